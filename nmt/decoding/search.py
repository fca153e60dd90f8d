"""Beam search with GNMT's length normalisation and coverage penalty (GNMT section 7), as a loop over a record.

    score(Y, X) = log P(Y | X) / lp(Y) + cp(X; Y)        (GNMT eq. 14)

The paper leaves three choices open. Here, |Y| counts the end-of-sentence token. The attention of a source position
counts as at least 1e-6, as log 0 would forbid the hypothesis. The caller selects the source positions to be covered.

GNMT prunes by one margin in two ways, and the paper is not clear about the scores that it compares. Here, a candidate
is dropped if its log P is more than the margin below that of the best candidate of its sentence. Once a hypothesis has
finished, a finished one is dropped if its score is more than the margin below the best score, and an unfinished one if
its log P / lp is. The latter leaves out cp, which rises as more of the source is covered. A margin of 0 drops nothing:
then the search returns the best of all finished hypotheses.

The loop keeps the model's state, the last subword of each hypothesis and the best scores. It writes each position into
a `Record`, and never reads it again. At the end, nmt/decoding/trace.py follows the record back from the best ends.

Letters: B sentences, K hypotheses (the beam), C candidates (2 K), V vocabulary, S source positions,
L subwords of the longest translation, N finished hypotheses to return.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from nmt.decoding.rules import NEVER, Rules, drop_distant
from nmt.decoding.trace import Candidates, Hypothesis, Stretch, empty_record, follow_back
from nmt.model.kernels import top_k as kernel
from nmt.tokens import BOS, EOS, PAD

_LEAST_COVERAGE = 1.0e-6


class SearchState(Protocol):
    """State of the model between positions, for K x B columns (column k * B + b). A search changes it in place."""

    def take_(self, after: Any, columns_R: Tensor) -> None:
        """Become `after`, the state after a position, with these columns: those that the hypotheses continue."""

    def shrink(self, columns_R: Tensor, sentences_B: Tensor) -> Self:
        """Return a new state of these columns and sentences, such as the encoded source of each."""


class StepOutput(NamedTuple):
    """Output of the model at one position."""

    logits_KBV: Tensor  # the search overwrites them
    attention_KBS: Tensor  # over source positions
    state: Any  # after the position; `SearchState.take_` takes it


Step = Callable[[Tensor, Any], StepOutput]
"""step(previous_KB, state) runs the model for one position."""


class BeamSettings(NamedTuple):
    """Settings of the search: beam size, scores, and results."""

    beam_size: int
    alpha: float
    beta: float
    keep: int = 1
    """Number of hypotheses to return per sentence; at most `beam_size`."""
    attention: bool = False
    """True to return the attention of hypotheses."""
    margin: float = 0.0
    """GNMT's pruning margin, in nats; 0: no pruning."""


Choose = Callable[[Tensor, Tensor, Rules, Tensor, Tensor], Candidates]
"""choose(logits_KBV, log_prob_KB, rules, length, history_KBL) returns candidates for subword number `length` (from 1, a
scalar on the device) of the hypotheses. It may overwrite the logits. There are at least K candidates per sentence. Of
these, only the first K can end a hypothesis."""


class Beam(NamedTuple):
    """State of the search between two positions, all on the device, so that no position waits for the host."""

    state: Any  # a SearchState
    previous_KB: Tensor  # int64, the last subword of each hypothesis
    log_prob_KB: Tensor  # float32, highest first; -inf where there is no hypothesis
    coverage_KBS: Tensor  # float32, summed attention
    history_KBL: Tensor  # int64, the subwords so far, then PAD; L is 0 if no rule reads them
    best_NB: Tensor  # float32, the highest scores of finished hypotheses, highest first; -inf where there is none
    count_B: Tensor  # int64, number of finished hypotheses so far
    done_B: Tensor  # bool, True if the result of the sentence cannot change any more
    length: Tensor  # int64 scalar, number of subwords output so far


def length_penalty(length: Tensor | int, alpha: float) -> Any:
    """Return lp(Y) = (5 + |Y|)^alpha / (5 + 1)^alpha (GNMT eq. 14)."""
    return ((5.0 + length) / 6.0) ** alpha


def coverage_penalty(coverage: Tensor, wanted: Tensor, beta: float) -> Tensor:
    """Return cp(X; Y) = beta sum_i log min(sum_j p_ij, 1) (GNMT eq. 14), over `wanted` source positions (last dim)."""
    log_coverage = coverage.clamp(_LEAST_COVERAGE, 1.0).log()
    return beta * log_coverage.masked_fill(~wanted, 0.0).sum(-1)


def top_k(
    logits_KBV: Tensor,
    log_prob_KB: Tensor,
    rules: Rules,
    length: Tensor,
    history_KBL: Tensor,
    bias_V: Tensor | None = None,
) -> Candidates:
    """Return the 2 K most probable continuations per sentence; a `Choose`. Even if K of them end, K others remain.

    `bias_V` is added to the logits, if it is not None. To add it here saves a GPU from reading the logits once more.
    """
    beam_size, sentences, _ = logits_KBV.shape
    # The best 2 K of each hypothesis include the best 2 K of all, so no log-softmax over the vocabulary is written.
    logits_RV = logits_KBV.flatten(0, 1)
    if rules.same_for_all:
        ends_R = (length >= rules.min_length_B).expand(beam_size, sentences).flatten()
        found = kernel.best(logits_RV, 2 * beam_size, rules.forbidden_F, ends_R, EOS, bias_V)
    else:
        if bias_V is not None:
            logits_RV.add_(bias_V)
        normaliser_R = kernel.log_sum_exp(logits_RV)
        rules.forbid_(logits_KBV, length, history_KBL)
        found = kernel.Best(*kernel.top_k(logits_RV, 2 * beam_size), normaliser_R)
    log_prob_RJ = (found.values_RK - found.normaliser_R.unsqueeze(1)).float()
    token_log_prob_KBJ = log_prob_RJ.unflatten(0, (beam_size, sentences))
    token_KBJ = found.indexes_RK.view_as(token_log_prob_KBJ)
    each = token_log_prob_KBJ.shape[2]
    total_BX = _by_sentence(log_prob_KB.unsqueeze(2) + token_log_prob_KBJ)
    log_prob_BC, pick_BC = total_BX.topk(min(2 * beam_size, total_BX.shape[1]), dim=1)
    return Candidates(
        log_prob_CB=log_prob_BC.T,
        token_log_prob_CB=_by_sentence(token_log_prob_KBJ).gather(1, pick_BC).T,
        hypothesis_CB=(pick_BC // each).T,
        token_CB=_by_sentence(token_KBJ).gather(1, pick_BC).T,
    )


def _by_sentence(values_KBJ: Tensor) -> Tensor:
    return values_KBJ.transpose(0, 1).flatten(1)


class Search:
    """A search for B sentences, in tensors that keep their places: a position can be recorded in a CUDA graph."""

    def __init__(
        self,
        step: Step,
        beam: Beam,
        wanted_BS: Tensor,
        rules: Rules,
        settings: BeamSettings,
        choose: Choose,
        most: int,
    ) -> None:
        """Keep the search as it is before its next position; `most` is the greatest length of all sentences."""
        self.step, self.beam, self.settings, self.choose = step, beam, settings, choose
        self.wanted_BS, self.rules, self.most = wanted_BS, rules, most
        attention = beam.coverage_KBS if settings.attention else None
        self.record = empty_record(most, beam.log_prob_KB, attention)
        self.column_B = torch.arange(beam.done_B.numel(), device=beam.done_B.device)

    @classmethod
    def begin(
        cls,
        step: Step,
        state: SearchState,
        wanted_BS: Tensor,
        rules: Rules,
        settings: BeamSettings,
        choose: Choose,
        most: int,
    ) -> "Search":
        """Return a search before its first position: one empty hypothesis per sentence, and none else."""
        device, (sentences, sources) = wanted_BS.device, wanted_BS.shape
        log_prob_KB = torch.full((settings.beam_size, sentences), NEVER, device=device)
        log_prob_KB[0] = 0.0
        history = most if rules.no_repeat else 0
        beam = Beam(
            state=state,
            previous_KB=torch.full((settings.beam_size, sentences), BOS, device=device),
            log_prob_KB=log_prob_KB,
            coverage_KBS=torch.zeros(settings.beam_size, sentences, sources, device=device),
            history_KBL=torch.full((settings.beam_size, sentences, history), PAD, device=device),
            best_NB=torch.full((settings.keep, sentences), NEVER, device=device),
            count_B=torch.zeros(sentences, dtype=torch.int64, device=device),
            done_B=torch.zeros(sentences, dtype=torch.bool, device=device),
            length=torch.zeros((), dtype=torch.int64, device=device),
        )
        return cls(step, beam, wanted_BS, rules, settings, choose, most)

    def restart(self, done_B: Tensor) -> None:
        """Go back to before the first position, with sentences that are done from the start, such as padding."""
        beam = self.beam
        beam.state.restart_()
        beam.previous_KB.fill_(BOS)
        beam.log_prob_KB.fill_(NEVER)
        beam.log_prob_KB[0] = 0.0
        for tensor in (beam.coverage_KBS, beam.count_B, beam.length):
            tensor.zero_()
        beam.history_KBL.fill_(PAD)
        beam.best_NB.fill_(NEVER)
        beam.done_B.copy_(done_B)

    def continue_(self, other: "Search", chosen_B: Tensor) -> None:
        """Become the search of these sentences of another one, in place."""
        part = other.shrink(chosen_B)
        self.beam.state.copy_(part.beam.state)
        for own, new in zip(self.beam[1:], part.beam[1:], strict=True):
            own.copy_(new)
        self.wanted_BS.copy_(part.wanted_BS)
        self.rules.max_length_B.copy_(part.rules.max_length_B)
        self.rules.min_length_B.copy_(part.rules.min_length_B)

    def advance(self) -> None:
        """Extend the hypotheses by one position."""
        beam, settings, rules = self.beam, self.settings, self.rules
        beam_size, sentences = beam.log_prob_KB.shape
        output = self.step(beam.previous_KB, beam.state)
        position = beam.length.clone()
        beam.length.add_(1)
        found = self.choose(output.logits_KBV, beam.log_prob_KB, rules, beam.length, beam.history_KBL)
        log_prob_CB = found.log_prob_CB
        if settings.margin:
            log_prob_CB = drop_distant(log_prob_CB, log_prob_CB.amax(0), settings.margin)
        # The coverage of a candidate is that of the hypothesis it continues, as its own subword has not attended yet.
        attention_KBS = output.attention_KBS.float()
        coverage_KBS = beam.coverage_KBS + attention_KBS
        penalty_KB = coverage_penalty(coverage_KBS, self.wanted_BS, settings.beta)
        normalised_CB = log_prob_CB / length_penalty(beam.length, settings.alpha)
        score_CB = normalised_CB + penalty_KB.gather(0, found.hypothesis_CB)
        ends_CB = (found.token_CB == EOS) & (log_prob_CB > NEVER)

        # Candidates that end count only if they are among the best K.
        finished_KB = ends_CB[:beam_size] & ~beam.done_B
        finished_score_KB = score_CB[:beam_size].masked_fill(~finished_KB, NEVER)
        beam.best_NB.copy_(torch.cat([beam.best_NB, finished_score_KB]).topk(settings.keep, dim=0).values)
        beam.count_B.add_(finished_KB.sum(0))

        # The best K of those that do not end remain in the beam.
        gone_CB = ends_CB | (normalised_CB < beam.best_NB[0] - settings.margin) if settings.margin else ends_CB
        log_prob_KB, pick_KB = log_prob_CB.masked_fill(gone_CB, NEVER).topk(beam_size, dim=0)
        columns_R = (found.hypothesis_CB.gather(0, pick_KB) * sentences + self.column_B).flatten()
        hopeless_B = beam.best_NB[-1] >= log_prob_KB[0] / length_penalty(rules.max_length_B, settings.alpha)
        beam.done_B.logical_or_((rules.max_length_B <= beam.length) | (beam.count_B >= beam_size) | hopeless_B)

        self.record.write_(position, found, score_CB, finished_KB, pick_KB, attention_KBS)
        beam.state.take_(output.state, columns_R)
        torch.gather(found.token_CB, 0, pick_KB, out=beam.previous_KB)
        beam.log_prob_KB.copy_(log_prob_KB)
        torch.index_select(coverage_KBS.flatten(0, 1), 0, columns_R, out=beam.coverage_KBS.flatten(0, 1))
        if beam.history_KBL.shape[2]:
            beam.history_KBL.copy_(beam.history_KBL.flatten(0, 1)[columns_R].view_as(beam.history_KBL))
            beam.history_KBL.index_copy_(2, position.view(1), beam.previous_KB.unsqueeze(2))

    def shrink(self, going_B: Tensor) -> "Search":
        """Return the search for these sentences alone, so that finished sentences take no more time."""
        beam, device = self.beam, going_B.device
        beam_size, sentences = beam.log_prob_KB.shape
        offset_K1 = torch.arange(beam_size, device=device)[:, None] * sentences
        smaller = Beam(
            state=beam.state.shrink((offset_K1 + going_B).flatten(), going_B),
            previous_KB=beam.previous_KB[:, going_B],
            log_prob_KB=beam.log_prob_KB[:, going_B],
            coverage_KBS=beam.coverage_KBS[:, going_B],
            history_KBL=beam.history_KBL[:, going_B],
            best_NB=beam.best_NB[:, going_B],
            count_B=beam.count_B[going_B],
            done_B=beam.done_B[going_B],
            length=beam.length.clone(),
        )
        wanted_BS, rules = self.wanted_BS[going_B], self.rules.select(going_B)
        return Search(self.step, smaller, wanted_BS, rules, self.settings, self.choose, self.most)


def beam_search(
    step: Step,
    state: SearchState,
    wanted_BS: Tensor,
    rules: Rules,
    settings: BeamSettings,
    choose: Choose = top_k,
    look_every: int = 1,
) -> list[list[Hypothesis]]:
    """Return the translations with the best scores for each of B sentences, best first; a beam of 1 is greedy search.

    step(previous_KB, state) runs the model for one position. `wanted_BS` is True at source positions to be covered.

    A sentence is done when it has `beam_size` finished hypotheses or is at its maximum length. It is also done when no
    unfinished hypothesis can be among the best `keep`, as log-probabilities can only fall. The result has at most
    `keep` finished hypotheses, or fewer if fewer finished. If none finished, it has the best unfinished ones. If the
    model's outputs were never finite, it has none.

    The host checks which sentences are done at every `look_every`th position. This does not change results.
    """
    max_lengths: list[int] = rules.max_length_B.tolist()
    search = Search.begin(step, state, wanted_BS, rules, settings, choose, max(max_lengths))
    sentences, first, stretches = list(range(len(max_lengths))), 0, []
    for length in range(1, search.most + 1):
        search.advance()
        if length % look_every:
            continue
        num_done = int(search.beam.done_B.sum())
        if num_done == len(sentences):
            break
        if 2 * num_done >= len(sentences):
            stretches.append(Stretch(sentences, search.record.part(first, length)))
            going_B = (~search.beam.done_B).nonzero().squeeze(1)
            search, first = search.shrink(going_B), length
            sentences = [sentences[column] for column in going_B.tolist()]
    stretches.append(Stretch(sentences, search.record.part(first, length)))
    return best_of(stretches, max_lengths, settings)


def best_of(stretches: list[Stretch], max_lengths: list[int], settings: BeamSettings) -> list[list[Hypothesis]]:
    """Return the results of `beam_search` from the records of a search."""
    found = follow_back(stretches, max_lengths, settings.keep)
    if not settings.margin:
        return found
    return [[each for each in ranked if each.score >= ranked[0].score - settings.margin] for ranked in found]
