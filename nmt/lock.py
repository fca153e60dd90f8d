"""Let one process at a time enter, on one host or on several hosts that share a file system.

A lock is a file that exists while a process has the lock. On one host, flock decides at once, and the system releases
it when the process dies. On many network file systems, flock works within each host only, or not at all. So the file is
also created with O_EXCL, which succeeds on only one host. It names its owner, which touches it every few seconds. If
nobody has touched a file for a while, another host takes it over.
"""

import fcntl
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nmt.files import parse_json
from nmt.process import host_name, pid_to_signal

_TOUCH_SECONDS = 3.0
# A network file system may show a touch late.
_WATCH_SECONDS = 20.0
_LOOK_SECONDS = 0.2
# Maximum time between creating the file and writing into it.
_WRITE_SECONDS = 0.5

_RECORD = {"pid": int, "host": str, "since": str, "kernel": str, "process": int}
_MOST_BYTES = 4096


class Held(Exception):  # noqa: N818 - not an error
    """Another process has the lock. The text names it: "pid 12 on box since 2026-11-26 18:00:00"."""


@contextmanager
def locked(path: Path, wait: Callable[[Held], None] | None = None) -> Iterator[None]:
    """Take the lock file `path`, and remove it on exit.

    If another process has it, raise Held; or, with `wait`, call `wait` once and wait for the lock. Raises OSError if
    the file cannot be made.
    """
    descriptor = _acquire(path, wait)
    own = os.pread(descriptor, _MOST_BYTES, 0)
    over = threading.Event()
    thread = threading.Thread(target=_touch, args=(descriptor, over), name="Lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        # If this process was suspended, another host may have taken the lock over.
        if os.pread(descriptor, _MOST_BYTES, 0) == own:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _touch(descriptor: int, over: threading.Event) -> None:
    while not over.wait(_TOUCH_SECONDS):
        with suppress(OSError):  # the disk may fail for a moment; if it stays away, training itself reports it
            os.utime(descriptor)


def _acquire(path: Path, wait: Callable[[Held], None] | None) -> int:
    """Return the descriptor of the lock file, locked and with this process's record in it."""
    told = False
    while True:
        descriptor, new = _open(path)
        try:
            holder = _holder(path, descriptor, new)
            if holder is None:
                holder = _write(path, descriptor, new)
            if holder is None:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if wait is None:
            raise holder
        if not told:
            wait(holder)
            told = True
        time.sleep(_LOOK_SECONDS)


def _open(path: Path) -> tuple[int, bool]:
    """Open or create the lock file. Returns (descriptor, whether it was created)."""
    # A folder received from somebody may contain a link or a pipe with this name.
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        with suppress(FileExistsError):
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        with suppress(FileNotFoundError):  # removed in the meantime
            return os.open(path, flags), False


def _holder(path: Path, descriptor: int, new: bool) -> Held | None:
    """Return who has the lock; None if this process has it and need only write its record."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path} is not a regular file: remove it")
    if status.st_nlink > 1:
        # A folder received from somebody may contain a hard link to a file of the user.
        raise OSError(f"{path} is a hard link to another file: remove it")
    shared = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _held(_look(path)[0])
    except OSError:
        shared = False  # this file system has no flock
    if not _is_at(descriptor, path):
        # Its owner removed it after we opened it and before we locked it.
        return _held(None)
    if new:
        return None
    record, touched = _look(path)
    if record is None:
        # Left by an older version of this program, or just created by another host.
        time.sleep(_WRITE_SECONDS)
        record, touched = _look(path)
    if record is None or (shared and record["kernel"] == _kernel()):
        return None
    deadline = time.monotonic() + _WATCH_SECONDS
    while time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
        again = _look(path)
        if again != (record, touched):
            return _held(again[0])
    return None


def _write(path: Path, descriptor: int, new: bool) -> Held | None:
    """Write this process's record. Returns the other host's process if one did so at the same time, otherwise None."""
    own = _own_record()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(own).encode(), 0)
    os.fsync(descriptor)
    if new:
        return None
    time.sleep(_WRITE_SECONDS)
    record, _ = _look(path)
    return None if record == own else _held(record)


def _look(path: Path) -> tuple[dict[str, Any] | None, int]:
    """Return (record, time of the last touch) of a lock file. Opening it anew makes network file systems refresh it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None, 0
    try:
        text, touched = os.pread(descriptor, _MOST_BYTES, 0), os.fstat(descriptor).st_mtime_ns
        return parse_json(text, _RECORD), touched
    except ValueError:
        return None, touched
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


def _held(record: dict[str, Any] | None) -> Held:
    if record is None:
        return Held("another process")
    return Held(f"pid {record['pid']} on {record['host']} since {record['since']}")


def _own_record() -> dict[str, Any]:
    return {
        "pid": pid_to_signal(),
        "host": host_name(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "kernel": _kernel(),
        "process": os.getpid(),
    }


def _kernel() -> str:
    """Return the identity of the running kernel, within which flock works, whatever hosts and containers are called."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return host_name()
