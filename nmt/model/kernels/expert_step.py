"""One optimiser step of the experts, in one or two passes over their gradient.

`sums_of_squares` is the first pass of a factored step. Its sums also give the gradient's norm, which every step needs
before it begins. `factored_step` and `adam_step` change the weights. Each chooses between a plain form, which may wait
for the device, and a fused one on a GPU. The fused form needs no host and can be captured in a CUDA graph.

A step is bound by memory traffic. The fused form aims at these bytes per parameter, with a gradient in bf16:

                 gradient    weights                 moments    all
    factored     2 + 2       float32 master 4+4+2    0          14
    factored     2 + 2       bf16 alone 2+2          0          8
    Adam         2 + 2       float32 master 4+4+2    8 + 8      30
    Adam         2 + 2       bf16 alone 2+2          8 + 8      24

In a factored step, an expert without tokens costs 2 bytes: its weights are neither read nor written.

Letters: E experts, I and O inputs and outputs of one layer of an expert, P blocks of inputs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nmt.model.kernels.mixing import mix

# Upper bound of one temporary tensor of the plain form, unless a single expert is larger.
_BUFFER_BYTES = 256 * 2**20


class ExpertWeights(NamedTuple):
    """One matrix of all experts of a process, as the optimiser keeps it.

    With a master, the step changes the master, and the bf16 parameter is its rounded copy. Otherwise, the parameter is
    all there is. If it is bf16, it is rounded stochastically: up or down, so that the expected value is exact. Rounding
    to nearest would lose every change of less than about 1/500 of a weight.

    The random bits follow from `stream`, the count of steps and the place of a number among all experts. So they do not
    depend on the number of processes, nor on what ran before.
    """

    w_EIO: Tensor
    master_EIO: Tensor | None  # float32
    first: int  # number of the first of these experts among all experts
    stream: int  # 0 .. 2^31 - 1, which differs between matrices


class Step(NamedTuple):
    """What is equal for all parameters of a step. Tensors are float32, without dimensions, on the device."""

    rate: Tensor
    scale: Tensor  # divisor of the gradient
    skipped: Tensor  # 1: nothing changes; else 0
    beta1: float
    beta2: float
    epsilon: float


def sums_of_squares(g_EIO: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of g^2 over (outputs, inputs): (E, I) and (E, P, O), the latter still to be summed over P.

    The sums are float32 or better, and always added in the same order.
    """
    if _fused(g_EIO):
        from nmt.model.kernels.expert_step_triton import fused_sums_of_squares

        return fused_sums_of_squares(g_EIO)
    return plain_sums_of_squares(g_EIO)


def factored_step(
    weights: ExpertWeights,
    g_EIO: Tensor,
    sums: tuple[Tensor, Tensor],
    r_EI: Tensor,
    c_EO: Tensor,
    count: Tensor,
    step: Step,
) -> None:
    """Change weights and averages (r, c) by a step of Adam with beta1 = 0 and a factored second moment.

    `sums` are those of `sums_of_squares`, and are overwritten. With t = count + 1 and g divided by the scale:

        r, c = running averages, with beta2, of the means of g^2 over outputs, over inputs
        V_ij = r_i c_j / mean(r) / (1 - beta2^t),    w -= rate g / (sqrt(V) + epsilon)

    With scale s and the raw gradient, the change is rate g / (a_i b_j + s epsilon) for a = s sqrt(r / mean(r)) and
    b = sqrt(c / (1 - beta2^t)). Roots are taken before products, because products of squares could underflow.
    """
    if _fused(g_EIO):
        from nmt.model.kernels.expert_step_triton import fused_factored_step

        fused_factored_step(weights, g_EIO, sums, r_EI, c_EO, count, step)
    else:
        plain_factored_step(weights, g_EIO, sums, r_EI, c_EO, count, step)


def adam_step(weights: ExpertWeights, g_EIO: Tensor, m_EIO: Tensor, v_EIO: Tensor, count: Tensor, step: Step) -> None:
    """Change weights and float32 moments (m, v) by a step of Adam, of which this is number count + 1."""
    if _fused(g_EIO):
        from nmt.model.kernels.expert_step_triton import fused_adam_step

        fused_adam_step(weights, g_EIO, m_EIO, v_EIO, count, step)
    else:
        plain_adam_step(weights, g_EIO, m_EIO, v_EIO, count, step)


def _fused(g_EIO: Tensor) -> bool:
    return g_EIO.is_cuda and g_EIO.dtype in (torch.bfloat16, torch.float32)


# ------------------------------------------------------------------------------------------------- plain forms


def plain_sums_of_squares(g_EIO: Tensor) -> tuple[Tensor, Tensor]:
    """Return `sums_of_squares` computed with PyTorch operations, with P = 1."""
    exact = torch.promote_types(g_EIO.dtype, torch.float32)
    row_EI, column_EO = (torch.linalg.vector_norm(g_EIO, dim=dim, dtype=exact).square() for dim in (2, 1))
    return row_EI, column_EO[:, None]


def plain_factored_step(
    weights: ExpertWeights,
    g_EIO: Tensor,
    sums: tuple[Tensor, Tensor],
    r_EI: Tensor,
    c_EO: Tensor,
    count: Tensor,
    step: Step,
) -> None:
    """Do `factored_step` with PyTorch operations, a few experts at a time."""
    if step.skipped:
        return
    inputs, outputs = g_EIO.shape[1:]
    row_EI, column_EO = sums[0], sums[1].sum(1)
    scale, t = step.scale.to(row_EI.dtype), int(count) + 1
    for averages, squares, number in ((r_EI, row_EI, outputs), (c_EO, column_EO, inputs)):
        averages.lerp_(((squares / number).sqrt() / scale).square(), 1.0 - step.beta2)
    mean_E1 = r_EI.mean(1, keepdim=True).clamp_min(torch.finfo(r_EI.dtype).tiny)
    a_EI = (r_EI / mean_E1).sqrt() * scale
    b_EO = (c_EO / (1.0 - step.beta2**t)).sqrt()
    for part in _parts(g_EIO):
        divisor = torch.addcmul(step.epsilon * scale, a_EI[part, :, None], b_EO[part, None])
        _subtract(weights, part, float(step.rate), g_EIO[part].to(divisor.dtype), divisor, t)


def plain_adam_step(
    weights: ExpertWeights, g_EIO: Tensor, m_EIO: Tensor, v_EIO: Tensor, count: Tensor, step: Step
) -> None:
    """Do `adam_step` with PyTorch operations, a few experts at a time."""
    if step.skipped:
        return
    t = int(count) + 1
    for part in _parts(g_EIO):
        g = g_EIO[part].to(m_EIO.dtype) / step.scale
        m, v = m_EIO[part].lerp_(g, 1.0 - step.beta1), v_EIO[part].lerp_(g * g, 1.0 - step.beta2)
        divisor = (v / (1.0 - step.beta2**t)).sqrt_().add_(step.epsilon)
        _subtract(weights, part, float(step.rate) / (1.0 - step.beta1**t), m, divisor, t)


def _parts(g_EIO: Tensor) -> Iterator[slice]:
    each = max(1, _BUFFER_BYTES // (4 * g_EIO[0].numel()))
    return (slice(first, min(first + each, len(g_EIO))) for first in range(0, len(g_EIO), each))


def _subtract(weights: ExpertWeights, part: slice, rate: float, numerator: Tensor, divisor: Tensor, t: int) -> None:
    """Subtract rate * numerator / divisor from the weights of some experts, in step t."""
    w = weights.w_EIO[part]
    exact = w.to(divisor.dtype) if weights.master_EIO is None else weights.master_EIO[part]
    exact.addcdiv_(numerator, divisor, value=-rate)
    if weights.master_EIO is None and w.dtype == torch.bfloat16:
        w.copy_(round_stochastically(exact, _random_bits(weights, part, t)))
    elif exact is not w:
        w.copy_(exact)


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """Return float32 `x` in bf16, rounded away from zero with the probability of the part that is cut off.

    `bits` (int32) has numbers of 0 .. 65535, all equally likely. What bf16 has exactly stays as it is.
    """
    return ((x.view(torch.int32) + bits) & ~0xFFFF).view(torch.float32).bfloat16()


def _random_bits(weights: ExpertWeights, part: slice, t: int) -> Tensor:
    """Return numbers of 0 .. 65535 for the weights of some experts in step t, int32."""
    _, inputs, outputs = weights.w_EIO.shape
    expert_E = torch.arange(weights.first + part.start, weights.first + part.stop)
    of_step = mix(weights.stream ^ mix(torch.tensor(t)))
    key_E = mix(of_step ^ expert_E)
    index_IO = torch.arange(inputs * outputs).view(inputs, outputs)
    return (mix(index_IO ^ key_E[:, None, None]) >> 16).int().to(weights.w_EIO.device)
