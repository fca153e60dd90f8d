"""Read and write pipes and terminals in threads that can be ended while they wait."""

import io
import os
import select
from typing import BinaryIO

# Long enough for a program that is still writing to refill its pipe, and too short for a waiting user to notice.
_PATIENCE_MS = 10


class Halted(Exception):  # noqa: N818 - not an error
    """`Halt.set` was called while a thread waited."""


class Halt:
    """Ends the waiting of all threads that read from a `Source` or write to a `Sink`. A context manager."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe()

    def set(self) -> None:
        """Make all waiting threads raise Halted, now and later."""
        os.write(self._writing, b"\0")

    def wait(self, descriptor: int, event: int) -> None:
        """Wait until a descriptor can be read (`event`: select.POLLIN) or written (select.POLLOUT), or has failed."""
        poll = select.poll()
        poll.register(descriptor, event)
        poll.register(self._reading, select.POLLIN)
        if any(ready == self._reading for ready, _ in poll.poll()):
            raise Halted

    def __enter__(self) -> "Halt":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._reading)
        os.close(self._writing)


class Source:
    """A binary stream to read in a thread. `read1` raises Halted when the thread should end."""

    def __init__(self, stream: BinaryIO, halt: Halt) -> None:
        self.num_bytes = 0
        """Bytes read so far."""
        self._stream = stream
        self._descriptor = _descriptor(stream)
        self._halt = halt

    def read1(self, size: int, /) -> bytes:
        """Return at most `size` bytes as soon as there are any; none at the end."""
        if self._descriptor is not None:
            self._halt.wait(self._descriptor, select.POLLIN)
        data: bytes = self._stream.read1(size)  # type: ignore[attr-defined]
        self.num_bytes += len(data)
        return data

    def more_now(self) -> bool:
        """Return whether more can be read without waiting. This is always so for a file."""
        if self._descriptor is None:
            return True
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(_PATIENCE_MS))


class Sink:
    """A pipe, terminal or open file to write to in a thread. `write` raises Halted when the thread should end."""

    def __init__(self, stream: BinaryIO, halt: Halt) -> None:
        stream.flush()
        self._stream = stream
        self._descriptor = _descriptor(stream)
        self._halt = halt

    def write(self, data: bytes) -> None:
        """Write all of `data`, without keeping any of it in a buffer."""
        if self._descriptor is None:
            self._stream.write(data)
            self._stream.flush()
            return
        left = memoryview(data)
        while left:
            self._halt.wait(self._descriptor, select.POLLOUT)
            try:
                # A pipe that is ready takes this many bytes without waiting.
                left = left[os.write(self._descriptor, left[: select.PIPE_BUF]) :]
            except BlockingIOError:  # another process has made the pipe non-blocking
                continue


def _descriptor(stream: BinaryIO) -> int | None:
    """Return the file descriptor of a stream, or None if it is in memory."""
    try:
        return stream.fileno()
    except io.UnsupportedOperation:
        return None
