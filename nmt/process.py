"""Who this process is: among those that one launcher started, and to a person who wants to see or to stop it."""

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
"""Variable with the path of the file by which the processes that `nmt train --processes` started find each other."""
LAUNCHER = "NMT_LAUNCHER"
"""Variable with the number of the process that started them, which takes the signals for all."""


def launched() -> bool:
    """Whether torchrun, or its agent in `nmt train --processes`, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launched_rank() -> int:
    """This process's rank among those that one launcher started; 0 for all others.

    RANK alone says nothing: other programs, such as schedulers of containers, set it in processes that are alone.
    """
    return int(os.environ["RANK"]) if launched() else 0


def pid_to_signal() -> int:
    """The number of the process that a person sends a signal to in order to stop this one."""
    return int(os.environ.get(LAUNCHER, os.getpid()))


def host_name() -> str:
    """The name of this host."""
    return socket.gethostname()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within, SIGTERM, SIGHUP and SIGQUIT raise `Ended`, so that whoever made a temporary file removes it.

    One that is ignored stays ignored (nohup). A second signal is the last word: it ends the program at once.
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
