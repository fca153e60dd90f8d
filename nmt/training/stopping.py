"""Being told to stop: a signal is noted, and training ends where it can save."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# To end, to interrupt, and that the terminal or the connection to it is gone.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """Whether a signal asked this process to stop, and which."""

    def __init__(self) -> None:
        self.signal = 0
        """The first one that came; 0 while there is none."""

    @contextmanager
    def noted(self, in_vain: Callable[[], bool]) -> Iterator[None]:
        """Within, the first SIGTERM, SIGINT or SIGHUP is noted, and a second one takes its ordinary effect.

        If `in_vain`, asked when a signal comes, there is nothing left to save: the process ends at once. A signal that
        is ignored stays so (nohup). For the main thread.
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
    """Write no more to a terminal that is gone: every line would be an error, before anything is saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in terminals:
        os.dup2(nowhere, stream)
    os.close(nowhere)
