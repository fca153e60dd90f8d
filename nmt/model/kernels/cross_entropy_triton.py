"""Fused version of `plain_softmax_gradient`: one program per token, which reads logits twice and writes them once.

The second read comes from the cache. The file is imported only to run on a GPU, since Triton comes with PyTorch's CUDA
builds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def _softmax_gradient(logits, target, nll, uniform, vocabulary, smoothing, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
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
        # Lanes that have read no column yet stay at -inf; exp of (-inf) - (-inf) would make them NaN.
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


def fused_softmax_gradient(
    logits_MV: Tensor, target_M: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as `plain_softmax_gradient`, for contiguous bf16 logits, which the gradient overwrites."""
    rows, vocabulary = logits_MV.shape
    nll_M, uniform_M = (torch.empty(rows, device=logits_MV.device) for _ in range(2))
    arguments = (logits_MV, target_M, nll_M, uniform_M, vocabulary, label_smoothing)
    _softmax_gradient[(rows,)](*arguments, BLOCK=_BLOCK, num_warps=8)
    return nll_M, uniform_M, logits_MV
