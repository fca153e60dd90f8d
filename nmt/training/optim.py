"""Adam and its learning rate.

Letters: E experts, I and O inputs and outputs of one layer of an expert.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nmt.checkpoint import Checkpoint
from nmt.config import TrainingConfig
from nmt.errors import CheckpointError
from nmt.model.names import is_expert
from nmt.parallel.mesh import World

ROW, COLUMN = "exp_avg_sq_row", "exp_avg_sq_column"
"""Names of the two parts of the factored second moment in the optimiser's state and in checkpoints."""

# Upper bound of the one temporary tensor of a factored step, unless a single expert is larger.
_BUFFER_BYTES = 256 * 2**20


def learning_rate(training: TrainingConfig, step: int, seconds: float = 0.0) -> float:
    """Return the learning rate of step `step`, counted from 1, which starts after `seconds` of training.

    inverse_sqrt: linear over warmup_steps, constant over hold_steps, then proportional to step^-1/2 (S17 appendix E).
    linear: linear over warmup_steps, then falling linearly to 0 at step max_steps + 1. With max_minutes, it is also at
    most learning_rate (1 - seconds / (60 max_minutes)), which is 0 when the time is up.
    """
    if step <= training.warmup_steps:
        rate = training.learning_rate * step / training.warmup_steps
    elif training.schedule == "inverse_sqrt":
        held_until = max(training.warmup_steps + training.hold_steps, 1)
        rate = training.learning_rate * min(1.0, math.sqrt(held_until / step))
    else:
        remaining = (training.max_steps + 1 - step) / (training.max_steps + 1 - training.warmup_steps)
        rate = training.learning_rate * max(remaining, 0.0)
    if training.schedule == "linear" and training.max_minutes:
        rate = min(rate, training.learning_rate * max(1.0 - seconds / 60.0 / training.max_minutes, 0.0))
    return rate


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """Return fused Adam for all parameters, or `ExpertFactoredAdam` with `expert_optimizer: factored`.

    Both take their steps through `clipped_step`. `state_shapes` lists their state.
    """
    experts = [p for name, p in model.named_parameters() if is_expert(name)]
    factored = experts if training.expert_optimizer == "factored" else []
    others = set(map(id, factored))
    adam = torch.optim.Adam(
        [parameter for parameter in model.parameters() if id(parameter) not in others],
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=True,
    )
    return ExpertFactoredAdam(adam, factored) if factored else adam


class ExpertFactoredAdam(torch.optim.Optimizer):
    """Adam, but for experts without first moment and with a factored second moment (S17 appendix D).

    Each expert matrix has two vectors of state: running averages, with Adam's beta2, of the row means r (I) and column
    means c (O) of its squared gradient g^2. A step is Adam's with beta1 = 0:

        V_ij = r_i c_j / mean(r) / (1 - beta2^t),    w -= rate * g / (sqrt(V) + epsilon)

    An expert matrix thus has I + O numbers of optimiser state instead of 2 I O. V is exact if g^2 has rank one. An
    expert that never got a token has r = c = 0 and g = 0, and does not change.

    The paper specifies neither a bias correction of the averages nor the epsilon in the divisor: both are as in Adam.
    As in Adam, t counts all steps, including those in which an expert had no token. If the square of one entry is far
    above the product of the factors, its step is larger than any of Adam's. The paper does not bound such steps, and
    neither does this class.

    Like fused Adam, it reads `grad_scale` (the gradient is first divided by it) and `found_inf` (if 1, nothing changes,
    not even the count of steps). Both are tensors on the device, so that the host does not wait.
    """

    def __init__(self, dense: torch.optim.Adam, experts: list[nn.Parameter]) -> None:
        (group,) = dense.param_groups
        super().__init__(experts, {"lr": group["lr"], "beta2": group["betas"][1], "eps": group["eps"]})
        self._dense = dense
        # The groups (the same dictionaries) and the state are shared with `dense`, so that this is one optimiser.
        self.param_groups = [*dense.param_groups, *self.param_groups]
        self.state = dense.state
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take one step with all parameters that have a gradient. Gradients are overwritten."""
        assert closure is None
        vars(self._dense).update(grad_scale=self.grad_scale, found_inf=self.found_inf)
        self._dense.step()
        group = self.param_groups[-1]
        experts = [w_EIO for w_EIO in group["params"] if w_EIO.grad is not None]
        if not experts:
            return
        buffer = experts[0].new_empty(max(_experts_at_once(w_EIO) * w_EIO[0].numel() for w_EIO in experts))
        scale = buffer.new_ones(()) if self.grad_scale is None else self.grad_scale.to(buffer.dtype)
        skipped = buffer.new_zeros(()) if self.found_inf is None else self.found_inf.to(buffer.dtype)
        for w_EIO in experts:
            state = self.state[w_EIO]
            if not state:
                for moment, shape in _factored_shapes(w_EIO.shape).items():
                    state[moment] = w_EIO.new_zeros(shape, dtype=torch.float32 if moment == "step" else w_EIO.dtype)
            _factored_step(w_EIO, w_EIO.grad, state, group, scale, skipped, buffer)


def _experts_at_once(w_EIO: Tensor) -> int:
    return min(len(w_EIO), max(1, _BUFFER_BYTES // w_EIO[0].nbytes))


def _factored_step(
    w_EIO: Tensor,
    g_EIO: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    scale: Tensor,
    skipped: Tensor,
    buffer: Tensor,
) -> None:
    """Take the step of `ExpertFactoredAdam` for one parameter, a few experts at a time.

    With scale s and the raw gradient g, rate * (g/s) / (sqrt(V) + epsilon) = rate * g / (a_i b_j + s epsilon) for
    a = s sqrt(r / mean(r)) and b = sqrt(c / (1 - beta2^t)). The divisor is the only temporary as large as the gradient.
    Roots are taken before products, because products of squares could underflow in float32.
    """
    beta2, dtype = group["beta2"], w_EIO.dtype
    inputs, outputs = w_EIO.shape[1:]
    # In float64, as 1 - beta2^t loses digits in float32. A skipped step counts here, where it changes nothing.
    correction = (1.0 - beta2 ** (state["step"].double() + 1.0)).to(dtype)
    weight = (1.0 - beta2) * (1.0 - skipped)
    epsilon = group["eps"] * scale
    each = _experts_at_once(w_EIO)
    parts = (whole.split(each) for whole in (w_EIO, g_EIO, state[ROW], state[COLUMN]))
    for w, g, r_EI, c_EO in zip(*parts, strict=True):
        # In a skipped step, the gradient and the weight of the averages are 0, so that nothing below changes a bit.
        g.masked_fill_(skipped.bool(), 0.0)
        r_EI.lerp_((torch.linalg.vector_norm(g, dim=2) / (scale * math.sqrt(outputs))).square(), weight)
        c_EO.lerp_((torch.linalg.vector_norm(g, dim=1) / (scale * math.sqrt(inputs))).square(), weight)
        mean_E = r_EI.mean(1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        a_EI = (r_EI / mean_E).sqrt() * scale
        b_EO = (c_EO / correction).sqrt()
        divisor = buffer[: g.numel()].view(g.shape)
        torch.addcmul(epsilon, a_EI[:, :, None], b_EO[:, None, :], out=divisor)
        w.addcdiv_(g, divisor, value=-group["lr"])
    state["step"].add_(1.0 - skipped)


def _factored_shapes(shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    experts, inputs, outputs = shape
    return {"step": (), ROW: (experts, inputs), COLUMN: (experts, outputs)}


def state_shapes(name: str, shape: Sequence[int], expert_optimizer: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a parameter's optimiser state, by name: float32 tensors, zero before the first step."""
    if expert_optimizer == "factored" and is_expert(name):
        return _factored_shapes(shape)
    return {"step": (), "exp_avg": tuple(shape), "exp_avg_sq": tuple(shape)}


def has_moments(checkpoint: Checkpoint, found: Collection[str], shapes: Mapping[str, Collection[str]]) -> set[str]:
    """Return the parameters whose optimiser state is in a checkpoint: all except those never trained (frozen).

    `found` has the names in the checkpoint; `shapes` has the state of each parameter (`state_shapes`). CheckpointError
    if only part of a parameter's state is there.
    """
    trained = set()
    for name, moments in shapes.items():
        wanted = [f"{moment}.{name}" for moment in moments]
        missing = [each for each in wanted if each not in found]
        if not missing:
            trained.add(name)
        elif len(missing) < len(wanted):
            raise CheckpointError(f"{checkpoint.path} lacks {missing[0]} of the optimiser: choose another checkpoint")
    return trained


def tensors_to_save(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a checkpoint: "model" has parameters by name, "training" has optimiser state.

    Names of optimiser state are such as "exp_avg.NAME".
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    moments = {
        f"{moment}.{name}": value
        for name, parameter in parameters.items()
        for moment, value in optimizer.state[parameter].items()
    }
    return {"model": parameters, "training": moments}


class ClippedStep(NamedTuple):
    """Result of `clipped_step`, as tensors, so that the host does not wait for the device."""

    gradient_norm: Tensor
    skipped: Tensor  # float32: 1 if the gradient was not finite and nothing changed, else 0


def _global_norm(parameters: list[Tensor], experts: Collection[Tensor], world: World | None) -> Tensor:
    shared = {id(parameter) for parameter in experts} if world else set()
    dense = [p.grad for p in parameters if p.grad is not None and id(p) not in shared]
    own = [p.grad for p in parameters if p.grad is not None and id(p) in shared]
    norm = torch.nn.utils.get_total_norm(dense, foreach=True)
    if world is None or not own:
        return norm
    of_experts = world.sum_over_group(torch.nn.utils.get_total_norm(own, foreach=True).square())
    # Groups may add in different orders. A difference in the norm's last bit would change every parameter.
    return world.from_main((norm.square() + of_experts).sqrt())


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clipped_step(
    optimizer: torch.optim.Optimizer,
    clip_norm: float,
    rate: float | None,
    experts: Collection[Tensor] = (),
    world: World | None = None,
) -> ClippedStep:
    """Scale the global gradient norm down to at most `clip_norm` (0: no clipping) and take one step.

    `experts` are the parameters that are split over the processes of `world`. All others are equal in all processes.

    The fused kernel divides by the scale, and skips gradients that are not finite, in the same pass that changes the
    parameters. Clipping thus needs no separate pass, and a NaN never reaches a weight or a moment.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = _global_norm(parameters, experts, world)
    skipped = (~norm.isfinite()).float()
    scale = (norm / clip_norm).clamp_min(1.0) if clip_norm else torch.ones_like(norm)
    # The interface through which torch.amp.GradScaler drives fused optimisers.
    vars(optimizer).update(grad_scale=torch.where(skipped.bool(), 1.0, scale).float(), found_inf=skipped)
    if rate is not None:
        set_rate(optimizer, rate)
    optimizer.step()
    return ClippedStep(norm, skipped)
