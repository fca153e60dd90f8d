"""Run a function in several processes that a gloo group joins, as torchrun would start them."""

import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

_LIMIT_SECONDS = 300


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
        context = mp.start_processes(
            _rank, (size, port, str(folder), function, arguments), nprocs=size, start_method="spawn", join=False
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
