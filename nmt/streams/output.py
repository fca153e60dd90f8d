"""Write translations to a file that appears when it is complete, or to a stream as soon as they are available."""

import bz2
import gzip
import lzma
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from nmt.errors import StorageError, UserError
from nmt.files import replacing
from nmt.streams.partial import Partial, open_partial

_DESCRIPTORS = re.compile(r"/proc/(\d+)(?:/task/\d+)?/fd")
_MOST_LINKS = 40
_COMPRESSED = (".gz", ".xz", ".zst", ".bz2")
_NOT_WRITTEN = (".zip", ".7z", ".lz4", ".z")


class Output(NamedTuple):
    """A stream for translations."""

    stream: BinaryIO
    live: bool
    """True if translations can be read while they are written: flush after each window."""
    partial: Partial | None = None
    """What keeps complete lines, if the translation can be resumed: write to it, not to `stream`."""


@contextmanager
def open_output(path: str, *sources: BinaryIO, resume: bool = False) -> Iterator[Output]:
    """Open standard output for "-", else a file that appears under its name only when it is complete.

    A file keeps the mode of the file that it replaces. It is compressed if its name ends in .gz, .xz, .zst or .bz2.
    Pipes, devices and files in /dev/fd, such as /dev/stdout, are written to and never replaced. UserError if the output
    is one of `sources`, the files that are being read. StorageError if it cannot be written.

    With `resume`, a file has a `partial`, whose complete lines stay after an error. UserError for other outputs.
    """
    suffix = Path(path).suffix.lower()
    if suffix in _NOT_WRITTEN:
        raise UserError(f"output {path}: {suffix} cannot be written; choose {', '.join(_COMPRESSED)} or no compression")
    shown = "standard output" if path == "-" else path
    try:
        if resume and path == "-":
            raise UserError("--resume keeps complete lines in a file: name the output with -o")
        if path == "-":
            _check_is_not_read(_status(sys.stdout.buffer), sources, shown)
            yield Output(sys.stdout.buffer, live=True)
            return
        stream = _open_as_it_is(path)
        if stream is not None:
            with stream:
                if resume:
                    raise UserError(f"--resume keeps complete lines in a file, and {path} is none: name a file with -o")
                _check_is_not_read(_status(stream), sources, shown)
                yield Output(stream, live=True)
            return
        # If the path is a symbolic link, the file that it refers to is replaced, not the link.
        final = Path(path).resolve()
        if final.is_dir():
            raise UserError(f"output {path} is a folder: name a file")
        if final.exists():
            _check_is_not_read(final.stat(), sources, shown)
        if resume:
            with open_partial(final) as partial:
                yield Output(partial.stream, live=False, partial=partial)
                _finish(partial, final, suffix)
            return
        with replacing(final) as plain, _compressing(plain, suffix) as stream:
            yield Output(stream, live=False)
    except BrokenPipeError:
        raise
    except OSError as error:
        if path == "-":
            # Discard buffered output, which would otherwise fail again when the program ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise StorageError(f"cannot write {shown}: {error.strerror or error}") from error


def _finish(partial: Partial, final: Path, suffix: str) -> None:
    """Make the file at `final` of the kept lines, which are complete."""
    if suffix not in _COMPRESSED:
        partial.replace(final)
        return
    with replacing(final) as plain, _compressing(plain, suffix) as stream:
        partial.stream.seek(0)
        shutil.copyfileobj(partial.stream, stream)
    partial.remove()


def _open_as_it_is(path: str) -> BinaryIO | None:
    """Open `path` for writing if it is neither a file nor a folder. Return None if it is one or does not exist."""
    place = Path(path)
    for _ in range(_MOST_LINKS):
        # Do not follow the link of a descriptor: it leads to the open file, which would be replaced, not written to.
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
    """Return the status of a stream's file, or None if it has none."""
    try:
        return os.fstat(stream.fileno())
    except OSError:
        return None


def _check_is_not_read(output: os.stat_result | None, sources: Sequence[BinaryIO], shown: str) -> None:
    """Raise UserError if the output is a file that is read, which would be lost or grow without end."""
    for read in map(_status, sources):
        if output and read and stat.S_ISREG(output.st_mode) and os.path.samestat(output, read):
            raise UserError(f"output {shown} is the input: name another file")


@contextmanager
def _compressing(plain: BinaryIO, suffix: str) -> Iterator[BinaryIO]:
    """Return a stream that writes to `plain`, compressed as the suffix of the file name requires."""
    if suffix == ".gz":
        # Without name and time, so that equal translations result in equal bytes.
        with gzip.GzipFile(filename="", mode="wb", fileobj=plain, mtime=0) as stream:
            yield stream  # type: ignore[misc]
    elif suffix == ".bz2":
        with bz2.BZ2File(plain, "wb") as stream:
            yield stream  # type: ignore[misc]
    elif suffix == ".xz":
        with lzma.LZMAFile(plain, "wb") as stream:
            yield stream  # type: ignore[misc]
    elif suffix == ".zst":
        import pyarrow

        # It closes the stream that it writes to.
        with open(os.dup(plain.fileno()), "wb") as copy, pyarrow.CompressedOutputStream(copy, "zstd") as stream:
            yield stream
    else:
        yield plain
