"""Write the results of a command to the run's report folder, after printing them."""

from collections.abc import Mapping

from nmt.commands import say
from nmt.errors import StorageError
from nmt.files import write_atomically
from nmt.run import RunDirectory


def keep(run: RunDirectory, contents: Mapping[str, str], done: str) -> None:
    """Write files with these names to the report folder, then print `done`.

    If they cannot be written, for example to a read-only folder, print a line instead of an error: the result itself
    was printed before.
    """
    try:
        try:
            run.report.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write {run.report}: {error.strerror or error}") from error
        for name, content in contents.items():
            write_atomically(run.report / name, content.encode())
    except StorageError as error:
        say(f"the report was not written: {error}")
    else:
        say(done)
