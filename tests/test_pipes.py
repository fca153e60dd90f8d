"""nmt translate between pipes, as a process: it answers at once, and ends at once, whatever it waits for."""

import array
import fcntl
import os
import select
import signal
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from tests.processes import Command


class Piped:
    """A translation from the pipe `question` to the pipe `answer`."""

    def __init__(self, run: Path, folder: Path) -> None:
        for name in ("in", "out"):
            os.mkfifo(folder / name)
        self.command = Command(
            folder, "translate", str(run), str(folder / "in"), "-o", str(folder / "out"), "decoding.beam_size=1"
        )
        self.question: BinaryIO = (folder / "in").open("wb", buffering=0)
        self.answer: BinaryIO = (folder / "out").open("rb")

    def ask(self, line: bytes) -> bytes:
        self.question.write(line + b"\n")
        return self.answer.readline()

    def close(self) -> None:
        self.question.close()
        self.answer.close()

    def told(self) -> list[str]:
        return self.command.errors.read_text().splitlines()


@pytest.fixture
def piped(run: Path, tmp_path: Path) -> Iterator[Piped]:
    piped = Piped(run, tmp_path)
    yield piped
    piped.close()
    piped.command.status()


def test_a_line_is_answered_before_the_next_is_written(piped: Piped) -> None:
    first = piped.ask(b"the dog")
    assert first.strip()
    assert piped.ask(b"") == b"\n"
    assert piped.ask(b"the dog") == first
    piped.question.close()
    assert piped.command.status() == 0
    assert piped.answer.read() == b""
    assert piped.told()[0].startswith("3 lines in")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_while_it_waits_for_lines(piped: Piped, number: signal.Signals) -> None:
    piped.ask(b"the dog")
    piped.command.signal(number)
    assert piped.command.status() == 128 + number
    last = "nmt: interrupted" if number == signal.SIGINT else "nmt: ended by SIGTERM"
    assert piped.told() == ["1 line translated so far; they were written", last]


def test_a_signal_ends_it_while_nobody_reads_its_answers(piped: Piped) -> None:
    piped.ask(b"the dog")
    os.set_blocking(piped.question.fileno(), False)

    def stuck() -> bool:
        """Write what is taken, and return whether the pipe of answers is full."""
        piped.question.write(b"-\n" * 2000)
        waiting = array.array("i", [0])
        fcntl.ioctl(piped.answer.fileno(), termios.FIONREAD, waiting)
        return waiting[0] > fcntl.fcntl(piped.answer.fileno(), fcntl.F_GETPIPE_SZ) - select.PIPE_BUF

    piped.command.wait_until(stuck)
    piped.command.signal(signal.SIGTERM)
    assert piped.command.status() == 143
    assert piped.told()[-1] == "nmt: ended by SIGTERM"


def test_it_ends_quietly_when_its_reader_has_gone(piped: Piped) -> None:
    piped.ask(b"the dog")
    piped.answer.close()
    piped.question.write(b"the dog\n")
    assert piped.command.status() == 141
    assert piped.told() == []
