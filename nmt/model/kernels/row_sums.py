"""Sums of groups of rows: the results that a token gets back from its experts.

`sum_rows` chooses between a plain and a fused implementation. The fused one reads each row once, in place. On a GPU,
the plain one, PyTorch's embedding bag, takes two to four times as long.

Letters: T tokens, R rows, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sum_rows(rows_RD: Tensor, row_R: Tensor, begin_T: Tensor, weight_R: Tensor | None = None) -> Tensor:
    """Return y_t = sum of weight[i] * rows[row[i]] over i = begin[t] .. begin[t + 1] - 1, shape (T, D).

    For the last t, i runs to the end. A token without rows gets zeros. Indices are int64. Weights have the type of the
    rows; None means 1. Sums are float32 or better, in the order of i.
    """
    if rows_RD.is_cuda and rows_RD.dtype in (torch.bfloat16, torch.float32) and len(begin_T):
        from nmt.model.kernels.row_sums_triton import fused_sum_rows

        return fused_sum_rows(rows_RD, row_R, begin_T, weight_R)
    return plain_sum_rows(rows_RD, row_R, begin_T, weight_R)


def plain_sum_rows(rows_RD: Tensor, row_R: Tensor, begin_T: Tensor, weight_R: Tensor | None = None) -> Tensor:
    """Return `sum_rows` computed with PyTorch operations."""
    return F.embedding_bag(row_R, rows_RD, begin_T, mode="sum", per_sample_weights=weight_R)
