"""Where translations go: a file that appears when it is complete, or a stream that is written as they come."""

import bz2
import gzip
import lzma
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from nmt.errors import StorageError, UserError
from nmt.files import replacing

_DESCRIPTORS = re.compile(r"/proc/(\d+)(?:/task/\d+)?/fd")
_MOST_LINKS = 40
_COMPRESSED = (".gz", ".bz2", ".xz")
_NOT_WRITTEN = (".zst", ".zip", ".7z", ".lz4", ".z")


class Output(NamedTuple):
    """Where translations are written."""

    stream: BinaryIO
    live: bool
    """Whether somebody may be reading while it is written, and wants each line as soon as it is there."""


@contextmanager
def open_output(path: str, source: BinaryIO) -> Iterator[Output]:
    """Standard output for "-"; else a file that appears under its name only when complete.

    It has the mode of the file that it replaces, and is compressed if its name ends in .gz, .bz2 or .xz. A pipe, a
    device and what lies in /dev/fd, such as /dev/stdout, are written to, never replaced. UserError if it is the file
    being read, `source`; StorageError if it cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix in _NOT_WRITTEN:
        raise UserError(f"output {path}: {suffix} cannot be written; choose {', '.join(_COMPRESSED)} or no compression")
    shown = "standard output" if path == "-" else path
    try:
        if path == "-":
            _check_is_not_read(_status(sys.stdout.buffer), source, shown)
            yield Output(sys.stdout.buffer, live=True)
            return
        stream = _open_as_it_is(path)
        if stream is not None:
            with stream:
                _check_is_not_read(_status(stream), source, shown)
                yield Output(stream, live=True)
            return
        # A link stays one: the file behind it is replaced.
        final = Path(path).resolve()
        if final.is_dir():
            raise UserError(f"output {path} is a folder: name a file")
        if final.exists():
            _check_is_not_read(final.stat(), source, shown)
        with replacing(final) as plain, _compressing(plain, suffix) as stream:
            yield Output(stream, live=False)
    except BrokenPipeError:
        raise
    except OSError as error:
        if path == "-":
            # What is still to be written goes nowhere, instead of failing once more at the end of the program.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise StorageError(f"cannot write {shown}: {error.strerror or error}") from error


def _open_as_it_is(path: str) -> BinaryIO | None:
    """Open `path` for writing if it is neither file nor folder; return None if it is one, or if nothing is there."""
    place = Path(path)
    for _ in range(_MOST_LINKS):
        # To follow the last link would lead to the file that a descriptor has open; replacing it writes elsewhere.
        folder = _DESCRIPTORS.fullmatch(os.path.realpath(place.parent))
        if folder and place.name.isdecimal():
            ours = int(folder[1]) == os.getpid()
            return open(os.dup(int(place.name)) if ours else os.open(place, os.O_WRONLY | os.O_APPEND), "wb")
        if not place.is_symlink():
            break
        place = place.parent / place.readlink()
    if not place.exists() or place.is_file() or place.is_dir():
        return None
    return place.open("wb")


def _status(stream: BinaryIO) -> os.stat_result | None:
    """That of the file behind a stream, if there is one."""
    try:
        return os.fstat(stream.fileno())
    except OSError:
        return None


def _check_is_not_read(output: os.stat_result | None, source: BinaryIO, shown: str) -> None:
    """Raise UserError if both are one file, which would be lost or grow without end."""
    read = _status(source)
    if output and read and stat.S_ISREG(output.st_mode) and os.path.samestat(output, read):
        raise UserError(f"output {shown} is the input: name another file")


@contextmanager
def _compressing(plain: BinaryIO, suffix: str) -> Iterator[BinaryIO]:
    """A stream to `plain` with the compression that the ending of a file's name asks for."""
    if suffix == ".gz":
        # Without name and time, so that the same translations give the same bytes.
        with gzip.GzipFile(filename="", mode="wb", fileobj=plain, mtime=0) as stream:
            yield stream  # type: ignore[misc]
    elif suffix == ".bz2":
        with bz2.BZ2File(plain, "wb") as stream:
            yield stream  # type: ignore[misc]
    elif suffix == ".xz":
        with lzma.LZMAFile(plain, "wb") as stream:
            yield stream  # type: ignore[misc]
    else:
        yield plain
