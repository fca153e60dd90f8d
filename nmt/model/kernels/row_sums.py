"""Weighted sums of the rows of each token, which combine the results of its experts, and the gradients of these sums.

`sum_rows` and `sum_rows_backward` choose between a plain and a fused implementation. The fused ones run on a GPU and
read each row once, in place. There, the plain sum, PyTorch's embedding bag, takes two to four times as long, and the
plain gradient makes five passes over the rows.

Letters: T tokens, R rows, S slots, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_FUSED_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def sum_rows(rows_RD: Tensor, row_R: Tensor, begin_T: Tensor, weight_R: Tensor | None = None) -> Tensor:
    """Return y_t = sum of weight[i] * rows[row[i]] over i = begin[t] .. begin[t + 1] - 1, shape (T, D).

    For the last t, i runs to the end. A token without rows gets zeros. Indices are int64. No weights means that all are
    1. Sums are float32 or better, in the order of i.
    """
    if rows_RD.is_cuda and rows_RD.dtype in _FUSED_TYPES and len(begin_T):
        from nmt.model.kernels.row_sums_triton import fused_sum_rows

        return fused_sum_rows(rows_RD, row_R, begin_T, weight_R)
    return plain_sum_rows(rows_RD, row_R, begin_T, weight_R)


def plain_sum_rows(rows_RD: Tensor, row_R: Tensor, begin_T: Tensor, weight_R: Tensor | None = None) -> Tensor:
    """Return `sum_rows` computed with PyTorch operations."""
    if weight_R is not None:
        weight_R = weight_R.to(rows_RD.dtype)
    return F.embedding_bag(row_R, rows_RD, begin_T, mode="sum", per_sample_weights=weight_R)


def sum_rows_backward(
    grad_TD: Tensor, rows_RD: Tensor, weight: Tensor, token_R: Tensor, order_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients (grad_RD, weight_grad) of y_t = sum of weight[s] * rows[r] over the rows r of token t.

    Row r belongs to token t = token_R[r] and slot s = order_R[r]. Weights have S numbers, in any shape. The weight of a
    slot without a row gets 0.
    """
    if rows_RD.is_cuda and rows_RD.dtype in _FUSED_TYPES and len(rows_RD):
        from nmt.model.kernels.row_sums_triton import fused_sum_rows_backward

        return fused_sum_rows_backward(grad_TD, rows_RD, weight, token_R, order_R)
    return plain_sum_rows_backward(grad_TD, rows_RD, weight, token_R, order_R)


def plain_sum_rows_backward(
    grad_TD: Tensor, rows_RD: Tensor, weight: Tensor, token_R: Tensor, order_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `sum_rows_backward` computed with PyTorch operations."""
    grad_RD = grad_TD.index_select(0, token_R)
    # Element-wise: one tiny matrix product per token would take longer.
    weight_grad_R = (rows_RD * grad_RD).sum(1, dtype=weight.dtype)
    weight_grad_S = weight.new_zeros(weight.numel()).index_copy_(0, order_R, weight_grad_R)
    weight_R = weight.flatten().index_select(0, order_R).to(grad_TD.dtype)
    return grad_RD.mul_(weight_R.unsqueeze(1)), weight_grad_S.view_as(weight)
