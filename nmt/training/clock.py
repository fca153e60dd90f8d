"""The time that training takes: of updates alone, for speeds, and of everything, for training.max_minutes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Runs from the first update of a sitting to its end; seconds.

    `seconds` is everything, the sittings before included: updates, validations and saves. A lap is what went by since
    the last one, without the pauses; validations are pauses, the short stop of a save is not.
    """

    def __init__(self, before: float = 0.0) -> None:
        self._before = before
        self._started = self._lap_started = time.perf_counter()
        self._paused = self._paused_before_lap = 0.0
        self._pauses = 0
        self.mark()

    @property
    def seconds(self) -> float:
        """Of training so far, in all sittings."""
        return self._before + time.perf_counter() - self._started

    @property
    def mean_pause(self) -> float:
        """How long a pause of this sitting took; 0 before the first."""
        return self._paused / max(self._pauses, 1)

    def lap(self) -> float:
        """End a lap and begin the next."""
        now = time.perf_counter()
        taken = now - self._lap_started - (self._paused - self._paused_before_lap)
        self._lap_started, self._paused_before_lap = now, self._paused
        return taken

    def mark(self) -> None:
        """Begin what `since_mark` measures."""
        self._marked = time.perf_counter() - self._paused

    def since_mark(self) -> float:
        """What went by since `mark`, without the pauses."""
        return time.perf_counter() - self._paused - self._marked

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens meanwhile is in no lap."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begun
            self._pauses += 1
