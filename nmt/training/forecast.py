"""Forecasts for a run: whether it fits into memory, and how long it will take."""

import math
import os
from typing import Any

import torch

from nmt.config import Config, TrainingConfig
from nmt.cost.budget import SentenceLengths, largest_shape, memory_of, numbers_of
from nmt.device import memory_bytes
from nmt.errors import MemoryLimitError
from nmt.parallel.mesh import World
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


def check_memory(config: Config, corpus: dict[str, Any], world: World) -> str | None:
    """Return a warning of one line if training may not fit into memory, else None.

    `corpus` has the counts of the prepared text. On a CPU, the processes of a host share its memory.
    MemoryLimitError if weights, gradients and optimiser state do not fit: then no batch is small enough.
    """
    on_gpu, vocab_size = world.device.type == "cuda", corpus["vocabulary_size"]
    numbers = numbers_of(config, on_gpu)
    shape = largest_shape(config, vocab_size, SentenceLengths.of_corpus(corpus), numbers)
    rows = memory_of(config, vocab_size, shape, numbers, world.size, world.group_size)
    on_this_host = 1 if on_gpu else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    there = memory_bytes(world.device)
    needed = on_this_host * sum(row.total for row in rows)
    fixed = on_this_host * sum(row.total for row in rows if row.kind in ("weights", "optimiser", "gradients"))
    place = torch.cuda.get_device_name(world.device) if on_gpu else "this machine"
    has = f"{place} has {there / 1e9:.3g} GB"
    if fixed > there:
        raise MemoryLimitError(
            f"weights, gradients and optimiser state of this model take {fixed / 1e9:.3g} GB, and {has}: choose a "
            "smaller model, such as model=small, or fewer experts (nmt cost with the same settings shows each part)"
        )
    if needed <= there:
        return None
    return (
        f"warning: training needs up to about {needed / 1e9:.3g} GB, and {has}: it may run out of memory. Lower "
        f"training.batch_tokens (now {config.training.batch_tokens:,}) or choose a smaller model (nmt cost with the "
        "same settings shows each part)"
    )
