"""Errors that a user can cause or fix, and their exit statuses.

    ValueError
      UserError             2   a mistake of usage or configuration
        MissingExtraError   2   a library of an extra is not installed
        DataError           3   text or a prepared corpus cannot be used
        CheckpointError     4   a run, checkpoint or vocabulary cannot be used
        NonFiniteError      5   training met no finite gradient
        StorageError        6   nothing can be written
        MemoryLimitError    6   too little memory
        ProcessError        7   processes that train together lost each other

Each message is one line; the command line prints it without a traceback. A plain ValueError counts as a mistake of
usage or configuration.
"""

import signal


class UserError(ValueError):
    """A mistake of usage or configuration: an unknown key, a wrong type, values that contradict each other."""

    status = 2
    reported_elsewhere = False
    """Whether another process, in which the error occurred, reports it."""


class MissingExtraError(UserError):
    """A library that only some commands need is not installed."""


class DataError(UserError):
    """Text or a prepared corpus that cannot be used: missing, misaligned, damaged, empty."""

    status = 3


class CheckpointError(UserError):
    """A run, checkpoint or vocabulary that is missing, damaged or does not fit."""

    status = 4


class NonFiniteError(UserError):
    """The gradient was not finite in too many consecutive training steps."""

    status = 5


class StorageError(UserError):
    """Files cannot be written or read: no space, no permission."""

    status = 6


class MemoryLimitError(UserError):
    """The machine or its GPU has too little memory for the task."""

    status = 6


class ProcessError(UserError):
    """Processes that train together lost contact, or their results no longer agree."""

    status = 7


class Ended(KeyboardInterrupt):
    """A signal asked the program to end. Not a mistake, but reported in one line, with the status shells expect."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.status = 128 + number


def same_error(status: int, message: str) -> UserError:
    """Return the error with this exit status, to raise in one process what another one found."""
    kinds = (DataError, CheckpointError, NonFiniteError, StorageError, ProcessError)
    error = next((kind for kind in kinds if kind.status == status), UserError)(message)
    error.reported_elsewhere = True
    return error


def exit_status(error: BaseException) -> int:
    """Return the exit status for a user's mistake or an error of the system; 1 for all other errors."""
    if isinstance(error, UserError | Ended):
        return error.status
    kinds = ((ValueError, 2), (BrokenPipeError, 141), (OSError, StorageError.status), (KeyboardInterrupt, 130))
    return next((status for kind, status in kinds if isinstance(error, kind)), 1)
