"""Records of a search, one per position, and the hypotheses that are read from them by following parents back.

Hypotheses are read once, on the host, at the end of the search: see nmt/decoding/search.py.

Letters: B sentences of a stretch, K hypotheses (the beam), C candidates, S source positions, P positions of a stretch,
L positions of the whole search, H returned hypotheses, G those of them that include a given position.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Candidates(NamedTuple):
    """Possible continuations of the hypotheses of each sentence, best first."""

    log_prob_CB: Tensor  # float32, of the whole hypothesis; -inf where there is no candidate
    token_log_prob_CB: Tensor  # float32, of its last subword
    hypothesis_CB: Tensor  # int64, the hypothesis (of K) that it continues
    token_CB: Tensor  # int64, its last subword


class Record(NamedTuple):
    """Record of the positions of a search: `Candidates` at each of them, and what became of these."""

    log_prob_PCB: Tensor
    token_log_prob_PCB: Tensor
    hypothesis_PCB: Tensor
    token_PCB: Tensor
    score_PCB: Tensor  # float32, GNMT eq. 14, as if each candidate ended here
    finished_PKB: Tensor  # bool, True for those of the best K candidates that are finished hypotheses
    pick_PKB: Tensor  # int64, the candidate that became hypothesis k of the next position
    attention_PKBS: Tensor | None  # float32, of the hypotheses before this position, if requested

    def write_(
        self,
        position: Tensor,
        found: Candidates,
        score_CB: Tensor,
        finished_KB: Tensor,
        pick_KB: Tensor,
        attention_KBS: Tensor,
    ) -> None:
        """Write one position, whose number is a scalar on the device. There are at most 2 K candidates."""
        index_1 = position.view(1)
        for whole, part in zip(self, (*found, score_CB, finished_KB, pick_KB, attention_KBS), strict=True):
            if whole is not None:
                whole[:, : len(part)].index_copy_(0, index_1, part[None])

    def on_host(self) -> "Record":
        """Return a copy on the host."""
        return Record(*(None if whole is None else whole.to("cpu", copy=True) for whole in self))  # type: ignore[arg-type]

    def part(self, first: int, end: int) -> "Record":
        """Return the record of positions from `first` to before `end`."""
        return Record(*(None if whole is None else whole[first:end] for whole in self))  # type: ignore[arg-type]


def empty_record(positions: int, log_prob_KB: Tensor, attention_KBS: Tensor | None) -> Record:
    """Return a record for this many positions of a search with such tensors."""
    beam_size, sentences = log_prob_KB.shape

    def empty(rows: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(positions, rows, sentences, dtype=dtype, device=log_prob_KB.device)

    real, whole, both = torch.float32, torch.int64, 2 * beam_size
    return Record(
        log_prob_PCB=empty(both, real),
        token_log_prob_PCB=empty(both, real),
        hypothesis_PCB=empty(both, whole),
        token_PCB=empty(both, whole),
        score_PCB=empty(both, real),
        finished_PKB=empty(beam_size, torch.bool),
        pick_PKB=empty(beam_size, whole),
        attention_PKBS=None if attention_KBS is None else attention_KBS.new_zeros(positions, *attention_KBS.shape),
    )


class Stretch(NamedTuple):
    """Consecutive positions with the same sentences in the search."""

    sentences: list[int]  # sentence of each column; -1 for a column without one
    record: Record


class Hypothesis(NamedTuple):
    """A translation found by the search."""

    tokens: list[int]  # without EOS
    score: float  # GNMT eq. 14
    token_log_probs: list[float]  # in nats; if finished, includes EOS
    attention_TS: np.ndarray | None  # float32, one row per log-probability, if requested
    finished: bool  # False: cut off at the maximum length

    @property
    def log_prob(self) -> float:
        """log P(Y | X) of the output, in nats."""
        return sum(self.token_log_probs)


class _Ends(NamedTuple):
    """Ends of hypotheses: of each sentence in turn, best first."""

    sentence_H: np.ndarray  # int64
    position_H: np.ndarray  # int64
    candidate_H: np.ndarray  # int64
    score_H: np.ndarray  # float32
    finished_H: np.ndarray  # bool


class _Seen(NamedTuple):
    """Record of a stretch on the host."""

    first: int  # number of its first position in the whole search
    sentence_B: np.ndarray  # sentence of each column; -1: none
    column_of: np.ndarray  # column of each sentence; -1: it had left the search
    log_prob_PCB: np.ndarray
    token_log_prob_PCB: np.ndarray
    hypothesis_PCB: np.ndarray
    token_PCB: np.ndarray
    score_PCB: np.ndarray
    finished_PKB: np.ndarray
    pick_PKB: np.ndarray
    attention_PKBS: np.ndarray | None

    @property
    def end(self) -> int:
        """Number of the position after its last one."""
        return self.first + len(self.token_PCB)


def follow_back(stretches: list[Stretch], max_lengths: list[int], keep: int) -> list[list[Hypothesis]]:
    """Return the `keep` best hypotheses of each sentence, best first: finished ones or, if there are none, unfinished.

    Hypotheses with equal scores are in the order in which they were found. A sentence without finite scores has none.
    """
    seen: list[_Seen] = []
    for stretch in stretches:
        if len(stretch.record.token_PCB):
            seen.append(_on_host(stretch, seen[-1].end if seen else 0, len(max_lengths)))
    finished = [_finished(each) for each in seen]
    # Positions beyond a sentence's maximum length do not count: the search checks for the end only now and then.
    last_B = np.array(max_lengths) - 1
    open_B = np.ones(len(max_lengths), dtype=bool)
    for ends in finished:
        open_B[ends.sentence_H] = False
    ends = _best([*finished, *(_unfinished(each, last_B, open_B) for each in seen)], keep)
    found: list[list[Hypothesis]] = [[] for _ in max_lengths]
    for sentence, hypothesis in zip(ends.sentence_H.tolist(), _follow(seen, ends), strict=True):
        found[sentence].append(hypothesis)
    return found


def _on_host(stretch: Stretch, first: int, num_sentences: int) -> _Seen:
    """Return a stretch on the host, with one copy for all of its positions."""
    sentence_B = np.array(stretch.sentences)
    column_of = np.full(num_sentences, -1)
    real = np.flatnonzero(sentence_B >= 0)
    column_of[sentence_B[real]] = real
    arrays = [None if tensor is None else tensor.cpu().numpy() for tensor in stretch.record]
    return _Seen(first, sentence_B, column_of, *arrays)  # type: ignore[arg-type]


def _finished(here: _Seen) -> _Ends:
    """Return the ends of the hypotheses that finish in a stretch, in the order in which they were found."""
    # In one dimension, numpy finds them several times faster.
    where = np.flatnonzero(here.finished_PKB)
    position_H, candidate_H, column_H = np.unravel_index(where, here.finished_PKB.shape)
    score_H = here.score_PCB[position_H, candidate_H, column_H]
    finished_H = np.ones(len(score_H), dtype=bool)
    return _Ends(here.sentence_B[column_H], here.first + position_H, candidate_H, score_H, finished_H)


def _unfinished(here: _Seen, last_B: np.ndarray, open_B: np.ndarray) -> _Ends:
    """Return the ends of the unfinished hypotheses in the beams of sentences whose last position is in a stretch.

    `last_B` is the last position of each sentence. Those that are `open_B` count, with finite scores.
    """
    inside_B = (here.first <= last_B) & (last_B < here.end) & (here.column_of >= 0)
    sentence_B = np.flatnonzero(inside_B & open_B)
    position_B1, column_B1 = (last_B - here.first)[sentence_B, None], here.column_of[sentence_B, None]
    candidate_BK = here.pick_PKB[position_B1, np.arange(here.pick_PKB.shape[1]), column_B1]
    score_BK = here.score_PCB[position_B1, candidate_BK, column_B1]
    row_H, hypothesis_H = np.isfinite(score_BK).nonzero()
    return _Ends(
        sentence_B[row_H],
        last_B[sentence_B[row_H]],
        candidate_BK[row_H, hypothesis_H],
        score_BK[row_H, hypothesis_H],
        np.zeros(len(row_H), dtype=bool),
    )


def _best(found: list[_Ends], keep: int) -> _Ends:
    """Return the `keep` best of each sentence."""
    every = _Ends(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
    order = np.lexsort((-every.score_H, every.sentence_H))  # equal ones keep their order
    sentence_H = every.sentence_H[order]
    rank_H = np.arange(len(order)) - np.searchsorted(sentence_H, sentence_H)
    return _Ends(*(part[order[rank_H < keep]] for part in every))


def _follow(seen: list[_Seen], ends: _Ends) -> list[Hypothesis]:
    """Return the hypotheses with these ends. All are followed back together, one position after another.

    Where a hypothesis has not begun from behind, at positions after its end, what is read means nothing.
    """
    num_wanted, num_positions = len(ends.sentence_H), seen[-1].end
    slot_H = np.zeros(num_wanted, dtype=np.int64)
    token_HL = np.empty((num_wanted, num_positions), dtype=np.int64)
    log_prob_HL = np.empty((num_wanted, num_positions), dtype=np.float32)
    attention = seen[0].attention_PKBS
    attention_HLS = None if attention is None else np.empty((num_wanted, num_positions, attention.shape[3]), np.float32)
    for here in reversed(seen):
        column_H = here.column_of[ends.sentence_H]
        candidate_PH = np.empty((len(here.token_PCB), num_wanted), dtype=np.int64)
        slot_PH = np.empty_like(candidate_PH)
        for place in range(len(candidate_PH) - 1, -1, -1):
            ends_H = ends.position_H == here.first + place
            candidate_PH[place] = np.where(ends_H, ends.candidate_H, here.pick_PKB[place][slot_H, column_H])
            slot_PH[place] = slot_H = here.hypothesis_PCB[place][candidate_PH[place], column_H]
        place_P1, positions = np.arange(len(candidate_PH))[:, None], slice(here.first, here.end)
        token_HL[:, positions] = here.token_PCB[place_P1, candidate_PH, column_H].T
        log_prob_HL[:, positions] = here.token_log_prob_PCB[place_P1, candidate_PH, column_H].T
        if attention_HLS is not None and here.attention_PKBS is not None:
            attention_HLS[:, positions] = here.attention_PKBS[place_P1, slot_PH, column_H].swapaxes(0, 1)
    return [
        Hypothesis(
            tokens=token_HL[row, : length - finished].tolist(),
            score=score,
            token_log_probs=log_prob_HL[row, :length].tolist(),
            attention_TS=None if attention_HLS is None else attention_HLS[row, :length].copy(),
            finished=finished,
        )
        for row, (length, score, finished) in enumerate(
            zip((ends.position_H + 1).tolist(), ends.score_H.tolist(), ends.finished_H.tolist(), strict=True)
        )
    ]
