"""Lines to translate, in windows: as many as make the search quick, or as are there now.

The rule for lines is that of nmt/textfile.py. A line that is too long to be held comes in pieces, cut where a sentence
ends, so that memory does not grow with it.
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

# Of a line that comes as one piece.
_MOST_BYTES = 1 << 16
# Of the text of a window.
_MOST_CHARACTERS = 1 << 20
# Longer than a program that writes on needs to fill its pipe again, too short for anybody who waits to notice.
_PATIENCE_MS = 10


class Piece(NamedTuple):
    """A line, or a piece of a very long one."""

    text: str
    begins: bool  # whether the line begins here
    ends: bool  # whether the line ends here


def open_input(path: str) -> io.BufferedReader:
    """The file at `path`, or standard input for "-". DataError if it cannot be read."""
    if path == "-":
        return cast(io.BufferedReader, sys.stdin.buffer)
    try:
        return Path(path).open("rb")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def text_reader(stream: io.BufferedReader, path: str) -> TextReader:
    """The lines of a stream from `open_input`, for `windows`."""
    return TextReader(stream, "standard input" if path == "-" else path, _MOST_BYTES)


def windows(reader: TextReader, stream: io.BufferedReader, most_lines: int) -> Iterator[list[Piece]]:
    """The lines that `reader` finds in `stream`, in windows of about `most_lines`.

    A window is smaller where the stream has no more for now: whoever writes a line and waits gets its answer.
    """
    more_now = _looking_for_more(stream)
    window: list[Piece] = []
    size = 0
    begun, rest = False, ""  # of a line that came in part
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
        # A block of a file may hold many more lines than a window.
        while len(window) > most_lines:
            yield window[:most_lines]
            window = window[most_lines:]
            size = sum(len(piece.text) for piece in window)
    if window:
        yield window


def _looking_for_more(stream: io.BufferedReader) -> Callable[[], bool]:
    """Return a function that is true if more can be read without waiting. A file never waits, nor does its end."""
    try:
        descriptor = stream.fileno()
    except io.UnsupportedOperation:
        return lambda: True
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return lambda: bool(poll.poll(_PATIENCE_MS))
