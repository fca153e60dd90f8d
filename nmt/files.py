"""Write files and folders completely or not at all, and read files with a size limit.

A folder may come from anybody, and a tar archive can contain links, pipes and huge files. So files are never written
under a name that somebody could predict. Small files are read only after a check that they are regular and not too
large.
"""

import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from nmt.errors import DataError, StorageError

# Limit for small files: a manifest of 2,048 processes has 1 MB, a vocabulary of a million pieces 30 MB.
_MOST_BYTES = 256 * 1024 * 1024


def sync(path: Path) -> None:
    """Flush the content of a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --------------------------------------------------------------------------------------------------------- writing


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a stream to a new file that replaces `path` on exit, and keeps the mode of the old file.

    After an error, the new file is removed and the old file stays. A link at `path` is replaced, never followed. Raises
    OSError if the file cannot be written.
    """
    # A short name, since `path` may have the longest name that the file system allows. Readers ignore it.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    # These flags never open an existing file. The umask restricts the mode, as for any new file.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with open(descriptor, "wb") as stream:
            with suppress(FileNotFoundError):
                before = path.lstat().st_mode
                if stat.S_ISREG(before):
                    os.fchmod(descriptor, stat.S_IMODE(before))
            yield stream
            stream.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file so that a crash leaves the old or the new one. Raises StorageError if it cannot be written."""
    try:
        with replacing(path) as stream:
            stream.write(content)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def remove(path: Path) -> None:
    """Remove the file, folder or link at `path`, if any. A link's target stays. Raises OSError if removal fails."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def unfinished(path: Path) -> Path:
    """Return the path where `folder_atomically` writes the future `path`."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def folder_atomically(path: Path, resumable: bool = False) -> Iterator[Path]:
    """Make an empty folder that is renamed to `path` on exit, when its content is on disk.

    After an error, the folder is removed. With `resumable`, it stays after any error but DataError, and it is not empty
    if an earlier call has left it. The caller must ensure that only one process at a time makes this folder, and that
    `path` is free or an empty folder at the end. Raises OSError if the folder cannot be written.
    """
    temporary = unfinished(path)
    # Left by a process that died, or a link made by the author of the outer folder.
    if not resumable or temporary.is_symlink() or not temporary.is_dir():
        remove(temporary)
    temporary.mkdir(parents=True, exist_ok=resumable)
    try:
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            sync(written)
        temporary.rename(path)
        sync(path.parent)
    except BaseException as error:
        if not resumable or isinstance(error, DataError):
            shutil.rmtree(temporary, ignore_errors=True)
        raise


# --------------------------------------------------------------------------------------------------------- reading


def foreign_entry(folder: Path, names: Iterable[str]) -> str:
    """Describe what is wrong with these entries of a folder, or with anything below them; "" if nothing is.

    Links out of the folder are wrong, and entries that are neither files nor folders. Missing entries are not wrong.
    """
    home = folder.resolve()
    waiting = [folder / name for name in names]
    while waiting:
        path = waiting.pop()
        try:
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                if not path.resolve().is_relative_to(home):
                    return f"{path} is a link that leads out of {folder}"
            elif stat.S_ISDIR(mode):
                waiting += path.iterdir()
            elif not stat.S_ISREG(mode):
                return f"{path} is neither a file nor a folder"
        except (FileNotFoundError, NotADirectoryError):
            pass  # missing, or removed since it was listed: training removes old checkpoints
        except (OSError, RuntimeError) as error:
            return f"{path} cannot be followed ({error})"  # links in a circle
    return ""


def is_plain_name(name: str) -> bool:
    """Return whether a path in a manifest is inside the folder of the manifest."""
    path = PurePosixPath(name)
    return str(path) == name and name not in ("", ".") and not path.is_absolute() and ".." not in path.parts


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file. Raises IsADirectoryError for a folder, OSError (EINVAL) for a pipe or a device."""
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def read_regular(path: Path, most_bytes: int = _MOST_BYTES) -> bytes:
    """Return the content of a regular file. Raises OSError like `open_regular`, or for more than `most_bytes` bytes."""
    with open_regular(path) as stream:
        content = stream.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than {most_bytes:,} bytes", str(path))
    return content


def read_json(path: Path, shape: Any, most_bytes: int = _MOST_BYTES) -> Any:
    """Return the value in a JSON file, which must have the `shape` (see `differs`).

    Raises OSError if the file cannot be read, ValueError with a short reason if it is not JSON of this shape.
    """
    return parse_json(read_regular(path, most_bytes), shape)


def parse_json(text: bytes | str, shape: Any) -> Any:
    """Return the value of a JSON text, which must have the `shape`. Raises ValueError if it does not."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    problem = differs(value, shape)
    if problem:
        raise ValueError(problem)
    return value


def differs(value: Any, shape: Any, key: str = "") -> str:
    """Describe how a value read from JSON differs from `shape`, in a few words that begin with the key; "" if it fits.

    A shape is one of:
    - a type (float accepts whole numbers too), or None;
    - a tuple of alternative shapes;
    - [shape] for a list of values of this shape;
    - {str: shape} for a mapping from any keys to values of this shape;
    - {"key": shape, ...} for a mapping with these keys and perhaps others.

    Example: {"step": int, "score": (float, None), "files": {str: {"size": int}}}.
    """
    where = f"{key}: " if key else ""
    if isinstance(shape, tuple):
        problems = [differs(value, each, key) for each in shape]
        return "" if "" in problems else problems[0]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where}{_brief(value)} is not a list"
        parts = [(str(index), each, shape[0]) for index, each in enumerate(value)]
    elif isinstance(shape, Mapping):
        if not isinstance(value, dict):
            return f"{where}{_brief(value)} is not a mapping"
        missing = [name for name in shape if name is not str and name not in value]
        if missing:
            return f"{where}{missing[0]} is missing"
        parts = [(name, each, shape.get(name, shape.get(str, object))) for name, each in value.items()]
    else:
        fits = value is None if shape is None else _is_a(value, shape)
        return "" if fits else f"{where}{_brief(value)} is not {'null' if shape is None else _KINDS[shape]}"
    found = (differs(each, its_shape, f"{key}.{name}".lstrip(".")) for name, each, its_shape in parts)
    return next((problem for problem in found if problem), "")


_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", object: "a value"}


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind in (bool, object)
    return isinstance(value, (int, float) if kind is float else kind)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
