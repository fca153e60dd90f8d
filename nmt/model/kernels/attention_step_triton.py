"""Fused version of `padded_attend` for a few queries per sentence, as in a search; for passes without gradient.

One program per sentence and group of queries: scores of all source positions, their softmax, and the weighted sum of
the values. A tile of keys or values is read once for all queries. Nothing but weights and contexts is written.

Bound on an H100: S A values of tanh per query, of which a multiprocessor does 16 per cycle. For 640 queries, 32
positions and A = 1024, that is 6 us. It is imported only to run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmt.model.kernels.attention_triton import _approximate, _tanh

# Numbers in a tile of keys or values, most queries of a program, and sentences from which programs have several.
_TILE, _GROUP, _FEW = 4096, 8, 32


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    padding,
    v,
    context,
    weights,
    K,
    S,
    B,
    A,
    D,
    PRODUCT: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    GROUP: tl.constexpr,
    POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    b, first_query = tl.program_id(0), tl.program_id(1) * GROUP
    group, s = tl.arange(0, GROUP), tl.arange(0, POSITIONS)
    source = (s * B + b).to(tl.int64)
    real = (s < S) & (tl.load(padding + source, mask=s < S, other=1) == 0)
    score = tl.zeros((GROUP, POSITIONS), tl.float32)
    for first in range(0, A, COLUMNS):
        a = first + tl.arange(0, COLUMNS)
        inside = real[:, None] & (a < A)[None, :]
        x = tl.load(keys + source[:, None] * A + a[None, :], mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(v + a, mask=a < A, other=0.0).to(tl.float32)
        for k in tl.static_range(GROUP):
            row = ((first_query + k) * B + b).to(tl.int64)
            q = tl.load(query + row * A + a, mask=(a < A) & (first_query + k < K), other=0.0).to(tl.float32)
            if PRODUCT:
                part = tl.sum(x * q[None, :], 1)
            else:
                part = tl.sum(_tanh(x + q[None, :], APPROXIMATE) * factor[None, :], 1)
            score += tl.where((group == k)[:, None], part[None, :], 0.0)
    score = tl.where(real[None, :], score, float("-inf"))
    weight = tl.exp(score - tl.max(score, 1)[:, None])
    weight = weight / tl.sum(weight, 1)[:, None]
    rows = ((first_query + group) * B + b).to(tl.int64)
    known = (first_query + group < K)[:, None] & (s < S)[None, :]
    tl.store(weights + rows[:, None] * S + s[None, :], weight, mask=known)
    for first in range(0, D, COLUMNS):
        d = first + tl.arange(0, COLUMNS)
        inside = real[:, None] & (d < D)[None, :]
        x = tl.load(values + source[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        for k in tl.static_range(GROUP):
            own = tl.sum(tl.where((group == k)[:, None], weight, 0.0), 0)
            row = ((first_query + k) * B + b).to(tl.int64)
            total = tl.sum(x * own[:, None], 0).to(context.dtype.element_ty)
            tl.store(context + row * D + d, total, mask=(d < D) & (first_query + k < K))


def fused_attend_step(
    query_TBA: Tensor, keys_SBA: Tensor, values_SBD: Tensor, padding_SB: Tensor, v_A: Tensor, function: str
) -> tuple[Tensor, Tensor]:
    """Return the same as `padded_attend`, with float32 weights."""
    queries, sentences, width = query_TBA.shape
    positions, values = len(keys_SBA), values_SBD.shape[2]
    context_TBD = torch.empty(queries, sentences, values, dtype=values_SBD.dtype, device=values_SBD.device)
    weights_TBS = torch.empty(queries, sentences, positions, dtype=torch.float32, device=values_SBD.device)
    held = max(16, triton.next_power_of_2(positions))
    # A few sentences do not fill the card, unless each of their queries has a program.
    group = min(_GROUP, triton.next_power_of_2(queries)) if sentences >= _FEW else 1
    _attend[(sentences, triton.cdiv(queries, group))](
        *(each.contiguous() for each in (query_TBA, keys_SBA, values_SBD, padding_SB, v_A)),
        context_TBD,
        weights_TBS,
        queries,
        positions,
        sentences,
        width,
        values,
        PRODUCT=function == "product",
        APPROXIMATE=_approximate(query_TBA),
        GROUP=group,
        POSITIONS=held,
        COLUMNS=max(16, _TILE // held),
        num_warps=4 if held <= 64 else 8,
    )
    return context_TBD, weights_TBS
