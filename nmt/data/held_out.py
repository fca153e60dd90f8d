"""Encode held-out pairs and batch them, with a limit on their lengths so that no pair exhausts the memory.

Training text is filtered by length. Dev and test text is not, and may come from anyone. The largest tensor of a pass
grows with the product of a pair's lengths.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from nmt.batch import Batch, make_batch
from nmt.data.batching import cut_batches
from nmt.data.subwords import Subwords

LONGEST_SIDE = 1024
"""Maximum subwords per side; the rest is cut off. It is several times the default limit of training pairs."""
# A batch has at most this many (source position, target position) pairs per position of its budget.
_EVAL_LENGTH = 256


class HeldOut(NamedTuple):
    """Encoded sentence pairs: arrays of subword ids."""

    sources: list[np.ndarray]
    """With the symbols before each source."""
    targets: list[np.ndarray]
    cut: list[int]
    """Numbers, from 0, of the pairs with a side that was cut to `LONGEST_SIDE` subwords."""


def encode_pairs(
    subwords: Subwords, sources: Sequence[str], targets: Sequence[str], *, prefixes: Sequence[Sequence[int]] = ()
) -> HeldOut:
    """Encode sentence pairs, and cut each side to `LONGEST_SIDE` subwords.

    `prefixes` has the ids of symbols before each source (`Directions.prefix`), which do not count; empty: none has any.
    """
    sides = subwords.encode_batch(list(sources)), subwords.encode_batch(list(targets))
    lengths = (max(len(source), len(target)) for source, target in zip(*sides, strict=True))
    cut = [pair for pair, length in enumerate(lengths) if length > LONGEST_SIDE]
    read = [[pieces[:LONGEST_SIDE] for pieces in side] for side in sides]
    if any(map(len, prefixes)):
        read[0] = [
            np.concatenate([np.array(prefix, dtype=source.dtype), source])
            for prefix, source in zip(prefixes, read[0], strict=True)
        ]
    return HeldOut(read[0], read[1], cut)


def describe_cut(cut: Sequence[int]) -> str:
    """Return a warning that counts the pairs that were cut; an empty string if there are none."""
    if not cut:
        return ""
    count = f"{len(cut):,} pair{'s have' if len(cut) > 1 else ' has'} more than {LONGEST_SIDE:,} subwords on a side"
    return f"{count} (line {cut[0] + 1:,}{' is the first' if len(cut) > 1 else ''}): the rest of each side is ignored"


def eval_batches(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], batch_tokens: int) -> Iterator[Batch]:
    """Yield every pair once, in batches of similar lengths; `pairs_B` are indices into the lists.

    A batch has at most `batch_tokens` positions per side, as in training. It has at most 256 times as many (source
    position, target position) pairs, because attention has a score for each of them. Batches of long sentences are
    therefore smaller. ValueError if the lists differ in length.
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
