"""Threads that wait for a pipe can be ended, and lose nothing before that."""

import io
import os
import threading
from collections.abc import Iterator

import pytest

from nmt.streams.halt import Halt, Halted, Sink, Source


@pytest.fixture
def halt() -> Iterator[Halt]:
    with Halt() as halt:
        yield halt


class Waiting(threading.Thread):
    """Calls a function, and keeps its result or its exception."""

    def __init__(self, function, *arguments) -> None:
        super().__init__()
        self.outcome = None
        self._call = function, arguments
        self.start()

    def run(self) -> None:
        function, arguments = self._call
        try:
            self.outcome = function(*arguments)
        except BaseException as error:
            self.outcome = error

    def result(self):
        self.join(20)
        assert not self.is_alive()
        return self.outcome


def test_a_source_without_input_is_ended(halt: Halt) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream:
        source = Source(stream, halt)
        waiting = Waiting(source.read1, 99)
        os.write(writing, b"text")
        assert waiting.result() == b"text"
        assert not source.more_now()
        waiting = Waiting(source.read1, 99)
        halt.set()
        assert isinstance(waiting.result(), Halted)
        with pytest.raises(Halted):
            source.read1(99)
        os.close(writing)
    assert source.num_bytes == 4


def test_a_source_ends_with_its_pipe(halt: Halt) -> None:
    reading, writing = os.pipe()
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        source = Source(stream, halt)
        assert source.more_now()
        assert source.read1(99) == b""


def test_a_sink_whose_reader_is_slow_gets_everything_through(halt: Halt) -> None:
    reading, writing = os.pipe()
    data = os.urandom(1_000_000)
    with os.fdopen(reading, "rb") as stream, os.fdopen(writing, "wb") as output:
        waiting = Waiting(Sink(output, halt).write, data)
        assert stream.read(len(data)) == data
        assert waiting.result() is None


def test_a_sink_whose_reader_takes_nothing_is_ended(halt: Halt) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as output:
        waiting = Waiting(Sink(output, halt).write, bytes(1_000_000))
        halt.set()
        assert isinstance(waiting.result(), Halted)
    os.close(reading)


def test_a_sink_whose_reader_has_gone_says_so(halt: Halt) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as output, pytest.raises(BrokenPipeError):
        Sink(output, halt).write(b"text")


def test_a_pipe_that_does_not_block_loses_nothing(halt: Halt) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    data = os.urandom(300_000)
    with os.fdopen(reading, "rb") as stream, os.fdopen(writing, "wb") as output:
        waiting = Waiting(Sink(output, halt).write, data)
        assert stream.read(len(data)) == data
        assert waiting.result() is None


def test_a_sink_writes_after_what_the_stream_has_kept(tmp_path, halt: Halt) -> None:
    with (tmp_path / "out").open("wb") as output:
        output.write(b"before ")
        Sink(output, halt).write(b"after")
    assert (tmp_path / "out").read_bytes() == b"before after"
    stream = io.BytesIO()
    Sink(stream, halt).write(b"text")
    assert stream.getvalue() == b"text"
    assert Source(io.BytesIO(b"text"), halt).read1(2) == b"te"
