"""Fused version of `padded_attend` for a few queries per sentence, as in a search; for passes without gradient.

One program per query: scores of all source positions, their softmax, and the weighted sum of the values. Nothing but
weights and contexts is written. Bound on an H100: S A values of tanh per query, of which a multiprocessor does 16 per
cycle. For 640 queries, 32 positions and A = 1024, that is 6 us. It is imported only to run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmt.model.kernels.attention_triton import _approximate, _tanh

# Numbers in a tile of keys or values.
_TILE = 8192


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    padding,
    v,
    context,
    weights,
    S,
    B,
    A,
    D,
    PRODUCT: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    k, b = tl.program_id(0), tl.program_id(1)
    row = (k * B + b).to(tl.int64)
    s = tl.arange(0, POSITIONS)
    source = (s * B + b).to(tl.int64)
    real = (s < S) & (tl.load(padding + source, mask=s < S, other=1) == 0)
    score = tl.zeros((POSITIONS,), tl.float32)
    for first in range(0, A, COLUMNS):
        a = first + tl.arange(0, COLUMNS)
        q = tl.load(query + row * A + a, mask=a < A, other=0.0).to(tl.float32)
        inside = real[:, None] & (a < A)[None, :]
        x = tl.load(keys + source[:, None] * A + a[None, :], mask=inside, other=0.0).to(tl.float32)
        if PRODUCT:
            score += tl.sum(x * q[None, :], 1)
        else:
            bent = _tanh(x + q[None, :], APPROXIMATE)
            factor = tl.load(v + a, mask=a < A, other=0.0).to(tl.float32)
            score += tl.sum(bent * factor[None, :], 1)
    score = tl.where(real, score, float("-inf"))
    weight = tl.exp(score - tl.max(score, 0))
    weight = weight / tl.sum(weight, 0)
    tl.store(weights + row * S + s, weight, mask=s < S)
    for first in range(0, D, COLUMNS):
        d = first + tl.arange(0, COLUMNS)
        inside = real[:, None] & (d < D)[None, :]
        x = tl.load(values + source[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        total = tl.sum(x * weight[:, None], 0)
        tl.store(context + row * D + d, total.to(context.dtype.element_ty), mask=d < D)


def fused_attend_step(
    query_TBA: Tensor, keys_SBA: Tensor, values_SBD: Tensor, padding_SB: Tensor, v_A: Tensor, function: str
) -> tuple[Tensor, Tensor]:
    """Return the same as `padded_attend`, with float32 weights."""
    queries, sentences, width = query_TBA.shape
    positions, values = len(keys_SBA), values_SBD.shape[2]
    context_TBD = torch.empty(queries, sentences, values, dtype=values_SBD.dtype, device=values_SBD.device)
    weights_TBS = torch.empty(queries, sentences, positions, dtype=torch.float32, device=values_SBD.device)
    held = max(16, triton.next_power_of_2(positions))
    _attend[(queries, sentences)](
        *(each.contiguous() for each in (query_TBA, keys_SBA, values_SBD, padding_SB, v_A)),
        context_TBD,
        weights_TBS,
        positions,
        sentences,
        width,
        values,
        PRODUCT=function == "product",
        APPROXIMATE=_approximate(query_TBA),
        POSITIONS=held,
        COLUMNS=_TILE // held,
        num_warps=8,
    )
    return context_TBD, weights_TBS
