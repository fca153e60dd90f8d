"""Read a table of terms from a file: .tsv, .csv or .tbx.

A row of a .tsv or .csv file is a source term and its required translation. An empty translation, or "=", means that the
term is not translated. A first row "source", "target" is a heading. In a .tbx file, an entry has terms by language:
`termEntry/langSet/.../term`, or `conceptEntry/langSec/.../term` of TBX-Basic. All source terms of an entry are
translated by its first target term.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from nmt.errors import DataError
from nmt.text.terms import Terms
from nmt.text.xml import XmlParser
from nmt.textfile import MOST_BYTES, SAVE_AS_UTF8, TextReader, open_input, open_text

ENDINGS = (".tsv", ".csv", ".tbx")
_ENTRIES = ("termEntry", "conceptEntry")
_LANGUAGES = ("langSet", "langSec")
_BLOCK = 1 << 16


def read_terms(path: Path, source_language: str, target_language: str) -> Terms:
    """Return the table in a file. The languages, such as "en", choose the terms of a .tbx file.

    DataError, which names the file and the line, if the file cannot be read or a row is not allowed.
    """
    kind = path.suffix.lower()
    terms = Terms()
    if kind == ".tbx":
        for number, source, target in _entries(path, source_language, target_language):
            terms.add(source, target, f"{path} line {number}")
        if not len(terms):
            raise DataError(
                f"{path} has no entry with a term in {source_language} and one in {target_language}: check its xml:lang"
            )
        return terms
    if kind not in ENDINGS:
        raise DataError(f"{path}: a table of terms ends in {', '.join(ENDINGS)}: rename or convert it")
    with open_text(path, "terms") as lines:
        for number, row in _tsv(lines) if kind == ".tsv" else _csv(lines):
            place = f"{path} line {number}"
            if number == 1 and [each.strip().lower() for each in row] == ["source", "target"]:
                continue
            if len(row) != 2:
                between = "a tab" if kind == ".tsv" else "a comma or semicolon"
                raise DataError(
                    f"{place} has {len(row)} column{'s' * (len(row) != 1)}, not 2: write the source term, {between} "
                    "and its translation, or = if it is not translated"
                )
            terms.add(row[0], row[1], place)
    if lines.num_invalid:
        raise DataError(f"{path} line {lines.first_invalid} has bytes that are not UTF-8: {SAVE_AS_UTF8}")
    return terms


def _tsv(lines: TextReader) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the line, fields) of lines that are not blank. Quotation marks have no special meaning."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, line.split("\t")


def _csv(lines: TextReader) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of a row's last line, fields), by RFC 4180. Semicolons separate fields if the first line has no
    comma."""
    texts = [f"{line}\n" for line in lines]
    delimiter = ";" if texts and ";" in texts[0] and "," not in texts[0] else ","
    rows = csv.reader(texts, delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise DataError(
                f"{lines.name} line {rows.line_num}: not valid CSV ({error}): correct its quotation marks"
            ) from error
        if row is None:
            return
        if any(map(str.strip, row)):
            yield rows.line_num, row


def _entries(path: Path, source_language: str, target_language: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line, source term, target term) for the entries of a .tbx file that have both languages."""
    reader = _TbxReader(str(path))
    with open_input(path, "terms") as stream:
        while True:
            block = stream.read(_BLOCK)
            if block:
                reader.parser.feed(block)
            else:
                reader.parser.close()
            for entry in reader.entries:
                targets = [text for _, language, text in entry if _is(language, target_language)]
                for number, language, text in entry:
                    if targets and _is(language, source_language):
                        yield number, text, targets[0]
            reader.entries.clear()
            if not block:
                return


class _TbxReader:
    """Gathers the terms of entries while a parser reads them."""

    def __init__(self, where: str) -> None:
        self.entries: list[list[tuple[int, str, str]]] = []
        """(line, language, term) of each entry that was read to its end."""
        self.parser = XmlParser(where, self, doctype=False)
        self._entry: list[tuple[int, str, str]] = []
        self._language = ""
        self._term: list[str] | None = None
        self._size = 0

    def start(self, name: str, attributes: dict[str, str]) -> None:
        """Begin an element."""
        name = name.rpartition(":")[2]
        if name in _ENTRIES:
            self._entry = []
        elif name in _LANGUAGES:
            self._language = attributes.get("xml:lang", attributes.get("lang", ""))
        elif name == "term":
            self._term, self._size = [], 0

    def characters(self, text: str) -> None:
        """Take text of an element."""
        if self._term is not None:
            self._size += len(text)
            if self._size > MOST_BYTES:
                self.parser.refuse(f"has a term of more than {MOST_BYTES:,} characters: remove it")
            self._term.append(text)

    def end(self, name: str) -> None:
        """End an element."""
        name = name.rpartition(":")[2]
        if name == "term" and self._term is not None:
            term = " ".join("".join(self._term).split())
            self._entry.append((self.parser.line, self._language, term))
            self._term = None
        elif name in _ENTRIES:
            self.entries.append(self._entry)


def _is(language: str, wanted: str) -> bool:
    """Return whether both codes name one language, without their region: en-US and en."""
    return _base(language) == _base(wanted)


def _base(code: str) -> str:
    return code.replace("_", "-").partition("-")[0].lower()
