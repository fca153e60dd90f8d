"""Losses and logit gradients of one piece of the vocabulary softmax, in one pass over the logits on a GPU.

`softmax_gradient` chooses between the plain form and its fused twin, which reads bf16 logits once and writes the
gradient over them, where the plain one makes some ten passes over float32.

Letters: M tokens, V vocabulary.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def softmax_gradient(logits_MV: Tensor, target_M: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """(nll_M, uniform_M, gradient_MV): -log softmax at the target, its mean over the vocabulary, and the gradient of
    sum((1 - s) nll + s uniform) by the logits, in their type. Consumes `logits_MV`."""
    if logits_MV.is_cuda and logits_MV.dtype == torch.bfloat16:
        return _fused()(logits_MV, target_M, label_smoothing)
    return plain_softmax_gradient(logits_MV, target_M, label_smoothing)


def plain_softmax_gradient(
    logits_MV: Tensor, target_M: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`softmax_gradient` in PyTorch operations, float32 or better inside."""
    exact_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    lse_M = exact_MV.logsumexp(dim=1)
    nll_M = lse_M - exact_MV.gather(1, target_M[:, None]).squeeze(1)
    uniform_M = lse_M - exact_MV.mean(dim=1)
    # d loss / d logits = softmax - smoothed target distribution
    gradient_MV = (exact_MV - lse_M[:, None]).exp_().sub_(label_smoothing / logits_MV.shape[1])
    gradient_MV[torch.arange(len(target_M), device=target_M.device), target_M] -= 1.0 - label_smoothing
    return nll_M, uniform_M, gradient_MV.to(logits_MV.dtype)


@cache
def _fused() -> Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]:
    """The fused twin; Triton comes with PyTorch's CUDA builds and is imported only when one runs."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(
        logits: Any, target: Any, nll: Any, uniform: Any, vocabulary: Any, smoothing: Any, BLOCK: tl.constexpr
    ) -> None:
        row = tl.program_id(0).to(tl.int64)
        base = logits + row * vocabulary
        wanted = tl.load(target + row)
        columns = tl.arange(0, BLOCK)
        peak = tl.full([BLOCK], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK], tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            inside = start + columns < vocabulary
            x = tl.load(base + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(peak, x)
            # Lanes that have seen no column yet stay at -inf; exp of (-inf) - (-inf) must not make them NaN.
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            mass = mass * tl.exp(peak - safe) + tl.exp(x - safe)
            peak = higher
            total += tl.where(inside, x, 0.0)
        top = tl.max(peak, 0)
        lse = top + tl.log(tl.sum(mass * tl.exp(peak - top), 0))
        tl.store(nll + row, lse - tl.load(base + wanted).to(tl.float32))
        tl.store(uniform + row, lse - tl.sum(total, 0) / vocabulary)
        for start in range(0, vocabulary, BLOCK):
            inside = start + columns < vocabulary
            x = tl.load(base + start + columns, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.exp(x - lse) - smoothing / vocabulary
            gradient -= tl.where(start + columns == wanted, 1.0 - smoothing, 0.0)
            tl.store(base + start + columns, gradient.to(tl.bfloat16), mask=inside)

    def run(logits_MV: Tensor, target_M: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
        rows, vocabulary = logits_MV.shape
        nll_M, uniform_M = (torch.empty(rows, device=logits_MV.device) for _ in range(2))
        kernel[(rows,)](logits_MV, target_M, nll_M, uniform_M, vocabulary, label_smoothing, BLOCK=2048, num_warps=8)
        return nll_M, uniform_M, logits_MV

    return run
