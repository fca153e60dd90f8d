"""What a person should know before and soon after a run starts: whether it fits the machine, and how long it takes."""

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

# On a CPU, a run that takes longer is told what would be shorter.
_LONG_HOURS = 2.0


def seconds_left(training: TrainingConfig, step: int, seconds: float, per_update: float, validation: float) -> float:
    """How long a run that is at `step` after `seconds` of training goes on, if nothing but its settings ends it.

    An update takes `per_update` seconds, a validation `validation`; that of this step is not counted.
    """
    if step >= training.max_steps:
        return 0.0
    validations = math.ceil(training.max_steps / training.validate_every) - step // training.validate_every
    by_steps = (training.max_steps - step) * per_update + validations * validation
    by_minutes = training.max_minutes * 60.0 - seconds if training.max_minutes else math.inf
    return max(min(by_steps, by_minutes), 0.0)


def first_forecast(training: TrainingConfig, step: int, seconds: float, per_update: float, on_cpu: bool) -> str:
    """One line for the first updates of a sitting: how long the run will take and, if long, what would be shorter."""
    updates = training.max_steps - step
    left = seconds_left(training, step, seconds, per_update, 0.0)
    line = f"{per_update:.2g} s an update, "
    if left < updates * per_update:
        in_time = int(left / per_update)
        line += (
            f"training.max_minutes={training.max_minutes:g} leaves time for about {in_time:,} of the {updates:,} "
            f"updates that training.max_steps={training.max_steps} asks for"
        )
        if step + in_time < training.warmup_steps:
            line += f": that is not even training.warmup_steps={training.warmup_steps}, so the model will hardly learn"
        return line
    line += f"{updates:,} to go: about {duration(left)}, validations not counted"
    if on_cpu and left > _LONG_HOURS * 3600:
        line += (
            "; shorter: training.max_minutes=30 with the same run, model=small or experiment=own_small with a new "
            "run.name"
        )
    return line


def check_memory(config: Config, corpus: dict[str, Any], world: World) -> str | None:
    """A warning, in one line, if training will hardly fit the memory there is; `corpus` are the counts of its text.

    MemoryLimitError if weights, gradients and the optimiser's memory alone do not fit: no batch is small enough then.
    On a CPU the processes of this host share its memory.
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
            f"weights, gradients and optimiser of this model take {fixed / 1e9:.3g} GB, and {has}: take a smaller one, "
            "such as model=small, or fewer experts (nmt cost with the same settings shows what takes how much)"
        )
    if needed <= there:
        return None
    return (
        f"warning: training takes about {needed / 1e9:.3g} GB at its highest, and {has}: it may run out of memory. "
        f"Take a lower training.batch_tokens (now {config.training.batch_tokens:,}) or a smaller model; nmt cost with "
        "the same settings shows what takes how much"
    )
