"""Fused versions of `plain_sum_rows` and `plain_sum_rows_backward`.

A program of the sum adds up one token's rows in order. A program of the gradient makes the gradients of a few rows and
of their weights. Bound: every row passes through memory once, in the gradient also its result.

The file is imported only to run on a GPU, since Triton comes with PyTorch's CUDA builds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_ROWS = 4  # rows per program of the gradient


@triton.jit
def _sum_rows(rows, row, begin, weight, out, num_tokens, num_rows, width, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    first = tl.load(begin + token)
    after = tl.load(begin + token + 1, mask=token + 1 < num_tokens, other=num_rows)
    total = tl.zeros([BLOCK], tl.float32)
    for place in range(first, after):
        x = tl.load(rows + tl.load(row + place) * width + columns, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            x *= tl.load(weight + place).to(tl.float32)
        total += x
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_rows_backward(  # type: ignore[no-untyped-def]
    grad, rows, weight, token, order, out, weight_grad, num_rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(order + row, mask=row < num_rows, other=0)
    factor = tl.load(weight + slot).to(tl.float32)
    grad_at = grad + tl.load(token + row, mask=row < num_rows, other=0)[:, None] * width
    place = row.to(tl.int64)[:, None] * width
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = (row < num_rows)[:, None] & (column < width)
        g = tl.load(grad_at + column, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(g * tl.load(rows + place + column, mask=inside, other=0.0).to(tl.float32), 1)
        tl.store(out + place + column, (g * factor[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(weight_grad + slot, total, mask=row < num_rows)


def fused_sum_rows(rows_RD: Tensor, row_R: Tensor, begin_T: Tensor, weight_R: Tensor | None) -> Tensor:
    """Return the same as `plain_sum_rows`, for at least one token."""
    rows_RD, num_tokens, width = rows_RD.contiguous(), len(begin_T), rows_RD.shape[1]
    out_TD = torch.empty(num_tokens, width, device=rows_RD.device, dtype=rows_RD.dtype)
    block = min(_BLOCK, triton.next_power_of_2(width))
    weight = row_R if weight_R is None else weight_R
    arguments = (rows_RD, row_R, begin_T, weight, out_TD, num_tokens, len(row_R), width)
    grid = (num_tokens, triton.cdiv(width, block))
    _sum_rows[grid](*arguments, WEIGHTED=weight_R is not None, BLOCK=block, num_warps=max(1, block // 256))
    return out_TD


def fused_sum_rows_backward(
    grad_TD: Tensor, rows_RD: Tensor, weight: Tensor, token_R: Tensor, order_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the same as `plain_sum_rows_backward`, for at least one row."""
    grad_TD, rows_RD, weight = grad_TD.contiguous(), rows_RD.contiguous(), weight.contiguous()
    grad_RD, (num_rows, width) = torch.empty_like(rows_RD), rows_RD.shape
    new = torch.empty_like if num_rows == weight.numel() else torch.zeros_like
    weight_grad = new(weight)
    arguments = (grad_TD, rows_RD, weight, token_R, order_R, grad_RD, weight_grad, num_rows, width)
    block = min(_BLOCK, triton.next_power_of_2(width))
    _sum_rows_backward[(triton.cdiv(num_rows, _ROWS),)](*arguments, ROWS=_ROWS, BLOCK=block)
    return grad_RD, weight_grad
