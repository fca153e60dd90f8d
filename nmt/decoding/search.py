"""Beam search as a pure loop over a record, with GNMT's length normalisation and coverage penalty (GNMT section 7).

    score(Y, X) = log P(Y | X) / lp(Y) + cp(X; Y)        (GNMT eq. 14)

Choices where the paper is silent: |Y| counts the end-of-sentence piece; a source position without any attention counts
as one with 1e-6 of it (log 0 would forbid the hypothesis); the caller says which source positions want covering. GNMT's
two pruning margins are not used: what the search returns is the best of all it saw.

Letters: B sentences, K hypotheses (the beam), C candidates (2 K), V vocabulary, F pieces that are never output,
S source positions, L output positions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from nmt.batch import BOS, EOS, PAD

_NEVER = float("-inf")
_LEAST_COVERAGE = 1.0e-6
# Positions between two looks at which sentences are done, on a GPU: a look waits for it.
_LOOK_EVERY = 4


class SearchState(Protocol):
    """What the model carries from position to position for K x B columns (column k * B + b)."""

    def select(self, columns_R: Tensor) -> Self:
        """Its columns gathered: hypotheses that go on."""

    def shrink(self, sentences_B: Tensor) -> Self:
        """Whatever it holds once per sentence, for these sentences only; called along with `select`."""


class StepOutput(NamedTuple):
    """One position of the model."""

    logits_KBV: Tensor  # before the softmax
    attention_KBS: Tensor  # over source positions
    state: Any  # a SearchState


class Hypotheses(NamedTuple):
    """The best translation of each sentence."""

    tokens: list[list[int]]  # without EOS
    scores: list[float]  # GNMT eq. 14; -inf if no step had a finite output
    log_probs: list[float]  # log P(Y | X), in nats
    finished: list[bool]  # False: nothing finished before the greatest length


class Beam(NamedTuple):
    """The whole search between two positions. The first four fields move with their hypothesis."""

    state: Any
    tokens_KBL: Tensor  # int64, PAD where nothing stands yet
    log_prob_KB: Tensor  # float32; -inf where there is no hypothesis
    coverage_KBS: Tensor  # float32, summed attention
    best_tokens_BL: Tensor  # int64, the best finished hypothesis, EOS included
    best_score_B: Tensor  # float32, its score; -inf while there is none
    best_log_prob_B: Tensor  # float32, its log-probability
    finished_B: Tensor  # bool, whether it ends with EOS
    count_B: Tensor  # int64, finished hypotheses so far
    done_B: Tensor  # bool, nothing can change any more


def length_penalty(length: Tensor | int, alpha: float) -> Any:
    """lp(Y) = (5 + |Y|)^alpha / (5 + 1)^alpha (GNMT eq. 14)."""
    return ((5.0 + length) / 6.0) ** alpha


def coverage_penalty(coverage: Tensor, wanted: Tensor, beta: float) -> Tensor:
    """cp(X; Y) = beta sum_i log min(sum_j p_ij, 1) (GNMT eq. 14), over the `wanted` source positions (last dim)."""
    log_coverage = coverage.clamp(_LEAST_COVERAGE, 1.0).log()
    return beta * log_coverage.masked_fill(~wanted, 0.0).sum(-1)


def beam_search(
    step: Callable[[Tensor, Any], StepOutput],
    state: SearchState,
    wanted_BS: Tensor,
    max_length_B: Tensor,
    forbidden_F: Tensor,
    beam_size: int,
    alpha: float,
    beta: float,
) -> Hypotheses:
    """The best-scored translation of each of B sentences; beam_size = 1 is greedy search.

    step(previous_KB, state) runs the model one position on. `wanted_BS` is True at source positions to be covered;
    the pieces `forbidden_F` (int64) are never output. A sentence is done when it has `beam_size` finished hypotheses,
    when no unfinished one can still win (its log-probability only falls), or at its greatest length `max_length_B`,
    which counts EOS; only if nothing finished by then, the best unfinished hypothesis is returned.
    """
    num_sentences, num_positions = wanted_BS.shape[0], int(max_length_B.max())
    beam = _first_beam(state, wanted_BS, num_positions, beam_size)
    sentence_B = torch.arange(num_sentences, device=wanted_BS.device)
    found: list[tuple[list[int], float, float, bool]] = [([], _NEVER, _NEVER, False)] * num_sentences
    look_every = 1 if wanted_BS.device.type == "cpu" else _LOOK_EVERY
    for position in range(num_positions):
        previous_KB = beam.tokens_KBL[:, :, position - 1]
        if position == 0:
            previous_KB = torch.full_like(previous_KB, BOS)
        output = step(previous_KB, beam.state)
        beam = _advance(beam, output, wanted_BS, max_length_B, forbidden_F, position, alpha, beta)
        last = position + 1 == num_positions
        if not last and (position + 1) % look_every:
            continue
        num_done, columns = int(beam.done_B.sum()), sentence_B.numel()
        if num_done == columns or last:
            _collect(beam, sentence_B, found)
            break
        if 2 * num_done >= columns:
            _collect(beam, sentence_B, found)
            going_B = (~beam.done_B).nonzero().squeeze(1)
            beam = _shrink(beam, going_B)
            sentence_B, wanted_BS, max_length_B = (
                sentence_B[going_B],
                wanted_BS[going_B],
                max_length_B[going_B],
            )
    return Hypotheses(*(list(column) for column in zip(*found, strict=True)))


def _first_beam(state: SearchState, wanted_BS: Tensor, num_positions: int, beam_size: int) -> Beam:
    """One empty hypothesis per sentence; the other places of the beam are open."""
    device, (sentences, sources) = wanted_BS.device, wanted_BS.shape
    log_prob_KB = torch.full((beam_size, sentences), _NEVER, device=device)
    log_prob_KB[0] = 0.0
    return Beam(
        state=state,
        tokens_KBL=torch.full((beam_size, sentences, num_positions), PAD, device=device),
        log_prob_KB=log_prob_KB,
        coverage_KBS=torch.zeros(beam_size, sentences, sources, device=device),
        best_tokens_BL=torch.full((sentences, num_positions), PAD, device=device),
        best_score_B=torch.full((sentences,), _NEVER, device=device),
        best_log_prob_B=torch.full((sentences,), _NEVER, device=device),
        finished_B=torch.zeros(sentences, dtype=torch.bool, device=device),
        count_B=torch.zeros(sentences, dtype=torch.int64, device=device),
        done_B=torch.zeros(sentences, dtype=torch.bool, device=device),
    )


def _candidates(logits_KBV: Tensor, log_prob_KB: Tensor, forbidden_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best 2 K continuations of each sentence, best first: (log_prob_CB, hypothesis_CB, token_CB)."""
    beam_size, sentences, vocabulary = logits_KBV.shape
    # The best 2 K of each hypothesis hold the best 2 K of all; no log-softmax over the whole vocabulary is written.
    normaliser_KB = logits_KBV.float().logsumexp(dim=2)
    logits_KBV.index_fill_(2, forbidden_F, _NEVER)
    top_KBJ, token_KBJ = logits_KBV.topk(min(2 * beam_size, vocabulary), dim=2)
    total_KBJ = (log_prob_KB - normaliser_KB).unsqueeze(2) + top_KBJ.float()
    each = total_KBJ.shape[2]
    total_BX = total_KBJ.transpose(0, 1).reshape(sentences, -1)
    log_prob_BC, pick_BC = total_BX.topk(min(2 * beam_size, total_BX.shape[1]), dim=1)
    token_BC = token_KBJ.transpose(0, 1).reshape(sentences, -1).gather(1, pick_BC)
    return log_prob_BC.T, (pick_BC // each).T, token_BC.T


def _advance(
    beam: Beam,
    output: StepOutput,
    wanted_BS: Tensor,
    max_length_B: Tensor,
    forbidden_F: Tensor,
    position: int,
    alpha: float,
    beta: float,
) -> Beam:
    """The search one position on."""
    beam_size, sentences = beam.log_prob_KB.shape
    length = position + 1
    attended_KBS = beam.coverage_KBS + output.attention_KBS.float()
    log_prob_CB, hypothesis_CB, token_CB = _candidates(output.logits_KBV, beam.log_prob_KB, forbidden_F)
    ends_CB = (token_CB == EOS) & (log_prob_CB > _NEVER)

    # Finished: candidates that end, among the best K. Their coverage is that of the hypothesis they end.
    coverage_CBS = attended_KBS.gather(0, hypothesis_CB.unsqueeze(2).expand(-1, -1, attended_KBS.shape[2]))
    score_CB = log_prob_CB / length_penalty(length, alpha) + coverage_penalty(coverage_CBS, wanted_BS, beta)
    counts_CB = ends_CB & ~beam.done_B
    counts_CB[beam_size:] = False
    final_score_B, final_C = score_CB.masked_fill(~counts_CB, _NEVER).max(0)
    final_tokens_BL = _tokens_of(beam.tokens_KBL, hypothesis_CB, final_C)
    final_tokens_BL[:, position] = EOS
    final_log_prob_B = log_prob_CB.gather(0, final_C[None])[0]
    beam = _keep_better(beam, final_score_B, final_log_prob_B, final_tokens_BL, finished=True)
    count_B = beam.count_B + counts_CB.sum(0)

    # Going on: the best K candidates that do not end.
    log_prob_KB, pick_KB = log_prob_CB.masked_fill(ends_CB, _NEVER).topk(min(beam_size, log_prob_CB.shape[0]), dim=0)
    hypothesis_KB, token_KB = hypothesis_CB.gather(0, pick_KB), token_CB.gather(0, pick_KB)
    tokens_KBL = beam.tokens_KBL.gather(0, hypothesis_KB.unsqueeze(2).expand(-1, -1, beam.tokens_KBL.shape[2]))
    tokens_KBL[:, :, position] = token_KB
    coverage_KBS = coverage_CBS.gather(0, pick_KB.unsqueeze(2).expand(-1, -1, coverage_CBS.shape[2]))
    columns_KB = hypothesis_KB * sentences + torch.arange(sentences, device=hypothesis_KB.device)

    # At the greatest length an unfinished hypothesis stands in where nothing finished.
    at_limit_B = ~beam.done_B & (max_length_B <= length)
    cut_score_KB = log_prob_KB / length_penalty(length, alpha) + coverage_penalty(coverage_KBS, wanted_BS, beta)
    cut_score_B, cut_K = cut_score_KB.masked_fill(~(at_limit_B & (count_B == 0)), _NEVER).max(0)
    cut_tokens_BL = tokens_KBL[cut_K, torch.arange(sentences, device=cut_K.device)]
    cut_log_prob_B = log_prob_KB.gather(0, cut_K[None])[0]
    beam = _keep_better(beam, cut_score_B, cut_log_prob_B, cut_tokens_BL, finished=False)

    hopeless_B = beam.best_score_B >= log_prob_KB[0] / length_penalty(max_length_B, alpha)
    return beam._replace(
        state=output.state.select(columns_KB.flatten()),
        tokens_KBL=tokens_KBL,
        log_prob_KB=log_prob_KB,
        coverage_KBS=coverage_KBS,
        count_B=count_B,
        done_B=beam.done_B | at_limit_B | (count_B >= beam_size) | hopeless_B,
    )


def _tokens_of(tokens_KBL: Tensor, hypothesis_CB: Tensor, pick_B: Tensor) -> Tensor:
    sentence_B = torch.arange(pick_B.numel(), device=pick_B.device)
    return tokens_KBL[hypothesis_CB[pick_B, sentence_B], sentence_B]


def _keep_better(beam: Beam, score_B: Tensor, log_prob_B: Tensor, tokens_BL: Tensor, finished: bool) -> Beam:
    better_B = score_B > beam.best_score_B
    return beam._replace(
        best_score_B=torch.where(better_B, score_B, beam.best_score_B),
        best_log_prob_B=torch.where(better_B, log_prob_B, beam.best_log_prob_B),
        best_tokens_BL=torch.where(better_B.unsqueeze(1), tokens_BL, beam.best_tokens_BL),
        finished_B=torch.where(better_B, finished, beam.finished_B),
    )


def _shrink(beam: Beam, going_B: Tensor) -> Beam:
    """The beam of the sentences that are not done, so that long sentences do not drag short ones along."""
    beam_size, sentences = beam.log_prob_KB.shape
    offset_K1 = torch.arange(beam_size, device=going_B.device)[:, None] * sentences
    return Beam(
        state=beam.state.select((offset_K1 + going_B).flatten()).shrink(going_B),
        tokens_KBL=beam.tokens_KBL[:, going_B],
        log_prob_KB=beam.log_prob_KB[:, going_B],
        coverage_KBS=beam.coverage_KBS[:, going_B],
        best_tokens_BL=beam.best_tokens_BL[going_B],
        best_score_B=beam.best_score_B[going_B],
        best_log_prob_B=beam.best_log_prob_B[going_B],
        finished_B=beam.finished_B[going_B],
        count_B=beam.count_B[going_B],
        done_B=beam.done_B[going_B],
    )


def _collect(beam: Beam, sentence_B: Tensor, found: list[tuple[list[int], float, float, bool]]) -> None:
    """Write the results of the sentences that are done to their places."""
    rows = zip(
        sentence_B.tolist(),
        beam.done_B.tolist(),
        beam.best_tokens_BL.tolist(),
        beam.best_score_B.tolist(),
        beam.best_log_prob_B.tolist(),
        beam.finished_B.tolist(),
        strict=True,
    )
    for sentence, done, tokens, score, log_prob, finished in rows:
        if done:
            found[sentence] = ([token for token in tokens if token not in (PAD, EOS)], score, log_prob, finished)
