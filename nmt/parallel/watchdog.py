"""A thread that sees when this process waits in vain for another one.

A collective operation waits inside PyTorch, and on a GPU so does whatever reads a result of one. Python runs no signal
handler there, and NCCL raises no exception: a process whose partner died or hangs could be told nothing, and would be
ended by NCCL's watchdog, or by SIGKILL, without a word of where it stood.
"""

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

# A main thread that was told to stop and ran no Python for so long waits for a process that will not come.
_STUCK_SECONDS = 20.0
_LOOK_SECONDS = 0.5
# Ignored where nobody handles it, and sent by nobody else.
_POKE = signal.SIGURG


@contextmanager
def watch_for_hangs(
    world: World,
    where: Callable[[], str],
    tell: Callable[[ProcessError], None],
    stuck_seconds: float = _STUCK_SECONDS,
) -> Iterator[None]:
    """Within, `tell` that another process is lost, and end this one with status 7, when NCCL says so (an operation took
    longer than parallel.timeout_seconds, or failed) or when SIGTERM, SIGINT or SIGHUP came and the main thread hangs.

    For the main thread, which must handle these signals itself. Nothing happens in a single process.
    """
    if world.size == 1:
        yield
        return
    watchdog = _HangWatchdog(world, where, tell, stuck_seconds, threading.get_ident())
    # What arrives for a handler in Python is noted here at once, even while no Python runs.
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
        """The main thread runs Python."""
        self._answers += 1

    def stop(self) -> None:
        """End the thread. The main thread has come out of whatever it waited for."""
        self._over = True
        os.write(self.writes, b"\0")
        self.join()
        os.close(self.reads)
        os.close(self.writes)

    def run(self) -> None:
        backends = _nccl_backends(self.world)
        told = False
        asked, since = -1, 0.0  # how many answers there were when the main thread was last poked, and when that was
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
            if told and self._answers > asked:
                if waited > _LOOK_SECONDS:
                    asked, since = self._answers, time.monotonic()
                    signal.pthread_kill(self.main_thread, _POKE)
            elif told and waited > self.stuck_seconds:
                self._give_up(f"told to stop, it waited {self.stuck_seconds:.0f} s more")

    def _give_up(self, cause: str) -> None:
        error = self.world.peer_lost(cause, self.where())
        with suppress(Exception):  # whatever it is, it must not keep this process alive
            self.tell(error)
        os._exit(error.status)


def _nccl_backends(world: World) -> list[Any]:
    if world.mesh is None or world.device.type != "cuda":
        return []
    groups = [dist.group.WORLD, *(world.mesh.get_group(name) for name in world.mesh.mesh_dim_names or ())]
    return [group._get_backend(torch.device("cuda")) for group in groups if group is not None]
