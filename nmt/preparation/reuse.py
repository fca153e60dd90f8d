"""Whether a prepared folder can be used as it is, and who may write it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from nmt.config import CorpusConfig
from nmt.corpus.sources import source_files
from nmt.data.prepared import Prepared
from nmt.data.shards import file_record
from nmt.data.vocabulary import why_other
from nmt.errors import DataError, StorageError
from nmt.files import remove, unfinished
from nmt.lock import locked

Log = Callable[[str], None]


def state_of(path: Path) -> tuple[int, int]:
    """Return the size and the time of the last change of a source file."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def source_record(path: Path, before: tuple[int, int]) -> dict[str, Any]:
    """Return the manifest's record of a source file. DataError if its state is not the one `before` it was read."""
    record = file_record(path)
    if state_of(path) != before:
        raise DataError(f"{path} changed while it was read: prepare the corpus again when it is complete")
    return {"path": str(path), **record, "mtime_ns": before[1]}


def why_stale(path: Path, corpus: CorpusConfig) -> str:
    """Return why a finished folder cannot be used as it is; an empty string if it can."""
    try:
        prepared = Prepared.open(path)
        if not prepared.is_verified:
            prepared.verify()
    except ValueError as error:
        return str(error)
    recorded = {record["path"]: record for record in prepared.manifest["sources"]}
    # A machine that has the prepared folder but not its source text can still train.
    present = [Path(name) for name in recorded if Path(name).exists()]
    if len(present) == len(recorded) and set(map(str, source_files(corpus))) != set(recorded):
        return "it has other source files than before"
    for source in present:
        record = recorded[str(source)]
        size, mtime_ns = state_of(source)
        same = size == record["bytes"] and (
            mtime_ns == record["mtime_ns"] or file_record(source)["sha256"] == record["sha256"]
        )
        if not same:
            return f"{source} has changed"
    return why_other(prepared.manifest["vocabulary"]) if "vocabulary" in prepared.manifest else ""


def is_verified(path: Path) -> bool:
    """Return whether a folder is a prepared corpus whose files have not changed since all were read."""
    try:
        return Prepared.open(path).is_verified
    except DataError:
        return False


def remove_leftovers(path: Path, name: str) -> None:
    """Remove what preparations of this corpus with other settings have left unfinished. The lock must be held."""
    for other in path.parent.glob(f".{escape(name)}-????????.tmp"):
        if other != unfinished(path):
            remove(other)


@contextmanager
def preparing(path: Path, name: str, log: Log) -> Iterator[None]:
    """Hold the lock that lets one process at a time prepare the corpus `name`. StorageError if it cannot be written.

    Preparations with other settings wait too, because they share the filtered text.
    """
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = path.with_name(f".{name}.lock")
            held.enter_context(locked(lock, lambda other: log(f"{other} is preparing {path}: waiting for it")))
        except OSError as error:
            raise StorageError(
                f"corpus.directory={path.parent} cannot be written ({error.strerror or error}): choose another"
            ) from error
        yield
