"""Read lines to translate, in windows: enough lines to make the search fast, or those that are available now.

Lines are as in nmt/textfile.py. A very long line is read in pieces, cut at the end of a sentence if possible, so that
memory does not grow with its length.
"""

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

from nmt.errors import DataError, UserError
from nmt.streams.halt import Source
from nmt.streams.records import Record, parse_record
from nmt.text.segment import last_place
from nmt.textfile import TextReader
from nmt.wording import counted

# Longest line that is read as one piece.
_MOST_BYTES = 1 << 16
# Most text in a window.
_MOST_CHARACTERS = 1 << 20
MOST_LINES = 4096
"""Most lines in a window."""
# The first window is small, so that its translations come early. Later ones double in size.
_FIRST_LINES = 64


class Piece(NamedTuple):
    """A line, or a piece of a very long line."""

    text: str
    begins: bool = True
    """True if the line begins with this piece."""
    ends: bool = True
    """True if the line ends with this piece."""
    record: Record | None = None
    """The object that has this text, if the line is one of JSON Lines."""
    prefix: str = ""
    """What the translation begins with."""


def open_input(path: str) -> io.BufferedReader:
    """Open the file at `path`, or standard input for "-". DataError if it cannot be read."""
    if path == "-":
        return cast(io.BufferedReader, sys.stdin.buffer)
    try:
        return Path(path).open("rb")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


class Window(NamedTuple):
    """Lines that are translated together, and how much was read before them and at their end."""

    pieces: list[Piece]
    lines: tuple[int, int]
    """Lines that ended before the window, and those that end up to its end."""
    num_bytes: tuple[int, int]
    """Bytes read before, and up to the end."""


def read_lines(
    source: Source, path: str, strict: bool = False, language: str = ""
) -> tuple[TextReader, Iterator[list[Piece]]]:
    """Return (a reader of plain text, its lines for `windows`). `path` is as in `open_input`, `strict` in TextReader.

    Very long lines come in pieces. `language` is that of the text, for the ends of its sentences.
    """
    reader = TextReader(source, shown(path), _MOST_BYTES, strict)
    return reader, _pieces(reader, language)


def read_whole_lines(source: Source, path: str, strict: bool = False) -> tuple[TextReader, Iterator[list[Piece]]]:
    """Return the same as `read_lines`, but with whole lines only. Reading raises DataError for a very long one."""
    reader = TextReader(source, shown(path), strict=strict)
    return reader, ([Piece(line) for line in lines] for lines in reader.whole_blocks())


def read_records(source: Source, path: str, strict: bool = False) -> tuple[TextReader, Iterator[list[Piece]]]:
    """Return (a reader of JSON Lines, their texts for `windows`). Reading raises DataError as `parse_record` does."""
    reader = TextReader(source, shown(path), strict=strict)
    return reader, _records(reader)


def with_prefixes(blocks: Iterator[list[Piece]], source: TextReader, prefixes: TextReader) -> Iterator[list[Piece]]:
    """Yield the pieces of `blocks`, which `source` reads, each line with what its translation begins with.

    Reading raises DataError if one of the files has more lines.
    """
    lines = iter(prefixes)
    for pieces in blocks:
        begun: list[Piece] = []
        for piece in pieces:
            prefix = next(lines, None) if piece.begins else ""
            if prefix is None:
                # The lines before it are translated.
                yield begun
                raise unequal(prefixes, source)
            begun.append(piece._replace(prefix=prefix))
        yield begun
    if next(lines, None) is not None:
        raise unequal(source, prefixes)


def with_kept_prefixes(
    blocks: Iterator[list[Piece]], prefixes: str, check: Callable[[str], object]
) -> Iterator[list[Piece]]:
    """Yield `blocks`. UserError if `check` refuses a prefix, which names its line in the file called `prefixes`."""
    line = 0
    for pieces in blocks:
        for place, piece in enumerate(pieces):
            line += piece.begins
            try:
                if piece.prefix:
                    check(piece.prefix)
            except UserError as error:
                # The lines before it are translated.
                yield pieces[:place]
                raise type(error)(f"{prefixes} line {line}: {error}") from error
        yield pieces


def unequal(short: TextReader, long: TextReader) -> DataError:
    """Return the error for files whose lines do not pair; `short` has been read to its end."""
    ends = counted(short.num_lines, "line")
    return DataError(f"{short.name} ends after {ends}, but {long.name} has more: they must pair line by line")


def shown(path: str) -> str:
    """Return the name of an input in messages."""
    return "standard input" if path == "-" else path


def _pieces(reader: TextReader, language: str) -> Iterator[list[Piece]]:
    begun, rest = False, ""  # of a line that is read in part: True after its first piece; text not yielded yet
    for lines, whole in reader.blocks():
        lines[0], rest = rest + lines[0], ""
        if not whole:
            place = last_place(lines[0], language)
            lines[0], rest = lines[0][:place], lines[0][place:]
        yield [Piece(line, index > 0 or not begun, whole) for index, line in enumerate(lines)]
        begun = not whole


def _records(reader: TextReader) -> Iterator[list[Piece]]:
    for lines in reader.whole_blocks():
        pieces: list[Piece] = []
        for number, line in enumerate(lines, reader.num_lines - len(lines) + 1):
            try:
                record = parse_record(line, f"{reader.name} line {number}")
                if record.raw and record.text != record.fields["text"]:
                    reader.count_invalid(number, "halves of characters")
            except DataError:
                # The lines before it are translated.
                yield pieces
                raise
            pieces.append(Piece(record.text, record=record, prefix=record.prefix))
        yield pieces


def windows(blocks: Iterator[list[Piece]], source: Source, most_lines: int = MOST_LINES) -> Iterator[Window]:
    """Yield lines that are read from `source`, in windows of at most `most_lines` lines.

    A window is smaller if the source has no more lines for now, so that a program can write one line and wait for its
    translation.
    """
    lines = num_bytes = 0
    for pieces in _gathered(blocks, source, most_lines):
        before = lines, num_bytes
        lines, num_bytes = lines + sum(piece.ends for piece in pieces), source.num_bytes
        yield Window(pieces, (before[0], lines), (before[1], num_bytes))


def _gathered(blocks: Iterator[list[Piece]], source: Source, most_lines: int) -> Iterator[list[Piece]]:
    """Yield the pieces of each window."""
    most = min(_FIRST_LINES, most_lines)
    window: list[Piece] = []
    size = 0
    while True:
        full = len(window) >= most or size >= _MOST_CHARACTERS
        if window and (full or not source.more_now()):
            yield window
            window, size = [], 0
            most = min(2 * most, most_lines)
        try:
            block = next(blocks, None)
        except DataError:
            # What was read before the error is translated first.
            if window:
                yield window
            raise
        if block is None:
            break
        window += block
        size += sum(map(_size, block))
        # A block of a file may have many more lines than a window.
        while len(window) > most:
            yield window[:most]
            window = window[most:]
            size = sum(map(_size, window))
            most = min(2 * most, most_lines)
    if window:
        yield window


def _size(piece: Piece) -> int:
    return len(piece.record.raw if piece.record else piece.text)
