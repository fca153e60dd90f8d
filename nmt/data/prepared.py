"""Read a prepared corpus. It may come from an untrusted source, so every file is checked before use."""

import hashlib
import json
import re
import time
from collections.abc import Iterable
from dataclasses import asdict
from functools import cached_property, reduce
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

from nmt.config import CorpusConfig, Direction
from nmt.config.corpus import SPLITS
from nmt.config.reading import parse_yaml, read_settings
from nmt.data.shards import MANIFEST, SIDES, ParallelShards, file_record
from nmt.data.subwords import Subwords
from nmt.data.symbols import Symbols
from nmt.errors import DataError, StorageError
from nmt.files import differs, read_json, read_regular, write_atomically

VOCABULARY = "subwords.model"
_RUN_SETTINGS = "config.yaml"
_MOST_SETTINGS_BYTES = 1 << 20
FORMAT = 2  # version of the prepared folder's format
# File systems have coarse clocks: a file that changed this recently could change again and keep its timestamp.
_UNSURE_SECONDS = 2.0
_FILE = {"bytes": int, "sha256": str}
_OF_TRAINING = ("mixture", "weight", "temperature", "subwords.sampling")
"""Settings of the corpus that change how a run draws from prepared text, not the text."""
_MEANINGS = ("languages", "tags")
FACTS = {
    "pairs_read": int,
    "pairs_kept": int,
    "dropped": {str: int},
    "source_pieces": int,
    "target_pieces": int,
    "vocabulary_size": int,
}
"""Counts in a manifest that a run records too, with their types."""
_OPTIONAL = {
    "symbols": [str],
    "longest_source_pieces": int,
    "parts": [{"name": str, "source": str, "target": str, "tag": str, "shards": str, "swapped": bool}],
    "vocabulary": {"from": str, "sha256": str},
}
_SHAPE = {
    "corpus": {"source_language": str, "target_language": str, str: object},
    "sources": [{"path": str, "mtime_ns": int, **_FILE}],
    **FACTS,
    "files": {VOCABULARY: _FILE, str: _FILE},
    "shards": {str: {"pairs": int, "dtype": str, "files": {str: _FILE}}},
}
TEXTS = tuple(f"{split}.{side}.txt" for split in ("dev", "test") for side in (*SIDES, "domain", "direction"))
_SHARDS = re.compile(r"train(\.[A-Za-z0-9_-]+)*")
_NEWER_FILTERS = (
    *("no_letters", "mojibake", "urls", "numbers", "test_overlap"),
    *("near_duplicates", "duplicate_sources", "duplicate_targets"),
)
_NO_EXAMPLES = {"slots": 0.0, "terms": 0.0}  # other settings of examples are newer
_NEWER: dict[str, tuple[Any, ...]] = {
    **{f"examples.{name}": (0.0,) for name in ("quoted", "title_case", "lower_case", "upper_case")},
    "examples": (_NO_EXAMPLES,),
    "directions": ([],),
    "filters.min_score": (None,),
    "filters.wrong_language": (0.0,),
    **{f"filters.{name}": (False,) for name in _NEWER_FILTERS},
    "punctuation": ("keep",),
    "subwords.vocabulary": ("auto", "learn"),
    **{
        f"{split}.{name}": (unused,)
        for split in SPLITS
        for name, unused in (("texts", {}), ("tags", []), ("scores", []))
    },
}
"""Settings of a corpus that are newer than the first corpora, and their values if they are not used."""


def prepared_path(corpus: CorpusConfig) -> Path:
    """Return the folder of the prepared corpus. Different settings of `nmt prepare` have different folders.

    A setting that is newer than the first corpora counts only if it is used, so that those are still found.
    """
    section = asdict(corpus)
    for key in ("directory", *_OF_TRAINING, *_NEWER):
        *names, last = key.split(".")
        inner = reduce(getitem, names, section)
        if key not in _NEWER or inner[last] in _NEWER[key]:
            del inner[last]
    canonical = json.dumps(section, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    fingerprint = hashlib.sha256(canonical.encode(errors="surrogatepass")).hexdigest()
    return Path(corpus.directory) / f"{corpus.name}-{fingerprint[:8]}"


def find_prepared(reference: str) -> "Prepared":
    """Return the prepared corpus of this folder, or the one of a run, which is given by its folder or name in runs/.

    DataError if there is no such folder or run, or if the corpus of the run is not prepared here.
    """
    for folder in (Path(reference), Path("runs") / reference):
        # An exported model has both files.
        if (folder / _RUN_SETTINGS).is_file():
            corpus = _corpus_of(folder / _RUN_SETTINGS)
            try:
                return Prepared.open(prepared_path(corpus))
            except DataError as error:
                raise DataError(f"{reference}: {error}") from error
        if (folder / MANIFEST).is_file():
            return Prepared.open(folder)
    raise DataError(
        f"{reference} is neither a prepared corpus nor a run: give the folder that nmt prepare printed, or the folder "
        "or name of a run"
    )


def have_texts(references: Iterable[str], fingerprints: list[str]) -> bool:
    """Say whether these corpora, which are given as to `find_prepared`, are found and have these fingerprints."""
    try:
        return [find_prepared(reference).fingerprint for reference in references] == fingerprints
    except DataError:
        return False


def _corpus_of(settings: Path) -> CorpusConfig:
    """Return the corpus settings in the config.yaml of a run. DataError if they cannot be read."""
    try:
        sections = parse_yaml(read_regular(settings, _MOST_SETTINGS_BYTES).decode())
        if not isinstance(sections, dict) or "corpus" not in sections:
            raise ValueError("it has no section corpus")
        return read_settings(CorpusConfig, sections["corpus"], "corpus")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{settings} cannot be read ({reason}): restore it, or choose another run") from error


class Part(NamedTuple):
    """The training pairs of one direction and tag."""

    name: str
    """Name for messages: the direction, and the tag if there is one, such as "en-de" or "en-de bt"."""
    direction: Direction
    tag: str
    """Domain or origin; empty for none."""
    shards: ParallelShards
    prefix: tuple[int, ...]
    """Ids of the symbols before every source sentence. They are not in the shards."""


class Prepared:
    """A prepared corpus on disk."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path) -> "Prepared":
        """Open a finished folder. DataError if its manifest is missing, damaged or of another version.

        Of the arrays, only the sizes are checked, when they are mapped. All other files are checked when they are read.
        """
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
            raise DataError(f"{path} was made by another version of this program: run nmt prepare again")
        problem = differs(manifest, _SHAPE) or _strange_file(manifest["files"]) or _strange_part(manifest)
        if problem:
            raise DataError(f"{path / MANIFEST} is damaged ({problem}): run nmt prepare again")
        return cls(path, manifest)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the vocabulary, the meanings of its symbols, and the training arrays with their directions and tags.

        A run can only resume if these have not changed.
        """
        files = self._files()
        contents: list[Any] = [(name, files[name]["sha256"]) for name in sorted(files) if _is_trained_on(name)]
        meanings = {key: self.manifest[key] for key in (*_MEANINGS, "parts") if self.manifest.get(key)}
        return hashlib.sha256(json.dumps([*contents, meanings] if meanings else contents).encode()).hexdigest()

    def subwords(self) -> Subwords:
        """Load the vocabulary. DataError if it is damaged or does not fit the manifest."""
        self._check(VOCABULARY, self.manifest["files"][VOCABULARY])
        subwords = Subwords.load(self.path / VOCABULARY)
        if subwords.size != self.manifest["vocabulary_size"]:
            raise DataError(
                f"{self.path / VOCABULARY} has {subwords.size:,} subwords instead of "
                f"{self.manifest['vocabulary_size']:,}: run nmt prepare again"
            )
        return subwords

    @cached_property
    def symbols(self) -> Symbols:
        """Meanings of the corpus's reserved symbols. DataError if the manifest is damaged."""
        return Symbols.of(self.manifest, str(self.path / MANIFEST))

    def parts(self) -> list[Part]:
        """Map the encoded training pairs, by direction and tag. DataError if their files do not fit the manifest.

        Two directions between the same languages share their arrays.
        """
        opened = {name: ParallelShards.open(self.path, name) for name in self.manifest["shards"]}
        subwords = self.subwords() if self.symbols != Symbols() else None
        parts = []
        for record in self._parts():
            shards, tag = opened[record["shards"]], record["tag"]
            parts.append(
                Part(
                    record["name"],
                    Direction(record["source"], record["target"]),
                    tag,
                    shards.swapped() if record["swapped"] else shards,
                    self.symbols.prefix(subwords, record["target"], tag) if subwords else (),
                )
            )
        return parts

    def trained_directions(self) -> list[Direction]:
        """Return the directions of the training pairs."""
        return list(dict.fromkeys(Direction(part["source"], part["target"]) for part in self._parts()))

    def _parts(self) -> list[dict[str, Any]]:
        corpus = self.manifest["corpus"]
        source, target = corpus["source_language"], corpus["target_language"]
        whole = {"name": f"{source}-{target}", "source": source, "target": target, "tag": "", "swapped": False}
        return self.manifest.get("parts") or [whole | {"shards": "train"}]

    def text(self, split: str) -> tuple[list[str], list[str], list[str]]:
        """Return (source lines, target lines, domains) of "dev" or "test"; a list is empty if it has no file.

        DataError if a file is damaged, or if the files differ in their number of lines.
        """
        sides: list[list[str]] = []
        for side in (*SIDES, "domain"):
            name = f"{split}.{side}.txt"
            sides.append(self._lines(name) if name in self.manifest["files"] else [])
        counts = {len(lines) for lines in sides if lines}
        if len(counts) > 1 or bool(sides[0]) != bool(sides[1]):
            raise DataError(f"{self.path}: the files of {split} have different numbers of lines: run nmt prepare again")
        return sides[0], sides[1], sides[2]

    def directions(self, split: str) -> list[Direction]:
        """Return the direction of each pair of "dev" or "test"; empty in a corpus without `corpus.directions`.

        Errors as for `text`.
        """
        name = f"{split}.direction.txt"
        lines = self._lines(name) if name in self.manifest["files"] else []
        if lines and len(lines) != len(self.text(split)[0]):
            raise DataError(f"{self.path}: the files of {split} have different numbers of lines: run nmt prepare again")
        try:
            return [Direction.of(line) for line in lines]
        except ValueError as error:
            raise DataError(f"{self.path / name} is damaged ({error}): run nmt prepare again") from error

    def _lines(self, name: str) -> list[str]:
        self._check(name, self.manifest["files"][name])
        try:
            return read_regular(self.path / name).decode("utf-8").split("\n")[:-1]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path / name} is damaged ({error}): run nmt prepare again") from error

    @property
    def is_verified(self) -> bool:
        """True if no file has changed since `verify` read it."""
        try:
            return read_json(self._record, object) == self._states()
        except (OSError, ValueError):
            return False

    def verify(self) -> None:
        """Read every file and compare it with the manifest. DataError for the first one that differs, or if the arrays
        have subword ids outside the vocabulary.

        The result is recorded next to the folder, if that place is writable, so that a large corpus is not read whole
        at every start.
        """
        states = self._states()
        for name, record in self._files().items():
            self._check(name, record)
        size = self.subwords().size
        for name in self.manifest["shards"]:
            ParallelShards.open(self.path, name).check_pieces(size)
        if all(time.time() - state[3] / 1e9 > _UNSURE_SECONDS for state in states.values()):
            try:
                write_atomically(self._record, json.dumps(states).encode())
            except StorageError:
                return

    @property
    def _record(self) -> Path:
        path = self.path.resolve()  # "." has no name
        return path.with_name(f".{path.name}.verified")

    def _files(self) -> dict[str, Any]:
        shards = self.manifest["shards"].values()
        return {name: record for files in (self.manifest, *shards) for name, record in files["files"].items()}

    def _states(self) -> dict[str, list[int]]:
        """Return (inode, size, mtime, ctime) by file. Any change of a file shows, since users cannot set its ctime."""
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
            raise DataError(f"{path} has changed since nmt prepare wrote it: run nmt prepare again")


def _is_trained_on(name: str) -> bool:
    return name == VOCABULARY or name.startswith("train.")


def _strange_file(names: dict[str, Any]) -> str:
    """Return a complaint about unknown file names, else "". A name must not lead out of the folder."""
    strange = [name for name in names if name not in (VOCABULARY, *TEXTS)]
    return f"files.{strange[0]} is not the name of one of its files" if strange else ""


def _strange_part(manifest: dict[str, Any]) -> str:
    """Return a complaint about arrays whose names lead elsewhere, or parts without arrays, else ""."""
    if strange := [name for name in manifest["shards"] if not _SHARDS.fullmatch(name)]:
        return f"shards.{strange[0]} is not the name of arrays"
    files = [(name, file) for name, record in manifest["shards"].items() for file in record["files"]]
    if outside := [file for name, file in files if not file.startswith(f"{name}.") or Path(file).name != file]:
        return f"shards: {outside[0]} is not the name of one of its files"
    for key, shape in _OPTIONAL.items():
        if key in manifest and (problem := differs(manifest[key], shape, key)):
            return problem
    named = [part["shards"] for part in manifest.get("parts", [])] or ["train"]
    missing = [name for name in named if name not in manifest["shards"]]
    return f"shards.{missing[0]} is missing" if missing else ""
