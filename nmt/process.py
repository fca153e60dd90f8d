"""Who this process is: among those that one launcher started, and to a person who wants to see or to stop it."""

import os
import socket

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
