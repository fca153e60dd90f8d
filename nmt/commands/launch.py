"""nmt train --processes N: torchrun's agent on this host, and its end told as one process would tell it.

torchrun answers everything that went wrong with status 1. RUN_STATUS.json, which the processes keep, says what it was.
For several hosts start torchrun itself: scripts/slurm.sh.

Nothing listens where another host could reach it, or another user of this one could read it. The agent of torchrun
listens on all networks and unpickles what comes. Here the agent and the processes find each other by files in a folder
of our own, and what the processes send each other goes over the loopback interface or between the GPUs.
"""

import logging
import os
import re
import signal
import socket
import sys
from contextlib import suppress
from tempfile import TemporaryDirectory

import torch
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from nmt.commands.train import run_of
from nmt.config import Config
from nmt.errors import ProcessError, StorageError, UserError, same_error
from nmt.process import LAUNCHER, RENDEZVOUS, host_name, pid_to_signal
from nmt.run import RunDirectory

# Seconds between the signal to stop and the one that kills: a large checkpoint must be written in between.
_SAVING_SECONDS = 600


def num_processes(wanted: str) -> int:
    """What --processes says: a number, or `gpu` for one on each GPU that is visible (one in all if there is none)."""
    if wanted == "gpu":
        return max(torch.cuda.device_count(), 1)
    # At most 99,999: a host has fewer, and what looks like digits need be no number.
    if not re.fullmatch("[1-9][0-9]{0,4}", wanted):
        raise UserError(f"--processes {wanted} must be a number of at least 1, or gpu: one on each GPU")
    return int(wanted)


def launch(config: Config, overrides: list[str], processes: int) -> None:
    """Train with the settings `overrides` in so many processes of this host.

    Ends the program with the status of the run if a signal stopped it; raises what made it fail, in one line.
    """
    if config.training.micro_batches % processes:
        raise UserError(
            f"training.micro_batches={config.training.micro_batches} does not divide among {processes} processes: "
            f"every one takes equally many (--processes {_divisor(config.training.micro_batches, processes)} would do)"
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    _let_them_save()
    # What the agent logs of processes that ended, they have said themselves.
    logging.disable()
    run = run_of(config)
    before = _written_at(run)
    # Of mode 700.
    with TemporaryDirectory(prefix="nmt-launch-") as folder:
        _stay_at_home(folder)
        agent = _agent(processes, folder)
        try:
            # -P: a yaml.py in the working directory is no module of ours.
            elastic_launch(agent, sys.executable)("-P", "-m", "nmt.cli", "train", *overrides)
        except SignalException as stopped:
            state, code = _told(run, before)
            if state != "finished":
                sys.exit(code or 128 + int(stopped.sigval))
        except ChildFailedError as failed:
            _end_like(run, before, failed, processes)


def _stay_at_home(folder: str) -> None:
    """What the processes are told by variables, so that they use no network. What a user set stays."""
    os.environ[RENDEZVOUS] = os.path.join(folder, "processes")
    os.environ[LAUNCHER] = str(os.getpid())
    # Else the agent opens a port for the processes, which they do not need.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    loopback = [name for _, name in socket.if_nameindex() if re.fullmatch(r"lo\d*", name)]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loopback else ():
        os.environ.setdefault(variable, loopback[0])


def _let_them_save() -> None:
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAVING_SECONDS))
    if not hasattr(LaunchConfig, "shutdown_timeout"):
        # This PyTorch (2.11) does not ask, and its agent would kill after 30 s: a default, and the only way to it.
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
        logs_specs=DefaultLogsSpecs(log_dir=folder),  # else its empty folders would stay
    )


def _divisor(micro_batches: int, most: int) -> int:
    return next(count for count in range(min(most, micro_batches), 0, -1) if micro_batches % count == 0)


def _written_at(run: RunDirectory) -> int:
    return run.status_path.stat().st_mtime_ns if run.status_path.exists() else 0


def _told(run: RunDirectory, before: int) -> tuple[str, int | None]:
    """(state, exit status) that the processes left; ("", None) if they never came to open the run."""
    status = run.status()
    # It may be that of another training of this run, which goes on and for which ours was refused.
    ours = (status.get("pid"), status.get("host")) == (pid_to_signal(), host_name())
    if _written_at(run) == before or not ours:
        return "", None
    return status["state"], status["code"]


def _end_like(run: RunDirectory, before: int, failed: ChildFailedError, processes: int) -> None:
    """End the program as the run ended. Raises what one process found, ProcessError if nobody could say."""
    state, code = _told(run, before)
    codes = {rank: failure.exitcode for rank, failure in sorted(failed.failures.items())}
    # What a process found wrong itself; that others lost it then, and may have said so, is no cause.
    causes = {rank: status for rank, status in codes.items() if status > 1 and status != ProcessError.status}
    if state == "stopped" or (state == "failed" and (code != ProcessError.status or not causes)):
        sys.exit(code)
    mistakes = [status for status in codes.values() if status > 0]
    if state not in ("running", "failed") and mistakes:
        # Found by all before there was a run to say it of; the main process told it.
        sys.exit(mistakes[0])
    # The agent ends those that are left with SIGTERM.
    lost = min(causes or (rank for rank, status in codes.items() if status != -signal.SIGTERM), default=min(codes))
    how = f"was ended by signal {-codes[lost]}" if codes[lost] < 0 else f"ended with status {codes[lost]}"
    message = (
        f"rank {lost} of {processes} {how}, and no other could save: the same command goes on from the newest "
        f"checkpoint in {run.checkpoints}"
    )
    error = same_error(causes.get(lost, ProcessError.status), message)
    if state:
        status = run.status()
        with suppress(StorageError):  # a full disk may be why
            run.write_status("failed", error.status, message, status["step"], status["checkpoint"])
    raise error
