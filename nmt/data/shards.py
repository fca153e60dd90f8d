"""A binarised parallel corpus on disk, mapped into memory.

Each side of a split is two flat little-endian arrays: the pieces of all sentences one after the other (uint16
where the vocabulary allows, else int32), and the int64 offsets at which sentences begin, with the end as the
last one. Pages are read when touched and dropped when memory is short: the corpus may be larger than it.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from nmt.errors import DataError
from nmt.files import read_json
from nmt.textfile import open_input

MANIFEST = "manifest.json"
SIDES = ("source", "target")
DTYPES = (np.dtype("<u2"), np.dtype("<i4"))
"""Of pieces: the first where the vocabulary allows."""
_OFFSET_DTYPE = np.dtype("<i8")
_CHECKED_PIECES = 1 << 24  # at a time


def file_record(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, as a manifest keeps them. DataError if it is a pipe or a device."""
    with open_input(path, "corpus") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"bytes": stream.tell(), "sha256": digest}


def _names(split: str) -> dict[str, tuple[str, str]]:
    return {side: (f"{split}.{side}.pieces", f"{split}.{side}.offsets") for side in SIDES}


class ShardWriter:
    """Writes the arrays of one split as its sentences come; what it holds does not grow with the corpus."""

    def __init__(self, folder: Path, vocab_size: int, split: str = "train") -> None:
        self.dtype = DTYPES[vocab_size > 1 << 16]
        self.num_pairs = 0
        self.num_pieces = dict.fromkeys(SIDES, 0)
        self.longest = dict.fromkeys(SIDES, 0)
        """Pieces of the longest sentence of a side."""
        self._split = split
        self._folder = folder
        self._streams = {name: (folder / name).open("wb") for pair in _names(split).values() for name in pair}
        for _, offsets in _names(split).values():
            self._streams[offsets].write(np.zeros(1, _OFFSET_DTYPE).tobytes())

    def append(self, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> None:
        """Add pairs."""
        assert len(sources) == len(targets)
        if not sources:
            return
        for side, sequences in zip(SIDES, (sources, targets), strict=True):
            pieces_name, offsets_name = _names(self._split)[side]
            lengths = [len(sequence) for sequence in sequences]
            self.longest[side] = max(self.longest[side], *lengths)
            offsets = self.num_pieces[side] + np.cumsum(lengths)
            self._streams[pieces_name].write(np.concatenate(sequences).astype(self.dtype).tobytes())
            self._streams[offsets_name].write(offsets.astype(_OFFSET_DTYPE).tobytes())
            self.num_pieces[side] = int(offsets[-1])
        self.num_pairs += len(sources)

    def close(self) -> None:
        """Write out what is buffered."""
        for stream in self._streams.values():
            stream.close()

    def record(self) -> dict[str, Any]:
        """The entry of the manifest for this split (after `close`)."""
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
    """The pairs of one split as arrays of pieces, without BOS and EOS."""

    def __init__(self, pieces: dict[str, np.ndarray], offsets: dict[str, np.ndarray]) -> None:
        self._pieces = pieces
        self._offsets = offsets
        self.source_lengths, self.target_lengths = (
            np.diff(offsets[side]).astype(np.int32, copy=False) for side in SIDES
        )

    @classmethod
    def open(cls, folder: Path, split: str = "train") -> "ParallelShards":
        """Map the arrays of `split` in a prepared folder, whose manifest says how large they must be."""
        record = read_json(folder / MANIFEST, {"shards": {split: object}})["shards"][split]
        dtype = {each.str: each for each in DTYPES}.get(record["dtype"])
        expected_names = {name for names in _names(split).values() for name in names}
        if dtype is None or record["files"].keys() != expected_names:
            raise DataError(f"{folder / MANIFEST} describes arrays that are none of {split}: prepare the corpus again")
        for name, expected in record["files"].items():
            size = (folder / name).stat().st_size if (folder / name).is_file() else None
            if size != expected["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise DataError(f"{folder / name} {found} instead of {expected['bytes']}: prepare the corpus again")
        pieces, offsets = {}, {}
        for side, (pieces_name, offsets_name) in _names(split).items():
            pieces[side] = _map(folder / pieces_name, dtype)
            offsets[side] = _map(folder / offsets_name, _OFFSET_DTYPE)
            _check_offsets(folder / offsets_name, offsets[side], record["pairs"], len(pieces[side]))
        return cls(pieces, offsets)

    def check_pieces(self, vocab_size: int) -> None:
        """DataError if there is a piece that a vocabulary of this size does not have. Reads every page once."""
        for side, pieces_N in self._pieces.items():
            for start in range(0, len(pieces_N), _CHECKED_PIECES):
                part_N = pieces_N[start : start + _CHECKED_PIECES]
                if part_N.min() < 0 or part_N.max() >= vocab_size:
                    raise DataError(
                        f"{side} pieces of the prepared corpus hold numbers outside 0 .. {vocab_size - 1}: prepare the "
                        "corpus again"
                    )

    def __len__(self) -> int:
        return len(self.source_lengths)

    def source(self, pair: int) -> np.ndarray:
        """The source pieces of one pair."""
        return self._pieces["source"][self._offsets["source"][pair] : self._offsets["source"][pair + 1]]

    def target(self, pair: int) -> np.ndarray:
        """The target pieces of one pair."""
        return self._pieces["target"][self._offsets["target"][pair] : self._offsets["target"][pair + 1]]

    def gather(self, side: str, pairs_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(pieces of these pairs one after the other, how many each has) of "source" or "target", int64."""
        starts_B = self._offsets[side][pairs_B]
        lengths_B = self._offsets[side][pairs_B + 1] - starts_B
        first_B = np.cumsum(lengths_B) - lengths_B
        positions_N = np.repeat(starts_B - first_B, lengths_B) + np.arange(lengths_B.sum())
        return self._pieces[side][positions_N].astype(np.int64), lengths_B.astype(np.int64)


def _check_offsets(path: Path, offsets: np.ndarray, num_pairs: int, num_pieces: int) -> None:
    """DataError unless the offsets rise from 0 to the number of pieces, one for each pair and the end."""
    rises = (
        len(offsets) == num_pairs + 1
        and offsets[0] == 0
        and offsets[-1] == num_pieces
        and bool((offsets[1:] >= offsets[:-1]).all())
    )
    if not rises:
        raise DataError(
            f"{path} does not rise from 0 to {num_pieces:,} pieces over {num_pairs:,} pairs: prepare the corpus again"
        )


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped, and what is left over after the last whole number is none.
    count = path.stat().st_size // dtype.itemsize
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype)
