"""Work on a corpus in numbered parts, each a file once it is done, so that many processes and many attempts share it.

Any number of processes, also on several hosts with one file system, may work at the same time. A lock gives each part
to one of them. A process that dies leaves no half of a file, and its part to the others.
"""

import io
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from nmt.errors import DataError, StorageError
from nmt.files import read_json, write_atomically
from nmt.lock import Held, locked
from nmt.students.teacher import Taught
from nmt.wording import duration

_MOST_PAIRS, _LEAST_PAIRS = 20_000, 16
_PARTS = 32  # at least, if there are enough pairs: work for several processes
_SHAPE = {"texts": [(str, None)], "kept": {str: int}}
_PROGRESS_SECONDS = 10.0

Log = Callable[[str], None]
Make = Callable[[range, Callable[[float], None]], Taught]
"""make(pairs, progress) returns what a teacher makes of pairs, and calls `progress` with the fraction that is done."""


class Parts:
    """The parts of a corpus, in a folder with a file for each that is done, until the whole is made of them."""

    def __init__(self, whole: Path, num_pairs: int) -> None:
        """Cut `num_pairs` pairs into parts. `whole` is what will be made of them, after which no part is needed."""
        self.whole, self.num_pairs = whole, num_pairs
        self.folder = whole.with_name(f"{whole.name}.parts")
        self.size = min(max(-(-num_pairs // _PARTS), _LEAST_PAIRS), _MOST_PAIRS)
        """Pairs per part; the last one may have fewer."""
        self.count = -(-num_pairs // self.size)

    def pairs(self, number: int) -> range:
        """Return the pairs of a part."""
        return range(number * self.size, min((number + 1) * self.size, self.num_pairs))

    def path(self, number: int) -> Path:
        """Return the file of a part."""
        return self.folder / f"part-{number:05d}.json"

    def num_done(self) -> int:
        """Return how many parts are done."""
        return sum(self.path(number).exists() for number in range(self.count))

    def fill(self, make: Make, log: Log) -> None:
        """Make all parts that are not done, and return when all are. Parts of other processes are waited for.

        StorageError if the folder cannot be written.
        """
        progress = _Progress(self, log)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for wait in (None, lambda other: log(f"{other} is at work on the last parts: waiting for it")):
                for number in range(self.count):
                    if not self._needless(number):
                        with suppress(Held), locked(self.path(number).with_suffix(".lock"), wait):
                            if not self._needless(number):
                                self._write(number, make(self.pairs(number), progress.tell))
        except OSError as error:
            # Another process removes the parts when it has made the whole.
            if not self.whole.exists():
                raise StorageError(f"cannot write {self.folder}: {error.strerror or error}") from error

    def _needless(self, number: int) -> bool:
        return self.path(number).exists() or self.whole.exists()

    def _rows_path(self, number: int) -> Path:
        return self.path(number).with_suffix(".npy")

    def _write(self, number: int, taught: Taught) -> None:
        if taught.teacher_N is not None:
            content = io.BytesIO()
            np.save(content, taught.teacher_N, allow_pickle=False)
            write_atomically(self._rows_path(number), content.getvalue())
        # The last file: with it, a part is done.
        write_atomically(self.path(number), json.dumps({"texts": taught.texts, "kept": taught.kept}).encode())

    def read(self, number: int) -> Taught:
        """Return a part that is done. DataError if its file is damaged."""
        try:
            part = Taught(**read_json(self.path(number), _SHAPE))
            if len(part.texts) != len(self.pairs(number)):
                raise ValueError(f"it has {len(part.texts):,} texts for {len(self.pairs(number)):,} pairs")
        except (OSError, ValueError, TypeError) as error:
            raise self._damaged(self.path(number), error) from error
        return part

    def read_rows(self, number: int, dtype: np.dtype, count: int) -> np.ndarray:
        """Return a part's `count` teacher's rows, of type `dtype`. DataError if their file is missing or damaged."""
        path = self._rows_path(number)
        try:
            rows_N: np.ndarray = np.load(path, allow_pickle=False)
            if rows_N.dtype != dtype or rows_N.shape != (count,):
                raise ValueError(f"it has {len(rows_N):,} rows for {count:,} target positions")
        except (OSError, ValueError, EOFError, TypeError) as error:
            raise self._damaged(self.path(number), error) from error
        return rows_N

    def _damaged(self, path: Path, error: Exception) -> DataError:
        return DataError(f"{path} is damaged ({error}): remove it, and run the same command again")


class _Progress:
    """Logs now and then how far all processes together are, how fast they are, and how long the rest takes."""

    def __init__(self, parts: Parts, log: Log) -> None:
        self.parts, self.log = parts, log
        self.before = parts.num_done() * parts.size
        self.started = self.last = time.monotonic()

    def tell(self, fraction: float) -> None:
        """Log the progress if this has not happened for some time; `fraction` of this process's part is done."""
        now = time.monotonic()
        if now - self.last < _PROGRESS_SECONDS:
            return
        self.last, total = now, self.parts.num_pairs
        done = min(round((self.parts.num_done() + fraction) * self.parts.size), total)
        speed = (done - self.before) / (now - self.started)
        left = f", {duration((total - done) / speed)} left" if speed > 0 else ""
        self.log(f"{done:,} of {total:,} pairs translated, {speed:,.1f} pairs/s{left}")
