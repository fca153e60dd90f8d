"""Special token ids, and the record that the data pass to the model.

Letters: S source positions, T target positions, B sentences of the batch, N real (not padding) positions of one side.
Tensors are time-major, cuDNN's own layout.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PAD, UNK, BOS, EOS = 0, 1, 2, 3
NUM_SPECIAL = 4


class Shape(NamedTuple):
    """The sizes of a batch's tensors. A step recorded for one batch may depend on nothing else."""

    sentences: int
    source: int  # positions, EOS included
    target: int
    source_rows: int  # tokens that gates, experts and softmax see
    target_rows: int

    def holds(self, other: "Shape") -> bool:
        """Return whether a batch of shape `other` can be padded to this shape."""
        return all(ours >= theirs for ours, theirs in zip(self, other, strict=True))


class Batch(NamedTuple):
    """One padded batch of sentence pairs.

    `*_rows_N` are the flat positions (t * B + b) of the real tokens of a time-major side, in order. The host computes
    them when it makes the batch. The model can then drop padding (before gates, experts and softmax) without waiting
    for the GPU to count what is left. In a batch that was padded to a bucket (`fit`), rows of padding follow them, and
    the counts say how many rows are real.
    """

    pairs_B: Tensor  # int64: the corpus pair in each column; -1 in a column of padding
    source_SB: Tensor  # int64: pieces, then EOS, then PAD
    source_length_B: Tensor  # int64: EOS included
    source_rows_N: Tensor  # int64
    target_in_TB: Tensor  # int64: BOS, then pieces
    target_out_TB: Tensor  # int64: pieces, then EOS
    target_rows_N: Tensor  # int64
    source_count: Tensor | None = None  # int64 scalar: how many of source_rows_N are real, the first ones; None: all
    target_count: Tensor | None = None  # the same of target_rows_N

    @property
    def shape(self) -> Shape:
        """The sizes of the tensors."""
        (source, sentences), target = self.source_SB.shape, len(self.target_in_TB)
        return Shape(sentences, source, target, self.source_rows_N.numel(), self.target_rows_N.numel())

    @property
    def num_sentences(self) -> int:
        """Number of sentence pairs. For a fitted batch, this and the two counts below wait for its device."""
        return len(self.pairs_B) if self.source_count is None else int((self.pairs_B >= 0).sum())

    @property
    def num_source_tokens(self) -> int:
        """Number of source tokens, with EOS, without padding."""
        return self.source_rows_N.numel() if self.source_count is None else int(self.source_count)

    @property
    def num_target_tokens(self) -> int:
        """Number of target tokens to predict, with EOS, without padding."""
        return self.target_rows_N.numel() if self.target_count is None else int(self.target_count)

    @property
    def real_source_rows(self) -> Tensor | None:
        """Bool (N): True for the real ones of `source_rows_N`; None if all are real."""
        return _first(self.source_rows_N, self.source_count)

    @property
    def real_target_rows(self) -> Tensor | None:
        """Bool (N): True for the real ones of `target_rows_N`; None if all are real."""
        return _first(self.target_rows_N, self.target_count)

    def to(self, device: torch.device) -> "Batch":
        """Copy this batch to `device`, asynchronously if its memory is pinned."""
        return Batch._make(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in self)

    def pin_memory(self) -> "Batch":
        """Copy this batch to page-locked memory, from which copies to a GPU do not block."""
        return Batch._make(None if tensor is None else tensor.pin_memory() for tensor in self)


def _first(rows_N: Tensor, count: Tensor | None) -> Tensor | None:
    return None if count is None else torch.arange(rows_N.numel(), device=rows_N.device) < count


def fit(batch: Batch, shape: Shape) -> Batch:
    """Return `batch` padded to exactly `shape`, so that all batches of a bucket have tensors of equal sizes.

    Real tokens keep their order. A column of padding is a sentence of one PAD, so that its attention has a position to
    attend to. Rows of padding are positions that hold PAD, each used at most once. Gates give them no expert, and no
    loss, sum or statistic counts them. A pass therefore computes the same as for `batch`, except that dropout and gate
    noise draw other numbers for a token. ValueError if `shape` does not hold the batch.
    """
    assert batch.source_count is None
    cells = shape.sentences * shape.source, shape.sentences * shape.target
    if not shape.holds(batch.shape) or shape.source_rows > cells[0] or shape.target_rows > cells[1]:
        raise ValueError(f"a batch of {batch.shape} cannot be padded to {shape}")
    columns = shape.sentences - len(batch.pairs_B)

    def side(ids_LB: Tensor, positions: int) -> Tensor:
        return F.pad(ids_LB, (0, columns, 0, positions - len(ids_LB)), value=PAD)

    return Batch(
        pairs_B=F.pad(batch.pairs_B, (0, columns), value=-1),
        source_SB=side(batch.source_SB, shape.source),
        source_length_B=F.pad(batch.source_length_B, (0, columns), value=1),
        source_rows_N=_fit_rows(batch.source_rows_N, len(batch.pairs_B), shape.sentences, cells[0], shape.source_rows),
        target_in_TB=side(batch.target_in_TB, shape.target),
        target_out_TB=side(batch.target_out_TB, shape.target),
        target_rows_N=_fit_rows(batch.target_rows_N, len(batch.pairs_B), shape.sentences, cells[1], shape.target_rows),
        source_count=torch.tensor(batch.num_source_tokens, device=batch.pairs_B.device),
        target_count=torch.tensor(batch.num_target_tokens, device=batch.pairs_B.device),
    )


def _fit_rows(rows_N: Tensor, sentences: int, columns: int, cells: int, num_rows: int) -> Tensor:
    """Renumber rows of `sentences` columns for `columns` columns, and append unused cells up to `num_rows` rows."""
    rows_N = rows_N // sentences * columns + rows_N % sentences
    free_M = torch.ones(cells, dtype=torch.bool, device=rows_N.device).index_fill_(0, rows_N, False)
    return torch.cat([rows_N, free_M.nonzero().flatten()[: num_rows - len(rows_N)]])


def real_rows(lengths_B: np.ndarray, num_positions: int) -> np.ndarray:
    """Return the flat time-major positions t * B + b with t < lengths_B[b], ascending (int64)."""
    return np.flatnonzero(np.arange(num_positions)[:, None] < lengths_B[None, :])


def source_batch(sources: Sequence[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the encoder's input (source_SB, source_length_B, source_rows_N) for source pieces without EOS."""
    return _source_side(*_end_to_end(sources))


def make_batch(pairs: np.ndarray, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> Batch:
    """Return a Batch of piece sequences without BOS and EOS, with pair `pairs[b]` in column b."""
    return make_flat_batch(pairs, *_end_to_end(sources), *_end_to_end(targets))


def make_flat_batch(
    pairs_B: np.ndarray,
    source_pieces_N: np.ndarray,
    source_lengths_B: np.ndarray,
    target_pieces_N: np.ndarray,
    target_lengths_B: np.ndarray,
) -> Batch:
    """Return the Batch of `make_batch` from concatenated sequences, as in shards, without a loop over sentences."""
    source_SB, source_length_B, source_rows_N = _source_side(source_pieces_N, source_lengths_B)
    num_target = int(target_lengths_B.max()) + 1
    target_in_TB = _scatter(target_pieces_N, target_lengths_B, num_target, first_position=1)
    target_in_TB[0] = BOS
    return Batch(
        pairs_B=torch.from_numpy(np.asarray(pairs_B, dtype=np.int64)),
        source_SB=source_SB,
        source_length_B=source_length_B,
        source_rows_N=source_rows_N,
        target_in_TB=torch.from_numpy(target_in_TB),
        target_out_TB=torch.from_numpy(_with_eos(target_pieces_N, target_lengths_B)),
        target_rows_N=torch.from_numpy(real_rows(target_lengths_B + 1, num_target)),
    )


def _end_to_end(sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return (all sequences concatenated, lengths_B int64)."""
    return np.concatenate(sequences), np.array([len(sequence) for sequence in sequences], dtype=np.int64)


def _source_side(pieces_N: np.ndarray, lengths_B: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    source_SB, length_B = _with_eos(pieces_N, lengths_B), lengths_B + 1
    rows_N = real_rows(length_B, len(source_SB))
    return torch.from_numpy(source_SB), torch.from_numpy(length_B), torch.from_numpy(rows_N)


def _with_eos(pieces_N: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
    """Return ids_LB: each column has a sentence, then EOS, then PAD."""
    ids_LB = _scatter(pieces_N, lengths_B, int(lengths_B.max()) + 1, first_position=0)
    ids_LB[lengths_B, np.arange(len(lengths_B))] = EOS
    return ids_LB


def _scatter(pieces_N: np.ndarray, lengths_B: np.ndarray, num_positions: int, first_position: int) -> np.ndarray:
    """Return a time-major side (ids_LB int64) of flat pieces: sentence b in column b, from row `first_position`."""
    num_sentences = len(lengths_B)
    column_N = np.repeat(np.arange(num_sentences), lengths_B)
    start_N = np.repeat(np.cumsum(lengths_B) - lengths_B, lengths_B)
    row_N = np.arange(len(pieces_N)) - start_N + first_position
    ids_L = np.full(num_positions * num_sentences, PAD, dtype=np.int64)
    ids_L[row_N * num_sentences + column_N] = pieces_N
    return ids_L.reshape(num_positions, num_sentences)
