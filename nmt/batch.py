"""The record that the data pass to the model.

A batch has no padding. Each side is packed: its real positions are rows, position by position, and at each position
the sentences follow in the order of falling length. Every layer but LSTMs and attention sees rows only. A batch may mix
sentences of any lengths.

Letters: S source positions, T target positions, L positions of either side, B sentences of the batch, N rows of a side.
"""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from operator import ge
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nmt.tokens import BOS, EOS, PAD


class Rows(NamedTuple):
    """Where the rows of one side of a batch are: row begin_L[t] + rank_B[b] is position t < length_B[b] of sentence b.

    The host computes all of it when it makes the batch, so that no pass waits for the device. After `fit`, rows of
    padding follow the real ones at each position, as if sentences of padding were there.
    """

    alive: tuple[int, ...]  # number of rows at each position, which never rises
    begin_L: Tensor  # int32 (L + 1): first row of each position; the last value is the number of rows
    rank_B: Tensor  # int32: place of each sentence in the order of falling length
    length_B: Tensor  # int32: number of positions; 0 for a sentence of padding
    previous_N: Tensor  # int32: row of the same sentence's previous position; N at the first position
    turn_N: Tensor  # int32: row of the position as far from the sentence's end as this one from its begin
    cell_N: Tensor  # int64: t B + b, the place in a padded (L, B) layout; L B for padding
    real_N: Tensor | None = None  # bool: False for rows of padding; None: all rows are real

    @property
    def num_sentences(self) -> int:
        """Number of sentences, including those of padding."""
        return self.rank_B.numel()

    @property
    def num_positions(self) -> int:
        """Number of positions of the longest sentence."""
        return len(self.alive)

    @property
    def num_rows(self) -> int:
        """Number of rows, including those of padding."""
        return self.cell_N.numel()

    @property
    def num_real(self) -> int:
        """Number of real rows; for a fitted side, this waits for its device."""
        return self.num_rows if self.real_N is None else int(self.real_N.sum())

    def copy_(self, other: "Rows") -> None:
        """Overwrite the tensors of these rows with those of rows of the same shape."""
        for own, new in zip(self[1:], other[1:], strict=True):
            if isinstance(own, Tensor) and isinstance(new, Tensor):
                own.copy_(new, non_blocking=True)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Rows":
        """Return this record with every tensor changed."""
        return Rows(self.alive, *(None if each is None else change(each) for each in self[1:]))  # type: ignore[arg-type]


class Shape(NamedTuple):
    """The sizes of a batch's tensors. A step recorded for one batch may depend on nothing else."""

    sentences: int
    source: tuple[int, ...]  # `Rows.alive`
    target: tuple[int, ...]

    def holds(self, other: "Shape") -> bool:
        """Return whether a batch of shape `other` can be padded to this shape."""
        sides = ((self.source, other.source), (self.target, other.target))
        return self.sentences >= other.sentences and all(
            len(ours) >= len(theirs) and all(map(ge, ours, theirs)) for ours, theirs in sides
        )

    def with_room(self, more: int) -> "Shape":
        """Return this shape with room for `more` sentences more, at every position."""
        source, target = (tuple(count + more for count in side) for side in self[1:])
        return Shape(self.sentences + more, source, target)


def covering(*shapes: Shape) -> Shape:
    """Return the smallest shape that holds batches of all these shapes."""
    source, target = (
        tuple(map(max, zip_longest(*sides, fillvalue=0)))
        for sides in zip(*(shape[1:] for shape in shapes), strict=True)
    )
    return Shape(max(shape.sentences for shape in shapes), source, target)


class Batch(NamedTuple):
    """One batch of sentence pairs, packed. Sides number their rows independently of each other."""

    pairs_B: Tensor  # int64: the corpus pair of each sentence; -1 for a sentence of padding
    source_N: Tensor  # int64: pieces and EOS of each sentence, PAD in rows of padding
    source: Rows
    target_in_N: Tensor  # int64: BOS and pieces
    target_out_N: Tensor  # int64: pieces and EOS
    target: Rows
    teacher_ids_NK: Tensor | None = None  # int64: the K most probable outputs by a teacher; None: no teacher
    teacher_NK: Tensor | None = None  # float32: their probabilities; 0 in rows without a teacher

    @property
    def shape(self) -> Shape:
        """The sizes of the tensors."""
        return Shape(len(self.pairs_B), self.source.alive, self.target.alive)

    @property
    def num_sentences(self) -> int:
        """Number of sentence pairs. For a fitted batch, this and the two counts below wait for its device."""
        return len(self.pairs_B) if self.source.real_N is None else int((self.pairs_B >= 0).sum())

    @property
    def num_source_tokens(self) -> int:
        """Number of source tokens, with EOS."""
        return self.source.num_real

    @property
    def num_target_tokens(self) -> int:
        """Number of target tokens to predict, with EOS."""
        return self.target.num_real

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Return this record with every tensor changed."""

        def changed(value: Tensor | Rows | None) -> Tensor | Rows | None:
            return value.map(change) if isinstance(value, Rows) else None if value is None else change(value)

        return Batch._make(map(changed, self))

    def to(self, device: torch.device) -> "Batch":
        """Copy this batch to `device`, asynchronously if its memory is pinned."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Copy this batch to page-locked memory, from which copies to a GPU do not block."""
        return self.map(Tensor.pin_memory)

    def copy_(self, other: "Batch") -> None:
        """Overwrite the tensors of this batch with those of a batch of the same shape."""
        for own, new in zip(self.tensors(), other.tensors(), strict=True):
            own.copy_(new, non_blocking=True)

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in order."""
        found: list[Tensor] = []
        self.map(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found


def fit(batch: Batch, shape: Shape) -> Batch:
    """Return `batch`, on the host, padded to exactly `shape`, so that different batches have tensors of equal sizes.

    Rows of padding hold PAD. Gates give them no expert, and no loss, sum or statistic counts them. A pass computes the
    same as for `batch`, except that dropout and gate noise draw other numbers for a token. ValueError if `shape` does
    not hold the batch.
    """
    assert batch.source.real_N is None
    if not shape.holds(batch.shape):
        raise ValueError(f"a batch of {batch.shape} cannot be padded to {shape}")
    source, source_row_N = _fit_rows(batch.source, shape.source, shape.sentences)
    target, target_row_N = _fit_rows(batch.target, shape.target, shape.sentences)

    def ids(ids_N: Tensor, row_N: Tensor, rows: Rows) -> Tensor:
        return torch.full((rows.num_rows,), PAD).index_copy_(0, row_N, ids_N)

    def of_teacher(values_NK: Tensor | None) -> Tensor | None:
        if values_NK is None:
            return None
        return values_NK.new_zeros(target.num_rows, values_NK.shape[1]).index_copy_(0, target_row_N, values_NK)

    return Batch(
        pairs_B=F.pad(batch.pairs_B, (0, shape.sentences - len(batch.pairs_B)), value=-1),
        source_N=ids(batch.source_N, source_row_N, source),
        source=source,
        target_in_N=ids(batch.target_in_N, target_row_N, target),
        target_out_N=ids(batch.target_out_N, target_row_N, target),
        target=target,
        teacher_ids_NK=of_teacher(batch.teacher_ids_NK),
        teacher_NK=of_teacher(batch.teacher_NK),
    )


def _fit_rows(rows: Rows, alive: tuple[int, ...], sentences: int) -> tuple[Rows, Tensor]:
    """Return (rows with room for alive[t] sentences at position t, new row of each row)."""
    counts, room = torch.tensor(rows.alive), torch.tensor(alive)
    begin_L = F.pad(room.cumsum(0), (1, 0))
    position_N = torch.arange(len(counts)).repeat_interleave(counts)
    rank_N = torch.arange(rows.num_rows) - rows.begin_L[position_N]
    row_N = begin_L[position_N] + rank_N
    num_rows, positions = int(begin_L[-1]), len(alive)
    place_N = torch.arange(num_rows)
    fitted = Rows(
        alive=alive,
        begin_L=begin_L.int(),
        rank_B=torch.cat([rows.rank_B, torch.arange(rows.num_sentences, sentences, dtype=torch.int32)]),
        length_B=F.pad(rows.length_B, (0, sentences - rows.num_sentences)),
        previous_N=_previous(alive),
        turn_N=place_N.index_copy(0, row_N, row_N[rows.turn_N.long()]).int(),
        cell_N=torch.full((num_rows,), positions * sentences).index_copy_(
            0, row_N, rows.cell_N // rows.num_sentences * sentences + rows.cell_N % rows.num_sentences
        ),
        real_N=torch.zeros(num_rows, dtype=torch.bool).index_fill_(0, row_N, True),
    )
    return fitted, row_N


def _previous(alive: Sequence[int]) -> Tensor:
    """Return `Rows.previous_N`: the first alive[t] of the sentences at position t - 1 are those at t."""
    counts = np.array(alive)
    num_rows, steps = int(counts.sum()), np.concatenate([[0], counts[:-1]])
    previous_N = np.arange(num_rows) - np.repeat(steps, counts)
    previous_N[: counts[0]] = num_rows
    return torch.from_numpy(previous_N.astype(np.int32))


def sentences_at_positions(length_B: np.ndarray) -> np.ndarray:
    """Return `Rows.alive` of sentences of these lengths: how many have each position."""
    num_positions = int(length_B.max())
    return len(length_B) - np.cumsum(np.bincount(length_B, minlength=num_positions + 1))[:num_positions]


def make_rows(length_B: np.ndarray) -> tuple[Rows, np.ndarray]:
    """Return (rows, order_N) for sentences of these lengths, at least 1 each.

    order_N has the row of each token of the concatenated sentences: packed[order_N] = concatenated.
    """
    num_sentences, num_rows = len(length_B), int(length_B.sum())
    rank_B = np.empty(num_sentences, dtype=np.int64)
    rank_B[np.argsort(-length_B, kind="stable")] = np.arange(num_sentences)
    active_L = sentences_at_positions(length_B)
    begin_L = np.concatenate([[0], np.cumsum(active_L)])
    sentence_N = np.repeat(np.arange(num_sentences), length_B)
    position_N = np.arange(num_rows) - np.repeat(np.cumsum(length_B) - length_B, length_B)
    rank_N = rank_B[sentence_N]
    order_N = begin_L[position_N] + rank_N

    def packed(values_N: np.ndarray, dtype: type = np.int32) -> Tensor:
        packed_N: np.ndarray = np.empty(num_rows, dtype=dtype)
        packed_N[order_N] = values_N
        return torch.from_numpy(packed_N)

    alive = tuple(active_L.tolist())
    rows = Rows(
        alive=alive,
        begin_L=torch.from_numpy(begin_L.astype(np.int32)),
        rank_B=torch.from_numpy(rank_B.astype(np.int32)),
        length_B=torch.from_numpy(length_B.astype(np.int32)),
        previous_N=_previous(alive),
        turn_N=packed(begin_L[length_B[sentence_N] - 1 - position_N] + rank_N),
        cell_N=packed(position_N * num_sentences + sentence_N, np.int64),
    )
    return rows, order_N


def source_batch(sources: Sequence[np.ndarray]) -> tuple[Tensor, Rows]:
    """Return the encoder's input (source_N, rows) for source pieces without EOS."""
    pieces_N, lengths_B = _end_to_end(sources)
    rows, order_N = make_rows(lengths_B + 1)
    return _packed(pieces_N, lengths_B, order_N, EOS), rows


def source_rectangle(sources: Sequence[np.ndarray], sentences: int, positions: int) -> tuple[Tensor, Rows]:
    """Return the result of `source_batch`, padded to `sentences` of `positions` each; padding is as in `fit`.

    All sentences are at every position, so they keep their order.
    """
    length_B = np.zeros(sentences, dtype=np.int64)
    length_B[: len(sources)] = [len(source) + 1 for source in sources]
    pieces_BS = np.full((sentences, positions), PAD)
    position_S = np.arange(positions)
    pieces_BS[position_S < length_B[:, None] - 1] = np.concatenate(sources)
    pieces_BS[np.arange(len(sources)), length_B[: len(sources)] - 1] = EOS
    real_SB = position_S[:, None] < length_B
    row_SB = np.arange(positions * sentences).reshape(positions, sentences)
    turned_SB = (length_B - 1 - position_S[:, None]) * sentences + np.arange(sentences)
    alive = (sentences,) * positions
    rows = Rows(
        alive=alive,
        begin_L=torch.arange(positions + 1, dtype=torch.int32) * sentences,
        rank_B=torch.arange(sentences, dtype=torch.int32),
        length_B=torch.from_numpy(length_B.astype(np.int32)),
        previous_N=_previous(alive),
        turn_N=torch.from_numpy(np.where(real_SB, turned_SB, row_SB).astype(np.int32).reshape(-1)),
        cell_N=torch.from_numpy(np.where(real_SB, row_SB, positions * sentences).reshape(-1)),
        real_N=torch.from_numpy(real_SB.reshape(-1)),
    )
    return torch.from_numpy(np.ascontiguousarray(pieces_BS.T).reshape(-1)), rows


def make_batch(pairs: np.ndarray, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> Batch:
    """Return a Batch of piece sequences without BOS and EOS, with pair `pairs[b]` as sentence b."""
    return make_flat_batch(pairs, *_end_to_end(sources), *_end_to_end(targets))


def make_flat_batch(
    pairs_B: np.ndarray,
    source_pieces_N: np.ndarray,
    source_lengths_B: np.ndarray,
    target_pieces_N: np.ndarray,
    target_lengths_B: np.ndarray,
    teacher_N: np.ndarray | None = None,
) -> Batch:
    """Return the Batch of `make_batch` from concatenated sequences, as in shards, without a loop over sentences.

    `teacher_N` has a teacher's `ids` and `probabilities` for each target position, with EOS, as in shards.
    """
    source, source_order_N = make_rows(source_lengths_B + 1)
    target, target_order_N = make_rows(target_lengths_B + 1)

    def of_teacher(field: str, dtype: type) -> Tensor | None:
        if teacher_N is None:
            return None
        packed_NK: np.ndarray = np.empty(teacher_N[field].shape, dtype=dtype)
        packed_NK[target_order_N] = teacher_N[field]
        return torch.from_numpy(packed_NK)

    return Batch(
        pairs_B=torch.from_numpy(np.asarray(pairs_B, dtype=np.int64)),
        source_N=_packed(source_pieces_N, source_lengths_B, source_order_N, EOS),
        source=source,
        target_in_N=_packed(target_pieces_N, target_lengths_B, target_order_N, BOS),
        target_out_N=_packed(target_pieces_N, target_lengths_B, target_order_N, EOS),
        target=target,
        teacher_ids_NK=of_teacher("ids", np.int64),
        teacher_NK=of_teacher("probabilities", np.float32),
    )


def _end_to_end(sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return (all sequences concatenated, lengths_B int64)."""
    return np.concatenate(sequences), np.array([len(sequence) for sequence in sequences], dtype=np.int64)


def _packed(pieces_N: np.ndarray, lengths_B: np.ndarray, order_N: np.ndarray, special: int) -> Tensor:
    """Return the packed ids of concatenated sentences, each with BOS before it or EOS after it (`special`)."""
    ends_B = np.cumsum(lengths_B)
    whole_N = np.insert(pieces_N.astype(np.int64), ends_B if special == EOS else ends_B - lengths_B, special)
    ids_N = np.empty_like(whole_N)
    ids_N[order_N] = whole_N
    return torch.from_numpy(ids_N)
