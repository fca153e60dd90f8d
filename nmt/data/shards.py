"""Write and memory-map a binarised parallel corpus.

Each side of a split consists of two flat little-endian arrays. The first holds the subword ids of all sentences,
concatenated: uint16 if the vocabulary is small enough, else int32. The second holds the int64 offsets at which
sentences begin, and the end as its last value. The operating system reads pages on access and drops them when memory
is short, so the corpus can be larger than the memory.

A teacher's targets may have one more array. It has a row for each target position, those of sentences' ends included:
the subwords that the teacher finds most probable there, and their probabilities.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from nmt.errors import DataError
from nmt.files import read_json
from nmt.textfile import open_input

MANIFEST = "manifest.json"
SIDES = ("source", "target")
DTYPES = (np.dtype("<u2"), np.dtype("<i4"))
"""Types of subword ids: the first if all ids of the vocabulary fit."""
TEACHER_BEST = 8
"""Subwords of a teacher's distribution that are stored per target position: the most probable ones."""
_TEACHER = ".teacher"
_OFFSET_DTYPE = np.dtype("<i8")
_CHECKED_PIECES = 1 << 22  # ids, or offsets, per check


def file_record(path: Path) -> dict[str, Any]:
    """Return the size and sha256 of a file, in the form of a manifest. DataError if it is a pipe or a device."""
    with open_input(path, "corpus") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"bytes": stream.tell(), "sha256": digest}


def ids_dtype(vocab_size: int) -> np.dtype:
    """Return the type of the subword ids of a vocabulary."""
    return DTYPES[vocab_size > 1 << 16]


def teacher_dtype(ids: np.dtype) -> np.dtype:
    """Return the type of a teacher's row: `ids`, of the given type, and `probabilities`, the most probable first.

    Probabilities are in half precision: 32 bytes per row, or 48 if ids have 4 bytes.
    """
    return np.dtype([("ids", ids, (TEACHER_BEST,)), ("probabilities", "<f2", (TEACHER_BEST,))])


def _names(split: str) -> dict[str, tuple[str, str]]:
    return {side: (f"{split}.{side}.pieces", f"{split}.{side}.offsets") for side in SIDES}


def has_teacher(record: dict[str, Any]) -> bool:
    """Return whether a split with this entry in the manifest has a teacher's rows."""
    return any(name.endswith(_TEACHER) for name in record["files"])


def _teacher_name(split: str) -> str:
    return split + _TEACHER


def _bytes(split: str, dtype: np.dtype, sizes: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes of each file of a split of these `ShardWriter.sizes`."""
    found = {}
    for side, (pieces, offsets) in _names(split).items():
        found[pieces] = sizes["pieces"][side] * dtype.itemsize
        found[offsets] = (sizes["pairs"] + 1) * _OFFSET_DTYPE.itemsize
    return found


def can_resume(folder: Path, vocab_size: int, split: str, sizes: Mapping[str, Any]) -> bool:
    """Return whether the files of a split have all that a `ShardWriter` of these sizes wrote."""
    needed = _bytes(split, ids_dtype(vocab_size), sizes)
    return all((folder / name).is_file() and (folder / name).stat().st_size >= size for name, size in needed.items())


class ShardWriter:
    """Writer of the arrays of one split, chunk by chunk; its memory use does not grow with the corpus."""

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        split: str = "train",
        *,
        taught: bool = False,
        resume: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the files; `taught`: with a teacher's rows; `resume`: cut to these `sizes`, to append to."""
        self.dtype = ids_dtype(vocab_size)
        self.num_pairs: int = resume["pairs"] if resume else 0
        self.num_pieces: dict[str, int] = dict(resume["pieces"]) if resume else dict.fromkeys(SIDES, 0)
        self.longest: dict[str, int] = dict(resume["longest"]) if resume else dict.fromkeys(SIDES, 0)
        """Subwords of the longest sentence, by side."""
        self._split = split
        self._folder = folder
        self._streams: dict[str, BinaryIO] = {}
        for name, size in _bytes(split, self.dtype, self.sizes()).items():
            self._streams[name] = (folder / name).open("r+b" if resume else "wb")
            if resume:
                self._streams[name].truncate(size)
                self._streams[name].seek(0, os.SEEK_END)
        if not resume:
            for _, offsets in _names(split).values():
                self._streams[offsets].write(np.zeros(1, _OFFSET_DTYPE).tobytes())
        self._teacher: BinaryIO | None = None
        if taught:
            name = _teacher_name(split)
            self._teacher = self._streams[name] = (folder / name).open("wb")

    def append(
        self, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], teacher_N: np.ndarray | None = None
    ) -> None:
        """Write the subword ids of these pairs, and the teacher's rows for their target positions."""
        assert len(sources) == len(targets)
        assert (teacher_N is None) == (self._teacher is None)
        if not sources:
            return
        sides = [
            (np.concatenate(sequences), np.fromiter(map(len, sequences), np.int64, len(sequences)))
            for sequences in (sources, targets)
        ]
        self.append_flat(*sides[0], *sides[1])
        if self._teacher and teacher_N is not None:
            assert len(teacher_N) == sum(map(len, targets)) + len(targets)
            self._teacher.write(teacher_N.astype(teacher_dtype(self.dtype)).tobytes())

    def append_flat(
        self, sources: np.ndarray, source_lengths: np.ndarray, targets: np.ndarray, target_lengths: np.ndarray
    ) -> None:
        """Write the subword ids of pairs, concatenated by side, given the number of ids of each text."""
        assert len(source_lengths) == len(target_lengths)
        if not len(source_lengths):
            return
        for side, ids, lengths in zip(SIDES, (sources, targets), (source_lengths, target_lengths), strict=True):
            pieces_name, offsets_name = _names(self._split)[side]
            self.longest[side] = max(self.longest[side], int(lengths.max()))
            offsets = self.num_pieces[side] + np.cumsum(lengths, dtype=np.int64)
            assert offsets[-1] == self.num_pieces[side] + len(ids)
            self._streams[pieces_name].write(ids.astype(self.dtype, copy=False).tobytes())
            self._streams[offsets_name].write(offsets.astype(_OFFSET_DTYPE, copy=False).tobytes())
            self.num_pieces[side] = int(offsets[-1])
        self.num_pairs += len(source_lengths)

    def sizes(self) -> dict[str, Any]:
        """Return what `resume` takes, to append after what was appended so far."""
        return {"pairs": self.num_pairs, "pieces": dict(self.num_pieces), "longest": dict(self.longest)}

    def sync(self) -> None:
        """Make sure that all that was appended is on disk."""
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Flush and close the files."""
        for stream in self._streams.values():
            stream.close()

    def record(self) -> dict[str, Any]:
        """Return this split's entry for the manifest. Call it after `close`."""
        return {
            "pairs": self.num_pairs,
            "dtype": self.dtype.str,
            "files": {name: file_record(self._folder / name) for name in self._streams},
        }

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ParallelShards:
    """The pairs of one split as arrays of subword ids, without BOS and EOS."""

    def __init__(
        self,
        pieces: dict[str, np.ndarray],
        offsets: dict[str, np.ndarray],
        teacher_N: np.ndarray | None = None,
        lengths: dict[str, np.ndarray] | None = None,
    ) -> None:
        """Take the arrays, by side; `teacher_N` has a row of `teacher_dtype` per target position, with EOS.

        `lengths` (int32) are the differences of `offsets`; None: they are computed.
        """
        self._pieces = pieces
        self._offsets = offsets
        self._teacher_N = teacher_N
        lengths = lengths or {side: np.diff(offsets[side]).astype(np.int32, copy=False) for side in SIDES}
        self.source_lengths, self.target_lengths = (lengths[side] for side in SIDES)

    @classmethod
    def open(cls, folder: Path, split: str = "train") -> "ParallelShards":
        """Map the arrays of `split` in a prepared folder. DataError if they do not fit the folder's manifest."""
        record = read_json(folder / MANIFEST, {"shards": {split: object}})["shards"][split]
        dtype = {each.str: each for each in DTYPES}.get(record["dtype"])
        expected_names = {name for names in _names(split).values() for name in names}
        teacher_name = _teacher_name(split)
        if dtype is None or record["files"].keys() - {teacher_name} != expected_names:
            raise DataError(f"{folder / MANIFEST} does not describe the arrays of {split}: prepare the corpus again")
        for name, expected in record["files"].items():
            size = (folder / name).stat().st_size if (folder / name).is_file() else None
            if size != expected["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise DataError(f"{folder / name} {found} instead of {expected['bytes']}: prepare the corpus again")
        pieces, offsets, lengths = {}, {}, {}
        for side, (pieces_name, offsets_name) in _names(split).items():
            pieces[side] = _map(folder / pieces_name, dtype)
            offsets[side] = _map(folder / offsets_name, _OFFSET_DTYPE)
            lengths[side] = _lengths(folder / offsets_name, record["pairs"], len(pieces[side]))
        teacher_N = None
        if teacher_name in record["files"]:
            teacher_N = _map(folder / teacher_name, teacher_dtype(dtype))
            needed = len(pieces["target"]) + record["pairs"]
            if len(teacher_N) != needed:
                problem = f"{len(teacher_N):,} rows for {needed:,} target positions"
                raise DataError(f"{folder / teacher_name} has {problem}: make the text again")
        return cls(pieces, offsets, teacher_N, lengths)

    def swapped(self) -> "ParallelShards":
        """Return the same pairs, in the same arrays, from target to source. They have no teacher."""
        source, target = SIDES
        return ParallelShards(
            {source: self._pieces[target], target: self._pieces[source]},
            {source: self._offsets[target], target: self._offsets[source]},
            lengths={source: self.target_lengths, target: self.source_lengths},
        )

    def check_pieces(self, vocab_size: int) -> None:
        """Raise DataError if an id is not in a vocabulary of this size, or if a teacher's probability is not one.

        Reads every page once.
        """
        for side, pieces_N in self._pieces.items():
            for start in range(0, len(pieces_N), _CHECKED_PIECES):
                part_N = pieces_N[start : start + _CHECKED_PIECES]
                if part_N.min() < 0 or part_N.max() >= vocab_size:
                    raise DataError(
                        f"the {side} side of the prepared corpus has subword ids outside 0..{vocab_size - 1}: prepare "
                        "the corpus again"
                    )
        for start in range(0, 0 if self._teacher_N is None else len(self._teacher_N), _CHECKED_PIECES // TEACHER_BEST):
            assert self._teacher_N is not None
            part_N = self._teacher_N[start : start + _CHECKED_PIECES // TEACHER_BEST]
            ids_NK, probability_NK = part_N["ids"], part_N["probabilities"]
            # A comparison with NaN is false.
            possible = ((probability_NK >= 0) & (probability_NK <= 1)).all()
            if ids_NK.min() < 0 or ids_NK.max() >= vocab_size or not possible:
                raise DataError(
                    f"the teacher's rows of the prepared corpus have subword ids outside 0..{vocab_size - 1}, or "
                    "probabilities outside 0..1: make the text again"
                )

    def __len__(self) -> int:
        return len(self.source_lengths)

    def epoch(self, _number: int) -> "ParallelShards":
        """Return the pairs of an epoch, which are these in all epochs (`nmt.data.batching.TrainingText`)."""
        return self

    def source(self, pair: int) -> np.ndarray:
        """Return the source subwords of one pair."""
        return self._pieces["source"][self._offsets["source"][pair] : self._offsets["source"][pair + 1]]

    def target(self, pair: int) -> np.ndarray:
        """Return the target subwords of one pair."""
        return self._pieces["target"][self._offsets["target"][pair] : self._offsets["target"][pair + 1]]

    def gather(self, side: str, pairs_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (concatenated subword ids of these pairs, their lengths), int64; `side` is "source" or "target"."""
        starts_B = self._offsets[side][pairs_B]
        lengths_B = self._offsets[side][pairs_B + 1] - starts_B
        return self._pieces[side][positions(starts_B, lengths_B)].astype(np.int64), lengths_B.astype(np.int64)

    @property
    def has_teacher(self) -> bool:
        """Whether the targets have a teacher's rows."""
        return self._teacher_N is not None

    def teacher(self, pairs_B: np.ndarray) -> np.ndarray | None:
        """Return the teacher's rows (`teacher_dtype`) of the target positions of these pairs, with EOS; None: none."""
        if self._teacher_N is None:
            return None
        starts_B = self._offsets["target"][pairs_B]
        lengths_B = self._offsets["target"][pairs_B + 1] - starts_B
        return self._teacher_N[positions(starts_B + pairs_B, lengths_B + 1)]


def positions(starts_B: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
    """Return the concatenated ranges start .. start + length - 1 (int64)."""
    first_B = np.cumsum(lengths_B) - lengths_B
    return np.repeat(starts_B - first_B, lengths_B) + np.arange(lengths_B.sum())


def _lengths(path: Path, num_pairs: int, num_pieces: int) -> np.ndarray:
    """Return the lengths (int32) of the sentences whose offsets are in a file.

    DataError unless there are `num_pairs` + 1 offsets that rise from 0 to `num_pieces`. The file is read in parts:
    pages of a map would count as memory of this process.
    """
    lengths_B = np.empty(num_pairs, dtype=np.int32)
    count, last, rises = 0, np.zeros(1, _OFFSET_DTYPE), True
    with path.open("rb") as stream:
        while rises and len(part := np.fromfile(stream, _OFFSET_DTYPE, _CHECKED_PIECES)):
            steps = np.diff(part, prepend=last if count else part[:1])
            rises = bool((steps >= 0).all()) and (count > 0 or part[0] == 0) and count + len(part) <= num_pairs + 1
            if rises:
                # The first offset is where the first sentence begins.
                own = steps[1:] if not count else steps
                lengths_B[max(count - 1, 0) : count - 1 + len(part)] = own
            count, last = count + len(part), part[-1:]
    if not rises or count != num_pairs + 1 or last[0] != num_pieces:
        raise DataError(
            f"{path} does not rise from 0 to {num_pieces:,} subwords over {num_pairs:,} pairs: prepare the corpus again"
        )
    return lengths_B


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped. Bytes after the last whole number are ignored.
    count = path.stat().st_size // dtype.itemsize
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype)
