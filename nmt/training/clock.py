"""Training time: of the steps alone, for speeds, and in total, for training.max_minutes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Clock of one process, from its first step on; all times are in seconds.

    `seconds` is the total training time: steps, validations and saves, including those before the run was last resumed.
    A lap is the time since the previous lap, without pauses. Validations are pauses. Saves are not: they stop training
    only briefly.
    """

    def __init__(self, before: float = 0.0) -> None:
        self._before = before
        self._started = self._lap_started = time.perf_counter()
        self._paused = self._paused_before_lap = 0.0
        self._pauses = 0
        self.mark()

    @property
    def seconds(self) -> float:
        """Training time so far, including the time before the run was last resumed."""
        return self._before + time.perf_counter() - self._started

    @property
    def mean_pause(self) -> float:
        """Mean length of the pauses of this process; 0 before the first."""
        return self._paused / max(self._pauses, 1)

    def lap(self) -> float:
        """End a lap and start the next. Return the time of the lap that ended."""
        now = time.perf_counter()
        taken = now - self._lap_started - (self._paused - self._paused_before_lap)
        self._lap_started, self._paused_before_lap = now, self._paused
        return taken

    def mark(self) -> None:
        """Start the time that `since_mark` returns."""
        self._marked = time.perf_counter() - self._paused

    def since_mark(self) -> float:
        """Return the time since `mark`, without pauses."""
        return time.perf_counter() - self._paused - self._marked

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count the time in this context as a pause."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begun
            self._pauses += 1
