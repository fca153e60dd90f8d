"""Read segments out of markup: TMX files of pairs, and WMT's test sets in SGML and XML.

A TMX file is streamed, and only the unit that is read is in memory. WMT's files are small. Many of those in SGML are
not well-formed, so that they are searched for their segments.
"""

import html
import re
from collections.abc import Iterator
from pathlib import Path
from xml.parsers import expat

from nmt.corpus.pairs import ending
from nmt.errors import DataError
from nmt.textfile import MOST_BYTES, TextReader, open_input

SET_ENDINGS = (".sgm", ".sgml", ".xml")
_CODES = frozenset(("bpt", "ept", "ph", "it", "ut"))
"""Elements of TMX whose text is code of a document format and no text of the segment."""
_MOST_SET_CHARACTERS = 1 << 26
_TOKEN = re.compile(r"<(?P<end>/?)(?P<name>src|ref|hyp|doc|seg)\b(?P<more>[^>]*)>", re.IGNORECASE)
_SEGMENT = re.compile(r"<seg\b[^>]*>(.*?)</seg\s*>", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"<[^>]+>")
_ATTRIBUTE = re.compile(r"""(\w+)\s*=\s*["']([^"']*)["']""")


def is_test_set(path: Path) -> bool:
    """Return whether a file of lines is a test set in markup, by its last ending: .sgm, .sgml or .xml, perhaps
    compressed."""
    return ending(path) in SET_ENDINGS


def read_test_set(path: Path, key: str, side: str, language: str) -> Iterator[str]:
    """Yield the segments of a test set: WMT's .sgm, with one side, or its .xml, with a source and references.

    `side` is "source" or "target": of an .xml file, the sources, or the first reference of each document in `language`.
    DataError if there is none.
    """
    with open_input(path, key) as stream:
        reader = TextReader(stream, f"{key}: {path}", markup=True)
        text = ""
        for lines, whole in reader.blocks():
            text += "".join(f"{line}\n" for line in lines) if whole else "".join(lines)
            if len(text) > _MOST_SET_CHARACTERS:
                raise DataError(f"{key}: {path} has more than {_MOST_SET_CHARACTERS:,} characters: it is no test set")
    found = list(_of_dataset(text, side, language) if re.search(r"<dataset\b", text[:4096]) else _segments(text))
    if not found:
        raise DataError(f"{key}: {path} has no segments of the {side} in {language}: check the file and the language")
    yield from found


def _segments(text: str) -> Iterator[str]:
    for match in _SEGMENT.finditer(text):
        yield _plain(match[1])


def _plain(segment: str) -> str:
    """Return the text of a segment: without tags, entities decoded, on one line."""
    return " ".join(html.unescape(_TAG.sub("", segment)).split())


def _of_dataset(text: str, side: str, language: str) -> Iterator[str]:
    """Yield the segments of a side of an XML test set, document by document."""
    wanted, taken, inside = {"source": "src", "target": "ref"}[side], False, False
    start = 0
    for token in _TOKEN.finditer(text):
        name, ends = token["name"].lower(), bool(token["end"])
        if name == "doc":
            taken = False
        elif name in ("src", "ref", "hyp"):
            if ends:
                taken, inside = taken or inside, False
            else:
                attributes = dict(_ATTRIBUTE.findall(token["more"]))
                inside = name == wanted and not taken and _same(attributes.get("lang", language), language)
        elif inside and not ends:
            start = token.end()
        elif inside:
            yield _plain(text[start : token.start()])


def _same(code: str, language: str) -> bool:
    """Return whether a language code of a file is a language: the same, or that of one of its regions."""
    first, second = (each.replace("_", "-").lower() for each in (code, language))
    return first == second or first.partition("-")[0] == second


def read_tmx(path: Path, key: str, languages: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of a TMX file: units with text in both languages, en-GB counting as en, the first of each.

    Inline tags are left out. DataError if the file is not XML, declares entities, or has a segment of more than 4 MiB.
    """
    where = f"{key}: {path}"
    handler = _Tmx(languages, where)
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = handler.start, handler.end
    parser.CharacterDataHandler = handler.characters
    parser.EntityDeclHandler = handler.entity
    with open_input(path, key) as stream:
        reader = TextReader(stream, where, markup=True)
        try:
            for lines, whole in reader.blocks():
                parser.Parse("".join(f"{line}\n" for line in lines) if whole else "".join(lines), False)
                yield from handler.taken()
            parser.Parse("", True)
        except expat.ExpatError as error:
            raise DataError(
                f"{where} line {error.lineno} is not well-formed XML ({expat.errors.messages[error.code]}): get the "
                "file again, or export it again"
            ) from error
    yield from handler.taken()


class _Tmx:
    """Gathers the pairs of a TMX file from the events of its parser."""

    def __init__(self, languages: tuple[str, str], where: str) -> None:
        self._languages, self._where = languages, where
        self._pairs: list[tuple[str, str]] = []
        self._texts: dict[str, str] = {}
        self._language = ""
        self._text: list[str] | None = None
        self._size = self._in_code = 0

    def taken(self) -> list[tuple[str, str]]:
        """Return the pairs that are complete, and forget them."""
        pairs, self._pairs = self._pairs, []
        return pairs

    def start(self, name: str, attributes: dict[str, str]) -> None:
        """Begin an element."""
        if name == "tu":
            self._texts = {}
        elif name == "tuv":
            code = attributes.get("xml:lang", attributes.get("lang", ""))
            self._language = next((each for each in self._languages if _same(code, each)), "")
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
        elif name == "tu" and len(self._texts) == len(self._languages):
            source, target = self._languages
            self._pairs.append((self._texts[source], self._texts[target]))

    def characters(self, text: str) -> None:
        """Take text of an element."""
        if self._text is not None and not self._in_code:
            self._size += len(text)
            if self._size > MOST_BYTES:
                raise DataError(f"{self._where} has a segment of more than {MOST_BYTES:,} characters: remove it")
            self._text.append(text)

    def entity(self, name: str, *_: object) -> None:
        """Refuse the declaration of an entity, which could expand without bounds."""
        raise DataError(f"{self._where} declares the entity {name}: only those of XML itself are read; remove it")
