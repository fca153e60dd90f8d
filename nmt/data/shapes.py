"""Few shapes for the many batches of a plan, so that a step recorded for each of them serves all.

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
    """What buckets add to the batches themselves, as shares of what is computed."""

    positions: float
    """Of the positions that LSTMs and attention work on: sentences times length, both sides."""
    rows: float
    """Of the tokens that gates, experts and softmax work on."""


class ShapeGrid(NamedTuple):
    """The shapes that batches are padded to (`nmt.batch.fit`)."""

    shapes: list[Shape]

    def smallest(self, needed: Shape) -> Shape | None:
        """The shape with the least work that holds a batch; None if none does, and it passes as it is."""
        return min((shape for shape in self.shapes if shape.holds(needed)), key=work, default=None)

    def padding(self, needed: Sequence[Shape]) -> Padding:
        """The share of padding that these batches get."""
        fitted = [self.smallest(shape) or shape for shape in needed]
        own, total = (np.array([_parts(shape) for shape in shapes]).sum(0) for shapes in (needed, fitted))
        return Padding(*(1.0 - own / total).tolist())


def shape_of(pairs_B: np.ndarray, source_lengths: np.ndarray, target_lengths: np.ndarray) -> Shape:
    """The shape of the batch of these pairs; the lengths, without EOS, are those of the whole corpus."""
    source_B, target_B = source_lengths[pairs_B] + 1, target_lengths[pairs_B] + 1
    sizes = source_B.max(), target_B.max(), source_B.sum(), target_B.sum()
    return Shape(len(pairs_B), *map(int, sizes))


def _parts(shape: Shape) -> tuple[int, int]:
    """(positions, rows) of a shape."""
    return shape.sentences * (shape.source + shape.target), shape.source_rows + shape.target_rows


def work(shape: Shape) -> int:
    """What a batch costs, roughly: its positions and its rows."""
    return sum(_parts(shape))


def few_shapes(needed: Sequence[Shape], most: int) -> ShapeGrid:
    """At most `most` shapes which together hold all these batches, chosen so that padding adds little work.

    One bucket for all is split in two, along the size and at the place that save most work, and so is the bucket whose
    split saves most then, until there are enough or nothing is saved. Deterministic; some N log N for each bucket.
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
    """(work saved, the halves) of the best of all splits of a bucket along one size; nothing saved for one batch."""
    best: tuple[float, tuple[Sizes, Sizes]] = (0.0, (bucket_NF, bucket_NF[:0]))
    num_batches = len(bucket_NF)
    whole = num_batches * _work(bucket_NF.max(0))
    first_N = np.arange(1, num_batches)  # batches of the first half, for each place of the split
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
    """`work` of shapes (..., F)."""
    sentences, source, target, source_rows, target_rows = np.moveaxis(sizes, -1, 0)
    return sentences * (source + target) + source_rows + target_rows
