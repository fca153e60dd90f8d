"""Held-out pairs as pieces, none so long that one of them would take all memory.

Training text is filtered by length; dev and test text never is, and may come from anybody. The largest tensor of a pass
grows with the product of a pair's lengths.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nmt.data.subwords import Subwords

LONGEST_SIDE = 1024
"""Pieces of a side that are read: several times what training lets through unless told otherwise."""


class HeldOut(NamedTuple):
    """Pairs as pieces."""

    sources: list[np.ndarray]
    targets: list[np.ndarray]
    cut: list[int]
    """The pairs of which a side is longer than `LONGEST_SIDE`, from 0: of both sides only so much is here."""


def encode_pairs(subwords: Subwords, sources: Sequence[str], targets: Sequence[str]) -> HeldOut:
    """The pieces of sentence pairs, at most `LONGEST_SIDE` of a side."""
    sides = subwords.encode_batch(list(sources)), subwords.encode_batch(list(targets))
    lengths = (max(len(source), len(target)) for source, target in zip(*sides, strict=True))
    cut = [pair for pair, length in enumerate(lengths) if length > LONGEST_SIDE]
    read = [[pieces[:LONGEST_SIDE] for pieces in side] for side in sides]
    return HeldOut(read[0], read[1], cut)


def describe_cut(cut: Sequence[int]) -> str:
    """What a person must know of the pairs that were cut; empty if there are none."""
    if not cut:
        return ""
    count = f"{len(cut):,} pair{'s have' if len(cut) > 1 else ' has'} more than {LONGEST_SIDE:,} pieces on a side"
    return f"{count} (line {cut[0] + 1:,}{' is the first' if len(cut) > 1 else ''}): only so many of each side are read"
