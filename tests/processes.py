"""Processes for tests, forked from a server that has imported the program already: so they begin in milliseconds."""

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing as torch_processes

from nmt.cli import program

CONTEXT = multiprocessing.get_context("forkserver")
# torch._dynamo is what the first optimiser of a process imports.
CONTEXT.set_forkserver_preload(["torch._dynamo", "nmt.commands.train", "nmt.commands.translate", "tests.toy"])
_LIMIT_SECONDS = 300


class Command:
    """`nmt ARGUMENTS` in a process of its own: `output` and `errors` are files, in `folder`, of what it writes.

    With a `terminal` (its name), that is the process's own and all that it reads and writes.
    """

    def __init__(self, folder: Path, *arguments: str, terminal: str = "") -> None:
        self.output, self.errors = folder / "output", folder / "errors"
        streams = [terminal] * 3 if terminal else [os.devnull, str(self.output), str(self.errors)]
        self.process = CONTEXT.Process(target=_command, args=(streams, bool(terminal), arguments))
        self.process.start()

    def wait_until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _LIMIT_SECONDS
        while not happened():
            assert self.process.is_alive(), self.process.exitcode
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def status(self) -> int:
        """Its exit status, when it has ended."""
        self.process.join(_LIMIT_SECONDS)
        assert self.process.exitcode is not None
        return self.process.exitcode


def _command(streams: list[str], leads: bool, arguments: tuple[str, ...]) -> None:
    if leads:
        # The first terminal that the leader of a session opens is its own.
        os.setsid()
    for descriptor, name in enumerate(streams):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), descriptor)
    # Those that were inherited know what the server's descriptors were.
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode, closefd=False) for number, mode in enumerate("rww"))
    torch.set_num_threads(1)
    sys.argv = ["nmt", *arguments]
    program()


def _rank(rank: int, size: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        raise


def run_ranks(size: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returned in each of `size` processes; it must live in an importable module."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        context = torch_processes.start_processes(
            _rank, (size, port, str(folder), function, arguments), nprocs=size, start_method="forkserver", join=False
        )
        deadline = time.monotonic() + _LIMIT_SECONDS
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{size} processes took more than {_LIMIT_SECONDS} seconds")
    except Exception as error:
        errors = "\n".join(path.read_text() for path in sorted(folder.glob("*.error")))
        raise AssertionError(f"a process failed:\n{errors}") from error
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def mirrored(received: torch.Tensor, sent: torch.Tensor, *_: Any, **__: Any) -> Any:
    """`dist.all_to_all_single` of a process that gets back from each process what it sends there."""
    received.copy_(sent)
    return SimpleNamespace(wait=lambda: None)
