"""Read segments out of markup: TMX files of pairs, and WMT's test sets in SGML and XML.

A TMX file is streamed, and only the unit that is read is in memory. WMT's files are small. Many of those in SGML are
not well-formed, so that they are searched for their segments. No search passes the next "<", so that time grows with
the size of the file alone.
"""

import html
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nmt.corpus.pairs import ReadReport, ending
from nmt.errors import DataError
from nmt.text.xml import XmlParser
from nmt.textfile import MOST_BYTES, TextReader, open_input

SET_ENDINGS = (".sgm", ".sgml", ".xml")
_CODES = frozenset(("bpt", "ept", "ph", "it", "ut"))
"""Elements of TMX whose text is code of a document format and no text of the segment."""
_MOST_SET_CHARACTERS = 1 << 26
_MOST_LANGUAGES = 20  # that an error names
_ELEMENT = re.compile(r"<(?P<end>/?)(?P<name>src|ref|hyp|doc|seg)\b[^<>]*+>", re.IGNORECASE)
_TAG = re.compile(r"<[/!?A-Za-z][^<>]*+>")
_ATTRIBUTE = re.compile(r"""\b(\w++)\s*+=\s*+["']([^"']*+)["']""")
_DECLARED = re.compile(r"""\s*<\?xml\b[^<>]*?\bencoding\s*=\s*["']([\w.:-]{1,40})["']""")
_READ = re.compile(r"utf-?8|utf-?16([bl]e)?|(us-)?ascii", re.IGNORECASE)
_SEVEN_BITS = re.compile(r"iso-2022-.*|utf-7|hz.*", re.IGNORECASE)
"""Encodings whose bytes are all ASCII, so that they look like UTF-8."""


def is_test_set(path: Path) -> bool:
    """Return whether a file of lines is a test set in markup, by its last ending: .sgm, .sgml or .xml, perhaps
    compressed."""
    return ending(path) in SET_ENDINGS


def read_test_set(path: Path, key: str, side: str, language: str, report: ReadReport) -> Iterator[str]:
    """Yield the segments of a test set: WMT's .sgm, with one side, or its .xml, with a source and references.

    `side` is "source" or "target": of an .xml file, the sources, or the first reference of each document in `language`.
    DataError if there is none, if one is not closed, or if the file declares an encoding that is not read.
    """
    where = f"{key}: {path}"
    parts, size = [], 0
    with _markup(path, key, report) as blocks:
        for part in blocks:
            parts.append(part)
            size += len(part)
            if size > _MOST_SET_CHARACTERS:
                raise DataError(f"{where} has more than {_MOST_SET_CHARACTERS:,} characters: it is no test set")
    text = "".join(parts)
    is_dataset = re.search(r"<dataset\b", text[:4096])
    found = list(_of_dataset(text, where, side, language) if is_dataset else _segments(text, where))
    if not found:
        raise DataError(f"{where} has no segments of the {side} in {language}: check the file and the language")
    yield from found


@contextmanager
def _markup(path: Path, key: str, report: ReadReport) -> Iterator[Iterator[str]]:
    """Open a file of markup, of which the text is given in parts. Lines that are not valid UTF-8 are counted."""
    with open_input(path, key) as stream:
        reader = TextReader(stream, f"{key}: {path}", markup=True)
        try:
            yield _parts(reader)
        finally:  # also if the caller stops early
            report.invalid_lines += reader.num_invalid


def _parts(reader: TextReader) -> Iterator[str]:
    """Yield the text of a file, in parts. DataError if it is in another encoding, which it declares."""
    declared = None
    for lines, whole in reader.blocks():
        part = "".join(f"{line}\n" for line in lines) if whole else "".join(lines)
        if declared is None:
            found = _DECLARED.match(part[:1024])
            declared = found[1] if found and not _READ.fullmatch(found[1]) else ""
        # Many files declare an encoding that they are not in, so that all of a file in valid UTF-8 is read.
        if declared and (reader.num_invalid or _SEVEN_BITS.fullmatch(declared)):
            line = f" line {reader.first_invalid}" if reader.num_invalid else ""
            raise DataError(
                f"{reader.name}{line} is not UTF-8, and the file declares {declared}: convert it (iconv -f {declared} "
                "-t UTF-8 FILE > NEW)"
            )
        yield part


def _elements(text: str) -> Iterator[tuple[str, bool, int, int]]:
    """Yield (name, whether it is an end tag, start, end) for the tags of a test set."""
    for found in _ELEMENT.finditer(text):
        yield found["name"].lower(), bool(found["end"]), found.start(), found.end()


def _segments(text: str, where: str) -> Iterator[str]:
    """Yield all segments. DataError if one is not closed: later ones would be in the wrong line."""
    opened = content = -1
    for name, ends, start, end in _elements(text):
        if name != "seg":
            continue
        if not ends:
            _check_closed(text, where, opened)
            opened, content = start, end
        elif opened >= 0:
            yield _plain(text[content:start], where)
            opened = -1
    _check_closed(text, where, opened)


def _check_closed(text: str, where: str, opened: int) -> None:
    if opened >= 0:
        line = text.count("\n", 0, opened) + 1
        raise DataError(f"{where} line {line} has a <seg> without its </seg>: get the file again, or correct it")


def _plain(segment: str, where: str) -> str:
    """Return the text of a segment: without tags, entities decoded, on one line. DataError if it is too long."""
    if len(segment) > MOST_BYTES:
        raise DataError(f"{where} has a segment of more than {MOST_BYTES:,} characters: remove it")
    try:
        return " ".join(html.unescape(_TAG.sub("", segment)).split())
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{where} has a character reference that is no character (&#...;): correct it") from error


def _of_dataset(text: str, where: str, side: str, language: str) -> Iterator[str]:
    """Yield the segments of a side of an XML test set, document by document. DataError if one is not closed."""
    wanted, taken, inside = {"source": "src", "target": "ref"}[side], False, False
    opened = content = -1
    for name, ends, start, end in _elements(text):
        if name != "seg":
            _check_closed(text, where, opened)
        if name == "doc":
            taken = False
        elif name in ("src", "ref", "hyp"):
            if ends:
                taken, inside = taken or inside, False
            else:
                attributes = dict(_ATTRIBUTE.findall(text, start, end))
                inside = name == wanted and not taken and _same(attributes.get("lang", language), language)
        elif inside and not ends:
            _check_closed(text, where, opened)
            opened, content = start, end
        elif inside and opened >= 0:
            yield _plain(text[content:start], where)
            opened = -1
    _check_closed(text, where, opened)


def _same(code: str, language: str) -> bool:
    """Return whether a language code of a file is a language: the same, or that of one of its regions."""
    first, second = (each.replace("_", "-").lower() for each in (code, language))
    return first == second or first.partition("-")[0] == second


def read_tmx(path: Path, key: str, languages: tuple[str, str], report: ReadReport) -> Iterator[tuple[str, str]]:
    """Yield the pairs of a TMX file: units with text in both languages, en-GB counting as en, the first of each.

    Inline tags are left out, and units without one of the languages are counted. DataError, with the line, if the file
    is not XML, declares entities or an encoding that is not read, or has a segment or tag of more than 4 MiB. DataError
    also if it has no pair at all.
    """
    where = f"{key}: {path}"
    units = _Tmx(languages)
    # The text has been decoded, so that the declared encoding means nothing any more.
    units.parser = parser = XmlParser(where, units, encoding="utf-8")
    num_pairs = 0
    with _markup(path, key, report) as parts:
        for part in parts:
            parser.feed(part.encode())
            num_pairs += len(units.pairs)
            yield from units.taken()
        parser.close()
    num_pairs += len(units.pairs)
    yield from units.taken()
    report.empty_rows += units.num_left_out
    if not num_pairs:
        there = ", ".join(sorted(units.codes)) or "none"
        raise DataError(
            f"{where} has no unit with text in {languages[0]} and {languages[1]}; its languages (xml:lang): {there}: "
            "correct corpus.source_language and corpus.target_language, or name another file"
        )


class _Tmx:
    """Gathers the pairs of a TMX file from the events of its parser."""

    parser: XmlParser

    def __init__(self, languages: tuple[str, str]) -> None:
        self.pairs: list[tuple[str, str]] = []
        """Pairs that are complete and were not taken."""
        self.codes: set[str] = set()
        """Languages of the file, as it names them."""
        self.num_left_out = 0
        """Units without text in one of the languages."""
        self._languages = languages
        self._texts: dict[str, str] = {}
        self._language = ""
        self._text: list[str] | None = None
        self._size = self._in_code = 0

    def taken(self) -> list[tuple[str, str]]:
        """Return the pairs that are complete, and forget them."""
        pairs, self.pairs = self.pairs, []
        return pairs

    def start(self, name: str, attributes: dict[str, str]) -> None:
        """Begin an element."""
        if name == "tu":
            self._texts = {}
        elif name == "tuv":
            code = attributes.get("xml:lang", attributes.get("lang", ""))
            self._language = next((each for each in self._languages if _same(code, each)), "")
            if len(self.codes) < _MOST_LANGUAGES:
                self.codes.add("".join(code.split())[:20] or "unnamed")
        elif name == "seg":
            self._text, self._size = [], 0
        elif name in _CODES:
            self._in_code += 1

    def end(self, name: str) -> None:
        """End an element."""
        if name == "seg" and self._text is not None:
            if self._language:
                self._texts.setdefault(self._language, " ".join("".join(self._text).split()))
            self._text = None
        elif name in _CODES:
            self._in_code -= 1
        elif name == "tu":
            if len(self._texts) == len(self._languages):
                source, target = self._languages
                self.pairs.append((self._texts[source], self._texts[target]))
            else:
                self.num_left_out += 1

    def characters(self, text: str) -> None:
        """Take text of an element."""
        if self._text is not None and not self._in_code:
            self._size += len(text)
            if self._size > MOST_BYTES:
                self.parser.refuse(f"has a segment of more than {MOST_BYTES:,} characters: remove it")
            self._text.append(text)
