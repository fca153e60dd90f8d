"""Signals that ask training to stop, from before its first update to after a lost connection."""

import json
import os
import pty
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nmt.checkpoint import list_checkpoints
from nmt.cli import main
from nmt.training.stopping import StopRequest
from nmt.training.trainer import Trainer
from tests.processes import Command
from tests.toy import settings


def never() -> bool:
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_is_noted_and_all_is_as_before_afterwards(number: signal.Signals) -> None:
    asked = StopRequest()
    before = signal.getsignal(number)
    with asked.noted(never):
        assert asked.signal == 0
        os.kill(os.getpid(), number)
        assert asked.signal == number
        ordinary = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        assert signal.getsignal(number) is ordinary
    assert signal.getsignal(number) is before


def test_what_is_ignored_stays_ignored() -> None:
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        asked = StopRequest()
        with asked.noted(never):
            os.kill(os.getpid(), signal.SIGHUP)
        assert asked.signal == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_where_there_is_nothing_to_save_a_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr("nmt.training.stopping.os._exit", codes.append)
    with StopRequest().noted(lambda: True):
        os.kill(os.getpid(), signal.SIGTERM)
    assert codes == [143]


def test_a_signal_before_the_first_update_is_not_lost(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the network is built, the run says that it is running already."""
    init = Trainer.__init__

    def slowly(trainer: Trainer, *arguments: Any) -> None:
        assert json.loads((corpus / "a" / "RUN_STATUS.json").read_text())["state"] == "running"
        os.kill(os.getpid(), signal.SIGTERM)
        init(trainer, *arguments)

    monkeypatch.setattr(Trainer, "__init__", slowly)
    with pytest.raises(SystemExit) as caught:
        main(["train", *settings(corpus, "run.name=a", "training.max_steps=100")])
    assert caught.value.code == 143
    status = json.loads((corpus / "a" / "RUN_STATUS.json").read_text())
    assert (status["state"], status["code"], status["step"]) == ("stopped", 143, 1)
    assert [each.step for each in list_checkpoints(corpus / "a" / "checkpoints")] == [1]


def test_a_reader_of_the_output_that_goes_away_has_one_status(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(Trainer, "__init__", gone)
    # The process' own output must stay.
    monkeypatch.setattr("nmt.cli._abandon_output", lambda: None)
    assert main(["train", *settings(corpus, "run.name=a")]) == 141
    assert json.loads((corpus / "a" / "RUN_STATUS.json").read_text())["code"] == 141


def test_a_connection_that_drops_stops_training_in_good_order(corpus: Path) -> None:
    """The terminal is gone, so that every line written to it is an error: training saves all the same."""
    ours, theirs = pty.openpty()
    arguments = settings(corpus, "run.name=a", "training.max_steps=100000", "training.validate_every=100000")
    command = Command(corpus, "train", *arguments, terminal=os.ttyname(theirs))
    os.set_blocking(ours, False)
    metrics = corpus / "a" / "metrics.jsonl"

    def has_trained() -> bool:
        with suppress(BlockingIOError):
            os.read(ours, 65536)
        return metrics.exists() and metrics.read_text().count("\n") >= 2

    command.wait_until(has_trained)
    os.close(theirs)
    os.close(ours)
    assert command.status() == 129
    status = json.loads((corpus / "a" / "RUN_STATUS.json").read_text())
    assert (status["state"], status["code"]) == ("stopped", 129)
    assert list_checkpoints(corpus / "a" / "checkpoints")[-1].step == status["step"] > 0
    assert not (corpus / "a" / ".lock").exists()
