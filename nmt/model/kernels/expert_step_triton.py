"""Fused versions of the plain steps of experts: every program has a tile of one expert's matrix.

Sums are added in a fixed order, without atomics. Nothing here reads a number on the host, and no launch depends on one
that changes between steps. The file is imported only to run on a GPU, since Triton comes with PyTorch's CUDA builds.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmt.model.kernels.expert_step import ExpertWeights, Step

# Inputs x outputs of a tile: the fastest of about ten on an H100. The first pass walks over all outputs of its inputs.
_SUM_TILE = (128, 64)
_STEP_TILE = (16, 128)
_ADAM_BLOCK = 1024
_SUM_WARPS, _WARPS = 2, 4


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _squares(g, row, column, inputs, outputs, BI: tl.constexpr, BO: tl.constexpr):  # type: ignore[no-untyped-def]
    blocks = tl.cdiv(inputs, BI)
    expert = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    i = block * BI + tl.arange(0, BI)
    columns = tl.arange(0, BO)
    base = g + expert * inputs * outputs
    total = tl.zeros([BI, BO], tl.float32)
    for start in range(0, outputs, BO):
        o = start + columns
        inside = (i < inputs)[:, None] & (o < outputs)[None, :]
        x = tl.load(base + i[:, None] * outputs + o[None, :], mask=inside, other=0.0).to(tl.float32)
        x *= x
        total += x
        tl.store(column + (expert * blocks + block) * outputs + o, tl.sum(x, 0), mask=o < outputs)
    tl.store(row + expert * inputs + i, tl.sum(total, 1), mask=i < inputs)


@triton.jit
def _factors(  # type: ignore[no-untyped-def]
    row, column, r, c, touched, count, scale, skipped, inputs, outputs, blocks,
    WEIGHT: tl.constexpr, LOG_BETA2: tl.constexpr, TINY: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Update the averages of an expert, and overwrite its sums with the factors a and b of its step."""
    expert = tl.program_id(0).to(tl.int64)
    if tl.load(skipped) != 0.0:
        # The sums may be NaN. Nothing is changed, here or by the programs that read `touched`.
        tl.store(touched + expert, 0)
        return
    s = tl.load(scale)
    correction = 1.0 - tl.exp((tl.load(count) + 1.0).to(tl.float64) * LOG_BETA2)
    i = tl.arange(0, BI)
    square = tl.load(row + expert * inputs + i, mask=i < inputs, other=0.0)
    root = tl.sqrt(square / outputs) / s
    average = tl.load(r + expert * inputs + i, mask=i < inputs, other=0.0)
    average += WEIGHT * (root * root - average)
    mean = tl.maximum(tl.sum(average, 0) / inputs, TINY)
    tl.store(r + expert * inputs + i, average, mask=i < inputs)
    tl.store(row + expert * inputs + i, tl.sqrt(average / mean) * s, mask=i < inputs)
    tl.store(touched + expert, (tl.sum(square, 0) > 0.0).to(tl.int32))
    o = tl.arange(0, BO)
    first = column + expert * blocks * outputs
    square = tl.zeros([BO], tl.float32)
    for block in range(blocks):
        square += tl.load(first + block * outputs + o, mask=o < outputs, other=0.0)
    root = tl.sqrt(square / inputs) / s
    average = tl.load(c + expert * outputs + o, mask=o < outputs, other=0.0)
    average += WEIGHT * (root * root - average)
    tl.store(c + expert * outputs + o, average, mask=o < outputs)
    tl.store(first + o, tl.sqrt(average / correction.to(tl.float32)), mask=o < outputs)


@triton.jit
def _store(w, master, place, inside, value, index, expert, first, stream, t, MASTER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store float32 values of an expert's weights; see `ExpertWeights`. `index` is their place in its matrix."""
    if MASTER:
        tl.store(master + place, value, mask=inside)
        tl.store(w + place, value.to(tl.bfloat16), mask=inside)
    elif w.dtype.element_ty == tl.bfloat16:
        of_step = _mix(stream.to(tl.uint32) ^ _mix(t.to(tl.uint32)))
        key = _mix(of_step ^ (first + expert).to(tl.uint32))
        bits = value.to(tl.uint32, bitcast=True) + (_mix(index.to(tl.uint32) ^ key) >> 16)
        # The upper half of a float32 is a bf16.
        tl.store(w + place, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(w + place, value, mask=inside)


@triton.jit(do_not_specialize=["first", "stream"])
def _factored(  # type: ignore[no-untyped-def]
    w, master, g, a, b, touched, count, rate, scale, inputs, outputs, blocks, first, stream,
    EPSILON: tl.constexpr, MASTER: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(outputs, BO)
    tiles = tl.cdiv(inputs, BI) * across
    expert = (tl.program_id(0) // tiles).to(tl.int64)
    if tl.load(touched + expert) == 0:
        return
    tile = tl.program_id(0) % tiles
    i = tile // across * BI + tl.arange(0, BI)
    o = tile % across * BO + tl.arange(0, BO)
    inside = (i < inputs)[:, None] & (o < outputs)[None, :]
    index = i[:, None] * outputs + o[None, :]
    place = expert * inputs * outputs + index
    gradient = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(master + place if MASTER else w + place, mask=inside, other=0.0).to(tl.float32)
    own_a = tl.load(a + expert * inputs + i, mask=i < inputs, other=0.0)
    own_b = tl.load(b + expert * blocks * outputs + o, mask=o < outputs, other=0.0)
    divisor = own_a[:, None] * own_b[None, :] + EPSILON * tl.load(scale)
    value -= tl.load(rate) * (gradient / divisor)
    _store(w, master, place, inside, value, index, expert, first, stream, tl.load(count).to(tl.int32) + 1, MASTER)


@triton.jit(do_not_specialize=["first", "stream"])
def _adam(  # type: ignore[no-untyped-def]
    w, master, g, m, v, count, rate, scale, skipped, size, first, stream,
    WEIGHT1: tl.constexpr, WEIGHT2: tl.constexpr, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr,
    EPSILON: tl.constexpr, MASTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(skipped) != 0.0:
        return
    blocks = tl.cdiv(size, BLOCK)
    expert = (tl.program_id(0) // blocks).to(tl.int64)
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    place = expert * size + index
    gradient = tl.load(g + place, mask=inside, other=0.0).to(tl.float32) / tl.load(scale)
    value = tl.load(master + place if MASTER else w + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(m + place, mask=inside, other=0.0)
    mean += WEIGHT1 * (gradient - mean)
    square = tl.load(v + place, mask=inside, other=0.0)
    square += WEIGHT2 * (gradient * gradient - square)
    tl.store(m + place, mean, mask=inside)
    tl.store(v + place, square, mask=inside)
    before = tl.load(count)
    t = (before + 1.0).to(tl.float64)
    correction1 = (1.0 - tl.exp(t * LOG_BETA1)).to(tl.float32)
    correction2 = (1.0 - tl.exp(t * LOG_BETA2)).to(tl.float32)
    divisor = tl.sqrt(square / correction2) + EPSILON
    value -= tl.load(rate) / correction1 * (mean / divisor)
    _store(w, master, place, inside, value, index, expert, first, stream, before.to(tl.int32) + 1, MASTER)


def fused_sums_of_squares(g_EIO: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same as `plain_sums_of_squares`, for a contiguous gradient, with a block of inputs per program."""
    assert g_EIO.is_contiguous()
    experts, inputs, outputs = g_EIO.shape
    tile, across = _SUM_TILE
    blocks = triton.cdiv(inputs, tile)
    row_EI = torch.empty(experts, inputs, device=g_EIO.device)
    column_EPO = torch.empty(experts, blocks, outputs, device=g_EIO.device)
    _squares[(experts * blocks,)](g_EIO, row_EI, column_EPO, inputs, outputs, BI=tile, BO=across, num_warps=_SUM_WARPS)
    return row_EI, column_EPO


def fused_factored_step(
    weights: ExpertWeights,
    g_EIO: Tensor,
    sums: tuple[Tensor, Tensor],
    r_EI: Tensor,
    c_EO: Tensor,
    count: Tensor,
    step: Step,
) -> None:
    """Do the same as `plain_factored_step`, for contiguous weights and gradients."""
    assert g_EIO.is_contiguous()
    assert weights.w_EIO.is_contiguous()
    experts, inputs, outputs = g_EIO.shape
    row_EI, column_EPO = sums
    blocks = column_EPO.shape[1]
    touched_E = torch.empty(experts, device=g_EIO.device, dtype=torch.int32)
    _factors[(experts,)](
        row_EI, column_EPO, r_EI, c_EO, touched_E, count, step.scale, step.skipped, inputs, outputs, blocks,
        WEIGHT=1.0 - step.beta2, LOG_BETA2=_log(step.beta2), TINY=torch.finfo(torch.float32).tiny,
        BI=triton.next_power_of_2(inputs), BO=triton.next_power_of_2(outputs), num_warps=_WARPS,
    )  # fmt: skip
    master_EIO = weights.w_EIO if weights.master_EIO is None else weights.master_EIO
    down, across = _STEP_TILE
    _factored[(experts * triton.cdiv(inputs, down) * triton.cdiv(outputs, across),)](
        weights.w_EIO, master_EIO, g_EIO, row_EI, column_EPO, touched_E, count, step.rate, step.scale,
        inputs, outputs, blocks, weights.first, weights.stream,
        EPSILON=step.epsilon, MASTER=weights.master_EIO is not None, BI=down, BO=across, num_warps=_WARPS,
    )  # fmt: skip


def fused_adam_step(
    weights: ExpertWeights, g_EIO: Tensor, m_EIO: Tensor, v_EIO: Tensor, count: Tensor, step: Step
) -> None:
    """Do the same as `plain_adam_step`, for contiguous weights, moments and gradients."""
    assert g_EIO.is_contiguous()
    assert weights.w_EIO.is_contiguous()
    experts, size = len(g_EIO), g_EIO[0].numel()
    master_EIO = weights.w_EIO if weights.master_EIO is None else weights.master_EIO
    _adam[(experts * triton.cdiv(size, _ADAM_BLOCK),)](
        weights.w_EIO, master_EIO, g_EIO, m_EIO, v_EIO, count, step.rate, step.scale, step.skipped,
        size, weights.first, weights.stream,
        WEIGHT1=1.0 - step.beta1, WEIGHT2=1.0 - step.beta2, LOG_BETA1=_log(step.beta1), LOG_BETA2=_log(step.beta2),
        EPSILON=step.epsilon, MASTER=weights.master_EIO is not None, BLOCK=_ADAM_BLOCK, num_warps=_WARPS,
    )  # fmt: skip


def _log(beta: float) -> float:
    """Return log(beta); for beta = 0, a number whose exponential is 0."""
    return math.log(beta) if beta else -1e9
