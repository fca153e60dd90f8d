"""Processes that wait in vain end themselves, and say where."""

import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nmt.errors import ProcessError
from nmt.parallel import watchdog
from nmt.parallel.mesh import World

# A mutex locked twice keeps the main thread in C for good, as a collective operation does whose partner died.
STUCK = """
import ctypes, os, signal, sys, threading, time
import torch
from nmt.parallel.watchdog import watch_for_hangs
from nmt.parallel.mesh import World

world = World(torch.device("cpu"))
world.size, world.rank = 2, 1
came = []
signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))

def tell(error):
    print(error, flush=True)

def soon(seconds):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()

with watch_for_hangs(world, lambda: "at step 7", tell, stuck_seconds=1.0):
    soon(0.1)
    until = time.monotonic() + 1.6
    while time.monotonic() < until:
        time.sleep(0.01)
    thread = threading.Thread(target=time.sleep, args=(1.3,))
    thread.start()
    thread.join()
print(f"handled {len(came)}, went on", flush=True)
with watch_for_hangs(world, lambda: "at step 8", tell, stuck_seconds=1.0):
    soon(0.1)
    mutex = ctypes.create_string_buffer(128)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex), lock(mutex)
print("never here", flush=True)
"""


def lines_before_the_end(script: str) -> list[str]:
    """What a script prints that must end as a process that lost another."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=os.getcwd(), check=False
    )
    assert (done.returncode, done.stderr) == (ProcessError.status, "")
    return done.stdout.splitlines()


@pytest.mark.slow
def test_told_to_stop_a_process_that_runs_goes_on_and_one_that_hangs_ends() -> None:
    """Neither Python code nor waiting for a thread, such as one that writes a checkpoint, is taken for hanging."""
    went_on, lost = lines_before_the_end(STUCK)
    assert went_on == "handled 1, went on"
    assert lost.startswith("rank 1 of 2 lost another at step 8 (received a signal to stop, but hung for 1 s)")


HUNG = """
import ctypes, datetime, time
import torch
from nmt.parallel import watchdog
from nmt.parallel.mesh import World

watchdog._CALM_SECONDS, watchdog._GRACE_SECONDS = 0.1, 0.2
world = World(torch.device("cpu"), timeout=datetime.timedelta(seconds=0.8))
world.size, world.rank = 2, 1
with watchdog.watch_for_hangs(world, lambda: "at step 9", lambda error: print(error, flush=True)):
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        time.sleep(0.01)
    print("went on", flush=True)
    mutex = ctypes.create_string_buffer(128)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex), lock(mutex)
print("never here", flush=True)
"""


@pytest.mark.slow
def test_a_process_that_hangs_longer_than_its_timeout_ends() -> None:
    """As in a recorded step, which NCCL does not watch."""
    went_on, lost = lines_before_the_end(HUNG)
    assert went_on == "went on"
    assert lost.startswith("rank 1 of 2 lost another at step 9 (hung for 1 s)")


@pytest.fixture
def two() -> World:
    world = World(torch.device("cpu"))
    world.size = 2
    return world


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What NCCL says (`name`), until the process ended itself: with which statuses."""
    error = SimpleNamespace(name="SUCCESS", statuses=[], ended=threading.Event())

    def end(status: int) -> None:
        error.name = "SUCCESS"
        error.statuses.append(status)
        error.ended.set()

    monkeypatch.setattr(watchdog, "_nccl_backends", lambda _world: [SimpleNamespace(get_error=lambda: error)])
    monkeypatch.setattr(watchdog, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(os, "_exit", end)
    return error


def test_what_nccl_says_ends_the_process(two: World, nccl: SimpleNamespace) -> None:
    """NCCL's word reaches no exception of the main thread: the thread must ask for it, and speak."""
    told: list[str] = []
    with watchdog.watch_for_hangs(two, lambda: "at step 3", lambda loss: told.append(str(loss))):
        assert not nccl.ended.wait(0.2)
        nccl.name = "REMOTE_ERROR"
        assert nccl.ended.wait(10)
    assert len(told) == 1
    assert told[0].startswith("rank 0 of 2 lost another at step 3 (NCCL: remote error)")
    assert nccl.statuses == [ProcessError.status]


def test_a_message_that_cannot_be_left_does_not_keep_the_process(two: World, nccl: SimpleNamespace) -> None:
    def full_disk(_error: ProcessError) -> None:
        raise OSError("no space")

    nccl.name = "TIMEOUT"
    with watchdog.watch_for_hangs(two, str, full_disk):
        assert nccl.ended.wait(10)
    assert nccl.statuses == [ProcessError.status]


def test_it_leaves_handlers_threads_and_files_as_they_were(two: World) -> None:
    def state() -> tuple[Any, ...]:
        descriptors = len(os.listdir("/proc/self/fd"))
        return signal.getsignal(signal.SIGURG), signal.set_wakeup_fd(-1), threading.active_count(), descriptors

    before = state()
    with watchdog.watch_for_hangs(two, str, print):
        assert threading.active_count() == before[2] + 1
    assert state() == before
    two.size = 1
    with watchdog.watch_for_hangs(two, str, print):
        assert threading.active_count() == before[2]
