"""Stopping by a signal: the signal is recorded, and training ends after the next save."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Terminate, interrupt, and hang-up: the terminal or the connection to it is gone.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """Record of the signal that asked this process to stop, if any."""

    def __init__(self) -> None:
        self.signal = 0
        """Number of the first signal; 0 if there was none."""

    @contextmanager
    def noted(self, in_vain: Callable[[], bool]) -> Iterator[None]:
        """Context in which the first SIGTERM, SIGINT or SIGHUP is recorded, and a second one has its usual effect.

        If `in_vain()` is true when a signal arrives, nothing can be saved any more, and the process exits at once. A
        signal that was ignored before (nohup) stays ignored. Only the main thread can use this.
        """
        terminals = [stream for stream in (1, 2) if os.isatty(stream)]

        def note(number: int, _frame: Any) -> None:
            if in_vain():
                os._exit(128 + number)
            if number == signal.SIGHUP:
                _forget(terminals)
            self.signal = number
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

        before = {number: signal.getsignal(number) for number in _SIGNALS}
        noted = [number for number in _SIGNALS if before[number] is not signal.SIG_IGN]
        for number in noted:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number in noted:
                signal.signal(number, before[number])


def _forget(terminals: list[int]) -> None:
    """Discard all further output to a terminal that is gone: writing would fail, and training would end unsaved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in terminals:
        os.dup2(nowhere, stream)
    os.close(nowhere)
