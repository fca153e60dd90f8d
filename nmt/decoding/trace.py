"""What a search saw, position by position, and the hypotheses that are read from it by following parents back.

All of this happens once, on the host, when the search is over: see nmt/decoding/search.py.

Letters: B sentences of a stretch, K hypotheses (the beam), C candidates, S source positions, P positions of a stretch,
L positions of the whole search, H hypotheses that are returned.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nmt.batch import PAD


class Candidates(NamedTuple):
    """What may continue the hypotheses of each sentence, best first."""

    log_prob_CB: Tensor  # float32, of all pieces; -inf where there is no candidate
    token_log_prob_CB: Tensor  # float32, of its last piece
    hypothesis_CB: Tensor  # int64, which of the K it continues
    token_CB: Tensor  # int64, its last piece


class Trace(NamedTuple):
    """One position of a search."""

    candidates: Candidates
    score_CB: Tensor  # float32, GNMT eq. 14, as if each ended here
    finished_KB: Tensor  # bool, which of the best K candidates are finished hypotheses
    pick_KB: Tensor  # int64, the candidate that became hypothesis k of the next position
    attention_KBS: Tensor | None  # of the hypotheses that were continued, where it was asked for


class Stretch(NamedTuple):
    """Positions between which no sentence left the search."""

    sentences: list[int]  # of its columns
    traces: list[Trace]


class Hypothesis(NamedTuple):
    """A translation that the search found."""

    tokens: list[int]  # without EOS
    score: float  # GNMT eq. 14
    token_log_probs: list[float]  # in nats; that of EOS too, if finished
    attention_TS: np.ndarray | None  # float32, a row per log-probability, where it was asked for
    finished: bool  # False: cut off at the greatest length

    @property
    def log_prob(self) -> float:
        """log P(Y | X) of what was output, in nats."""
        return sum(self.token_log_probs)


class _End(NamedTuple):
    """Where a hypothesis ends."""

    score: float
    position: int
    candidate: int
    finished: bool


class _Seen(NamedTuple):
    """One position on the host, with the column of each sentence (-1: it had left)."""

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
    """The `keep` best hypotheses of each sentence, best first: finished ones, or if there are none, unfinished ones.

    Of equal scores the first that was found comes first. A sentence without any finite score has no hypothesis.
    """
    seen = [position for stretch in stretches for position in _on_host(stretch, len(max_lengths))]
    ends = _finished(seen, len(max_lengths))
    for sentence, found in enumerate(ends):
        # What goes on beyond its greatest length, until somebody looks, does not count.
        if not found and max_lengths[sentence] <= len(seen):
            found += _unfinished(seen, sentence, max_lengths[sentence] - 1)
    best = [sorted(found, key=lambda end: -end.score)[:keep] for found in ends]
    hypotheses = iter(_follow(seen, [(sentence, end) for sentence, found in enumerate(best) for end in found]))
    return [[next(hypotheses) for _ in found] for found in best]


def _on_host(stretch: Stretch, num_sentences: int) -> list[_Seen]:
    """The positions of a stretch, with one copy per tensor rather than one per position."""
    if not stretch.traces:
        return []
    column_of = np.full(num_sentences, -1)
    column_of[stretch.sentences] = np.arange(len(stretch.sentences))
    rows = [(*trace.candidates, *trace[1:4]) for trace in stretch.traces]
    arrays_P = [torch.stack(column).cpu().numpy() for column in zip(*rows, strict=True)]
    attentions = [trace.attention_KBS for trace in stretch.traces]
    asked = [each for each in attentions if each is not None]
    attention_PKBS = torch.stack(asked).float().cpu().numpy() if asked else [None] * len(attentions)
    return [_Seen(column_of, *row) for row in zip(*arrays_P, attention_PKBS, strict=True)]


def _finished(seen: list[_Seen], num_sentences: int) -> list[list[_End]]:
    """The finished hypotheses of each sentence, in the order in which they were found."""
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
    """What the beam held of a sentence after this position, as far as it held anything."""
    here, column = seen[position], seen[position].column_of[sentence]
    if column < 0:
        return []
    picks = here.pick_KB[:, column].tolist()
    ends = [_End(float(here.score_CB[pick, column]), position, pick, False) for pick in picks]
    return [end for end in ends if np.isfinite(end.score)]


def _follow(seen: list[_Seen], wanted: list[tuple[int, _End]]) -> list[Hypothesis]:
    """The hypotheses with these ends, all of them followed back at once."""
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
