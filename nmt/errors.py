"""What a user can get wrong, and the exit status that says so.

Every one of these is told in one line, without a traceback. A plain ValueError counts as a mistake of usage or
configuration.
"""

import signal


class UserError(ValueError):
    """A mistake of usage or configuration: unknown key, wrong type, value that contradicts another."""

    status = 2
    reported_elsewhere = False
    """Whether another process, whose error this is, tells it."""


class DataError(UserError):
    """Text or a prepared corpus that cannot be used: missing, misaligned, damaged, empty."""

    status = 3


class CheckpointError(UserError):
    """A run, checkpoint or vocabulary that is missing, damaged or does not fit."""

    status = 4


class NonFiniteError(UserError):
    """Training met too many updates in a row whose gradient was not finite."""

    status = 5


class StorageError(UserError):
    """Nothing can be written: no space, no permission."""

    status = 6


class MemoryLimitError(UserError):
    """The machine, or its GPU, has too little memory for what was asked."""

    status = 6


class ProcessError(UserError):
    """Processes that train together lost each other, or no longer agree."""

    status = 7


class Ended(KeyboardInterrupt):
    """A signal asked the program to end. No mistake, but told in one line, with the status that shells expect."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.status = 128 + number


def same_error(status: int, message: str) -> UserError:
    """The error of that exit status: what one process found, raised in another."""
    kinds = (DataError, CheckpointError, NonFiniteError, StorageError, ProcessError)
    error = next((kind for kind in kinds if kind.status == status), UserError)(message)
    error.reported_elsewhere = True
    return error


def exit_status(error: BaseException) -> int:
    """The exit status for a mistake of the user's, or for a system that refuses; 1 for what is neither."""
    if isinstance(error, UserError | Ended):
        return error.status
    kinds = ((ValueError, 2), (OSError, StorageError.status), (KeyboardInterrupt, 130))
    return next((status for kind, status in kinds if isinstance(error, kind)), 1)
