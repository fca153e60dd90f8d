"""Adam and its learning rate.

Letters: E experts, I and O inputs and outputs of one layer of an expert.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nmt.checkpoint import Checkpoint
from nmt.config import TrainingConfig
from nmt.errors import CheckpointError
from nmt.model.experts import Experts
from nmt.model.kernels.expert_step import ExpertWeights, Step, adam_step, factored_step, sums_of_squares
from nmt.model.names import is_expert
from nmt.parallel.mesh import World

ROW, COLUMN = "exp_avg_sq_row", "exp_avg_sq_column"
"""Names of the two parts of the factored second moment in the optimiser's state and in checkpoints."""

MASTER = "master"
"""Name of the float32 values of a bf16 parameter in the optimiser's state. Checkpoints have them as the parameter."""

_FACTOR = "factor"
"""Key of a group of parameters: its learning rate as a multiple of the one that is set."""


def learning_rate(training: TrainingConfig, step: int, seconds: float = 0.0, warm_from: int = 0) -> float:
    """Return the learning rate of step `step`, counted from 1, which starts after `seconds` of training.

    inverse_sqrt: linear over warmup_steps, constant over hold_steps, then proportional to step^-1/2 (S17 appendix E).
    linear: linear over warmup_steps, then falling linearly to 0 at step max_steps + 1. With max_minutes, it is also at
    most learning_rate (1 - seconds / (60 max_minutes)), which is 0 when the time is up.
    wsd (warm-up, stable, decay; Hu et al. 2024, "MiniCPM"): linear over warmup_steps, constant, then falling linearly
    to 0 over the last decay_share of max_steps, or of max_minutes, as `linear` does over all. Hu et al. decay
    exponentially.

    If the network was changed after step `warm_from`, such as by more experts, its new parts are warmed up: the rate of
    any schedule is multiplied by min(1, (step - warm_from) / warmup_steps). 0: it was not changed.
    """
    peak, steps_left = training.learning_rate, training.max_steps + 1 - step
    if step <= training.warmup_steps:
        rate = peak * step / training.warmup_steps
    elif training.schedule == "inverse_sqrt":
        held_until = max(training.warmup_steps + training.hold_steps, 1)
        rate = peak * min(1.0, math.sqrt(held_until / step))
    elif training.schedule == "linear":
        rate = peak * max(steps_left / (training.max_steps + 1 - training.warmup_steps), 0.0)
    else:
        rate = peak
    decay_share = training.decay_share if training.schedule == "wsd" else 1.0
    if training.schedule == "wsd":
        rate = min(rate, peak * max(steps_left, 0) / (decay_share * training.max_steps))
    if training.schedule != "inverse_sqrt" and training.max_minutes:
        rate = min(rate, peak * max(1.0 - seconds / 60.0 / training.max_minutes, 0.0) / decay_share)
    if warm_from and step < warm_from + training.warmup_steps:
        rate *= (step - warm_from) / training.warmup_steps
    return rate


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimiser of a model on its device: fused Adam, or `ExpertAdam` if experts need a step of their own.

    Experts become bf16 parameters here, so that no pass casts them, if their products are bf16 on a GPU or with
    `training.expert_weights=bfloat16`. `clipped_step` takes the steps. `state_shapes` lists the state.
    """
    device = next(model.parameters()).device
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    in_bf16 = training.experts_in_bf16(on_gpu=device.type == "cuda")
    factored = training.expert_optimizer == "factored"
    places = [(w_EIO, module.first) for module in experts for w_EIO in module.weights]
    own = places if in_bf16 or factored else []
    of_experts = {id(w_EIO) for w_EIO, _ in places}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in of_experts]
    groups = [(dense, 1.0), ([] if own else [w_EIO for w_EIO, _ in places], training.expert_rate)]
    adam = torch.optim.Adam(
        [
            # The rate is a tensor, so that a captured step takes that of each replay.
            {"params": parameters, "lr": torch.tensor(factor * training.learning_rate, device=device), _FACTOR: factor}
            for parameters, factor in groups
            if parameters
        ],
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=True,
        capturable=device.type == "cuda",
    )
    if not own:
        return adam
    weights = []
    for number, (w_EIO, first) in enumerate(own):
        (stream,) = np.random.SeedSequence([training.seed, number]).generate_state(1, np.uint32)
        master_EIO = _to_bf16(w_EIO) if in_bf16 else None
        kept_EIO = master_EIO if training.expert_weights == "float32" else None
        weights.append(ExpertWeights(w_EIO, kept_EIO, first, int(stream) >> 1))
    return ExpertAdam(adam, weights, factored, training.expert_rate)


def _to_bf16(parameter: nn.Parameter) -> Tensor:
    """Round a parameter to bf16 and return its former values."""
    values = parameter.data
    parameter.data = values.bfloat16()
    return values


class ExpertAdam(torch.optim.Optimizer):
    """Adam, with a step of its own for experts: for bf16 parameters, and for a factored second moment.

    A bf16 parameter has its float32 values in the state ("master"), which a step changes, or it is rounded
    stochastically (`ExpertWeights`). With `factored`, experts have no first moment and a factored second moment (S17
    appendix D): for each expert matrix, running averages r (I) and c (O) of the row and column means of its squared
    gradient. `factored_step` has the formulas. An expert matrix thus has I + O numbers of state instead of 2 I O. The
    second moment is exact if g^2 has rank one. An expert that never got a token has r = c = 0 and g = 0, and does not
    change.

    The paper specifies neither a bias correction of the averages nor the epsilon in the divisor: both are as in Adam.
    As in Adam, t counts all steps, including those in which an expert had no token. If the square of one entry is far
    above the product of the factors, its step is larger than any of Adam's. The paper does not bound such steps, and
    neither does this class.

    Like fused Adam, it reads `grad_scale` (the gradient is first divided by it) and `found_inf` (if 1, nothing changes,
    not even the count of steps). Both are tensors on the device, so that the host does not wait. The first step creates
    the state, even if it is skipped. Each later step may be captured in a CUDA graph: the state stays where it is.
    """

    def __init__(self, dense: torch.optim.Adam, experts: list[ExpertWeights], factored: bool, factor: float) -> None:
        (group,) = dense.param_groups
        own = {key: group[key] for key in ("betas", "eps")} | {"lr": factor * group["lr"], _FACTOR: factor}
        super().__init__([weights.w_EIO for weights in experts], own)
        self._dense, self._experts, self._factored = dense, experts, factored
        # The groups (the same dictionaries) and the state are shared with `dense`, so that this is one optimiser.
        self.param_groups = [*dense.param_groups, *self.param_groups]
        self.state = dense.state
        for weights in experts:
            if weights.master_EIO is not None:
                self.state[weights.w_EIO][MASTER] = weights.master_EIO
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self._sums: dict[Tensor, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def squared_norm(self) -> Tensor:
        """Return the squared norm of the experts' gradients, in float32 or better; keep their sums for `step`."""
        if self._factored:
            self._sums = {weights.w_EIO: sums_of_squares(g_EIO) for weights, g_EIO in self._with_gradient()}
            squares = [row_EI.sum() for row_EI, _ in self._sums.values()]
        else:
            # The experts are bf16, in which a norm would have three digits.
            norms = [torch.linalg.vector_norm(g_EIO, dtype=torch.float32) for _, g_EIO in self._with_gradient()]
            squares = [norm.square() for norm in norms]
        return torch.stack(squares).sum() if squares else torch.zeros_like(self.param_groups[-1]["lr"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take one step with all parameters that have a gradient."""
        assert closure is None
        vars(self._dense).update(grad_scale=self.grad_scale, found_inf=self.found_inf)
        self._dense.step()
        group = self.param_groups[-1]
        rate = group["lr"]
        scale = torch.ones_like(rate) if self.grad_scale is None else self.grad_scale
        skipped = torch.zeros_like(rate) if self.found_inf is None else self.found_inf
        beta1, beta2 = group["betas"]
        step = Step(rate, scale, skipped, beta1, beta2, group["eps"])
        for weights, g_EIO in self._with_gradient():
            w_EIO = weights.w_EIO
            state = self.state[w_EIO]
            if "step" not in state:
                exact = torch.promote_types(w_EIO.dtype, torch.float32)
                for moment, shape in _moments(w_EIO.shape, self._factored).items():
                    state[moment] = w_EIO.new_zeros(shape, dtype=torch.float32 if moment == "step" else exact)
            if self._factored:
                sums = self._sums.pop(w_EIO, None) or sums_of_squares(g_EIO)
                factored_step(weights, g_EIO, sums, state[ROW], state[COLUMN], state["step"], step)
            else:
                adam_step(weights, g_EIO, state["exp_avg"], state["exp_avg_sq"], state["step"], step)
            state["step"].add_(1.0 - skipped)

    def _with_gradient(self) -> list[tuple[ExpertWeights, Tensor]]:
        gradients = ((weights, weights.w_EIO.grad) for weights in self._experts)
        return [(weights, g_EIO) for weights, g_EIO in gradients if g_EIO is not None]


def _moments(shape: Sequence[int], factored: bool) -> dict[str, tuple[int, ...]]:
    if factored:
        experts, inputs, outputs = shape
        return {"step": (), ROW: (experts, inputs), COLUMN: (experts, outputs)}
    return {"step": (), "exp_avg": tuple(shape), "exp_avg_sq": tuple(shape)}


def state_shapes(name: str, shape: Sequence[int], expert_optimizer: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a parameter's moments, by name: float32 tensors, zero before the first step.

    A master, which is in the optimiser's state too, is no moment: in checkpoints, it is the parameter.
    """
    return _moments(shape, expert_optimizer == "factored" and is_expert(name))


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

    Names of optimiser state are such as "exp_avg.NAME". A parameter with a master is the master there.
    """
    parameters = dict(model.named_parameters())
    state = {name: optimizer.state[parameter] for name, parameter in parameters.items()}
    moments = {
        f"{moment}.{name}": value for name, own in state.items() for moment, value in own.items() if moment != MASTER
    }
    values = {name: state[name].get(MASTER, parameter) for name, parameter in parameters.items()}
    return {"model": values, "training": moments}


class ClippedStep(NamedTuple):
    """Result of `clipped_step`, as tensors, so that the host does not wait for the device."""

    gradient_norm: Tensor
    skipped: Tensor  # float32: 1 if the gradient was not finite and nothing changed, else 0


def _global_norm(optimizer: torch.optim.Optimizer, experts: Collection[Tensor], world: World | None) -> Tensor:
    """Return the norm of the whole gradient. `ExpertAdam` measures its experts itself, with what its step needs."""
    measured = optimizer.squared_norm() if isinstance(optimizer, ExpertAdam) else None
    groups = optimizer.param_groups[: None if measured is None else -1]
    parameters = [p for group in groups for p in group["params"] if p.grad is not None]
    shared = {id(parameter) for parameter in experts} if world else set()
    gradients = [p.grad for p in parameters if id(p) not in shared]
    # Without any, as when all but experts are frozen, the library's norm is on the host.
    norm = torch.nn.utils.get_total_norm(gradients or [torch.zeros_like(groups[0]["lr"])], foreach=True)
    own = [p.grad for p in parameters if id(p) in shared]
    if own:
        measured = torch.nn.utils.get_total_norm(own, foreach=True).square()
    if measured is None:
        return norm
    if world is None:
        return torch.hypot(norm, measured.sqrt().to(norm.dtype))
    # Groups may add in different orders. A difference in the norm's last bit would change every parameter.
    return world.from_main(torch.hypot(norm, world.sum_over_group(measured).sqrt().to(norm.dtype)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next steps, also of a captured one when it is replayed.

    That of experts is `training.expert_rate` times this.
    """
    for group in optimizer.param_groups:
        group["lr"].fill_(rate * group.get(_FACTOR, 1.0))


def clipped_step(
    optimizer: torch.optim.Optimizer,
    clip_norm: float,
    rate: float | None,
    experts: Collection[Tensor] = (),
    world: World | None = None,
) -> ClippedStep:
    """Scale the global gradient norm down to at most `clip_norm` (0: no clipping) and take one step.

    `experts` are the parameters that are split over the processes of `world`. All others are equal in all processes.
    If `rate` is None, `set_rate` has set it: a captured step must have no number of the host.

    The fused kernel divides by the scale, and skips gradients that are not finite, in the same pass that changes the
    parameters. Clipping thus needs no separate pass, and a NaN never reaches a weight or a moment.
    """
    if rate is not None:
        set_rate(optimizer, rate)
    norm = _global_norm(optimizer, experts, world)
    skipped = (~norm.isfinite()).float()
    scale = (norm / clip_norm).clamp_min(1.0) if clip_norm else torch.ones_like(norm)
    # The interface through which torch.amp.GradScaler drives fused optimisers.
    vars(optimizer).update(grad_scale=torch.where(skipped.bool(), 1.0, scale).float(), found_inf=skipped)
    optimizer.step()
    return ClippedStep(norm, skipped)
