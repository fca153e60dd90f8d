"""Choose a few shapes to which the batches of a plan are padded, so that a step recorded per shape serves all batches.

Letters: N batches, F = 5 sizes of a shape.
"""

import heapq
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nmt.batch import Shape

Sizes = NDArray[np.int64]
"""Shapes (N, F)."""


class Padding(NamedTuple):
    """Share of the work on padded batches that is spent on the added padding, from 0 to 1."""

    positions: float
    """Share of the positions of LSTMs and attention: sentences times length, both sides."""
    rows: float
    """Share of the tokens of gates, experts and softmax."""


class ShapeGrid(NamedTuple):
    """The shapes to which batches are padded (`nmt.batch.fit`)."""

    shapes: list[Shape]

    def smallest(self, needed: Shape) -> Shape | None:
        """Return the shape with the least work that holds a batch of shape `needed`; None if none does."""
        return min((shape for shape in self.shapes if shape.holds(needed)), key=work, default=None)

    def padding(self, needed: Sequence[Shape]) -> Padding:
        """Return the shares of padding if batches of these shapes are padded. A batch that no shape holds is not."""
        fitted = [self.smallest(shape) or shape for shape in needed]
        own, total = (np.array([_parts(shape) for shape in shapes]).sum(0) for shapes in (needed, fitted))
        return Padding(*(1.0 - own / total).tolist())


def shape_of(pairs_B: np.ndarray, source_lengths: np.ndarray, target_lengths: np.ndarray) -> Shape:
    """Return the shape of the batch of these pairs. The lengths are those of the whole corpus, without EOS."""
    source_B, target_B = source_lengths[pairs_B] + 1, target_lengths[pairs_B] + 1
    sizes = source_B.max(), target_B.max(), source_B.sum(), target_B.sum()
    return Shape(len(pairs_B), *map(int, sizes))


def _parts(shape: Shape) -> tuple[int, int]:
    """Return (positions, rows) of a shape."""
    return shape.sentences * (shape.source + shape.target), shape.source_rows + shape.target_rows


def work(shape: Shape) -> int:
    """Return the approximate work of a batch: the sum of its positions and rows."""
    return sum(_parts(shape))


def few_shapes(needed: Sequence[Shape], most: int) -> ShapeGrid:
    """Return at most `most` shapes that together hold all batches of shapes `needed`, with little added padding.

    The search starts with one bucket of all batches. It repeatedly splits the bucket whose best split saves most work.
    A split sorts the bucket by one size and cuts it in two. It stops after `most` buckets, or when no split saves work.
    Deterministic; it takes O(N log N) time per bucket. ValueError if there is no batch or `most` is below 1.
    """
    if not needed or most < 1:
        raise ValueError(f"{len(needed)} batches cannot be given {most} shapes: both must be at least 1")
    number = count()  # breaks ties: arrays do not compare

    def entry(bucket: Sizes) -> tuple[float, int, Sizes, tuple[Sizes, Sizes]]:
        saved, halves = _best_split(bucket)
        return -saved, next(number), bucket, halves

    heap = [entry(np.array(needed, dtype=np.int64))]
    while len(heap) < most and heap[0][0] < 0:
        for half in heapq.heappop(heap)[3]:
            heapq.heappush(heap, entry(half))
    return ShapeGrid(sorted(Shape(*bucket.max(0).tolist()) for _, _, bucket, _ in heap))


def _best_split(bucket_NF: Sizes) -> tuple[float, tuple[Sizes, Sizes]]:
    """Return (work saved, the two parts) of the best split of a bucket along one size; (0, ...) if none saves work."""
    best: tuple[float, tuple[Sizes, Sizes]] = (0.0, (bucket_NF, bucket_NF[:0]))
    num_batches = len(bucket_NF)
    whole = num_batches * _work(bucket_NF.max(0))
    first_N = np.arange(1, num_batches)  # number of batches in the first part, by place of the split
    for size in range(bucket_NF.shape[1]):
        sorted_NF = bucket_NF[np.argsort(bucket_NF[:, size], kind="stable")]
        below_NF = np.maximum.accumulate(sorted_NF)[:-1]
        above_NF = np.maximum.accumulate(sorted_NF[::-1])[::-1][1:]
        saved_N = whole - first_N * _work(below_NF) - (num_batches - first_N) * _work(above_NF)
        if len(saved_N) and saved_N.max() > best[0]:
            place = int(saved_N.argmax())
            best = float(saved_N[place]), (sorted_NF[: place + 1], sorted_NF[place + 1 :])
    return best


def _work(sizes: Sizes) -> Sizes:
    """Return `work` of shapes (..., F)."""
    sentences, source, target, source_rows, target_rows = np.moveaxis(sizes, -1, 0)
    return sentences * (source + target) + source_rows + target_rows
