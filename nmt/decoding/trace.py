"""Records of a search, one per position, and the hypotheses that are read from them by following parents back.

Hypotheses are read once, on the host, at the end of the search: see nmt/decoding/search.py.

Letters: B sentences of a stretch, K hypotheses (the beam), C candidates, S source positions, P positions of a stretch,
L positions of the whole search, H returned hypotheses, G those of them that include a given position.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nmt.batch import PAD


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


class _End(NamedTuple):
    """End of a hypothesis."""

    score: float
    position: int
    candidate: int
    finished: bool


class _Seen(NamedTuple):
    """Record of one position on the host, with the column of each sentence (-1: it had left the search)."""

    column_of: np.ndarray
    log_prob_CB: np.ndarray
    token_log_prob_CB: np.ndarray
    hypothesis_CB: np.ndarray
    token_CB: np.ndarray
    score_CB: np.ndarray
    finished_KB: np.ndarray
    pick_KB: np.ndarray
    attention_KBS: np.ndarray | None


def follow_back(stretches: list[Stretch], max_lengths: list[int], keep: int) -> list[list[Hypothesis]]:
    """Return the `keep` best hypotheses of each sentence, best first: finished ones or, if there are none, unfinished.

    Hypotheses with equal scores are in the order in which they were found. A sentence without finite scores has none.
    """
    seen = [position for stretch in stretches for position in _on_host(stretch, len(max_lengths))]
    ends = _finished(seen, len(max_lengths))
    for sentence, found in enumerate(ends):
        # Positions beyond a sentence's maximum length do not count: the search checks for the end only now and then.
        if not found and max_lengths[sentence] <= len(seen):
            found += _unfinished(seen, sentence, max_lengths[sentence] - 1)
    best = [sorted(found, key=lambda end: -end.score)[:keep] for found in ends]
    hypotheses = iter(_follow(seen, [(sentence, end) for sentence, found in enumerate(best) for end in found]))
    return [[next(hypotheses) for _ in found] for found in best]


def _on_host(stretch: Stretch, num_sentences: int) -> list[_Seen]:
    """Return the positions of a stretch on the host, with one copy for all of them."""
    if not len(stretch.record.token_PCB):
        return []
    column_of = np.full(num_sentences, -1)
    real = [(sentence, column) for column, sentence in enumerate(stretch.sentences) if sentence >= 0]
    column_of[[sentence for sentence, _ in real]] = [column for _, column in real]
    *whole, attention_PKBS = stretch.record
    arrays_P = [tensor.cpu().numpy() for tensor in whole if tensor is not None]
    attentions = [None] * len(arrays_P[0]) if attention_PKBS is None else attention_PKBS.cpu().numpy()
    return [_Seen(column_of, *row) for row in zip(*arrays_P, attentions, strict=True)]


def _finished(seen: list[_Seen], num_sentences: int) -> list[list[_End]]:
    """Return the ends of each sentence's finished hypotheses, in the order in which they were found."""
    ends: list[list[_End]] = [[] for _ in range(num_sentences)]
    for position, here in enumerate(seen):
        if not here.finished_KB.any():
            continue
        sentence_of = {column: sentence for sentence, column in enumerate(here.column_of.tolist())}
        for candidate, column in np.argwhere(here.finished_KB).tolist():
            score = float(here.score_CB[candidate, column])
            ends[sentence_of[column]].append(_End(score, position, candidate, True))
    return ends


def _unfinished(seen: list[_Seen], sentence: int, position: int) -> list[_End]:
    """Return the ends of the unfinished hypotheses in the beam of a sentence after this position, if there are any."""
    here, column = seen[position], seen[position].column_of[sentence]
    if column < 0:
        return []
    picks = here.pick_KB[:, column].tolist()
    ends = [_End(float(here.score_CB[pick, column]), position, pick, False) for pick in picks]
    return [end for end in ends if np.isfinite(end.score)]


def _follow(seen: list[_Seen], wanted: list[tuple[int, _End]]) -> list[Hypothesis]:
    """Return the hypotheses with these ends. All are followed back together."""
    num_positions, num_wanted = len(seen), len(wanted)
    sentence_H = np.array([sentence for sentence, _ in wanted], dtype=np.int64)
    last_H = np.array([end.position for _, end in wanted], dtype=np.int64)
    end_H = np.array([end.candidate for _, end in wanted], dtype=np.int64)
    slot_H = np.zeros(num_wanted, dtype=np.int64)
    token_HL = np.full((num_wanted, num_positions), PAD)
    log_prob_HL = np.zeros((num_wanted, num_positions), dtype=np.float32)
    attention = seen[0].attention_KBS
    attention_HLS = None if attention is None else np.zeros((num_wanted, num_positions, attention.shape[2]), np.float32)
    for position in range(num_positions - 1, -1, -1):
        here = seen[position]
        begun_G = np.flatnonzero(last_H >= position)
        column_G = here.column_of[sentence_H[begun_G]]
        ends_G = last_H[begun_G] == position
        candidate_G = np.where(ends_G, end_H[begun_G], here.pick_KB[slot_H[begun_G], column_G])
        slot_H[begun_G] = slot_G = here.hypothesis_CB[candidate_G, column_G]
        token_HL[begun_G, position] = here.token_CB[candidate_G, column_G]
        log_prob_HL[begun_G, position] = here.token_log_prob_CB[candidate_G, column_G]
        if attention_HLS is not None and here.attention_KBS is not None:
            attention_HLS[begun_G, position] = here.attention_KBS[slot_G, column_G]
    found = []
    for row, (_, end) in enumerate(wanted):
        length = end.position + 1
        found.append(
            Hypothesis(
                tokens=token_HL[row, : length - end.finished].tolist(),
                score=end.score,
                token_log_probs=log_prob_HL[row, :length].tolist(),
                attention_TS=None if attention_HLS is None else attention_HLS[row, :length].copy(),
                finished=end.finished,
            )
        )
    return found
