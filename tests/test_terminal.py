"""What is printed cannot steer a terminal."""

import ast
import errno
import io
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nmt.terminal
from nmt.cli import main
from nmt.commands import say, show
from nmt.metrics.writer import MetricsWriter
from nmt.terminal import printable, written

EVIL = "a\x1b]0;PWNED\x07\x1b[2Jb\x9b1mc\rd\x7f\x00"


@given(st.text())
def test_all_but_control_characters_stay(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    for before, after in zip(text, shown, strict=True):
        control = ord(before) < 32 or 127 <= ord(before) < 160
        assert after == ("\ufffd" if control and before not in "\t\n" else before)


def test_results_and_messages_are_cleaned(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    show(EVIL)
    say(EVIL)
    assert main(["translate", f"{tmp_path}/{EVIL.replace(chr(0), '')}"]) == 4
    out, errors = capfd.readouterr()
    assert not set(EVIL) & set(out + errors) & set(map(chr, [*range(9), *range(11, 32), *range(127, 160)]))
    assert out == printable(EVIL) + "\n"
    assert "]0;PWNED" in errors


def test_nothing_is_printed_past_it() -> None:
    """All commands print through `show` and `say`; what else prints, prints its own words or cleans them."""
    own = {"cli.py", "commands/__init__.py", "training/trainer.py"}
    root = Path(nmt.terminal.__file__).parent
    prints = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert prints <= own


def test_a_write_that_fails_before_the_signal_of_a_hang_up_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler of SIGHUP discards further output; before it has run, each write is an error."""
    calls: list[str] = []
    gone = True

    def handler(_seconds: float) -> None:
        nonlocal gone
        calls.append("signal")
        gone = False

    def write() -> None:
        calls.append("write")
        if gone:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(nmt.terminal.time, "sleep", handler)
    written(write)
    assert calls == ["write", "signal", "write"]
    written(write)
    assert calls == ["write", "signal", "write", "write"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EPIPE])
def test_a_write_that_keeps_failing_is_an_error(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    tries = 0

    def write() -> None:
        nonlocal tries
        tries += 1
        raise OSError(number, "error")

    monkeypatch.setattr(nmt.terminal.time, "sleep", lambda _: None)
    with pytest.raises(OSError, match="error") as error:
        written(write)
    assert error.value.errno == number
    assert tries == (2 if number == errno.EIO else 1)


class DroppedTerminal(io.StringIO):
    """A terminal whose first write or first flush fails, as its signal has not come yet."""

    def __init__(self, failing: str) -> None:
        super().__init__()
        self.failing = failing

    def fail_once(self, call: str) -> None:
        if call == self.failing:
            self.failing = ""
            raise OSError(errno.EIO, "Input/output error")

    def write(self, text: str, /) -> int:
        self.fail_once("write")
        return super().write(text)

    def flush(self) -> None:
        self.fail_once("flush")


@pytest.mark.parametrize("failing", ["write", "flush"])
def test_all_that_is_printed_in_training_waits_for_that_signal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: str
) -> None:
    monkeypatch.setattr(nmt.terminal.time, "sleep", lambda _: None)
    with MetricsWriter((tmp_path / "metrics.jsonl", tmp_path / "tensorboard"), 0, 10) as writer:
        for name, write in (("stdout", show), ("stderr", say), ("stderr", writer.say)):
            terminal = DroppedTerminal(failing)
            with monkeypatch.context() as patch:
                patch.setattr(sys, name, terminal)
                write("a line")
            assert not terminal.failing
            assert "a line" in terminal.getvalue()
