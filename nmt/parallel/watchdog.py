"""A thread that detects when this process waits for another process that died or hangs.

A collective operation blocks inside PyTorch. On a GPU, so does any code that reads its result. Python runs no signal
handlers meanwhile, and NCCL raises no exception. Without this thread, NCCL's watchdog or a SIGKILL would end the
process, and nothing would report the step it was at.
"""

import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

from nmt.errors import ProcessError
from nmt.parallel.mesh import World

# If the main thread runs no Python for this long after a signal to stop, it waits for a process that is lost.
_STUCK_SECONDS = 20.0
_LOOK_SECONDS = 0.5
# Without such a signal, the main thread is looked at this often. It may wait parallel.timeout_seconds for another
# process, and the libraries that notice this themselves get some time to do so.
_CALM_SECONDS, _GRACE_SECONDS = 5.0, 10.0
# This signal is ignored by default, and nothing else sends it.
_POKE = signal.SIGURG


@contextmanager
def watch_for_hangs(
    world: World,
    where: Callable[[], str],
    tell: Callable[[ProcessError], None],
    stuck_seconds: float = _STUCK_SECONDS,
) -> Iterator[None]:
    """Context in which a lost peer ends this process: call `tell` with the error, then exit with status 7.

    A peer is lost if NCCL reports an error: an operation failed or took longer than parallel.timeout_seconds. It is
    also lost if the main thread has run no Python for longer than that, since NCCL does not watch operations of CUDA
    graphs. After SIGTERM, SIGINT or SIGHUP, `stuck_seconds` without Python are enough.

    Call it in the main thread, which must handle these signals itself. With a single process, it does nothing.
    """
    if world.size == 1:
        yield
        return
    watchdog = _HangWatchdog(world, where, tell, stuck_seconds, threading.get_ident())
    # Signals with a Python handler are written to this pipe at once, even while no Python runs.
    fd_before = signal.set_wakeup_fd(watchdog.writes, warn_on_full_buffer=False)
    handler_before = signal.signal(_POKE, watchdog.answer)
    watchdog.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd_before)
        signal.signal(_POKE, handler_before)
        watchdog.stop()


class _HangWatchdog(threading.Thread):
    def __init__(
        self,
        world: World,
        where: Callable[[], str],
        tell: Callable[[ProcessError], None],
        stuck_seconds: float,
        main_thread: int,
    ) -> None:
        super().__init__(name="Lookout", daemon=True)
        self.world, self.where, self.tell = world, where, tell
        self.stuck_seconds, self.main_thread = stuck_seconds, main_thread
        self.reads, self.writes = os.pipe()
        os.set_blocking(self.writes, False)
        self._over = False
        self._answers = 0

    def answer(self, _number: int, _frame: Any) -> None:
        """Count an answer: the main thread runs Python. Handler of the signal _POKE."""
        self._answers += 1

    def stop(self) -> None:
        """End the thread. Called by the main thread, which thus no longer hangs."""
        self._over = True
        os.write(self.writes, b"\0")
        self.join()
        os.close(self.reads)
        os.close(self.writes)

    def run(self) -> None:
        backends = _nccl_backends(self.world)
        told, patience = False, math.inf
        if self.world.timeout is not None:
            patience = self.world.timeout.total_seconds() + _GRACE_SECONDS
        asked, since = -1, 0.0  # number of answers when the main thread was last poked, and the time of that
        while not self._over:
            arrived = b""
            if select.select([self.reads], [], [], _LOOK_SECONDS)[0]:
                arrived = os.read(self.reads, 1024)
            if self._over:
                return
            for backend in backends:
                error = backend.get_error().name
                if error != "SUCCESS":
                    self._give_up(f"NCCL: {error.lower().replace('_', ' ')}")
            told = told or any(number in arrived for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
            waited = time.monotonic() - since
            if self._answers > asked:
                if waited > (_LOOK_SECONDS if told else _CALM_SECONDS):
                    asked, since = self._answers, time.monotonic()
                    signal.pthread_kill(self.main_thread, _POKE)
            elif told and waited > self.stuck_seconds:
                self._give_up(f"received a signal to stop, but hung for {self.stuck_seconds:.0f} s")
            elif waited > patience:
                self._give_up(f"hung for {patience:.0f} s")

    def _give_up(self, cause: str) -> None:
        error = self.world.peer_lost(cause, self.where())
        with suppress(Exception):  # no exception may keep this process alive
            self.tell(error)
        os._exit(error.status)


def _nccl_backends(world: World) -> list[Any]:
    if world.mesh is None or world.device.type != "cuda":
        return []
    groups = [dist.group.WORLD, *(world.mesh.get_group(name) for name in world.mesh.mesh_dim_names or ())]
    return [group._get_backend(torch.device("cuda")) for group in groups if group is not None]
