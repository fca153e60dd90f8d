"""Files and folders that are written whole or not at all, and files that are read with a bound.

A folder may come from anybody, and a tar keeps links, pipes and sizes. A file is therefore never written through a name
that somebody could foresee, and nothing small is read before it is known to be a regular file of bounded size.
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

from nmt.errors import StorageError

# The largest of the small files: a manifest of 2,048 processes has 1 MB, a vocabulary of a million pieces 30 MB.
_MOST_BYTES = 256 * 1024 * 1024


def sync(path: Path) -> None:
    """Make the disk hold what was written to a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --------------------------------------------------------------------------------------------------------- writing


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A stream to a new file that takes the name `path` at the end, with the mode of the file that it replaces.

    After an error, nothing is left of it and the old file stays. A link at `path` is replaced, never followed. OSError
    if it cannot be written.
    """
    # Short, since `path` may have the longest name that the file system allows; no reader takes it for a result.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    # With these flags nothing that stands there is ever opened. The mode is cut by the umask, as for any new file.
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
    """Write a small file, so that a crash leaves the old one or the new one. StorageError if it cannot be written."""
    try:
        with replacing(path) as stream:
            stream.write(content)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def remove(path: Path) -> None:
    """Remove what stands at `path`, if anything: a link itself, not what it leads to. OSError if it stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def unfinished(path: Path) -> Path:
    """Where `folder_atomically` writes what is to become `path`."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def folder_atomically(path: Path) -> Iterator[Path]:
    """A new, empty folder that takes the name `path` at the end, when all that was written into it is on disk.

    After an error nothing is left of it. The caller sees to it that one process at a time makes this folder, and that
    no file and no folder with anything in it stands at `path` at the end. OSError if it cannot be written.
    """
    temporary = unfinished(path)
    # Left by a process that died, or a link by whoever made the folder around it.
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            sync(written)
        temporary.rename(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


# --------------------------------------------------------------------------------------------------------- reading


def foreign_entry(folder: Path, names: Iterable[str]) -> str:
    """What is wrong with these entries of a folder, or with anything below them; empty if nothing is.

    A link that leads out of the folder is, and what is neither a file nor a folder. Entries that are not there are not.
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
            pass  # or gone since it was listed: training removes old checkpoints
        except (OSError, RuntimeError) as error:
            return f"{path} cannot be followed ({error})"  # links in a circle
    return ""


def is_plain_name(name: str) -> bool:
    """Whether a path, as a manifest has it, names a place below the folder of the manifest."""
    path = PurePosixPath(name)
    return str(path) == name and name not in ("", ".") and not path.is_absolute() and ".." not in path.parts


def open_regular(path: Path) -> BufferedReader:
    """A stream of a regular file. IsADirectoryError for a folder, OSError (EINVAL) for a pipe or a device."""
    # Without O_NONBLOCK, opening a pipe would wait for somebody to write to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is no regular file", str(path))


def read_regular(path: Path, most_bytes: int = _MOST_BYTES) -> bytes:
    """The content of a regular file of at most so many bytes. OSError as for `open_regular`, or if it has more."""
    with open_regular(path) as stream:
        content = stream.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than {most_bytes:,} bytes", str(path))
    return content


def read_json(path: Path, shape: Any, most_bytes: int = _MOST_BYTES) -> Any:
    """The value in a JSON file, which has the `shape` (see `differs`).

    OSError if it cannot be read, ValueError that says in a few words what is wrong if it is something else.
    """
    return parse_json(read_regular(path, most_bytes), shape)


def parse_json(text: bytes | str, shape: Any) -> Any:
    """The value that a JSON text writes, which has the `shape`. ValueError if it is something else."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    problem = differs(value, shape)
    if problem:
        raise ValueError(problem)
    return value


def differs(value: Any, shape: Any, key: str = "") -> str:
    """How a value read from JSON differs from `shape`, in a few words that begin with the key; empty if it does not.

    A shape is a type (float takes whole numbers too), None, a tuple of shapes of which one must fit, [shape] for a list
    of such values, {str: shape} for a mapping of any keys to such values, or {"key": shape, ...} for a mapping that has
    these keys and perhaps others: {"step": int, "score": (float, None), "files": {str: {"size": int}}}.
    """
    where = f"{key}: " if key else ""
    if isinstance(shape, tuple):
        problems = [differs(value, each, key) for each in shape]
        return "" if "" in problems else problems[0]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where}{_brief(value)} is no list"
        parts = [(str(index), each, shape[0]) for index, each in enumerate(value)]
    elif isinstance(shape, Mapping):
        if not isinstance(value, dict):
            return f"{where}{_brief(value)} is no mapping"
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
