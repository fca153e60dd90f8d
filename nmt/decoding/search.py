"""Beam search as a pure loop over a record, with GNMT's length normalisation and coverage penalty (GNMT section 7).

    score(Y, X) = log P(Y | X) / lp(Y) + cp(X; Y)        (GNMT eq. 14)

Choices where the paper is silent: |Y| counts the end-of-sentence piece; a source position without any attention counts
as one with 1e-6 of it (log 0 would forbid the hypothesis); the caller says which source positions want covering. GNMT's
two pruning margins are not used: what the search returns is the best of all it saw.

The loop keeps the model's state, one piece per hypothesis and the best scores. What it saw at each position goes into a
`Trace`, which it never reads or gathers. At the end, nmt/decoding/trace.py follows the traces back from the best ends.

Letters: B sentences, K hypotheses (the beam), C candidates (2 K), V vocabulary, F pieces that are never output,
S source positions, N finished hypotheses that are wanted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from nmt.batch import BOS, EOS
from nmt.decoding.trace import Candidates, Hypothesis, Stretch, Trace, follow_back

_NEVER = float("-inf")
_LEAST_COVERAGE = 1.0e-6
# Positions between two looks at which sentences are done, on a GPU: a look waits for it.
_LOOK_EVERY = 4


class SearchState(Protocol):
    """What the model carries from position to position for K x B columns (column k * B + b)."""

    def select(self, columns_R: Tensor) -> Self:
        """Its columns gathered: the hypotheses that remain."""

    def shrink(self, sentences_B: Tensor) -> Self:
        """Whatever it holds once per sentence, for these sentences only; called along with `select`."""


class StepOutput(NamedTuple):
    """One position of the model."""

    logits_KBV: Tensor  # before the softmax; the search overwrites them
    attention_KBS: Tensor  # over source positions
    state: Any  # a SearchState


class Limits(NamedTuple):
    """What may be output, and how long it may get. Lengths are int64 and count EOS."""

    min_length_B: Tensor  # at least 1; EOS cannot come before
    max_length_B: Tensor  # at least 1
    forbidden_F: Tensor  # int64, pieces that are never output

    def forbid_(self, logits_KBV: Tensor, length: Tensor) -> None:
        """Set the logits of what may not be piece number `length` (from 1) to minus infinity, in place."""
        logits_KBV.index_fill_(2, self.forbidden_F, _NEVER)
        logits_KBV[:, :, EOS].masked_fill_(length < self.min_length_B, _NEVER)

    def select(self, sentences_B: Tensor) -> "Limits":
        """The limits of these sentences only."""
        return Limits(self.min_length_B[sentences_B], self.max_length_B[sentences_B], self.forbidden_F)


class BeamSettings(NamedTuple):
    """How wide the search is, how it scores, and what it returns."""

    beam_size: int
    alpha: float
    beta: float
    keep: int = 1
    """Finished hypotheses per sentence that are wanted, at most `beam_size`."""
    attention: bool = False
    """Whether hypotheses come with their attention."""


Choose = Callable[[Tensor, Tensor, Limits, Tensor], Candidates]
"""choose(logits_KBV, log_prob_KB, limits, length): what may follow the hypotheses as piece number `length` (from 1, a
scalar on the device). It may overwrite the logits. At least K candidates per sentence; the first K of them may end."""


class Beam(NamedTuple):
    """The whole search between two positions; all on the device, so that no position waits for the host."""

    state: Any
    previous_KB: Tensor  # int64, the last piece of each hypothesis
    log_prob_KB: Tensor  # float32, highest first; -inf where there is no hypothesis
    coverage_KBS: Tensor  # float32, summed attention
    best_NB: Tensor  # float32, the highest scores of finished hypotheses, highest first; -inf where there is none
    count_B: Tensor  # int64, finished hypotheses so far
    done_B: Tensor  # bool, nothing can change any more
    length: Tensor  # int64 scalar, pieces output so far


def length_penalty(length: Tensor | int, alpha: float) -> Any:
    """lp(Y) = (5 + |Y|)^alpha / (5 + 1)^alpha (GNMT eq. 14)."""
    return ((5.0 + length) / 6.0) ** alpha


def coverage_penalty(coverage: Tensor, wanted: Tensor, beta: float) -> Tensor:
    """cp(X; Y) = beta sum_i log min(sum_j p_ij, 1) (GNMT eq. 14), over the `wanted` source positions (last dim)."""
    log_coverage = coverage.clamp(_LEAST_COVERAGE, 1.0).log()
    return beta * log_coverage.masked_fill(~wanted, 0.0).sum(-1)


def top_k(logits_KBV: Tensor, log_prob_KB: Tensor, limits: Limits, length: Tensor) -> Candidates:
    """The most probable 2 K continuations of each sentence: a `Choose`. With EOS among them, K others remain."""
    beam_size, _, vocabulary = logits_KBV.shape
    # The best 2 K of each hypothesis hold the best 2 K of all; no log-softmax over the whole vocabulary is written.
    normaliser_KB1 = logits_KBV.float().logsumexp(dim=2, keepdim=True)
    limits.forbid_(logits_KBV, length)
    top_KBJ, token_KBJ = logits_KBV.topk(min(2 * beam_size, vocabulary), dim=2)
    token_log_prob_KBJ = top_KBJ.float() - normaliser_KB1
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


def beam_search(
    step: Callable[[Tensor, Any], StepOutput],
    state: SearchState,
    wanted_BS: Tensor,
    limits: Limits,
    settings: BeamSettings,
    choose: Choose = top_k,
    look_every: int = 0,
) -> list[list[Hypothesis]]:
    """The best-scored translations of each of B sentences, best first; a beam of 1 is greedy search.

    step(previous_KB, state) runs the model by one position. `wanted_BS` is True at source positions to be covered. A
    sentence is done when it has `beam_size` finished hypotheses, when no unfinished one can come among the best `keep`
    (its log-probability only falls), or at its greatest length. There are at most `keep` finished hypotheses, and fewer
    if fewer finished; only if none did, the best unfinished ones are returned. A sentence whose model outputs were
    never finite has none at all. Which sentences are done is looked up at every `look_every`th position; 0: as often
    as is best for the device. It changes no result.
    """
    max_lengths: list[int] = limits.max_length_B.tolist()
    look_every = look_every or (1 if wanted_BS.device.type == "cpu" else _LOOK_EVERY)
    beam = _first_beam(state, wanted_BS, settings)
    stretches = [Stretch(list(range(len(max_lengths))), [])]
    for length in range(1, max(max_lengths) + 1):
        output = step(beam.previous_KB, beam.state)
        beam, trace = _advance(beam, output, wanted_BS, limits, settings, choose)
        stretches[-1].traces.append(trace)
        if length % look_every:
            continue
        num_done, columns = int(beam.done_B.sum()), len(stretches[-1].sentences)
        if num_done == columns:
            break
        if 2 * num_done >= columns:
            going_B = (~beam.done_B).nonzero().squeeze(1)
            beam, limits, wanted_BS = _shrink(beam, going_B), limits.select(going_B), wanted_BS[going_B]
            stretches.append(Stretch([stretches[-1].sentences[column] for column in going_B.tolist()], []))
    return follow_back(stretches, max_lengths, settings.keep)


def _first_beam(state: SearchState, wanted_BS: Tensor, settings: BeamSettings) -> Beam:
    """One empty hypothesis per sentence; the other places of the beam are open."""
    device, (sentences, sources) = wanted_BS.device, wanted_BS.shape
    log_prob_KB = torch.full((settings.beam_size, sentences), _NEVER, device=device)
    log_prob_KB[0] = 0.0
    return Beam(
        state=state,
        previous_KB=torch.full((settings.beam_size, sentences), BOS, device=device),
        log_prob_KB=log_prob_KB,
        coverage_KBS=torch.zeros(settings.beam_size, sentences, sources, device=device),
        best_NB=torch.full((settings.keep, sentences), _NEVER, device=device),
        count_B=torch.zeros(sentences, dtype=torch.int64, device=device),
        done_B=torch.zeros(sentences, dtype=torch.bool, device=device),
        length=torch.zeros((), dtype=torch.int64, device=device),
    )


def _advance(
    beam: Beam, output: StepOutput, wanted_BS: Tensor, limits: Limits, settings: BeamSettings, choose: Choose
) -> tuple[Beam, Trace]:
    """The search one position further, and what it saw there."""
    beam_size, sentences = beam.log_prob_KB.shape
    length = beam.length + 1
    found = choose(output.logits_KBV, beam.log_prob_KB, limits, length)
    # The coverage of a candidate is that of the hypothesis it continues: its own piece has attended to nothing yet.
    coverage_KBS = beam.coverage_KBS + output.attention_KBS.float()
    penalty_KB = coverage_penalty(coverage_KBS, wanted_BS, settings.beta)
    score_CB = found.log_prob_CB / length_penalty(length, settings.alpha) + penalty_KB.gather(0, found.hypothesis_CB)
    ends_CB = (found.token_CB == EOS) & (found.log_prob_CB > _NEVER)

    # Those that end count only among the best K.
    finished_KB = ends_CB[:beam_size] & ~beam.done_B
    finished_score_KB = score_CB[:beam_size].masked_fill(~finished_KB, _NEVER)
    best_NB = torch.cat([beam.best_NB, finished_score_KB]).topk(settings.keep, dim=0).values
    count_B = beam.count_B + finished_KB.sum(0)

    # Those that do not end: the best K.
    log_prob_KB, pick_KB = found.log_prob_CB.masked_fill(ends_CB, _NEVER).topk(beam_size, dim=0)
    parent_KB = found.hypothesis_CB.gather(0, pick_KB)
    columns_KB = parent_KB * sentences + torch.arange(sentences, device=parent_KB.device)

    hopeless_B = best_NB[-1] >= log_prob_KB[0] / length_penalty(limits.max_length_B, settings.alpha)
    after = Beam(
        state=output.state.select(columns_KB.flatten()),
        previous_KB=found.token_CB.gather(0, pick_KB),
        log_prob_KB=log_prob_KB,
        coverage_KBS=coverage_KBS.flatten(0, 1).index_select(0, columns_KB.flatten()).view_as(coverage_KBS),
        best_NB=best_NB,
        count_B=count_B,
        done_B=beam.done_B | (limits.max_length_B <= length) | (count_B >= beam_size) | hopeless_B,
        length=length,
    )
    attention_KBS = output.attention_KBS if settings.attention else None
    return after, Trace(found, score_CB, finished_KB, pick_KB, attention_KBS)


def _shrink(beam: Beam, going_B: Tensor) -> Beam:
    """The beam of the sentences that are not done, so that long sentences do not drag short ones along."""
    beam_size, sentences = beam.log_prob_KB.shape
    offset_K1 = torch.arange(beam_size, device=going_B.device)[:, None] * sentences
    return Beam(
        state=beam.state.select((offset_K1 + going_B).flatten()).shrink(going_B),
        previous_KB=beam.previous_KB[:, going_B],
        log_prob_KB=beam.log_prob_KB[:, going_B],
        coverage_KBS=beam.coverage_KBS[:, going_B],
        best_NB=beam.best_NB[:, going_B],
        count_B=beam.count_B[going_B],
        done_B=beam.done_B[going_B],
        length=beam.length,
    )
