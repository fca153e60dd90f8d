"""Fused version of `plain_best`, which reads the logits once, and a few blocks of each row again.

Bound: the bytes of the logits at the card's bandwidth. It is imported only to run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Logits per block, whose maximum is kept, and blocks per program.
_WIDTH, _BLOCKS = 128, 32
_NONE = tl.constexpr(1 << 30)


@triton.jit
def _blocks(  # type: ignore[no-untyped-def]
    logits,
    allowed,
    ends,
    maxima,
    sums,
    bias,
    V,
    BIASED: tl.constexpr,
    EOS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Maxima of the allowed logits of each block, and log sum exp of all logits of this program's part of a row."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    block = part * BLOCKS + tl.arange(0, BLOCKS)
    index = block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = index < V
    x = tl.load(logits + row * V + index, mask=inside, other=float("-inf")).to(tl.float32)
    if BIASED:
        x += tl.load(bias + index, mask=inside, other=0.0)
    most = tl.max(tl.max(x, 1), 0)
    # A part of nothing but minus infinity has no sum.
    shift = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(tl.sum(tl.exp(x - shift), 1), 0)
    tl.store(sums + row * parts + part, shift + tl.log(total))
    free = tl.load(allowed + index, mask=inside, other=0) != 0
    free = free & ((index != EOS) | (tl.load(ends + row) != 0))
    best = tl.max(tl.where(free, x, float("-inf")), 1)
    tl.store(maxima + row * parts * BLOCKS + block, best)


@triton.jit
def _best(  # type: ignore[no-untyped-def]
    logits,
    allowed,
    ends,
    maxima,
    sums,
    values,
    indexes,
    normaliser,
    bias,
    V,
    parts,
    blocks,
    K: tl.constexpr,
    BIASED: tl.constexpr,
    EOS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Select K blocks of a row by their maxima, and the K largest logits in these."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    s = tl.load(sums + row * parts + part, mask=part < parts, other=float("-inf"))
    most = tl.max(s, 0)
    tl.store(normaliser + row, most + tl.log(tl.sum(tl.exp(s - most), 0)))

    number = tl.arange(0, BLOCKS)
    place = tl.arange(0, PLACES)
    m = tl.load(maxima + row * blocks + number, mask=number < blocks, other=float("-inf"))
    left = number < blocks
    chosen = tl.full((PLACES,), 0, tl.int32)
    for k in range(K):
        largest = tl.max(tl.where(left, m, float("-inf")), 0)
        block = tl.min(tl.where(left & (m == largest), number, _NONE), 0)
        chosen = tl.where(place == k, block, chosen)
        left = left & (number != block)

    index = chosen[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (place < K)[:, None] & (index < V)
    free = tl.load(allowed + index, mask=inside, other=0) != 0
    free = free & ((index != EOS) | (tl.load(ends + row) != 0))
    x = tl.load(logits + row * V + index, mask=free, other=float("-inf")).to(tl.float32)
    if BIASED:
        x += tl.load(bias + index, mask=free, other=0.0)
    for k in range(K):
        largest = tl.max(tl.max(tl.where(inside, x, float("-inf")), 1), 0)
        first = tl.min(tl.min(tl.where(inside & (x == largest), index, _NONE), 1), 0)
        tl.store(values + row * K + k, largest)
        tl.store(indexes + row * K + k, first.to(tl.int64))
        inside = inside & (index != first)


def fused_best(
    logits_RV: Tensor, k: int, forbidden_F: Tensor, ends_R: Tensor, eos: int, bias_V: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as `plain_best`: (values_RK, indexes_RK, normaliser_R)."""
    rows, vocabulary = logits_RV.shape
    allowed_V = torch.ones(vocabulary, dtype=torch.bool, device=logits_RV.device).index_fill_(0, forbidden_F, False)
    parts = triton.cdiv(vocabulary, _WIDTH * _BLOCKS)
    blocks = parts * _BLOCKS
    maxima_RN = torch.empty(rows, blocks, dtype=torch.float32, device=logits_RV.device)
    sums_RP = torch.empty(rows, parts, dtype=torch.float32, device=logits_RV.device)
    values_RK = torch.empty(rows, k, dtype=torch.float32, device=logits_RV.device)
    indexes_RK = torch.empty(rows, k, dtype=torch.int64, device=logits_RV.device)
    normaliser_R = torch.empty(rows, dtype=torch.float32, device=logits_RV.device)
    given = logits_RV, allowed_V, ends_R, maxima_RN, sums_RP
    bias, constants = logits_RV if bias_V is None else bias_V, {"BIASED": bias_V is not None, "EOS": eos}
    _blocks[(rows, parts)](*given, bias, vocabulary, WIDTH=_WIDTH, BLOCKS=_BLOCKS, num_warps=4, **constants)
    _best[(rows,)](
        *given,
        values_RK,
        indexes_RK,
        normaliser_R,
        bias,
        vocabulary,
        parts,
        blocks,
        K=k,
        WIDTH=_WIDTH,
        PARTS=triton.next_power_of_2(parts),
        BLOCKS=triton.next_power_of_2(blocks),
        PLACES=triton.next_power_of_2(k),
        num_warps=4,
        **constants,
    )
    return values_RK, indexes_RK, normaliser_R
