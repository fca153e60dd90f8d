"""nmt train --processes: several processes through the one command, and the status that one process would end with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from test_training import settings, write_corpus
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.launcher.api import LaunchConfig

from nmt.cli import main
from nmt.commands.launch import _agent, _let_them_save, num_processes
from nmt.errors import UserError

PAIR = ("training.micro_batches=2", "training.log_every=1")


def command(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "nmt.cli", "train", "--processes=2", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def status(run: Path) -> dict[str, object]:
    return json.loads((run / "RUN_STATUS.json").read_text())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    write_corpus(folder)
    return folder


def test_two_processes_stop_together_and_refuse_other_settings(corpus: Path) -> None:
    run = corpus / "pair"
    endless = settings(corpus, "run.name=pair", "training.max_steps=100000", "training.validate_every=100000", *PAIR)
    process = command(*endless)
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=40)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("stopped by SIGTERM at step ")
    step = int(status(run)["step"])  # type: ignore[call-overload]
    assert status(run)["state"] == "stopped"
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step

    process = command(*endless, "model.moe.k=1")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 4, errors
    assert "Traceback" not in errors
    assert errors.count("model.moe.k was 2, now 1") == 1
    assert status(run)["state"] == "stopped"


@pytest.mark.slow
def test_two_processes_go_on_to_the_end(corpus: Path) -> None:
    for steps in (2, 4):
        process = command(*settings(corpus, "run.name=whole", f"training.max_steps={steps}", *PAIR))
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert out.splitlines() == [str(corpus / "whole")]
        assert "Traceback" not in errors
        assert status(corpus / "whole") == {
            "state": "finished",
            "code": 0,
            "message": "",
            "step": steps,
            "checkpoint": str(corpus / "whole" / "checkpoints" / f"step-{steps:08d}"),
        }


def test_a_number_that_does_not_divide_is_refused(corpus: Path, capfd: pytest.CaptureFixture[str]) -> None:
    six = settings(corpus, "run.name=none", "training.micro_batches=6")
    assert main(["train", "--processes", "4", *six]) == 2
    assert capfd.readouterr().err == (
        "nmt: training.micro_batches=6 does not divide among 4 processes: every one takes equally many "
        "(--processes 3 would do)\n"
    )
    assert not (corpus / "none").exists()


@pytest.mark.parametrize("wanted", ["0", "-1", "two", "", "1.5"])
def test_processes_are_a_number_or_gpu(wanted: str) -> None:
    with pytest.raises(UserError, match=r"must be a number of at least 1, or gpu"):
        num_processes(wanted)


@pytest.mark.parametrize(("visible", "expected"), [(0, 1), (1, 1), (8, 8)])
def test_gpu_means_one_process_on_each(monkeypatch: pytest.MonkeyPatch, visible: int, expected: int) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    assert num_processes("gpu") == expected


def test_an_option_without_its_value_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "experiment=demo", "--processes"]) == 2
    assert "--processes needs a value" in capfd.readouterr().err


@pytest.mark.parametrize("asks", [True, False])
def test_processes_have_time_to_save(monkeypatch: pytest.MonkeyPatch, asks: bool) -> None:
    """Whether this PyTorch's agent asks how long, or has its 30 seconds from nothing but a default."""
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    waited: list[int] = []
    context = MagicMock(_close=lambda death_sig, timeout: waited.append(timeout))
    # Restored afterwards.
    monkeypatch.setattr(PContext.close, "__defaults__", PContext.close.__defaults__)
    monkeypatch.setattr("nmt.commands.launch.LaunchConfig", LaunchConfig if asks else object)
    _let_them_save()
    PContext.close(context, signal.SIGTERM)
    assert waited == [30 if asks else 600]
    assert not asks or _agent(2, "").shutdown_timeout == 600
    os.environ.pop("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
