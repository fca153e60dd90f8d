"""Fused version of `plain_sum_rows`: one program per token, which adds up the token's rows in order.

It is imported only to run on a GPU, since Triton comes with PyTorch's CUDA builds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


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


def fused_sum_rows(rows_RD: Tensor, row_R: Tensor, begin_T: Tensor, weight_R: Tensor | None) -> Tensor:
    """Return the same as `plain_sum_rows`, for bf16 or float32 rows and at least one token."""
    rows_RD, num_tokens, width = rows_RD.contiguous(), len(begin_T), rows_RD.shape[1]
    out_TD = torch.empty(num_tokens, width, device=rows_RD.device, dtype=rows_RD.dtype)
    block = min(_BLOCK, triton.next_power_of_2(width))
    weight = row_R if weight_R is None else weight_R
    arguments = (rows_RD, row_R, begin_T, weight, out_TD, num_tokens, len(row_R), width)
    _sum_rows[(num_tokens, triton.cdiv(width, block))](*arguments, WEIGHTED=weight_R is not None, BLOCK=block)
    return out_TD
