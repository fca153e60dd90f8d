"""Writing files so that a crash leaves the old one or the new one, never half of one."""

import os
from pathlib import Path

from nmt.errors import StorageError


def sync(path: Path) -> None:
    """Make the disk hold what was written to a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file under another name, and rename it into place. StorageError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
