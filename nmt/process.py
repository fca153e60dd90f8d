"""Identify this process: its rank among those of one launcher, its host, and the process that takes its signals."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from nmt.errors import Ended

_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
RENDEZVOUS = "NMT_RENDEZVOUS"
"""Environment variable: path of the file through which the processes of `nmt train --processes` find each other."""
LAUNCHER = "NMT_LAUNCHER"
"""Environment variable: id of the process that started them, which takes signals for all of them."""

WORKER = "NMT_WORKER"
"""Environment variable: number of a process among those that share the work of one command."""


def worker() -> int:
    """Return this process's number among those that share the work of one command; 0 if it works alone."""
    return int(os.environ.get(WORKER, "0"))


def launched() -> bool:
    """Return whether torchrun, or its agent in `nmt train --processes`, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launched_rank() -> int:
    """Return this process's rank among those of one launcher; 0 if no launcher started it.

    RANK alone proves nothing: other programs, such as container schedulers, set it for single processes.
    """
    return int(os.environ["RANK"]) if launched() else 0


def pid_to_signal() -> int:
    """Return the id of the process to signal in order to stop this one."""
    return int(os.environ.get(LAUNCHER, os.getpid()))


def host_name() -> str:
    """Return the name of this host."""
    return socket.gethostname()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Make SIGTERM, SIGHUP and SIGQUIT raise `Ended` within the context, so that temporary files are removed.

    Ignored signals stay ignored (nohup). A second signal ends the program at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _ENDING}
    caught = [number for number in _ENDING if before[number] is signal.SIG_DFL]

    def end(number: int, _frame: FrameType | None) -> None:
        for each in caught:
            signal.signal(each, signal.SIG_DFL)
        raise Ended(number)

    for number in caught:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number])
