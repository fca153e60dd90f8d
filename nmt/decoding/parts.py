"""The parts of a line that are translated one by one, and what they make together."""

from itertools import accumulate
from typing import NamedTuple

import numpy as np

from nmt.decoding.alignment import Attended, Block
from nmt.decoding.search import length_penalty
from nmt.decoding.terms import Placed
from nmt.decoding.trace import Hypothesis
from nmt.text.checks import Flag


class Part(NamedTuple):
    """A translated line, or a translated part of a line."""

    source: np.ndarray  # subword ids, without EOS
    placed: list[Placed]  # texts of the hypotheses; if there are none, the source text
    hypotheses: list[Hypothesis]  # empty if there was nothing to translate
    unlearned: str
    retried: list[Flag]  # one if it was searched again

    def ranked(self, rank: int) -> Placed:
        """Return the text of hypothesis number `rank`, or of the last one."""
        return self.placed[min(rank, len(self.placed) - 1)]


def score_of(found: list[Hypothesis], alpha: float) -> float:
    """Return the score (GNMT eq. 14) of one or more hypotheses taken as one."""
    if len(found) == 1:
        return found[0].score
    lengths = [len(each.token_log_probs) for each in found]
    coverage = sum(
        each.score - each.log_prob / length_penalty(length, alpha) for each, length in zip(found, lengths, strict=True)
    )
    return float(sum(each.log_prob for each in found) / length_penalty(sum(lengths), alpha) + coverage)


def block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    """Return a matrix with these blocks from the upper left to the lower right, and 0 elsewhere."""
    whole = np.zeros(np.sum([block.shape for block in blocks], axis=0), dtype=np.float32)
    row = column = 0
    for block in blocks:
        whole[row : row + len(block), column : column + block.shape[1]] = block
        row, column = row + len(block), column + block.shape[1]
    return whole


def attended_of(text: str, starts: list[int], rank: int, texts: list[str], parts: list[Part]) -> Attended:
    """Return the attention between a line and its hypothesis number `rank`.

    `texts` are the texts of its parts, whose translations begin at `starts` in `text`.
    """
    blocks = []
    before = [0, *accumulate(map(len, texts[:-1]))]
    for part, first, start in zip(parts, before, starts, strict=True):
        if not part.hypotheses:
            continue
        shown, _, attention = part.ranked(rank)
        # Blanks at the beginning of a part are left out where it is joined to others.
        left_out = 0 if text.startswith(shown, start) else len(shown) - len(shown.lstrip())
        assert attention is not None
        source_S, target_T, weight_TS = attention
        source_S = np.where(source_S < 0, -1, source_S + first)
        blocks.append(Block(source_S, np.where(target_T < 0, -1, target_T - left_out + start), weight_TS))
    return Attended("".join(texts), text, tuple(blocks))
