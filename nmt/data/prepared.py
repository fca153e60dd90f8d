"""A prepared corpus on disk, which may have come from anybody: nothing in it is used before it is checked."""

import hashlib
import json
import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from nmt.config import CorpusConfig
from nmt.data.shards import MANIFEST, SIDES, ParallelShards, file_record
from nmt.data.subwords import Subwords
from nmt.errors import DataError, StorageError
from nmt.files import differs, read_json, read_regular, write_atomically

VOCABULARY = "subwords.model"
FORMAT = 2  # of the prepared folder
# A file changed so shortly before it was read may change again without a sign: clocks of file systems are coarse.
_UNSURE_SECONDS = 2.0
_FILE = {"bytes": int, "sha256": str}
FACTS = {
    "pairs_read": int,
    "pairs_kept": int,
    "dropped": {str: int},
    "source_pieces": int,
    "target_pieces": int,
    "vocabulary_size": int,
}
"""What a manifest counts, and a run records of it."""
_SHAPE = {
    "corpus": {str: object},
    "sources": [{"path": str, "mtime_ns": int, **_FILE}],
    **FACTS,
    "files": {VOCABULARY: _FILE, str: _FILE},
    "shards": {"train": {"pairs": int, "dtype": str, "files": {str: _FILE}}},
}
TEXTS = tuple(f"{split}.{side}.txt" for split in ("dev", "test") for side in (*SIDES, "domain"))


def prepared_path(corpus: CorpusConfig) -> Path:
    """Where the prepared corpus lies: any change of the section gives another folder."""
    section = asdict(corpus)
    del section["directory"]
    canonical = json.dumps(section, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    fingerprint = hashlib.sha256(canonical.encode(errors="surrogatepass")).hexdigest()
    return Path(corpus.directory) / f"{corpus.name}-{fingerprint[:8]}"


class Prepared:
    """A prepared corpus on disk."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path) -> "Prepared":
        """Open a finished folder. Arrays are checked by size when mapped, all else when it is read."""
        try:
            manifest = read_json(path / MANIFEST, {"format": object})
        except FileNotFoundError as error:
            name = path.name.rpartition("-")[0] or path.name
            raise DataError(
                f"corpus {name} is not prepared (no {path}): run nmt prepare with the same corpus settings"
            ) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{path / MANIFEST} is damaged ({reason}): run nmt prepare again") from error
        if manifest["format"] != FORMAT:
            raise DataError(f"{path} is of another version of this program: run nmt prepare again")
        problem = differs(manifest, _SHAPE) or _strange_file(manifest["files"])
        if problem:
            raise DataError(f"{path / MANIFEST} is damaged ({problem}): run nmt prepare again")
        return cls(path, manifest)

    @cached_property
    def fingerprint(self) -> str:
        """Of the vocabulary and the training arrays: what a run must find unchanged to be resumed."""
        files = self.manifest["files"] | self.manifest["shards"]["train"]["files"]
        contents = [(name, files[name]["sha256"]) for name in sorted(files) if _is_trained_on(name)]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    def subwords(self) -> Subwords:
        """The vocabulary."""
        self._check(VOCABULARY, self.manifest["files"][VOCABULARY])
        subwords = Subwords.load(self.path / VOCABULARY)
        if subwords.size != self.manifest["vocabulary_size"]:
            raise DataError(
                f"{self.path / VOCABULARY} has {subwords.size:,} pieces instead of "
                f"{self.manifest['vocabulary_size']:,}: run nmt prepare again"
            )
        return subwords

    def train(self) -> ParallelShards:
        """The training pairs, encoded."""
        return ParallelShards.open(self.path, "train")

    def text(self, split: str) -> tuple[list[str], list[str], list[str]]:
        """(source lines, target lines, domains) of "dev" or "test"; what is not known is empty."""
        sides: list[list[str]] = []
        for side in (*SIDES, "domain"):
            name = f"{split}.{side}.txt"
            sides.append(self._lines(name) if name in self.manifest["files"] else [])
        counts = {len(lines) for lines in sides if lines}
        if len(counts) > 1 or bool(sides[0]) != bool(sides[1]):
            raise DataError(f"{self.path}: the files of {split} have different numbers of lines: run nmt prepare again")
        return sides[0], sides[1], sides[2]

    def _lines(self, name: str) -> list[str]:
        self._check(name, self.manifest["files"][name])
        try:
            return read_regular(self.path / name).decode("utf-8").split("\n")[:-1]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path / name} is damaged ({error}): run nmt prepare again") from error

    @property
    def is_verified(self) -> bool:
        """Whether every file is as it was when `verify` read it."""
        try:
            return read_json(self._record, object) == self._states()
        except (OSError, ValueError):
            return False

    def verify(self) -> None:
        """Read every file and compare it with the manifest: DataError for the first that differs, or that holds pieces
        which the vocabulary does not have. What was found right is remembered beside the folder, if that can be
        written, so that a large corpus is not read whole at every start.
        """
        states = self._states()
        for name, record in self._files().items():
            self._check(name, record)
        self.train().check_pieces(self.subwords().size)
        if all(time.time() - state[3] / 1e9 > _UNSURE_SECONDS for state in states.values()):
            try:
                write_atomically(self._record, json.dumps(states).encode())
            except StorageError:
                return

    @property
    def _record(self) -> Path:
        return self.path.with_name(f".{self.path.name}.verified")

    def _files(self) -> dict[str, Any]:
        return self.manifest["files"] | self.manifest["shards"]["train"]["files"]

    def _states(self) -> dict[str, list[int]]:
        """What changes when anybody touches a file: nobody can set back the time of its last change (ctime)."""
        states = {}
        for name in (MANIFEST, *self._files()):
            try:
                stat = (self.path / name).stat()
            except FileNotFoundError as error:
                raise DataError(f"{self.path / name} is missing: run nmt prepare again") from error
            states[name] = [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        return states

    def _check(self, name: str, record: dict[str, Any]) -> None:
        path = self.path / name
        if not path.is_file():
            raise DataError(f"{path} is missing: run nmt prepare again")
        if file_record(path) != record:
            raise DataError(f"{path} is not what was written: run nmt prepare again")


def _is_trained_on(name: str) -> bool:
    return name == VOCABULARY or name.startswith("train.")


def _strange_file(names: dict[str, Any]) -> str:
    """What is wrong with the names of files, in a few words: they may not lead out of the folder."""
    strange = [name for name in names if name not in (VOCABULARY, *TEXTS)]
    return f"files.{strange[0]} is none of its files" if strange else ""
