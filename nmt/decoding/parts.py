"""The parts of lines that are translated one by one, before and after the search, and what they make together."""

from collections.abc import Callable, Collection, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np

from nmt.batch import EOS
from nmt.data.examples import Annotated
from nmt.data.subwords import Subwords
from nmt.decoding.alignment import Attended, Block
from nmt.decoding.keeping import Protected
from nmt.decoding.search import length_penalty
from nmt.decoding.terms import Placed
from nmt.decoding.trace import Hypothesis
from nmt.decoding.translation import Options, TextHypothesis, Translation
from nmt.text.checks import Flag
from nmt.text.segment import join_at
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
    given: dict[int, str]
    """Lines as they were before their punctuation was normalised, by their numbers, if that changed them."""

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


Rank = Callable[[Sequence[str]], Sequence[float]]
"""rank(texts) returns how good each of several translations of a line is; the highest is the best."""


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


def joined(
    subwords: Subwords, texts: list[str], parts: list[Part], cut: bool, options: Options, rank: Rank | None
) -> Translation:
    """Return the translation of a line from those of its parts; `cut`: the line is a piece of a longer line.

    `rank` orders the hypotheses; None: their scores do.
    """
    count = max(len(part.hypotheses) for part in parts)
    alone = len(parts) == 1 and not cut
    ranked = []
    for place in range(max(count, 1)):
        shown = [part.ranked(place).text for part in parts]
        # Strip the parts, as `join_at` adds the blanks between them.
        ranked.append(
            (shown[0], [0]) if alone else join_at(texts, [text.strip() for text in shown], options.paragraphs)
        )
    hypotheses = [_hypothesis(subwords, *ranked[place], place, texts, parts, options) for place in range(count)]
    order = list(range(count))
    if hypotheses and (options.temperature or rank):
        # Draws of parts are joined in the order of drawing, so that those of the line are independent.
        merits = rank([each.text for each in hypotheses]) if rank else [each.score for each in hypotheses]
        order.sort(key=lambda place: -merits[place])
    first = order[0] if order else 0
    best = hypotheses[first] if hypotheses else None
    text = best.text if best else ranked[0][0]
    finished = best.finished if best else True
    unlearned = "".join(part.unlearned for part in parts)
    read = [part.source for part in parts if part.hypotheses] if options.attention else []
    return Translation(
        text=text,
        score=best.score if best else 0.0,
        num_parts=len(parts),
        finished=finished,
        unlearned=unlearned,
        source_pieces=tuple(piece for source in read for piece in subwords.pieces([*source, EOS])),
        hypotheses=tuple(hypotheses[place] for place in order),
        source="".join(texts),
        noted=tuple(flag for part in parts for flag in (*part.ranked(first).flags, *part.retried)),
    )


def _hypothesis(
    subwords: Subwords, text: str, starts: list[int], rank: int, texts: list[str], parts: list[Part], options: Options
) -> TextHypothesis:
    """Return hypothesis number `rank` of a line from those of its parts, which begin at `starts` in its `text`."""
    found = [part.hypotheses[min(rank, len(part.hypotheses) - 1)] for part in parts if part.hypotheses]
    attention = [each.attention_TS for each in found if each.attention_TS is not None]
    ids = [*chain.from_iterable((*each.tokens, EOS) if each.finished else each.tokens for each in found)]
    return TextHypothesis(
        text=text,
        score=score_of(found, options.alpha),
        finished=all(each.finished for each in found),
        pieces=tuple(subwords.pieces(ids)),
        log_probs=tuple(chain.from_iterable(each.token_log_probs for each in found)),
        attention=block_diagonal(attention) if options.attention else None,
        attended=attended_of(text, starts, rank, texts, parts) if attention else None,
    )


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
