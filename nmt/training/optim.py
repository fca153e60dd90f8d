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
"""The factored second moment's two parts, as the optimiser's state and checkpoints name them."""

# Of the one temporary that a factored update needs, however large the experts are together.
_BUFFER_BYTES = 256 * 2**20


def learning_rate(training: TrainingConfig, step: int, seconds: float = 0.0) -> float:
    """The rate of update `step`, counted from 1, which begins after `seconds` of training.

    inverse_sqrt: linear over warmup_steps, constant over hold_steps, then proportional to step^-1/2 (S17 appendix E).
    linear: linear over warmup_steps, then falling linearly so that the update after max_steps would have 0. With
    max_minutes it is also never above learning_rate (1 - seconds / max_minutes), and so is 0 when they are over.
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
    """Adam over all parameters, each update one fused pass; with `expert_optimizer: factored`, experts have their own.

    `clipped_step` drives both; `state_shapes` says what they remember.
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
    """Adam, in which experts have no first moment and a factored second one (S17 appendix D).

    Of every expert's matrix two vectors are kept: the running averages r (I) and c (O) of the row means and of the
    column means of its squared gradient g^2, with Adam's beta2. The step is Adam's with beta1 = 0:

        V_ij = r_i c_j / mean(r) / (1 - beta2^t),    w -= rate * g / (sqrt(V) + epsilon)

    so an expert's optimiser state takes I + O numbers instead of 2 I O. V is exact where g^2 has rank one. An expert
    that never got a token has r = c = 0 and g = 0, and stays as it is. The paper does not say whether the averages are
    corrected for starting at zero, nor what keeps the divisor from 0: both are taken from Adam, and t counts the
    updates of all experts, those without tokens too, as Adam's does. Where an entry's square is far above the factors'
    product its step exceeds any of Adam's; the paper does not bound it, nor is it bounded here. All other parameters
    are Adam's own.

    Like the fused Adam it reads `grad_scale` (the gradient is divided by it first) and `found_inf` (1: nothing
    changes, the count of updates neither) as tensors on the device, so that the host does not wait.
    """

    def __init__(self, dense: torch.optim.Adam, experts: list[nn.Parameter]) -> None:
        (group,) = dense.param_groups
        super().__init__(experts, {"lr": group["lr"], "beta2": group["betas"][1], "eps": group["eps"]})
        self._dense = dense
        # One list of groups and one state, as if it were one optimiser: the groups are the same dictionaries.
        self.param_groups = [*dense.param_groups, *self.param_groups]
        self.state = dense.state
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient. Gradients are spent: what they hold afterwards is no
        longer the gradient.
        """
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
    """`ExpertFactoredAdam`'s step for one parameter, some experts at a time.

    With scale s and the raw gradient g, rate * (g/s) / (sqrt(V) + epsilon) = rate * g / (a_i b_j + s epsilon) for
    a = s sqrt(r / mean(r)) and b = sqrt(c / (1 - beta2^t)): the only temporary as large as the gradient is the
    divisor. Roots are taken before products, which could underflow in float32.
    """
    beta2, dtype = group["beta2"], w_EIO.dtype
    inputs, outputs = w_EIO.shape[1:]
    # In float64, since 1 - beta2 has lost digits in float32. The update that is skipped counts here as if it was not.
    correction = (1.0 - beta2 ** (state["step"].double() + 1.0)).to(dtype)
    weight = (1.0 - beta2) * (1.0 - skipped)
    epsilon = group["eps"] * scale
    each = _experts_at_once(w_EIO)
    parts = (whole.split(each) for whole in (w_EIO, g_EIO, state[ROW], state[COLUMN]))
    for w, g, r_EI, c_EO in zip(*parts, strict=True):
        # 0 instead of what is not finite: then nothing below changes a bit, as the averages' weight is 0 too.
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
    """What the optimiser remembers of the parameter `name`: tensors by name, float32, zeros before the first update."""
    if expert_optimizer == "factored" and is_expert(name):
        return _factored_shapes(shape)
    return {"step": (), "exp_avg": tuple(shape), "exp_avg_sq": tuple(shape)}


def has_moments(checkpoint: Checkpoint, found: Collection[str], shapes: Mapping[str, Collection[str]]) -> set[str]:
    """The parameters of which a checkpoint holds what the optimiser remembers: all but those never trained (frozen).

    `found` names what it holds, `shapes` what each parameter has (`state_shapes`). CheckpointError for half of it.
    """
    trained = set()
    for name, moments in shapes.items():
        wanted = [f"{moment}.{name}" for moment in moments]
        missing = [each for each in wanted if each not in found]
        if not missing:
            trained.add(name)
        elif len(missing) < len(wanted):
            raise CheckpointError(f"{checkpoint.path} lacks {missing[0]} of the optimiser: choose another")
    return trained


def tensors_to_save(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The parts of a checkpoint: parameters by name ("model"), and what the optimiser remembers of them as
    "exp_avg.NAME" and the like ("training").
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    moments = {
        f"{moment}.{name}": value
        for name, parameter in parameters.items()
        for moment, value in optimizer.state[parameter].items()
    }
    return {"model": parameters, "training": moments}


class ClippedStep(NamedTuple):
    """The result of `clipped_step`, as tensors, so that nobody waits for the device."""

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
    optimizer: torch.optim.Optimizer,
    clip_norm: float,
    rate: float,
    experts: Collection[Tensor] = (),
    world: World | None = None,
) -> ClippedStep:
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
    return ClippedStep(norm, skipped)
