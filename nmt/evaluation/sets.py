"""Sets of sentence pairs to score: a run's own sets, files given by the user, or sets that sacreBLEU knows by name.

Their reports never overwrite each other. A run's own sets are named test and dev; the name of any other set begins with
"set-" and ends with part of the hash of its text.
"""

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nmt.config import Direction
from nmt.decoding.directions import Directions, places_by_direction
from nmt.decoding.translation import Options
from nmt.errors import DataError, UserError
from nmt.evaluation.scores import named_set
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
    """Name for readers: "test", "dev", the name of a file, or sacreBLEU's name with the languages. It ends with the
    name of the file of translations made elsewhere, if there are any."""
    sources: list[str]
    """Empty if they are unknown: translations made elsewhere can be scored without them."""
    references: list[list[str]]
    """One list per translator; at least one."""
    domains: list[str]
    """Empty if unknown."""
    files: tuple[PairedFile, ...] = ()
    """Files of source, if there is one, and references; empty for a run's own set."""
    hypotheses: list[str] | None = None
    """Translations made elsewhere; None: the run translates."""
    directions: tuple[Direction, ...] = ()
    """Direction of each line in a run's own set of several directions; else empty."""
    direction: Direction | None = None
    """Direction of all lines; None: the only one of the run."""
    tag: str = ""
    """Domain or origin that the run shall take the sources for; empty: none."""
    zero_shot: bool = False
    """True if the run was not trained in `direction`."""
    part_of: str = ""
    """Title of the set of several directions that this is a part of; empty: of none."""
    notes: tuple[str, ...] = ()
    """What readers should know about the files."""

    def options(self, base: Options) -> Options:
        """Return the options of a call that translates this set, otherwise as `base`."""
        return replace(base, direction=self.direction, tag=self.tag)

    @property
    def size(self) -> int:
        """Number of sentences."""
        return len(self.references[0])

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
        found = {
            "set": self.name,
            "title": self.title,
            "own": self.own,
            "sources_sha256": sha256_of(self.sources),
            "source": source,
            "references": references,
        }
        if self.direction is not None:
            found |= {"direction": str(self.direction), "zero_shot": self.zero_shot}
        return found | ({"tag": self.tag} if self.tag else {})


@dataclass(frozen=True)
class Request:
    """A set to score, as a command line describes it."""

    split: str = ""
    """One of the run's own sets; `named` is one of sacreBLEU's. Without both, the set is in files."""
    named: str = ""
    source: str | None = None
    references: tuple[str, ...] = ()
    hypothesis: str | None = None
    """File of translations made elsewhere."""

    @property
    def files(self) -> list[str]:
        """Names of all files."""
        return [name for name in (self.source, *self.references, self.hypothesis) if name is not None]


def requests(options: Sequence[tuple[str, str]]) -> list[Request]:
    """Return the sets that options describe: pairs (split, set, source, reference or hypothesis; value) in order.

    Options belong to one set until one comes that this set cannot take: --split and --set always begin a set, which may
    have a hypothesis, and a second --source or --hypothesis begins the next set of files.
    """
    found: list[dict[str, tuple[str, ...]]] = []
    for name, value in options:
        last = found[-1] if found else {}
        named = "split" in last or "set" in last
        second = name in last and name != "reference"
        if not last or name in ("split", "set") or second or (named and name != "hypothesis"):
            last = {}
            found.append(last)
        last[name] = (*last.get(name, ()), value)
    return [
        Request(
            split=each.get("split", ("",))[0],
            named=each.get("set", ("",))[0],
            source=each.get("source", (None,))[0],
            references=each.get("reference", ()),
            hypothesis=each.get("hypothesis", (None,))[0],
        )
        for each in found
    ]


def evaluation_sets(wanted: Sequence[Request], run: RunDirectory | None, languages: str) -> list[EvaluationSet]:
    """Return these sets. `languages`, such as "en-de", choose the text of sacreBLEU's sets.

    UserError for a source without references or the reverse, for a set that needs a run if there is none, or if several
    files are standard input. DataError if files are empty or do not pair line by line, or if a set is missing.
    CheckpointError if the run's own set is damaged.
    """
    if [name for each in wanted for name in each.files].count("-") > 1:
        raise UserError("only one of all files can be standard input")
    return [_evaluation_set(each, run, languages) for each in wanted]


def _evaluation_set(wanted: Request, run: RunDirectory | None, languages: str) -> EvaluationSet:
    in_files = wanted.source is not None or bool(wanted.references)
    if in_files and not wanted.references:
        raise UserError(f"--source {wanted.source} has no --reference: give both for each set")
    if in_files and wanted.source is None and wanted.hypothesis is None:
        raise UserError(f"--reference {wanted.references[0]} has no --source: give --source first in each set")
    if run is None and not (in_files and wanted.hypothesis is not None):
        raise UserError(
            "without RUN, nothing is translated: give --hypothesis F and --reference F for each set "
            "(try nmt evaluate --help)"
        )
    if wanted.named:
        source, *references = named_set(wanted.named, languages)
        return _from_files(source, references, wanted.hypothesis, f"{wanted.named} {languages}")
    if in_files:
        return _from_files(wanted.source, wanted.references, wanted.hypothesis)
    assert run is not None
    return _own_set(run, wanted.split or "test", wanted.hypothesis)


def _own_set(run: RunDirectory, split: str, hypothesis: str | None) -> EvaluationSet:
    sources, targets, domains = run.text(split)
    if not sources:
        raise DataError(f"{run.path} has no {split} set: give --source and --reference")
    hypotheses, notes = (None, list[str]()) if hypothesis is None else read_lines(hypothesis)
    if hypothesis is not None and hypotheses is not None:
        _check_pair(f"the {split} set of {run.path}", sources, hypothesis, hypotheses)
    title = split if hypothesis is None else f"{split}, {_short(hypothesis)}"
    directions = tuple(run.directions(split))
    return EvaluationSet(
        split, title, sources, [targets], domains, hypotheses=hypotheses, directions=directions, notes=tuple(notes)
    )


def by_direction(
    text: EvaluationSet, directions: Directions, asked: Direction | None = None, tag: str = ""
) -> list[EvaluationSet]:
    """Return a set as the sets of one direction each that a model of `directions` translates.

    `asked` chooses one direction; None: all that the set has. For a model of a single direction, the set stays as it
    is. DataError if the set has no line of the direction. UserError if its direction must be asked for.
    """
    if tag:
        text = replace(text, name=f"{text.name}-{tag}", title=f"{text.title}, tag {tag}", tag=tag)
    if not directions.are_several:
        return [text]
    if not text.directions:
        return [_in_direction(text, asked or directions.choose(None, None), directions)]
    there = places_by_direction(text.directions)
    if asked is not None and asked not in there:
        listed = ", ".join(map(str, there))
        raise DataError(f"the {text.title} set has no lines from {asked.source} to {asked.target}; it has: {listed}")
    return [
        _in_direction(_lines_at(text, there[direction]), direction, directions)
        for direction in (there if asked is None else [asked])
    ]


def _lines_at(text: EvaluationSet, places: Sequence[int]) -> EvaluationSet:
    """Return the lines of one direction of a set of several, which are at these places."""

    def chosen(lines: list[str]) -> list[str]:
        return [lines[place] for place in places] if lines else []

    return replace(
        text,
        sources=chosen(text.sources),
        references=[chosen(lines) for lines in text.references],
        domains=chosen(text.domains),
        hypotheses=None if text.hypotheses is None else chosen(text.hypotheses),
        directions=(),
        part_of=text.title,
    )


def _in_direction(text: EvaluationSet, direction: Direction, directions: Directions) -> EvaluationSet:
    zero_shot = directions.is_zero_shot(direction)
    return replace(
        text,
        name=f"{text.name}-{direction}",
        title=f"{text.title} {direction}" + (" (zero-shot)" if zero_shot else ""),
        direction=direction,
        zero_shot=zero_shot,
    )


def evaluation_set(
    source: str | None, references: Sequence[str], split: str, run: RunDirectory | None
) -> EvaluationSet:
    """Return the set made of these files, or without files, the run's own set `split`. Errors as `evaluation_sets`.

    Without a run, the set may be files, whose translations come from elsewhere.
    """
    if run is None and source is not None and references:
        if [source, *references].count("-") > 1:
            raise UserError("only one of all files can be standard input")
        return _from_files(source, references, None)
    wanted = Request("" if source is not None or references else split, "", source, tuple(references))
    (found,) = evaluation_sets([wanted], run, "")
    return found


def _from_files(
    source: str | None, references: Sequence[str], hypothesis: str | None, title: str = ""
) -> EvaluationSet:
    """Return the set in these files; `title`: "" for the name of a file."""
    names = references if source is None else (source, *references)
    found = [read_lines(name) for name in names]
    sides, notes = [lines for lines, _ in found], [note for _, own in found for note in own]
    if not sides[0]:
        raise DataError(f"{_title(names[0])} is empty: there is nothing to score")
    hypotheses, more = (None, list[str]()) if hypothesis is None else read_lines(hypothesis)
    for name, side in zip(names, sides, strict=True):
        _check_pair(_title(names[0]), sides[0], name, side)
    if hypothesis is not None and hypotheses is not None:
        _check_pair(_title(names[0]), sides[0], hypothesis, hypotheses)
    files = tuple(PairedFile(_path(name), sha256_of(side)) for name, side in zip(names, sides, strict=True))
    digest = hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()[:8]
    if hypothesis is not None:
        title = f"{title}, {_short(hypothesis)}" if title else _short(hypothesis)
    title = title or _short(names[0])
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", title).strip("-")[:_LONGEST_NAME]
    sources = [] if source is None else sides[0]
    return EvaluationSet(
        f"set-{plain}-{digest}",
        title,
        sources,
        sides[source is not None :],
        [],
        files,
        hypotheses=hypotheses,
        notes=(*notes, *more),
    )


def _check_pair(first: str, lines: list[str], name: str, others: list[str]) -> None:
    """Raise DataError unless the file `name` has as many lines as `first` has."""
    if len(others) != len(lines):
        raise DataError(
            f"{first} has {counted(len(lines), 'line')} but {_title(name)} has {len(others):,}: "
            "they must pair line by line"
        )


def read_lines(name: str) -> tuple[list[str], list[str]]:
    """Return (lines of the file `name`, or of standard input for "-"; notes on them). DataError if it cannot be read.

    There is a note, for readers, if bytes are not text.
    """
    try:
        # The file may be a pipe, as it is read only once.
        with open(sys.stdin.fileno() if name == "-" else name, "rb", closefd=name != "-") as stream:
            reader = TextReader(stream, _title(name))
            lines = list(reader)
            return lines, [f"{reader.name}: {note}" for note in (reader.replaced(),) if note]
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from error


def _title(name: str) -> str:
    return "standard input" if name == "-" else name


def _short(name: str) -> str:
    return _title(name) if name == "-" else Path(name).name


def _path(name: str) -> str:
    return name if name == "-" else str(Path(name).resolve())


def sha256_of(lines: Sequence[str]) -> str:
    """Return the hash of lines in UTF-8, each with a line feed at the end."""
    found = hashlib.sha256()
    for line in lines:
        found.update(f"{line}\n".encode())
    return found.hexdigest()
