"""The parts of lines that are translated one by one, before and after the search, and what they make together."""

from collections.abc import Collection
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from nmt.data.examples import Annotated
from nmt.decoding.alignment import Attended, Block
from nmt.decoding.keeping import Protected
from nmt.decoding.search import length_penalty
from nmt.decoding.terms import Placed
from nmt.decoding.trace import Hypothesis
from nmt.decoding.translation import Options
from nmt.text.checks import Flag
from nmt.text.terms import Match


class Reading(NamedTuple):
    """Lines that are ready to be searched."""

    options: Options
    symbols: tuple[int, ...]
    """Ids that the model reads before each part. No result shows them."""
    parts: list[list[str]]
    """The parts of each line, in order. Most lines have one. A line with tags or fields may be here several times."""
    cut: Collection[int]
    """Numbers of those that are pieces of longer lines."""
    texts: list[str]
    """All parts in order."""
    unlearned: list[str]
    """Characters of each part that are not in the vocabulary."""
    sources: dict[int, np.ndarray]
    """Subword ids, without EOS, of the parts that have something to translate, by the number of the part."""
    prefixes: dict[int, np.ndarray]
    """Subword ids that the translation of a part begins with, by the number of the part."""
    terms: dict[int, list[Match]]
    """Terms with required translations, by the number of the part."""
    marked: dict[int, Annotated]
    """Texts of the parts whose terms the model reads with symbols, by the number of the part."""
    origin: list[int]
    """The number of the line that each of `parts` is translated for."""
    kept: dict[int, Protected]
    """Lines with tags or fields, by their numbers."""

    @property
    def attended(self) -> Collection[int]:
        """Numbers of the parts whose attention is needed: those of lines with terms, tags or fields, or all."""
        if self.options.attention or self.options.alignments:
            return range(len(self.texts))
        if not (self.kept or self.terms):
            return ()
        ends = accumulate(map(len, self.parts))
        of_line = [range(end - len(texts), end) for end, texts in zip(ends, self.parts, strict=True)]
        return {
            place
            for line, places in zip(self.origin, of_line, strict=True)
            if line in self.kept or not self.terms.keys().isdisjoint(places)
            for place in places
        }


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
