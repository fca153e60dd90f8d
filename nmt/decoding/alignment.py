"""Alignments out of a search: which words of a line each word of its translation comes from.

Row t of the attention belongs to output subword t, in all wirings: in those that feed back, the context is read before
subword t is chosen, too. The weight between two words is the attention between their subwords, summed; the end of the
sentence has no word. The weights of a target word are then divided by their sum.

A target word is linked to the source word with its largest weight, except if another target word gives that source word
a much larger one. Without this exception, a word that no source word calls for would be linked to one of its
neighbours' words. docs/results/quality.md has the alignment error rates of this rule.

Letters: T output subwords and S source subwords of a part, each with the end of the sentence; N weights.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_WORD = re.compile(r"\S+")
_LEAST_SHARE = 0.7  # of the largest weight that the source word has
_LEAST_WEIGHT = 0.01  # that a soft alignment reports

Span = tuple[int, int]


class Block(NamedTuple):
    """The attention of one part of a line. Places are those of characters in the line, or in its translation."""

    source_S: np.ndarray  # int64, where each source subword begins; -1: the end of the sentence
    target_T: np.ndarray
    attention_TS: np.ndarray


class Attended(NamedTuple):
    """A line and its translation, with the attention between them."""

    source: str
    target: str
    blocks: tuple[Block, ...]


class Weights(NamedTuple):
    """Weights between units (words, for one) of a line and its translation, in the order of source units."""

    source_N: np.ndarray  # int64
    target_N: np.ndarray  # int64
    weight_N: np.ndarray  # float64; those of a target unit add up to 1
    num_source: int
    num_target: int

    def from_units(self, first: int, end: int) -> np.ndarray:
        """Return for each target unit how much of it comes from source units `first` to `end` - 1."""
        low, high = np.searchsorted(self.source_N, (first, end))
        return np.bincount(self.target_N[low:high], self.weight_N[low:high], minlength=self.num_target)


def words(text: str) -> list[Span]:
    """Return where the words of a text are: what blanks separate."""
    return [match.span() for match in _WORD.finditer(text)]


def weights(attended: Attended, source_units: Sequence[Span], target_units: Sequence[Span]) -> Weights:
    """Return the weights between units of a line and of its translation, given in order."""
    keys, values = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    for block in attended.blocks:
        source_S, target_T = _unit_of(block.source_S, source_units), _unit_of(block.target_T, target_units)
        read_S, written_T = source_S >= 0, target_T >= 0
        key_TS = source_S[None, read_S] * len(target_units) + target_T[written_T, None]
        keys.append(key_TS.ravel())
        values.append(block.attention_TS[np.ix_(written_T, read_S)].ravel())
    # One weight for each pair of units, in the order of source units.
    key_N, pair = np.unique(np.concatenate(keys), return_inverse=True)
    sum_N = np.bincount(pair, np.concatenate(values), minlength=len(key_N))
    source_N, target_N = np.divmod(key_N, max(len(target_units), 1))
    total = np.bincount(target_N, sum_N, minlength=len(target_units))
    weight_N = sum_N / np.maximum(total[target_N], np.finfo(np.float32).tiny)
    return Weights(source_N, target_N, weight_N, len(source_units), len(target_units))


def _unit_of(place: np.ndarray, units: Sequence[Span]) -> np.ndarray:
    """Return the unit of the subword that begins at each place: the first that ends after it; -1: none."""
    ends = np.array([end for _, end in units], dtype=np.int64)
    unit = np.searchsorted(ends, place, side="right")
    return np.where((place < 0) | (unit == len(units)), -1, unit)


def links(found: Weights) -> tuple[Span, ...]:
    """Return the (source, target) pairs of units that are linked, in the order of target units; at most one for each.

    The rule is at the head of this file. Of equal weights, that of the first source unit counts.
    """
    largest = np.zeros(max(found.num_source, 1))
    np.maximum.at(largest, found.source_N, found.weight_N)
    # By target, then by weight from the largest, then by source.
    order = np.lexsort((found.source_N, -found.weight_N, found.target_N))
    _, first = np.unique(found.target_N[order], return_index=True)
    best = order[first]
    kept = best[(found.weight_N[best] > 0) & (found.weight_N[best] >= _LEAST_SHARE * largest[found.source_N[best]])]
    return tuple(zip(found.source_N[kept].tolist(), found.target_N[kept].tolist(), strict=True))


def soft_links(found: Weights) -> tuple[tuple[int, int, float], ...]:
    """Return (source, target, weight) of all weights but the smallest, in the order of target units."""
    order = np.lexsort((found.source_N, found.target_N))
    kept = order[found.weight_N[order] >= _LEAST_WEIGHT]
    rounded = found.weight_N[kept].round(4).tolist()
    return tuple(zip(found.source_N[kept].tolist(), found.target_N[kept].tolist(), rounded, strict=True))


def pharaoh(pairs: Sequence[Span]) -> str:
    """Return links as the Pharaoh format writes them: "0-0 1-2"."""
    return " ".join(f"{source}-{target}" for source, target in pairs)
