"""Run three stages at the same time: a thread reads ahead, the caller works, and another thread writes."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Generic, TypeVar

_In = TypeVar("_In")
_Out = TypeVar("_Out")
# Items that may wait before the caller, and again before the writing thread.
_AHEAD = 2
# A thread that runs Python code gives way to waiting threads after this time. The default is 5 ms, which the caller
# would wait each time that it comes back from its device.
_SWITCH_SECONDS = 1e-4


class Overlap(Generic[_In, _Out]):
    """Yields items that a thread reads ahead, and has another thread write what the caller makes of them.

        with Overlap(source, write, halt) as stages:
            for item in stages:
                stages.write(result_of(item))

    Items stay in order, and only a few exist at any time. On exit, all results are written. An error of `source` is
    raised in the caller after the items before it, and an error of `write` as soon as possible. After an error anywhere
    both threads end; `halt` is called and must end any waiting of theirs.
    """

    def __init__(self, source: Iterable[_In], write: Callable[[_Out], None], halt: Callable[[], None]) -> None:
        self._halt = halt
        # What the threads report, as functions that the caller's thread calls. These queues have no bounds, so no
        # sender ever waits, not even one that a signal interrupts. Permits bound the number of items instead.
        self._reports: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._permits: SimpleQueue[bool] = SimpleQueue()
        self._results: SimpleQueue[list[_Out]] = SimpleQueue()
        self._items: deque[_In | BaseException] = deque()
        self._unwritten = 0
        for _ in range(_AHEAD):
            self._permits.put(True)
        self._threads = [
            Thread(target=self._read_ahead, args=(source,), name="Reader", daemon=True),
            Thread(target=self._write_out, args=(write,), name="Writer", daemon=True),
        ]

    def __enter__(self) -> "Overlap[_In, _Out]":
        self._switch_seconds = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)
        for thread in self._threads:
            thread.start()
        return self

    def __iter__(self) -> Iterator[_In]:
        while True:
            while not self._items:
                self._reports.get()()
            item = self._items.popleft()
            if isinstance(item, BaseException):
                self._wait_for_writing()
                if isinstance(item, StopIteration):
                    return
                raise item
            self._permits.put(True)
            yield item

    def write(self, result: _Out) -> None:
        """Hand a result to the writing thread. Waits while earlier ones are not written yet."""
        while self._unwritten >= _AHEAD:
            self._reports.get()()
        self._unwritten += 1
        self._results.put([result])

    def check(self) -> None:
        """Raise the error of the writing thread, if it had one. Call this now and then during long work."""
        while not self._reports.empty():
            self._reports.get()()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._wait_for_writing()
        finally:
            self._halt()
            self._permits.put(False)
            self._results.put([])
            for thread in self._threads:
                thread.join()
            sys.setswitchinterval(self._switch_seconds)

    def _wait_for_writing(self) -> None:
        while self._unwritten:
            self._reports.get()()

    def _read_ahead(self, source: Iterable[_In]) -> None:
        """Read items; the last one is an exception, which is StopIteration after the end of `source`."""
        try:
            items = iter(source)
            while self._permits.get():
                self._reports.put(partial(self._items.append, next(items)))
        except BaseException as error:
            self._reports.put(partial(self._items.append, error))

    def _write_out(self, write: Callable[[_Out], None]) -> None:
        try:
            while results := self._results.get():
                write(results[0])
                self._reports.put(self._count_written)
        except BaseException as error:
            self._reports.put(partial(_fail, error))

    def _count_written(self) -> None:
        self._unwritten -= 1


def _fail(error: BaseException) -> None:
    raise error
