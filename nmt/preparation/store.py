"""The filtered text of a corpus on disk, so that a preparation can be resumed, and redoes only what it must.

    data/prepared/NAME.text/<hash of how a unit is read and filtered>/
        00000.parquet ...   blocks: texts that passed the rules of single pairs, with the keys to compare them by
        unit.json           when all blocks are there: how many rows they were, and what was noted

A unit is a group of source files that are read together. A changed file, or a rule that another setting changes, gives
another hash; other units stay. Blocks are Parquet files with zstd, which other programs can read too.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nmt.corpus.pairs import ReadReport
from nmt.errors import DataError
from nmt.files import differs, read_json, remove, replacing, write_atomically
from nmt.preparation.tally import Tally

_UNIT = "unit.json"
_VERSION = 2
"""Version of how blocks are cut, filtered and stored."""
_FOLDER = re.compile(r"[0-9a-f]{16}")
_FILE = re.compile(r"\d{5}\.parquet|unit\.json|\.[0-9a-f]+\.tmp")
_ABOUT = b"nmt"
_LEVEL = 1  # of zstd
_REPORT_SHAPE = {"invalid_lines": int, "empty_rows": int, "notes": [str]}
_UNIT_SHAPE = {"rows": int, "blocks": int, "report": _REPORT_SHAPE}
_BLOCK_SHAPE = {"pairs": [int], "tally": Tally.shape()}


class StoredBlock(NamedTuple):
    """A block on disk."""

    path: Path
    pairs: list[int]
    """Pairs of each kind, which follow one another in the file."""
    seed: int
    """Number for pseudorandom choices, the same wherever the block is in the corpus."""

    @property
    def total(self) -> int:
        """Number of pairs."""
        return sum(self.pairs)

    def keys(self, name: str) -> np.ndarray:
        """Return the keys of all pairs (uint64). DataError if the file is damaged."""
        return np.asarray(_read(self.path, [f"key.{name}"]).column(0).to_numpy())

    def texts(self, places: np.ndarray | None = None) -> tuple[list[str], list[str]]:
        """Return the sources and targets, of the pairs at these places only if given. DataError: damaged file."""
        table = _read(self.path, ["source", "target"])
        if places is not None and len(places) < self.total:
            table = table.take(places)
        return table.column("source").to_pylist(), table.column("target").to_pylist()

    def domains(self, places: np.ndarray) -> list[str]:
        """Return the domains of the pairs at these places; "" for none. DataError if the file is damaged."""
        table = _read(self.path, None)
        if "domain" not in table.column_names:
            return [""] * len(places)
        return list(table.column("domain").take(places).to_pylist())

    def rows(self) -> np.ndarray:
        """Return the row number of each pair in its unit, from 0 (int64)."""
        return np.asarray(_read(self.path, ["row"]).column(0).to_numpy()).astype(np.int64)


class Unit:
    """The folder of one unit's blocks."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def seed_of(self, number: int) -> int:
        """Return the number for pseudorandom choices in a block."""
        return (int(self.path.name[:15], 16) + (number << 32)) % (1 << 63)

    def block_path(self, number: int) -> Path:
        """Return the path of a block's file."""
        return self.path / f"{number:05}.parquet"

    def record(self) -> dict[str, Any] | None:
        """Return what `finish` recorded; None if blocks may be missing."""
        try:
            record = dict(read_json(self.path / _UNIT, _UNIT_SHAPE))
        except (OSError, ValueError):
            return None
        return record if bool(record["rows"]) == bool(record["blocks"]) else None

    def finish(self, num_rows: int, num_blocks: int, report: ReadReport) -> None:
        """Record that all blocks are there."""
        noted = {key: value for key, value in asdict(report).items() if key in _REPORT_SHAPE}
        record = {"rows": num_rows, "blocks": num_blocks, "report": noted}
        write_atomically(self.path / _UNIT, json.dumps(record).encode())

    def blocks(self) -> list[tuple[StoredBlock, Tally]]:
        """Return the blocks of a finished unit, with their counts. DataError for a damaged one, which is removed."""
        record = self.record()
        assert record is not None
        try:
            return [self._block(number) for number in range(record["blocks"])]
        except DataError:
            (self.path / _UNIT).unlink(missing_ok=True)  # the unit is unfinished again
            raise

    def _block(self, number: int) -> tuple[StoredBlock, Tally]:
        from pyarrow import ArrowException, parquet

        path = self.block_path(number)
        try:
            about = json.loads(parquet.read_schema(path).metadata[_ABOUT])
            if problem := differs(about, _BLOCK_SHAPE):
                raise ValueError(problem)
        except (ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            path.unlink(missing_ok=True)
            raise _damaged(path, error) from error
        return StoredBlock(path, about["pairs"], self.seed_of(number)), Tally.of(about["tally"])

    def has_block(self, number: int) -> bool:
        """Return whether a block was written. A file appears when it is complete."""
        return self.block_path(number).is_file()


class TextStore:
    """The folder of a corpus's filtered text."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def unit(self, key: Mapping[str, Any]) -> Unit:
        """Return the folder of a unit; `key` is all that its blocks depend on, in a form for JSON."""
        canonical = json.dumps([_VERSION, key], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode(errors="surrogatepass")).hexdigest()
        path = self.path / digest[:16]
        path.mkdir(parents=True, exist_ok=True)
        for left in path.glob(".*.tmp"):  # of a process that was killed
            left.unlink()
        return Unit(path)

    def keep_only(self, units: Iterable[Unit]) -> None:
        """Remove the text of all other units: of other files, and of other rules. Nothing else is touched."""
        kept = {unit.path.name for unit in units}
        with suppress(FileNotFoundError):
            for path in self.path.iterdir():
                if path.name not in kept and _is_unit(path):
                    remove(path)


def _is_unit(path: Path) -> bool:
    """Return whether this is a folder that a preparation made: it has a unit's name and files, and no others."""
    if not _FOLDER.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    return all(_FILE.fullmatch(each.name) and not each.is_symlink() for each in path.iterdir())


def write_block(
    path: Path,
    texts: tuple[Sequence[str], Sequence[str]],
    domains: Sequence[str],
    keys: Mapping[str, np.ndarray],
    about: dict[str, Any],
) -> None:
    """Write a block: texts of both sides, their domains (empty for none), "row" and keys (uint64) by name, and facts.

    `about` has "pairs", the numbers of pairs of each kind, and "tally".
    """
    import pyarrow
    from pyarrow import parquet

    arrays = {
        "source": pyarrow.array(texts[0], pyarrow.string()),
        "target": pyarrow.array(texts[1], pyarrow.string()),
        **({"domain": pyarrow.array(domains, pyarrow.string())} if domains else {}),
        **{name: pyarrow.array(values) for name, values in keys.items()},
    }
    table = pyarrow.table(arrays).replace_schema_metadata({_ABOUT: json.dumps(about)})
    if path.is_dir():
        remove(path)
    with replacing(path) as stream:
        parquet.write_table(
            table,
            stream,
            compression="zstd",
            compression_level=_LEVEL,
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )


def _read(path: Path, columns: list[str] | None) -> Any:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(path, columns=columns, use_threads=False, page_checksum_verification=True)
    except (ArrowException, OSError) as error:
        path.unlink(missing_ok=True)
        path.with_name(_UNIT).unlink(missing_ok=True)
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"{path} is damaged or missing ({reason}): run nmt prepare again, which makes it again")


def in_kinds(block: StoredBlock, mask_N: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the part of a block's mask (bool) of each kind."""
    start = 0
    for count in block.pairs:
        yield mask_N[start : start + count]
        start += count
