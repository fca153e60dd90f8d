"""Read lines to translate, in windows: enough lines to make the search fast, or those that are available now.

Lines are as in nmt/textfile.py. A very long line is read in pieces, cut at the end of a sentence if possible, so that
memory does not grow with its length.
"""

import io
import select
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

from nmt.errors import DataError
from nmt.text.segment import last_place
from nmt.textfile import TextReader

# Longest line that is read as one piece.
_MOST_BYTES = 1 << 16
# Most text in a window.
_MOST_CHARACTERS = 1 << 20
# Long enough for a program that is still writing to refill its pipe, and too short for a waiting user to notice.
_PATIENCE_MS = 10


class Piece(NamedTuple):
    """A line, or a piece of a very long line."""

    text: str
    begins: bool  # True if the line begins with this piece
    ends: bool  # True if the line ends with this piece


def open_input(path: str) -> io.BufferedReader:
    """Open the file at `path`, or standard input for "-". DataError if it cannot be read."""
    if path == "-":
        return cast(io.BufferedReader, sys.stdin.buffer)
    try:
        return Path(path).open("rb")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def text_reader(stream: io.BufferedReader, path: str, strict: bool = False) -> TextReader:
    """Return a reader of the lines of a stream from `open_input`, for `windows`; `strict` as in TextReader."""
    return TextReader(stream, "standard input" if path == "-" else path, _MOST_BYTES, strict)


def windows(reader: TextReader, stream: io.BufferedReader, most_lines: int) -> Iterator[list[Piece]]:
    """Yield the lines that `reader` reads from `stream`, in windows of at most `most_lines` lines.

    A window is smaller if the stream has no more lines for now, so that a program can write one line and wait for its
    translation.
    """
    more_now = _looking_for_more(stream)
    window: list[Piece] = []
    size = 0
    begun, rest = False, ""  # of a line that is read in part: True after its first piece; text not yielded yet
    blocks = reader.blocks()
    while True:
        full = len(window) >= most_lines or size >= _MOST_CHARACTERS
        if window and (full or not more_now()):
            yield window
            window, size = [], 0
        block = next(blocks, None)
        if block is None:
            break
        lines, whole = block
        lines[0], rest = rest + lines[0], ""
        if not whole:
            place = last_place(lines[0])
            lines[0], rest = lines[0][:place], lines[0][place:]
        window += [Piece(line, index > 0 or not begun, whole) for index, line in enumerate(lines)]
        begun = not whole
        size += sum(map(len, lines))
        # A block of a file may have many more lines than a window.
        while len(window) > most_lines:
            yield window[:most_lines]
            window = window[most_lines:]
            size = sum(len(piece.text) for piece in window)
    if window:
        yield window


def _looking_for_more(stream: io.BufferedReader) -> Callable[[], bool]:
    """Return a function that returns whether more can be read without waiting. This is always so for a file."""
    try:
        descriptor = stream.fileno()
    except io.UnsupportedOperation:
        return lambda: True
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return lambda: bool(poll.poll(_PATIENCE_MS))
