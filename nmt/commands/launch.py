"""nmt train --processes N: run torchrun's agent on this host, and exit with the status a single process would have.

torchrun itself exits with status 1 for every failure. The real exit status is in RUN_STATUS.json, which the processes
write. For several hosts, start torchrun itself: scripts/slurm.sh.

No port is open to other hosts, and no file is readable by other users. By default, the agent of torchrun listens on all
networks and unpickles what it receives. Here, the agent and the processes find each other through files in a private
folder. The processes exchange data over the loopback interface or between the GPUs.
"""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from tempfile import TemporaryDirectory

import torch
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from nmt.commands.train import run_of
from nmt.config import Config
from nmt.errors import ProcessError, StorageError, UserError, same_error
from nmt.process import LAUNCHER, RENDEZVOUS, WORKER, host_name, pid_to_signal
from nmt.run import RunDirectory

# Seconds between the signal to stop and the signal to kill, so that a large checkpoint can be written.
_SAVING_SECONDS = 600
_LOOK_SECONDS = 0.1


def num_processes(wanted: str) -> int:
    """Return the number that --processes asks for; `gpu` is one per visible GPU, or one if there is no GPU."""
    if wanted == "gpu":
        return max(torch.cuda.device_count(), 1)
    # At most 99,999, which is enough for a host. Only ASCII digits: int accepts others.
    if not re.fullmatch("[1-9][0-9]{0,4}", wanted):
        raise UserError(f"--processes {wanted} must be a number of at least 1, or gpu: one per GPU")
    return int(wanted)


def check_processes(config: Config, processes: int) -> None:
    """Raise UserError if the micro-batches of a step cannot be split evenly over this many processes."""
    if config.training.micro_batches % processes:
        raise UserError(
            f"training.micro_batches={config.training.micro_batches} cannot be split evenly over {processes} "
            f"processes: give --processes {_divisor(config.training.micro_batches, processes)}, or another number of "
            "micro-batches"
        )


def launch(config: Config, overrides: list[str], processes: int) -> None:
    """Train with the settings `overrides` in `processes` processes on this host.

    If a signal stops the run, exit with the status of the run. If it fails, raise the cause as an error of one line.
    """
    check_processes(config, processes)
    os.environ.setdefault("OMP_NUM_THREADS", _threads(processes))
    _let_them_save()
    # The processes have reported their errors themselves.
    logging.disable()
    run = run_of(config)
    before = _written_at(run)
    # The folder has mode 700.
    with TemporaryDirectory(prefix="nmt-launch-") as folder:
        _stay_at_home(folder)
        agent = _agent(processes, folder)
        try:
            # -P: do not import modules, such as a yaml.py, from the working directory.
            elastic_launch(agent, sys.executable)("-P", "-m", "nmt.cli", "train", *overrides)
        except SignalException as stopped:
            state, code = _told(run, before)
            if state != "finished":
                sys.exit(code or 128 + int(stopped.sigval))
        except ChildFailedError as failed:
            _end_like(run, before, failed, processes)


def run_together(arguments: Sequence[str], processes: int) -> None:
    """Run an nmt command, whose processes share its work by themselves, in several processes on this host.

    Each has a GPU of its own, as far as there are any. Return when all have ended. If one fails, the others are stopped
    and this program exits with its status, as it has reported the error. ProcessError if a signal ended one.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
    shared = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", _threads(processes))}
    running: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(processes):
            own = {WORKER: str(number)} | ({"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {})
            command = [sys.executable, "-P", "-m", "nmt.cli", *arguments]
            running.append(subprocess.Popen(command, env=os.environ | shared | own, stdout=subprocess.DEVNULL))
        # All are polled, not only the first that is still running.
        while None in (codes := [each.poll() for each in running]) and not any(codes):
            time.sleep(_LOOK_SECONDS)
        failed = next(((number, code) for number, code in enumerate(codes) if code), None)
    finally:
        for each in running:
            if each.poll() is None:
                each.terminate()
        for each in running:
            each.wait()
    if failed is None:
        return
    if failed[1] > 0:
        sys.exit(failed[1])
    raise ProcessError(
        f"process {failed[0]} of {processes} was ended by signal {-failed[1]}: run the same command again to resume"
    )


def _threads(processes: int) -> str:
    return str(max((os.cpu_count() or 1) // processes, 1))


def _stay_at_home(folder: str) -> None:
    """Set environment variables, unless the user did, so that the processes use no network."""
    os.environ[RENDEZVOUS] = os.path.join(folder, "processes")
    os.environ[LAUNCHER] = str(os.getpid())
    # Otherwise the agent opens a port for the processes, which they do not need.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    loopback = [name for _, name in socket.if_nameindex() if re.fullmatch(r"lo\d*", name)]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loopback else ():
        os.environ.setdefault(variable, loopback[0])


def _let_them_save() -> None:
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAVING_SECONDS))
    if not hasattr(LaunchConfig, "shutdown_timeout"):
        # PyTorch 2.11 has no such setting: its agent kills after 30 s, and only this default can change that.
        PContext.close.__defaults__ = (None, int(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]))


def _agent(processes: int, folder: str) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint=os.path.join(folder, "agent"),
        rdzv_configs={"store_type": "file"},
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=folder),  # otherwise empty folders are left behind
    )


def _divisor(micro_batches: int, most: int) -> int:
    return next(count for count in range(min(most, micro_batches), 0, -1) if micro_batches % count == 0)


def _written_at(run: RunDirectory) -> int:
    return run.status_path.stat().st_mtime_ns if run.status_path.exists() else 0


def _told(run: RunDirectory, before: int) -> tuple[str, int | None]:
    """Return (state, exit status) as the processes wrote them; ("", None) if they never opened the run."""
    status = run.status()
    # The file may belong to another process that is training this run, so that ours was rejected.
    ours = (status.get("pid"), status.get("host")) == (pid_to_signal(), host_name())
    if _written_at(run) == before or not ours:
        return "", None
    return status["state"], status["code"]


def _end_like(run: RunDirectory, before: int, failed: ChildFailedError, processes: int) -> None:
    """Exit with the status of the run, or raise the error of the process that failed; ProcessError if unknown."""
    state, code = _told(run, before)
    codes = {rank: failure.exitcode for rank, failure in sorted(failed.failures.items())}
    # Errors that a process found itself. A ProcessError, for losing another process, is not the cause.
    causes = {rank: status for rank, status in codes.items() if status > 1 and status != ProcessError.status}
    if state == "stopped" or (state == "failed" and (code != ProcessError.status or not causes)):
        sys.exit(code)
    mistakes = [status for status in codes.values() if status > 0]
    if state not in ("running", "failed") and mistakes:
        # All processes found the mistake before opening the run, and the main process reported it.
        sys.exit(mistakes[0])
    # The agent ends the remaining processes with SIGTERM.
    lost = min(causes or (rank for rank, status in codes.items() if status != -signal.SIGTERM), default=min(codes))
    how = f"was ended by signal {-codes[lost]}" if codes[lost] < 0 else f"ended with status {codes[lost]}"
    message = (
        f"rank {lost} of {processes} {how}, and no other could save: run the same command again to resume from the "
        f"newest checkpoint in {run.checkpoints}"
    )
    error = same_error(causes.get(lost, ProcessError.status), message)
    if state:
        status = run.status()
        with suppress(StorageError):  # a full disk may be the cause
            run.write_status("failed", error.status, message, status["step"], status["checkpoint"])
    raise error
