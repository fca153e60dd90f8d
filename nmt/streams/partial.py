"""A translation that can be resumed: its complete lines, kept in OUTPUT.part until all lines are translated.

OUTPUT.part.json records how many lines and bytes are complete, a hash of the source lines that they translate, and what
made them. It is replaced when the lines are on disk, so that even a loss of power leaves a state to resume from.
"""

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from nmt.errors import DataError, UserError
from nmt.files import read_json, sync, write_atomically
from nmt.streams.lines import Piece

_RECORD = {"lines": int, "bytes": int, "source": str, "made_by": {str: str}}


class Partial:
    """The complete lines of a file of translations; `open_partial` makes one."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        """Keep lines in `stream`, the file at `path`."""
        self.path = path
        self.stream = stream
        self.num_lines = 0
        """Complete lines."""
        self._record = _record_of(path)
        self._made_by: Mapping[str, str] = {}
        self._num_bytes = 0
        self._source = hashlib.sha256()
        self._expected = ""
        """Hash of the source of the lines that were complete at the beginning."""

    def begin(self, made_by: Mapping[str, str]) -> None:
        """Go to the end of the complete lines. UserError if something else than `made_by` made them."""
        self._made_by = made_by
        if not self.stream.seek(0, os.SEEK_END):
            # Without it, nobody could distinguish the beginning of a first line from lines whose record is lost.
            self._keep(0)
            return
        again = f"remove {self.path} to start again"
        try:
            record = read_json(self._record, _RECORD)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{self._record}, which {self.path} needs, cannot be read ({reason}): {again}") from error
        # Before the first line is complete, there is nothing that other settings made.
        keys = made_by.keys() | record["made_by"].keys() if record["lines"] else set()
        for key in sorted(keys):
            now, before = made_by.get(key, "nothing"), record["made_by"].get(key, "nothing")
            if now != before:
                raise UserError(f"{self.path} was begun with {key}={before}, not {now}: give the same, or {again}")
        if self.stream.tell() < record["bytes"]:
            raise UserError(f"{self.path} has fewer bytes than {self._record} records: {again}")
        self.num_lines, self._num_bytes, self._expected = record["lines"], record["bytes"], record["source"]
        self.stream.truncate(self._num_bytes)
        self.stream.seek(self._num_bytes)
        if not self.num_lines:
            self._keep(0)

    def rest(self, blocks: Iterator[list[Piece]]) -> Iterator[list[Piece]]:
        """Yield the pieces of `blocks` after the complete lines. DataError if those lines translate other text."""
        left = self.num_lines
        for pieces in blocks:
            place = 0
            while left and place < len(pieces):
                self._add(pieces[place])
                left -= pieces[place].ends
                place += 1
                if not left and self._source.hexdigest() != self._expected:
                    raise self._other_text()
            if place < len(pieces):
                yield pieces[place:]
        if left:
            raise self._other_text()

    def write(self, pieces: list[Piece], text: bytes) -> None:
        """Write the translation of `pieces`, and record which lines are complete now."""
        self.stream.write(text)
        self.stream.flush()
        ended = max((place + 1 for place, piece in enumerate(pieces) if piece.ends), default=0)
        for piece in pieces[:ended]:
            self._add(piece)
        self.num_lines += sum(piece.ends for piece in pieces)
        if ended:
            os.fsync(self.stream.fileno())
            self._keep(self._num_bytes + text.rindex(b"\n") + 1)
        self._num_bytes += len(text)
        for piece in pieces[ended:]:
            self._add(piece)

    def replace(self, final: Path) -> None:
        """Make the complete file the one at `final`."""
        self.path.replace(final)
        sync(final.parent)
        self._record.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the kept lines and their record."""
        self.path.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)

    def _keep(self, num_bytes: int) -> None:
        """Record that the lines in the first `num_bytes` bytes are complete."""
        record = {
            "lines": self.num_lines,
            "bytes": num_bytes,
            "source": self._source.hexdigest(),
            "made_by": self._made_by,
        }
        write_atomically(self._record, f"{json.dumps(record, indent=2)}\n".encode())

    def _add(self, piece: Piece) -> None:
        self._source.update((piece.record.raw if piece.record else piece.text + piece.prefix).encode())
        if piece.ends:
            self._source.update(b"\n")

    def _other_text(self) -> DataError:
        return DataError(
            f"{self.path} has translations of another text: the first {self.num_lines:,} lines of the input differ; "
            f"give the same input, or remove {self.path} to start again"
        )


@contextmanager
def open_partial(final: Path) -> Iterator[Partial]:
    """Open the kept lines of a future file. After an error, complete lines stay.

    UserError if another process writes them, OSError if they cannot be written.
    """
    path = final.with_name(f"{final.name}.part")
    # Never through a link, which another user of the folder may have made.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with open(descriptor, "r+b") as stream:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process writes {path}: wait for its end, or name another output") from error
        with suppress(FileNotFoundError):
            os.fchmod(descriptor, stat.S_IMODE(final.stat().st_mode))
        partial = Partial(path, stream)
        try:
            yield partial
        except BaseException:
            if not os.fstat(descriptor).st_size:
                partial.remove()
            raise


def _record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
