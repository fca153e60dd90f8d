"""Parse XML piece by piece: in bounded memory, and in time that grows with the size of the file alone.

The parser of the standard library would store whatever a file has in it: elements inside each other, a comment of any
length, names without end, entities and default values that expand. None of these is in a file of segments or terms.
"""

from typing import NoReturn, Protocol
from xml.parsers import expat

from nmt.errors import DataError
from nmt.textfile import MOST_BYTES

MOST_DEPTH = 100
"""Maximum elements inside each other."""
_MOST_NAMES = 1000
_MOST_NAME_CHARACTERS = 1 << 16  # of all names together


class Handler(Protocol):
    """What takes the events of a parser."""

    def start(self, name: str, attributes: dict[str, str]) -> None: ...

    def end(self, name: str) -> None: ...

    def characters(self, text: str) -> None: ...


class XmlParser:
    """Gives the events of an XML file to a handler. `where` names the file in errors.

    `encoding`: of the bytes, whatever the file declares; None: as declared. `doctype`: whether a document type is
    allowed. Even then, it may declare neither entities nor default values.
    """

    def __init__(self, where: str, handler: Handler, encoding: str | None = None, doctype: bool = True) -> None:
        self._where, self._handler, self._doctype = where, handler, doctype
        self._names: dict[str, str] = {}  # the parser's; also None, for what a document type lacks
        self._num_names = self._depth = 0
        self._held: list[bytes] = []
        self._size = self._parsed = self._pending = 0
        self._doctype_start = -1  # its first byte while it is read
        self._expat = expat.ParserCreate(encoding, None, self._names)
        self._expat.buffer_text = True
        self._expat.StartElementHandler, self._expat.EndElementHandler = self._start, self._end
        self._expat.CharacterDataHandler = handler.characters
        self._expat.StartDoctypeDeclHandler, self._expat.EndDoctypeDeclHandler = self._begin_doctype, self._end_doctype
        self._expat.EntityDeclHandler = self._refuse_entity
        self._expat.AttlistDeclHandler = self._check_attribute
        self._expat.SkippedEntityHandler = self._refuse_skipped

    @property
    def line(self) -> int:
        """Number of the line that is parsed, from 1."""
        return self._expat.CurrentLineNumber

    def feed(self, data: bytes) -> None:
        """Parse more bytes. DataError, with the line, if they are not XML or too large to be a file of texts."""
        self._held.append(data)
        self._size += len(data)
        # The parser scans a tag or comment from its start until it has its end. So it gets twice as much each time.
        if self._size >= self._pending:
            self._parse(False)

    def close(self) -> None:
        """Parse what is left. DataError if the file ends too early."""
        self._parse(True)

    def refuse(self, problem: str) -> NoReturn:
        """Raise DataError for what is in the current line."""
        raise DataError(f"{self._where} line {self.line} {problem}")

    def _parse(self, last: bool) -> None:
        data = b"".join(self._held)
        self._held, self._size = [], 0
        self._parsed += len(data)
        try:
            self._expat.Parse(data, last)
        except expat.ExpatError as error:
            raise DataError(
                f"{self._where} line {error.lineno} is not well-formed XML ({expat.errors.messages[error.code]}): get "
                "the file again, or export it again"
            ) from error
        self._pending = self._parsed - self._expat.CurrentByteIndex
        if self._pending > MOST_BYTES:
            self.refuse(f"has a tag or comment of more than {MOST_BYTES:,} bytes: remove it")
        if self._doctype_start >= 0 and self._parsed - self._doctype_start > MOST_BYTES:
            self.refuse(f"has a document type (<!DOCTYPE>) of more than {MOST_BYTES:,} bytes: remove it")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            self.refuse(
                f"has more than {MOST_DEPTH} elements inside each other: get the file again, or export it again"
            )
        if len(self._names) > self._num_names:
            self._num_names = len(self._names)
            if self._num_names > _MOST_NAMES or sum(map(len, filter(None, self._names))) > _MOST_NAME_CHARACTERS:
                self.refuse(
                    f"has more than {_MOST_NAMES:,} names of elements and attributes, or longer ones than a file of "
                    "texts has: get the file again, or export it again"
                )
        self._handler.start(name, attributes)

    def _end(self, name: str) -> None:
        self._depth -= 1
        self._handler.end(name)

    def _begin_doctype(self, *_: object) -> None:
        if not self._doctype:
            self.refuse("has a document type (<!DOCTYPE>), which could define entities: remove it")
        self._doctype_start = self._expat.CurrentByteIndex

    def _end_doctype(self) -> None:
        self._doctype_start = -1

    def _refuse_entity(self, name: str, *_: object) -> None:
        """Refuse the declaration of an entity, which could expand without bounds."""
        self.refuse(f"declares the entity {name[:40]}: only those of XML itself are read; remove it")

    def _check_attribute(self, element: str, name: str, _type: str, default: str | None, _required: bool) -> None:
        """Refuse a default value, which every element of that name would have."""
        if default is not None:
            self.refuse(f"declares a default value of {name[:40]} in <{element[:40]}>: remove the document type")

    def _refuse_skipped(self, name: str, *_: object) -> None:
        """Refuse an entity of a document type in another file, whose text would be missing without a word."""
        self.refuse(f"has the entity &{name[:40]};, which is not XML's own: write the character itself")
