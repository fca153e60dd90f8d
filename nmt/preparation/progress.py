"""Report the progress of a preparation, with the time left."""

import time
from collections.abc import Callable

from nmt.preparation.filtered import Tick
from nmt.wording import duration, percent

_SECONDS = 10.0
_UNSURE_SECONDS = 3.0  # of a stage, before its end can be forecast


class Stages:
    """The stages of a preparation: how long each took, and how far the present one is."""

    def __init__(self, show: Callable[[str, float | None], None], every: float = _SECONDS) -> None:
        """Call show(line, share of the stage that is done) at most once in `every` seconds."""
        self.seconds: dict[str, float] = {}
        """Seconds of each stage so far."""
        self._show, self._every = show, every
        self._stage, self._began = "", time.monotonic()
        self._shown = self._began

    def begin(self, stage: str) -> Tick:
        """End the present stage and begin another. Return what reports its progress."""
        self.end()
        self._stage, self._began = stage, time.monotonic()
        return self.tick

    def end(self) -> None:
        """End the present stage."""
        if self._stage:
            spent = time.monotonic() - self._began
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + spent
        self._stage = ""

    def tick(self, text: str, share: float | None = None) -> None:
        """Report what is done in the present stage, and which share of it that is, if known."""
        now = time.monotonic()
        if now - self._shown < self._every:
            return
        self._shown = now
        if share:
            share = min(share, 1.0)
            text += f", {percent(share)}"
            if now - self._began > _UNSURE_SECONDS:
                text += f", {duration((now - self._began) * (1 - share) / share)} left"
        self._show(text, share)
