"""Held-out pairs as pieces, none so long that one of them would take all memory.

Training text is filtered by length; dev and test text never is, and may come from anybody. The largest tensor of a pass
grows with the product of a pair's lengths.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from nmt.batch import Batch, make_batch
from nmt.data.batching import cut_batches
from nmt.data.subwords import Subwords

LONGEST_SIDE = 1024
"""Pieces of a side that are read: several times what training lets through unless told otherwise."""
# A batch has at most this many pairs of a source and a target position for each position of its budget.
_EVAL_LENGTH = 256


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


def eval_batches(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], batch_tokens: int) -> Iterator[Batch]:
    """Every pair once, in batches of similar lengths; `pairs_B` are positions in the lists.

    A batch has at most `batch_tokens` positions on either side, as in training. It also has at most 256 times as many
    pairs of a source and a target position, for attention looks at each of these: long sentences come fewer at a time.
    """
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} source sentences but {len(targets)} target sentences")
    source_lengths = np.array([len(source) for source in sources], dtype=np.int64)
    target_lengths = np.array([len(target) for target in targets], dtype=np.int64)
    order = np.lexsort((source_lengths, target_lengths))
    longest = np.maximum(source_lengths, target_lengths) + 1
    for similar_B in cut_batches(order, longest, batch_tokens):
        area = int((source_lengths[similar_B].max() + 1) * (target_lengths[similar_B].max() + 1))
        most = max(1, batch_tokens * _EVAL_LENGTH // area)
        for start in range(0, len(similar_B), most):
            pairs_B = similar_B[start : start + most]
            yield make_batch(pairs_B, [sources[pair] for pair in pairs_B], [targets[pair] for pair in pairs_B])
