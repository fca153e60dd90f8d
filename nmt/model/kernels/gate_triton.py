"""Fused version of `plain_noisy_top_k`: one kernel per pass, which reads the logits once.

The forward pass reads 12 T E bytes (two logits and the noise of each expert), and the backward pass reads 8 T E and
writes 8 T E. These bytes are the bound: at 3 TB/s, 0.27 and 0.36 ms for T = 32,768 and E = 2048. An H100 takes 0.70 and
0.50 ms: the instructions per number are the limit, most of them in the search for the largest and in exponentials.

A program holds a few rows of all experts in registers, finds the largest k + 1 by repeated maxima, and adds up columns
over all its rows. The sums of the programs are added in order, so results do not change from run to run.

The file is imported only where it runs, since Triton comes with PyTorch's CUDA builds.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from nmt.model.kernels.gate import MIN_NOISE_STD, Choice, mean_std

_TILE = 512  # numbers of a tile with several rows
_FLOOR = tl.constexpr(MIN_NOISE_STD)
# Lower than the key of any number.
_TAKEN = tl.constexpr(-(2**31))


@triton.jit
def _rows(start, real, num_tokens, PADDED: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return numbers of a tile's rows, which of them exist, and which are real tokens."""
    row = (start + tl.arange(0, ROWS)).to(tl.int64)
    exists = row < num_tokens
    counts = exists
    if PADDED:
        counts = tl.load(real + row, mask=exists, other=0) != 0
    return row, exists, counts


@triton.jit
def _inverse(x):  # type: ignore[no-untyped-def]
    # 1 / x of a positive x in two instructions; a division takes eight.
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _std(noise_logit):  # type: ignore[no-untyped-def]
    """Return (softplus(x) + MIN_NOISE_STD, its derivative)."""
    # What log(1 + e) loses for a small e is far below the floor.
    e = tl.exp(-tl.abs(noise_logit))
    slope = tl.where(noise_logit > 0, 1.0, e) * _inverse(1.0 + e)
    return tl.maximum(noise_logit, 0.0) + tl.log(1.0 + e) + _FLOOR, slope


@triton.jit
def _cumulative_normal(z):  # type: ignore[no-untyped-def]
    # Abramowitz and Stegun 26.2.17: the absolute error is below 7.5e-8, that of a number near 1 in float32.
    t = _inverse(1.0 + 0.2316419 * tl.abs(z))
    series = ((((1.330274429 * t - 1.821255978) * t + 1.781477937) * t - 0.356563782) * t + 0.319381530) * t
    tail = 0.3989422804014327 * tl.exp(-0.5 * z * z) * series
    return tl.where(z > 0, 1.0 - tail, tail)


@triton.jit
def _flip(bits):  # type: ignore[no-untyped-def]
    # The bits of a float as an integer of the same order, and back.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _keys(noisy, inside):  # type: ignore[no-untyped-def]
    # NaN counts as the largest, so that it reaches the gates.
    key = tl.where(noisy != noisy, 0x7FFFFFFF, _flip(noisy.to(tl.int32, bitcast=True)))
    return tl.where(inside, key, _TAKEN)


@triton.jit
def _choose(  # type: ignore[no-untyped-def]
    logits, noise, real, value, drawn, index, gates, expert, sums, num_tokens, num_experts,
    K: tl.constexpr, TOP: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    slot = tl.arange(0, SLOTS)[None, :]
    inside = column < num_experts
    importance = tl.zeros([ROWS, BLOCK], tl.float32)
    load = tl.zeros([ROWS, BLOCK], tl.float32)
    count = tl.zeros([ROWS, BLOCK], tl.float32)
    spread = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(tl.program_id(0) * ROWS, num_tokens, tl.num_programs(0) * ROWS):
        row, exists, counts = _rows(start, real, num_tokens, PADDED, ROWS)
        mask = exists[:, None] & inside
        place = row[:, None] * (2 * num_experts) + column
        # What is not there is left out below, where numbers are selected.
        clean = tl.load(logits + place, mask=mask)
        std, _ = _std(tl.load(logits + place + num_experts, mask=mask))
        noisy = clean + tl.load(noise + row[:, None] * num_experts + column, mask=mask) * std
        key = _keys(noisy, inside)
        top = tl.zeros([ROWS, SLOTS], tl.float32)
        at = tl.zeros([ROWS, SLOTS], tl.int32)
        peak = tl.zeros([ROWS], tl.float32)
        last = peak
        next_one = peak
        for j in tl.static_range(TOP):
            best = tl.max(key, 1)
            where = tl.min(tl.where(key == best[:, None], column, BLOCK), 1)
            x = _flip(best).to(tl.float32, bitcast=True)
            top = tl.where(slot == j, x[:, None], top)
            at = tl.where(slot == j, where[:, None], at)
            if j == 0:
                peak = x
            if j == K - 1:
                last = x
            if j == K:
                next_one = x
            else:
                key = tl.where(column == where[:, None], _TAKEN, key)
        kept = exists[:, None] & (slot < TOP)
        tl.store(value + row[:, None] * TOP + slot, top, mask=kept)
        tl.store(index + row[:, None] * TOP + slot, at, mask=kept)
        own = tl.load(noise + row[:, None] * num_experts + at, mask=kept, other=0.0)
        tl.store(drawn + row[:, None] * TOP + slot, own, mask=kept)
        weight = tl.where(slot < K, tl.exp(top - peak[:, None]), 0.0)
        scale = 1.0 / tl.sum(weight, 1)[:, None]
        kept = exists[:, None] & (slot < K)
        tl.store(gates + row[:, None] * K + slot, tl.where(counts[:, None], weight * scale, 0.0), mask=kept)
        tl.store(expert + row[:, None] * K + slot, tl.where(counts[:, None], at, num_experts).to(tl.int64), mask=kept)
        here = counts[:, None] & inside
        selected = here & (key == _TAKEN)
        importance += tl.where(selected, tl.exp(noisy - peak[:, None]) * scale, 0.0)
        count += tl.where(selected, 1.0, 0.0)
        spread += tl.where(here, std, 0.0)
        if TOP > K:
            threshold = tl.where(noisy > next_one[:, None], next_one[:, None], last[:, None])
            load += tl.where(here, _cumulative_normal((clean - threshold) * _inverse(std)), 0.0)
    number = tl.arange(0, BLOCK)
    out = sums + tl.program_id(0).to(tl.int64) * 4 * num_experts + number
    tl.store(out, tl.sum(importance, 0), mask=number < num_experts)
    tl.store(out + num_experts, tl.sum(load, 0), mask=number < num_experts)
    tl.store(out + 2 * num_experts, tl.sum(count, 0), mask=number < num_experts)
    tl.store(out + 3 * num_experts, tl.sum(spread, 0), mask=number < num_experts)


@triton.jit
def _keep(  # type: ignore[no-untyped-def]
    logits, real, gates, expert, sums, num_tokens, num_experts,
    K: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`_choose` without noise and for a pass without gradient."""
    column = tl.arange(0, BLOCK)[None, :]
    slot = tl.arange(0, SLOTS)[None, :]
    inside = column < num_experts
    importance = tl.zeros([ROWS, BLOCK], tl.float32)
    count = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(tl.program_id(0) * ROWS, num_tokens, tl.num_programs(0) * ROWS):
        row, exists, counts = _rows(start, real, num_tokens, PADDED, ROWS)
        clean = tl.load(logits + row[:, None] * num_experts + column, mask=exists[:, None] & inside)
        key = _keys(clean, inside)
        top = tl.zeros([ROWS, SLOTS], tl.float32)
        at = tl.zeros([ROWS, SLOTS], tl.int32)
        peak = tl.zeros([ROWS], tl.float32)
        for j in tl.static_range(K):
            best = tl.max(key, 1)
            where = tl.min(tl.where(key == best[:, None], column, BLOCK), 1)
            x = _flip(best).to(tl.float32, bitcast=True)
            top = tl.where(slot == j, x[:, None], top)
            at = tl.where(slot == j, where[:, None], at)
            if j == 0:
                peak = x
            key = tl.where(column == where[:, None], _TAKEN, key)
        weight = tl.where(slot < K, tl.exp(top - peak[:, None]), 0.0)
        scale = 1.0 / tl.sum(weight, 1)[:, None]
        kept = exists[:, None] & (slot < K)
        tl.store(gates + row[:, None] * K + slot, tl.where(counts[:, None], weight * scale, 0.0), mask=kept)
        tl.store(expert + row[:, None] * K + slot, tl.where(counts[:, None], at, num_experts).to(tl.int64), mask=kept)
        selected = counts[:, None] & inside & (key == _TAKEN)
        importance += tl.where(selected, tl.exp(clean - peak[:, None]) * scale, 0.0)
        count += tl.where(selected, 1.0, 0.0)
    number = tl.arange(0, BLOCK)
    out = sums + tl.program_id(0).to(tl.int64) * 2 * num_experts + number
    tl.store(out, tl.sum(importance, 0), mask=number < num_experts)
    tl.store(out + num_experts, tl.sum(count, 0), mask=number < num_experts)


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    logits, real, value, drawn, index, gates, grad_gates, grad_importance, grad_load, grad_logits,
    num_tokens, num_experts,
    K: tl.constexpr, TOP: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < num_experts
    of_load = tl.load(grad_load + column, mask=inside & (TOP > K), other=0.0)
    for start in range(tl.program_id(0) * ROWS, num_tokens, tl.num_programs(0) * ROWS):
        row, exists, counts = _rows(start, real, num_tokens, PADDED, ROWS)
        mask = exists[:, None] & inside
        place = row[:, None] * (2 * num_experts) + column
        clean = tl.load(logits + place, mask=mask)
        std, slope = _std(tl.load(logits + place + num_experts, mask=mask))
        of_clean = tl.zeros([ROWS, BLOCK], tl.float32)
        of_std = of_clean
        mean = tl.zeros([ROWS], tl.float32)
        in_sum = mean
        out_sum = mean
        if TOP > K:
            last = tl.load(value + row * TOP + K - 1, mask=exists, other=0.0)
            next_one = tl.load(value + row * TOP + K, mask=exists, other=0.0)
            # The experts of the top k have the other threshold, unless they are equal to it.
            threshold = tl.zeros([ROWS, BLOCK], tl.float32) + last[:, None]
            for j in tl.static_range(K):
                x = tl.load(value + row * TOP + j, mask=exists, other=0.0)
                where = tl.load(index + row * TOP + j, mask=exists, other=0)
                threshold = tl.where(
                    column == where[:, None], tl.where(x > next_one, next_one, last)[:, None], threshold
                )
            inverse = _inverse(std)
            z = (clean - threshold) * inverse
            # d P / d clean = phi(z) / std; d P / d std is that times -z, and d P / d threshold times -1.
            of_clean = of_load * tl.exp(-0.5 * z * z) * (0.3989422804014327 * inverse)
            of_clean = tl.where(counts[:, None] & inside, of_clean, 0.0)
            of_std = -of_clean * z
            in_sum = tl.sum(tl.where(threshold < last[:, None], of_clean, 0.0), 1)
            out_sum = tl.sum(tl.where(threshold < last[:, None], 0.0, of_clean), 1)
        for j in tl.static_range(K):
            where = tl.load(index + row * TOP + j, mask=exists, other=0)
            of_gate = tl.load(grad_gates + row * K + j, mask=exists, other=0.0) + tl.load(grad_importance + where)
            mean += tl.load(gates + row * K + j, mask=exists, other=0.0) * of_gate
        more_clean = tl.zeros([ROWS, BLOCK], tl.float32)
        more_std = more_clean
        for j in tl.static_range(TOP):
            where = tl.load(index + row * TOP + j, mask=exists, other=0)
            of_noisy = tl.zeros([ROWS], tl.float32)
            if j < K:
                of_gate = tl.load(grad_gates + row * K + j, mask=exists, other=0.0) + tl.load(grad_importance + where)
                of_noisy += tl.load(gates + row * K + j, mask=exists, other=0.0) * (of_gate - mean)
            if j == K - 1:
                of_noisy -= out_sum
            if j == K:
                of_noisy -= in_sum
            own = tl.load(drawn + row * TOP + j, mask=exists, other=0.0)
            more_clean = tl.where(column == where[:, None], of_noisy[:, None], more_clean)
            more_std = tl.where(column == where[:, None], (of_noisy * own)[:, None], more_std)
        tl.store(grad_logits + place, of_clean + more_clean, mask=mask)
        tl.store(grad_logits + place + num_experts, (of_std + more_std) * slope, mask=mask)


def _shape(num_tokens: int, num_experts: int, device: torch.device) -> tuple[int, dict[str, int]]:
    """Return (number of programs, sizes of a tile) for a pass over all tokens."""
    block = triton.next_power_of_2(num_experts)
    rows = max(1, _TILE // block)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    programs = min(triton.cdiv(num_tokens, rows), 16 * _TILE // (rows * block) * processors)
    return programs, {"ROWS": rows, "BLOCK": block}


class _NoisyTopK(Function):
    @staticmethod
    def forward(ctx: Any, logits_T2E: Tensor, noise_TE: Tensor, real_T: Tensor | None, k: int) -> tuple[Tensor, ...]:
        num_tokens, num_experts = noise_TE.shape
        top = min(k + 1, num_experts)
        programs, tile = _shape(num_tokens, num_experts, noise_TE.device)
        value_TQ, drawn_TQ = (noise_TE.new_empty(num_tokens, top) for _ in range(2))
        index_TQ = torch.empty_like(value_TQ, dtype=torch.int32)
        gates_TK = noise_TE.new_empty(num_tokens, k)
        expert_TK = torch.empty_like(gates_TK, dtype=torch.int64)
        sums_M4E = noise_TE.new_empty(programs, 4, num_experts)
        sizes = {"K": k, "TOP": top, "PADDED": real_T is not None} | tile
        # Eight numbers per thread.
        warps = tile["ROWS"] * tile["BLOCK"] // 256
        real = index_TQ if real_T is None else real_T
        arguments = (logits_T2E, noise_TE, real, value_TQ, drawn_TQ, index_TQ, gates_TK, expert_TK, sums_M4E)
        slots = triton.next_power_of_2(top)
        _choose[(programs,)](*arguments, num_tokens, num_experts, SLOTS=slots, num_warps=warps, **sizes)
        importance_E, load_E, count_E, spread_E = sums_M4E.sum(0)
        ctx.save_for_backward(logits_T2E, real, value_TQ, drawn_TQ, index_TQ, gates_TK)
        # Four numbers per thread, in so few registers that programs do not wait for each other.
        ctx.sizes, ctx.programs = sizes | {"num_warps": 2 * warps, "maxnreg": 64}, programs
        ctx.mark_non_differentiable(expert_TK, count_E, spread_E)
        return gates_TK, expert_TK, importance_E, load_E, count_E, spread_E

    @staticmethod
    def backward(
        ctx: Any, grad_TK: Tensor, _expert: None, importance_E: Tensor, load_E: Tensor, *_sums: None
    ) -> tuple[Tensor, None, None, None]:
        logits_T2E = ctx.saved_tensors[0]
        grad_T2E = torch.empty_like(logits_T2E)
        num_tokens, num_experts = len(logits_T2E), logits_T2E.shape[1] // 2
        gradients = (grad_TK.contiguous(), importance_E.contiguous(), load_E.contiguous(), grad_T2E)
        _gradient[(ctx.programs,)](*ctx.saved_tensors, *gradients, num_tokens, num_experts, **ctx.sizes)
        return grad_T2E, None, None, None


def fused_noisy_top_k(logits_T2E: Tensor, noise_TE: Tensor, k: int, real_T: Tensor | None) -> Choice:
    """Return the same as `plain_noisy_top_k`, for float32 logits and at least one token."""
    found = _NoisyTopK.apply(logits_T2E.contiguous(), noise_TE, real_T, k)
    gates_TK, expert_TK, importance_E, load_E, count_E, std_E = found
    load_E = load_E if k < noise_TE.shape[1] else count_E
    return Choice(gates_TK, expert_TK, importance_E, load_E, count_E, mean_std(std_E, noise_TE, real_T))


def fused_top_k_gate(logits_TE: Tensor, k: int, real_T: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the same as `plain_top_k_gate`, for float32 logits and at least one token."""
    num_tokens, num_experts = logits_TE.shape
    programs, tile = _shape(num_tokens, num_experts, logits_TE.device)
    gates_TK = logits_TE.new_empty(num_tokens, k)
    expert_TK = torch.empty_like(gates_TK, dtype=torch.int64)
    sums_M2E = logits_TE.new_empty(programs, 2, num_experts)
    arguments = (logits_TE, expert_TK if real_T is None else real_T, gates_TK, expert_TK, sums_M2E)
    sizes = {"K": k, "SLOTS": triton.next_power_of_2(k), "PADDED": real_T is not None} | tile
    warps = max(1, tile["ROWS"] * tile["BLOCK"] // 256)
    _keep[(programs,)](*arguments, num_tokens, num_experts, num_warps=warps, **sizes)
    importance_E, count_E = sums_M2E.sum(0)
    return gates_TK, expert_TK, importance_E, count_E
