"""nmt train --processes: several processes through the one command, and the status that one process would end with."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig

from nmt.cli import main
from nmt.commands.launch import _agent, _end_like, _let_them_save, _written_at, num_processes
from nmt.errors import UserError
from nmt.process import LAUNCHER, RENDEZVOUS
from nmt.run import RunDirectory
from tests.toy import settings, write_corpus

LOOPBACK = {"0100007F", "00000000000000000000000001000000"}
PAIR = ("training.micro_batches=2", "training.log_every=1")


def command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    temporary = folder / "50% #1?"  # the folder for temporary files may have any name
    temporary.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(temporary)}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "nmt.cli", "train", "--processes=2", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=folder,
    )


def family(pid: int) -> list[int]:
    """A process and all that it started, and so on."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in family(int(child)))]


def listening(pid: int) -> set[str]:
    """Addresses, as the kernel writes them in hexadecimal, at which TCP sockets of a process listen."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(descriptor)))
    sockets = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    ]
    return {each[1].split(":")[0] for each in sockets if each[3] == "0A" and each[9] in inodes}


def status(run: Path) -> dict[str, object]:
    return json.loads((run / "RUN_STATUS.json").read_text())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    write_corpus(folder)
    # No process may take it for the library.
    (folder / "yaml.py").write_text("raise SystemExit('a file of the working directory was run')")
    return folder


@pytest.mark.slow
def test_two_processes_stop_together_and_refuse_other_settings(corpus: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Meanwhile they listen to no network, and no other process trains the run."""
    run = corpus / "pair"
    endless = settings(corpus, "run.name=pair", "training.max_steps=100000", "training.validate_every=100000", *PAIR)
    process = command(corpus, *endless)
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes = family(process.pid)
    assert len(processes) == 3
    assert set.union(*map(listening, processes)) <= LOOPBACK

    capfd.readouterr()
    before = status(run)
    assert (before["state"], before["pid"]) == ("running", process.pid)
    assert main(["train", *endless]) == 4
    assert f"{run} is being trained by pid {process.pid} on " in capfd.readouterr().err.splitlines()[-1]
    assert status(run) == before

    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=40)
    assert process.returncode == 129, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("stopped by SIGHUP at step ")
    step = int(status(run)["step"])
    assert status(run)["state"] == "stopped"
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step

    process = command(corpus, *endless, "model.moe.k=1")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 4, errors
    assert "Traceback" not in errors
    assert errors.count("model.moe.k was 2, now 1") == 1
    assert status(run)["state"] == "stopped"


@pytest.mark.slow
def test_two_processes_go_on_to_the_end(corpus: Path) -> None:
    for steps in (2, 4):
        process = command(corpus, *settings(corpus, "run.name=whole", f"training.max_steps={steps}", *PAIR))
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
            "pid": process.pid,
            "host": socket.gethostname(),
        }


def test_the_agent_starts_nmt_train_with_the_same_settings_and_uses_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torchrun's agent is given; the slow tests run it."""
    begun: list[tuple[LaunchConfig, tuple[str, ...], dict[str, str]]] = []

    def start(agent: LaunchConfig, program: str) -> Callable[..., None]:
        assert program == sys.executable
        assert Path(agent.rdzv_endpoint).parent.stat().st_mode & 0o777 == 0o700
        return lambda *arguments: begun.append((agent, arguments, dict(os.environ)))

    monkeypatch.setattr("nmt.commands.launch.elastic_launch", start)
    monkeypatch.setattr(os, "environ", os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"})
    words = settings(tmp_path, "run.name=pair", *PAIR)
    assert main(["train", "--processes", "2", *words]) == 0
    ((agent, arguments, environment),) = begun
    assert arguments == ("-P", "-m", "nmt.cli", "train", *words)
    assert (agent.nproc_per_node, agent.max_nodes, agent.max_restarts) == (2, 1, 0)
    assert agent.rdzv_configs["store_type"] == "file"
    assert Path(environment[RENDEZVOUS]).parent == Path(agent.rdzv_endpoint).parent
    assert environment[LAUNCHER] == str(os.getpid())
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "lo"
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert not Path(agent.rdzv_endpoint).parent.exists()


def test_the_status_of_another_training_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours was refused for it, and must not end as it did, nor write to its file."""
    run = RunDirectory(tmp_path)
    before = _written_at(run)
    monkeypatch.setenv("NMT_LAUNCHER", str(os.getpid() + 1))
    run.write_status("running", None, "", 3, "step-3")
    monkeypatch.delenv("NMT_LAUNCHER")
    refused = ChildFailedError("nmt", {rank: ProcessFailure(rank, 0, 4, "/nowhere") for rank in (0, 1)})
    with pytest.raises(SystemExit) as caught:
        _end_like(run, before, refused, 2)
    assert caught.value.code == 4
    assert run.status()["state"] == "running"


def test_a_number_that_does_not_divide_is_refused(corpus: Path, capfd: pytest.CaptureFixture[str]) -> None:
    six = settings(corpus, "run.name=none", "training.micro_batches=6")
    assert main(["train", "--processes", "4", *six]) == 2
    assert capfd.readouterr().err == (
        "nmt: training.micro_batches=6 cannot be split evenly over 4 processes: give --processes 3, or another "
        "number of micro-batches\n"
    )
    assert not (corpus / "none").exists()


@pytest.mark.parametrize("wanted", ["0", "-1", "two", "", "1.5", "²", "٣", "007", "9" * 5000, "99999999999"])
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


@pytest.mark.parametrize("asks", [True, False] if hasattr(LaunchConfig, "shutdown_timeout") else [False])
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
