"""Sentence pairs, and how they are made from rows with columns, of a file of pairs or of a dataset of the hub."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nmt.config import CorpusConfig, Direction, FilesConfig
from nmt.errors import DataError
from nmt.textfile import MOST_BYTES

COMPRESSIONS = (".gz", ".xz", ".zst", ".bz2")


def ending(path: Path) -> str:
    """Return the last ending of a file's name that is not one of a compression, in lower case."""
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return plain.suffix.lower()


class SentencePair(NamedTuple):
    """A sentence, its translation, and its kind of text if known. No text contains a "\\n"."""

    source: str
    target: str
    domain: str = ""
    tag: str = ""
    """Tag of its file; empty for none."""
    direction: Direction | None = None
    """None for a corpus in two languages, without `corpus.directions`."""


class Rows(NamedTuple):
    """Some consecutive rows of a corpus, in columns."""

    texts: dict[str, list[str]]
    """Texts by language: one per row."""
    domains: list[str]
    """One per row; empty if there are none."""
    tag: str = ""
    """Tag of all rows."""
    scores: Sequence[float] = ()
    """Log-probability of each row, from `corpus.train.scores`; empty if there are none."""


@dataclass
class ReadReport:
    """Counts and notes about what was read, in addition to the pairs."""

    bytes_read: int = 0
    """Bytes of files, compressed or not, that were read."""
    invalid_lines: int = 0
    """Lines that were not valid UTF-8; U+FFFD replaces the broken bytes."""
    empty_rows: int = 0
    """Rows of files of pairs and of datasets that were left out because they are blank, or null on one side. In a
    corpus with directions, also pairs with a blank side."""
    notes: list[str] = field(default_factory=list)
    """One line each."""


class Columns:
    """The columns with the two texts in the rows of one split, according to the configuration."""

    def __init__(self, corpus: CorpusConfig, split: str) -> None:
        files: FilesConfig = getattr(corpus, split)
        self.key = f"corpus.{split}.columns"
        self.given = bool(files.columns)
        """Whether the setting names the columns; otherwise they are named after the languages."""
        self.languages = (corpus.source_language, corpus.target_language)
        """The languages of the two texts."""
        self.names = tuple(files.columns) or self.languages
        self.numbers = tuple(int(name) - 1 for name in files.columns if name.isascii() and name.isdigit())
        """Their places, counted from 0, if the setting chooses them by number; otherwise empty."""

    def named(self, row: Sequence[str], where: str) -> tuple[str, str]:
        """Return the names of the two columns in `row`, the names of all columns in order. DataError if too few."""
        if not self.numbers:
            return self.names[0], self.names[1]
        if max(self.numbers) >= len(row):
            raise DataError(f"{where}: {len(row)} columns, too few for {self}")
        return row[self.numbers[0]], row[self.numbers[1]]

    def pair(self, row: Any, names: tuple[str, str], where: str, report: ReadReport) -> SentencePair | None:
        """Return the pair in a row: a mapping from column to text, or a mapping with such a `translation`.

        If the row or a text is null, count it and return None. Raises DataError for any other row.
        """
        inner = row.get("translation", row) if isinstance(row, Mapping) else row
        if inner is None:
            report.empty_rows += 1
            return None
        if isinstance(inner, Mapping) and inner.keys() == {"language", "translation"} and not self.given:
            # The hub stores varying languages in this way.
            inner = dict(zip(inner["language"], inner["translation"], strict=False))
        if self.given and isinstance(row, Mapping):
            inner = {**inner, **_reached(row, names)} if isinstance(inner, Mapping) else inner
        if not isinstance(inner, Mapping):
            raise DataError(f"{where}: must be an object with a text for each language, or with `translation`")
        self.check(names, inner, where)
        texts = [_text(inner[name], f"{where}: {name}", report) for name in names]
        if texts[0] is None or texts[1] is None:
            report.empty_rows += 1
            return None
        domain = row.get("domain")
        return SentencePair(texts[0], texts[1], one_line(domain) if isinstance(domain, str) else "")

    def check(self, names: tuple[str, str], there: Collection[str], where: str) -> None:
        """Raise DataError if one of `names` is not among the columns `there`."""
        for name in names:
            if name not in there:
                raise DataError(f"{where}: {self._lacks(name)}; there are {_brief(there)}: {self.remedy}")

    @property
    def remedy(self) -> str:
        """What to do if the columns are not found, for error messages."""
        return f"set {self.key} to the source column and the target column"

    def __str__(self) -> str:
        return f"{self.key}=[{', '.join(self.names)}]"

    def _lacks(self, name: str) -> str:
        if self.given:
            return f"no column {name} of {self}"
        side = "source_language" if name == self.names[0] else "target_language"
        return f"no text for corpus.{side}={name}"


def _reached(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return what paths such as inputs.text or targets.0 lead to in a row; a path that leads nowhere is left out."""
    found = {}
    for name in names:
        if "." in name and name not in row:
            value: Any = row
            for step in name.split("."):
                value = _inside(value, step)
            if value is not None:
                found[name] = value
    return found


def _inside(value: Any, step: str) -> Any:
    """Return the entry `step` of a mapping or a list; None if there is none."""
    if isinstance(value, Mapping):
        return value.get(step)
    is_place = isinstance(value, Sequence) and not isinstance(value, str) and step.isdigit()
    return value[int(step)] if is_place and int(step) < len(value) else None


def one_line(text: str) -> str:
    """Return `text` without "\\n" and without lone surrogates, which JSON can contain."""
    return text.replace("\n", " ").encode("utf-8", errors="replace").decode("utf-8")


def _text(value: Any, where: str, report: ReadReport) -> str | None:
    """Return the text of a cell, None if it is null."""
    if value is None:
        return None
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            report.invalid_lines += 1
            value = value.decode("utf-8", errors="replace")
    if not isinstance(value, str):
        raise DataError(f"{where} is a value of type {type(value).__name__}, not text")
    if len(value) > MOST_BYTES:
        raise DataError(f"{where} has more than {MOST_BYTES:,} characters: a text is one sentence; remove it")
    return one_line(value)


def _brief(names: Collection[str]) -> str:
    text = ", ".join(map(str, names)) or "none"
    return text if len(text) <= 200 else f"{text[:200]} ..."
