"""Adam and its learning rate."""

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nmt.config import TrainingConfig
from nmt.parallel.mesh import World


def learning_rate(training: TrainingConfig, step: int) -> float:
    """The rate of update `step`, counted from 1.

    inverse_sqrt: linear over warmup_steps, constant over hold_steps, then proportional to step^-1/2 (S17 appendix E).
    linear: linear over warmup_steps, then falling linearly so that the update after max_steps would have 0.
    """
    if step <= training.warmup_steps:
        return training.learning_rate * step / training.warmup_steps
    if training.schedule == "inverse_sqrt":
        held_until = max(training.warmup_steps + training.hold_steps, 1)
        return training.learning_rate * min(1.0, math.sqrt(held_until / step))
    remaining = (training.max_steps + 1 - step) / (training.max_steps + 1 - training.warmup_steps)
    return training.learning_rate * max(remaining, 0.0)


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Adam:
    """Adam over all parameters, each update one fused pass."""
    return torch.optim.Adam(
        model.parameters(),
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=True,
    )


def tensors_to_save(model: nn.Module, optimizer: torch.optim.Adam) -> dict[str, dict[str, Tensor]]:
    """The parts of a checkpoint: parameters by name ("model"), and Adam's moments as "exp_avg.NAME" ("training")."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    moments = {
        f"{moment}.{name}": value
        for name, parameter in parameters.items()
        for moment, value in optimizer.state[parameter].items()
    }
    return {"model": parameters, "training": moments}


class Update(NamedTuple):
    """What one update did; tensors, so that nobody waits for the device."""

    gradient_norm: Tensor
    skipped: Tensor  # float32, 1 if the gradient was not finite and nothing was changed


def _global_norm(parameters: list[Tensor], experts: Collection[Tensor], world: World | None) -> Tensor:
    shared = {id(parameter) for parameter in experts} if world else set()
    dense = [p.grad for p in parameters if p.grad is not None and id(p) not in shared]
    own = [p.grad for p in parameters if p.grad is not None and id(p) in shared]
    norm = torch.nn.utils.get_total_norm(dense, foreach=True)
    if world is None or not own:
        return norm
    of_experts = world.sum_over_group(torch.nn.utils.get_total_norm(own, foreach=True).square())
    # Groups may add in another order; one bit of the norm would be one bit of every parameter.
    return world.from_main((norm.square() + of_experts).sqrt())


def clipped_step(
    optimizer: torch.optim.Adam,
    clip_norm: float,
    rate: float,
    experts: Collection[Tensor] = (),
    world: World | None = None,
) -> Update:
    """Scale the whole gradient to at most `clip_norm` (0: leave it) and take one step at `rate`.

    `experts` are the parameters of which this process of a `world` holds a share; all others are the same everywhere.

    The fused kernel divides by the scale and skips a gradient that is not finite in the same pass over the
    parameters, so clipping costs no pass of its own and a NaN never reaches a weight or a moment.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = _global_norm(parameters, experts, world)
    skipped = (~norm.isfinite()).float()
    scale = (norm / clip_norm).clamp_min(1.0) if clip_norm else torch.ones_like(norm)
    # The interface through which torch.amp.GradScaler drives fused optimisers.
    vars(optimizer).update(grad_scale=torch.where(skipped.bool(), 1.0, scale).float(), found_inf=skipped)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return Update(norm, skipped)
