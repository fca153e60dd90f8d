"""When training ends by its settings, and with which setting it can be resumed after that."""

from typing import NamedTuple

from nmt.config import TrainingConfig


class Ending(NamedTuple):
    """An end of training."""

    reason: str
    """Such as "training.max_steps=500 is reached"."""
    longer: str
    """The setting that trains longer, such as "training.max_steps=1000": twice as long as now."""


def ending(training: TrainingConfig, step: int, seconds: float, validations_since_best: int) -> Ending | None:
    """Return why training ends after `step` steps and `seconds` of training; None if it does not."""
    if step >= training.max_steps:
        longer = f"training.max_steps={2 * training.max_steps}"
        return Ending(f"training.max_steps={training.max_steps} is reached", longer)
    if 0 < training.patience <= validations_since_best:
        reason = f"none of the last {training.patience} validations was better (training.patience)"
        return Ending(reason, f"training.patience={2 * max(training.patience, validations_since_best)}")
    if 0.0 < training.max_minutes <= seconds / 60.0:
        # The limit may have been lowered below the time that is used up.
        longer = f"training.max_minutes={2 * max(training.max_minutes, round(seconds / 60.0)):g}"
        return Ending(f"training.max_minutes={training.max_minutes:g} is used up", longer)
    return None
