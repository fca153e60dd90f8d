"""Sets of sentence pairs to score: a run's own sets, or files given by the user.

Their reports never overwrite each other. A run's own sets are named test and dev; the name of any other set begins with
"set-" and ends with part of the hash of its text.
"""

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nmt.errors import DataError, UserError
from nmt.run import RunDirectory
from nmt.textfile import TextReader
from nmt.wording import counted

_LONGEST_NAME = 60


@dataclass(frozen=True)
class PairedFile:
    """One side of a set that was read from a file."""

    path: str
    sha256: str
    """Hash of its lines in UTF-8, each with a line feed at the end. Compressed files are unpacked first."""


@dataclass(frozen=True)
class EvaluationSet:
    """Sentences and their translations, line by line."""

    name: str
    """Name in file names of reports: test, dev, or set-NAME-HASH."""
    title: str
    """Name for readers: "test", "dev", or the name of a file."""
    sources: list[str]
    references: list[list[str]]
    """One list per translator; at least one."""
    domains: list[str]
    """Empty if unknown."""
    files: tuple[PairedFile, ...] = ()
    """Files of source and references; empty for a run's own set."""

    @property
    def own(self) -> bool:
        """True for a set of the run itself."""
        return not self.files

    def report(self, kind: str, ending: str) -> str:
        """Return the file name of a report: KIND.ENDING for the run's test set, else KIND-NAME.ENDING."""
        return f"{kind}.{ending}" if self.name == "test" else f"{kind}-{self.name}.{ending}"

    def to_dict(self) -> dict[str, Any]:
        """Return the identity of the set, as JSON has it."""
        source, *references = [asdict(file) for file in self.files] or [{}]
        return {
            "set": self.name,
            "title": self.title,
            "own": self.own,
            "sources_sha256": sha256_of(self.sources),
            "source": source,
            "references": references,
        }


def evaluation_set(source: str | None, references: Sequence[str], split: str, run: RunDirectory) -> EvaluationSet:
    """Return the set made of these files, or without files, the run's own set `split`.

    UserError for a source without references or the reverse. DataError if files are empty or do not pair line by line,
    or if the run has no such set. CheckpointError if the run's set is damaged.
    """
    if (source is None) != (not references):
        raise UserError("--source and --reference go together")
    if source is not None:
        return _from_files(source, references)
    sources, targets, domains = run.text(split)
    if not sources:
        raise DataError(f"{run.path} has no {split} set: give --source and --reference")
    return EvaluationSet(split, split, sources, [targets], domains)


def _from_files(source: str, references: Sequence[str]) -> EvaluationSet:
    names = (source, *references)
    if names.count("-") > 1:
        raise UserError("--source and --reference: only one of them can be standard input")
    sides = [_read(name) for name in names]
    if not sides[0]:
        raise DataError(f"{_title(source)} is empty: there is nothing to score")
    for name, side in zip(names, sides, strict=True):
        if len(side) != len(sides[0]):
            raise DataError(
                f"{_title(source)} has {counted(len(sides[0]), 'line')} but {_title(name)} has {len(side):,}: "
                "they must pair line by line"
            )
    files = tuple(PairedFile(_path(name), sha256_of(side)) for name, side in zip(names, sides, strict=True))
    digest = hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()[:8]
    title = _title(source) if source == "-" else Path(source).name
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", title).strip("-")[:_LONGEST_NAME]
    return EvaluationSet(f"set-{plain}-{digest}", title, sides[0], sides[1:], [], files)


def _read(name: str) -> list[str]:
    try:
        # The file may be a pipe, as it is read only once.
        with open(sys.stdin.fileno() if name == "-" else name, "rb", closefd=name != "-") as stream:
            return list(TextReader(stream, _title(name)))
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from error


def _title(name: str) -> str:
    return "standard input" if name == "-" else name


def _path(name: str) -> str:
    return name if name == "-" else str(Path(name).resolve())


def sha256_of(lines: Sequence[str]) -> str:
    """Return the hash of lines in UTF-8, each with a line feed at the end."""
    found = hashlib.sha256()
    for line in lines:
        found.update(f"{line}\n".encode())
    return found.hexdigest()
