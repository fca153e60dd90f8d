"""Fused versions of `plain_softmax_gradient` and `plain_two_softmax_gradients`: one program per token.

A program reads its logits two or three times, from the cache after the first time, and writes them once. The file is
imported only to run on a GPU, since Triton comes with PyTorch's CUDA builds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def _normaliser(base, columns, vocabulary, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the logarithm of the sum of exp of a token's logits, and their sum."""
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        x = tl.load(base + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, x)
        # Lanes that have read no column yet stay at -inf; exp of (-inf) - (-inf) would make them NaN.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(peak - safe) + tl.exp(x - safe)
        peak = higher
        total += tl.where(inside, x, 0.0)
    top = tl.max(peak, 0)
    lse = top + tl.log(tl.sum(mass * tl.exp(peak - top), 0))
    return lse, tl.sum(total, 0)


@triton.jit
def _softmax_gradient(logits, target, nll, uniform, vocabulary, smoothing, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * vocabulary
    wanted = tl.load(target + row)
    columns = tl.arange(0, BLOCK)
    lse, total = _normaliser(base, columns, vocabulary, BLOCK)
    tl.store(nll + row, lse - tl.load(base + wanted).to(tl.float32))
    tl.store(uniform + row, lse - total / vocabulary)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        x = tl.load(base + start + columns, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.exp(x - lse) - smoothing / vocabulary
        gradient -= tl.where(start + columns == wanted, 1.0 - smoothing, 0.0)
        tl.store(base + start + columns, gradient.to(tl.bfloat16), mask=inside)


def fused_softmax_gradient(
    logits_MV: Tensor, target_M: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as `plain_softmax_gradient`, for contiguous bf16 logits, which the gradient overwrites."""
    rows, vocabulary = logits_MV.shape
    nll_M, uniform_M = (torch.empty(rows, device=logits_MV.device) for _ in range(2))
    arguments = (logits_MV, target_M, nll_M, uniform_M, vocabulary, label_smoothing)
    _softmax_gradient[(rows,)](*arguments, BLOCK=_BLOCK, num_warps=8)
    return nll_M, uniform_M, logits_MV


@triton.jit
def _two_softmax_gradients(  # type: ignore[no-untyped-def]
    first, second, target, nll, uniform, apart, vocabulary, smoothing, alpha, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    base_p, base_q = first + row * vocabulary, second + row * vocabulary
    wanted = tl.load(target + row)
    columns = tl.arange(0, BLOCK)
    lse_p, total_p = _normaliser(base_p, columns, vocabulary, BLOCK)
    lse_q, total_q = _normaliser(base_q, columns, vocabulary, BLOCK)
    at_target = tl.load(base_p + wanted).to(tl.float32) + tl.load(base_q + wanted).to(tl.float32)
    tl.store(nll + row, (lse_p + lse_q - at_target) / 2)
    tl.store(uniform + row, (lse_p + lse_q - (total_p + total_q) / vocabulary) / 2)
    kl_p = tl.zeros([BLOCK], tl.float32)
    kl_q = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        # Lanes without a column have probabilities of 0.
        log_p = tl.load(base_p + start + columns, mask=inside, other=-1e30).to(tl.float32) - lse_p
        log_q = tl.load(base_q + start + columns, mask=inside, other=-1e30).to(tl.float32) - lse_q
        kl_p += tl.exp(log_p) * (log_p - log_q)
        kl_q += tl.exp(log_q) * (log_q - log_p)
    from_p, from_q = tl.sum(kl_p, 0), tl.sum(kl_q, 0)
    tl.store(apart + row, from_p + from_q)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        log_p = tl.load(base_p + start + columns, mask=inside, other=0.0).to(tl.float32) - lse_p
        log_q = tl.load(base_q + start + columns, mask=inside, other=0.0).to(tl.float32) - lse_q
        p, q = tl.exp(log_p), tl.exp(log_q)
        smoothed = smoothing / vocabulary + tl.where(start + columns == wanted, 1.0 - smoothing, 0.0)
        from_target_p, from_target_q = (p - smoothed) / 2, (q - smoothed) / 2
        from_other_p = p * (log_p - log_q - from_p) + p - q
        from_other_q = q * (log_q - log_p - from_q) + q - p
        gradient_p = from_target_p + alpha / 4 * from_other_p
        gradient_q = from_target_q + alpha / 4 * from_other_q
        tl.store(base_p + start + columns, gradient_p.to(tl.bfloat16), mask=inside)
        tl.store(base_q + start + columns, gradient_q.to(tl.bfloat16), mask=inside)


def fused_two_softmax_gradients(
    first_MV: Tensor, second_MV: Tensor, target_M: Tensor, label_smoothing: float, alpha: float
) -> tuple[Tensor, ...]:
    """Return the same as `plain_two_softmax_gradients`, for contiguous bf16 logits, which the gradients overwrite."""
    rows, vocabulary = first_MV.shape
    sums_M = [torch.empty(rows, device=first_MV.device) for _ in range(3)]
    arguments = (first_MV, second_MV, target_M, *sums_M, vocabulary, label_smoothing, float(alpha))
    _two_softmax_gradients[(rows,)](*arguments, BLOCK=_BLOCK, num_warps=8)
    return *sums_M, first_MV, second_MV
