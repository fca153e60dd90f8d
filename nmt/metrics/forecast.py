"""How long a run will take, estimated from its first steps."""

import math

from nmt.config import TrainingConfig
from nmt.wording import duration

# For a longer run on a CPU, the forecast suggests how to shorten it.
_LONG_HOURS = 2.0


def seconds_left(training: TrainingConfig, step: int, seconds: float, per_update: float, validation: float) -> float:
    """Return the seconds left for a run that is at `step` after `seconds` of training, if only its settings end it.

    A step takes `per_update` seconds and a validation takes `validation` seconds. The validation of this step does not
    count.
    """
    if step >= training.max_steps:
        return 0.0
    validations = math.ceil(training.max_steps / training.validate_every) - step // training.validate_every
    by_steps = (training.max_steps - step) * per_update + validations * validation
    by_minutes = training.max_minutes * 60.0 - seconds if training.max_minutes else math.inf
    return max(min(by_steps, by_minutes), 0.0)


def first_forecast(training: TrainingConfig, step: int, seconds: float, per_update: float, on_cpu: bool) -> str:
    """Return a line for soon after a start: how long the run will take and, if long, how to shorten it."""
    updates = training.max_steps - step
    left = seconds_left(training, step, seconds, per_update, 0.0)
    line = f"{per_update:.2g} s per step, "
    if left < updates * per_update:
        in_time = int(left / per_update)
        line += (
            f"training.max_minutes={training.max_minutes:g} leaves time for about {in_time:,} of the {updates:,} "
            f"steps left to training.max_steps={training.max_steps}"
        )
        if step + in_time < training.warmup_steps:
            line += f": fewer than training.warmup_steps={training.warmup_steps}, so the model will hardly learn"
        return line
    line += f"{updates:,} steps left: about {duration(left)}, without validations"
    if on_cpu and left > _LONG_HOURS * 3600:
        line += (
            "; to shorten this, set training.max_minutes=30 in the same run, or start a new run.name with model=small "
            "or experiment=own_small"
        )
    return line
