"""Keeping what a command found in the run's report folder, after it was printed."""

from collections.abc import Mapping

from nmt.commands import say
from nmt.errors import StorageError
from nmt.files import write_atomically
from nmt.run import RunDirectory


def keep(run: RunDirectory, contents: Mapping[str, str], done: str) -> None:
    """Write files, of these names, to the report folder, and say `done`.

    Where they cannot be written, as in a folder that is shared for reading only, one line says so: the result has been
    printed and stands.
    """
    try:
        try:
            run.report.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write {run.report}: {error.strerror or error}") from error
        for name, content in contents.items():
            write_atomically(run.report / name, content.encode())
    except StorageError as error:
        say(f"the report was not kept: {error}")
    else:
        say(done)
