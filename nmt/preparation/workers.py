"""Share work among processes: results come in the order of the items, whatever the number of processes is."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import cache, partial
from itertools import chain, islice
from multiprocessing.connection import wait
from types import ModuleType
from typing import Any, TypeVar

from nmt.errors import ProcessError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
# Items that wait per process, so that none waits for the reader.
_AHEAD = 2
_STOP = signal.SIGUSR1
"""Signal that ends the call that a process of a pool is in, and lets all later calls end at once."""


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shared_out(
    make: Callable[..., Callable[[_Item], _Result]], arguments: tuple[Any, ...], items: Iterable[_Item], processes: int
) -> Iterator[_Result]:
    """Yield make(*arguments)(item) for each item, in order.

    Each process calls `make` once. Items are drawn as they are needed, so that few of them are in memory. A single item
    needs no process of its own. An error of a call or of `items` is raised here; ProcessError if a process dies.

    Keep `arguments` small, such as names of files. They go through a pipe, and if they are larger than its buffer, the
    main process waits until the new one has started and read them: half a second for each, one after the other.
    """
    waiting = iter(items)
    first = list(islice(waiting, 2))
    waiting = chain(first, waiting)
    if processes == 1 or len(first) < 2:
        if first:
            yield from map(make(*arguments), waiting)
        return
    # A forked process could hold locks of threads that it does not have.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(make, arguments))
    pending: deque[Future[_Result]] = deque()
    try:
        for item in waiting:
            with _without_main_module():
                pending.append(pool.submit(_call, item))
            while len(pending) >= _AHEAD * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ProcessError(
            "a process of nmt prepare ended by itself, perhaps for lack of memory: resume it by the same command, "
            "with a smaller number of --processes"
        ) from error
    except BaseException:
        # After a mistake, or if nobody waits for the results: what processes still do is for nothing. One that was
        # terminated could leave half a result, for whose rest the pool would wait.
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            with suppress(ProcessLookupError):
                os.kill(process.pid, _STOP)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Hide the main module from processes that start here.

    They would import it, and a script that calls `nmt.prepare` would begin again in each. They need nothing of it.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


_make: Callable[[], Callable[[Any], Any]] | None = None
"""In a process of a pool: what makes the function to call."""
_calling = _stopped = False
"""In a process of a pool: whether it is in a call, and whether it was asked to stop."""


class _Stopped(Exception):  # noqa: N818 - nobody sees it
    """The end of a call whose result nobody waits for."""


def _begin(make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    # A terminal sends an interrupt to all processes; the main one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(_STOP, _stop)
    threading.Thread(target=_end_with_parent, name="Parent", daemon=True).start()
    global _make
    # Called with the first item, because the error of an initializer would not reach the main process.
    _make = cache(partial(make, *arguments))


def _end_with_parent() -> None:
    """End this process when the main one has died: nobody would take its results."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _stop(*_: Any) -> None:
    global _stopped
    _stopped = True
    # Outside a call, the process may be sending a result, which must arrive whole.
    if _calling:
        raise _Stopped


def _call(item: Any) -> Any:
    global _calling
    assert _make is not None
    _calling = True
    try:
        if _stopped:
            raise _Stopped
        return _make()(item)
    finally:
        _calling = False
