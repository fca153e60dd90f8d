"""Sums of consecutive groups of rows, as tokens need them that get several rows back from their experts.

`sum_rows` chooses between the plain form and its fused twin, which reads each row once where it lies; PyTorch's
embedding bag takes two to four times as long on a GPU.

Letters: T tokens, R rows, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sum_rows(rows_RD: Tensor, row_R: Tensor, begin_T: Tensor, weight_R: Tensor | None = None) -> Tensor:
    """(T, D): y_t = the sum of weight[i] * rows[row[i]] over i from begin[t] to begin[t + 1] - 1, for the last t to the
    end. Zeros for a token without rows.

    Indices are int64; weights, of the type of the rows, are 1 if left out. Sums are float32 or better, in that order.
    """
    if rows_RD.is_cuda and rows_RD.dtype in (torch.bfloat16, torch.float32) and len(begin_T):
        from nmt.model.kernels.row_sums_triton import fused_sum_rows

        return fused_sum_rows(rows_RD, row_R, begin_T, weight_R)
    return plain_sum_rows(rows_RD, row_R, begin_T, weight_R)


def plain_sum_rows(rows_RD: Tensor, row_R: Tensor, begin_T: Tensor, weight_R: Tensor | None = None) -> Tensor:
    """`sum_rows` in PyTorch's operations."""
    return F.embedding_bag(row_R, rows_RD, begin_T, mode="sum", per_sample_weights=weight_R)
