"""Files of sentences, one per line, in and out: as many lines come out as went in, at the same places.

A line ends at b"\\n" and nowhere else; an unterminated last line counts if it is not empty. Bytes that are not UTF-8
are replaced and counted.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nmt.errors import DataError, StorageError, UserError

_BOM = b"\xef\xbb\xbf"


class LineReader:
    """Lines of a binary stream, in windows of up to `window` lines; a terminal gets its answer line by line."""

    def __init__(self, stream: BinaryIO, window: int) -> None:
        self.stream = stream
        self.window = 1 if stream.isatty() else window
        self.num_lines = 0
        self.num_invalid = 0
        """Lines with bytes that are not UTF-8."""

    def __iter__(self) -> Iterator[list[str]]:
        window: list[str] = []
        # Iterating over a binary stream splits at b"\\n" only.
        for raw in self.stream:
            window.append(self._text(raw))
            if len(window) == self.window:
                yield window
                window = []
        if window:
            yield window

    def _text(self, raw: bytes) -> str:
        raw = raw.removesuffix(b"\n")
        if self.num_lines == 0:
            raw = raw.removeprefix(_BOM)
        self.num_lines += 1
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.num_invalid += 1
            return raw.decode("utf-8", errors="replace")


def open_input(path: str) -> BinaryIO:
    """The file at `path`, or standard input for "-". DataError if it cannot be read."""
    if path == "-":
        return sys.stdin.buffer
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def read_all(path: str) -> list[str]:
    """Every line of a file."""
    with open_input(path) as stream:
        return [line for window in LineReader(stream, 4096) for line in window]


@contextmanager
def open_output(path: str, source: str) -> Iterator[BinaryIO]:
    """Standard output for "-"; else a file that appears under its name only when complete.

    UserError if it is the file being read, StorageError if it cannot be written.
    """
    if path == "-":
        yield sys.stdout.buffer
        return
    # A link stays one: the file behind it is replaced.
    final = Path(path).resolve()
    if source != "-" and final.exists() and os.path.samefile(final, source):
        raise UserError(f"output {path} is the input: name another file")
    if final.is_dir():
        raise UserError(f"output {path} is a folder: name a file")
    if final.exists() and not final.is_file():
        # A device or a pipe is written to, not replaced by a file.
        with final.open("wb") as stream:
            yield stream
        return
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as stream:
                yield stream
            temporary.replace(final)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
