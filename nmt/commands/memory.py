"""Check, before training starts, whether it will fit into the memory of this machine."""

import os
from typing import Any

import torch

from nmt.config import Config
from nmt.cost.budget import SentenceLengths, largest_shape, memory_of, numbers_of
from nmt.device import memory_bytes
from nmt.errors import MemoryLimitError
from nmt.parallel.mesh import World


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
