"""Moving rows about without a scatter that adds: every backward pass here is another gather or a plain copy.

PyTorch's own backward of an index is an accumulating scatter, which a GPU does with atomics, slowly and in an order
that changes from run to run. Where the index is known to be unique, or its inverse is known, none is needed.

Letters: T tokens, K places for experts a token has, S = T * K slots, R <= S routed rows, N selected rows, M rows to
select from, D width, P of A groups of B values; in `turn_round` T positions of B sentences.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class _TakeRows(Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, index_N: Tensor) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.num_rows = x_MD.shape[0]
        return x_MD.index_select(0, index_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        (index_N,) = ctx.saved_tensors
        grad_MD = grad_ND.new_zeros(ctx.num_rows, *grad_ND.shape[1:])
        return grad_MD.index_copy_(0, index_N, grad_ND), None


def _rows_of_slots(rows_RD: Tensor, row_S: Tensor) -> Tensor:
    """The row of each slot; zeros for an empty slot, whose row is R or more."""
    num_rows = rows_RD.shape[0]
    if row_S.numel() > num_rows:
        rows_RD, row_S = torch.cat([rows_RD, rows_RD.new_zeros(1, rows_RD.shape[1])]), row_S.clamp_max(num_rows)
    return rows_RD.index_select(0, row_S)


class _RouteRows(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, row_S: Tensor) -> Tensor:
        ctx.save_for_backward(row_S)
        ctx.num_tokens = x_TD.shape[0]
        choices = row_S.numel() // max(x_TD.shape[0], 1)
        return x_TD.index_select(0, order_R // max(choices, 1))

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (row_S,) = ctx.saved_tensors
        width = grad_RD.shape[1]
        choices = row_S.numel() // max(ctx.num_tokens, 1)
        grad_TKD = _rows_of_slots(grad_RD, row_S).view(ctx.num_tokens, choices, width)
        return grad_TKD.sum(1), None, None


class _CombineRows(Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, gates_TK: Tensor, order_R: Tensor, row_S: Tensor) -> Tensor:
        rows_TKD = _rows_of_slots(rows_RD, row_S).view(*gates_TK.shape, rows_RD.shape[1])
        ctx.save_for_backward(rows_TKD, gates_TK, order_R)
        return torch.bmm(gates_TK.to(rows_RD.dtype).unsqueeze(1), rows_TKD).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_TKD, gates_TK, order_R = ctx.saved_tensors
        # Element-wise rather than as one tiny matrix product per token, which a GPU runs ten times slower.
        gates_grad_TK = (rows_TKD * grad_TD.unsqueeze(1)).sum(2, dtype=gates_TK.dtype)
        gates_R = gates_TK.flatten().index_select(0, order_R).to(grad_TD.dtype)
        rows_grad_RD = grad_TD.index_select(0, order_R // gates_TK.shape[1]) * gates_R.unsqueeze(1)
        return rows_grad_RD, gates_grad_TK, None, None


class _TakeGroups(Function):
    @staticmethod
    def forward(ctx: Any, x_TAB: Tensor, group_TP: Tensor) -> Tensor:
        index_TPB = group_TP[:, :, None].expand(-1, -1, x_TAB.shape[2])
        ctx.save_for_backward(group_TP)
        ctx.num_groups = x_TAB.shape[1]
        return x_TAB.gather(1, index_TPB)

    @staticmethod
    def backward(ctx: Any, grad_TPB: Tensor) -> tuple[Tensor, None]:
        (group_TP,) = ctx.saved_tensors
        grad_TAB = grad_TPB.new_zeros(len(grad_TPB), ctx.num_groups, grad_TPB.shape[2])
        return grad_TAB.scatter_(1, group_TP[:, :, None].expand_as(grad_TPB), grad_TPB), None


class _TurnRound(Function):
    @staticmethod
    def forward(ctx: Any, x_TBD: Tensor, turn_TB: Tensor) -> Tensor:
        ctx.save_for_backward(turn_TB)
        return x_TBD.gather(0, turn_TB[:, :, None].expand_as(x_TBD))

    @staticmethod
    def backward(ctx: Any, grad_TBD: Tensor) -> tuple[Tensor, None]:
        (turn_TB,) = ctx.saved_tensors
        return grad_TBD.gather(0, turn_TB[:, :, None].expand_as(grad_TBD)), None


def take_groups(x_TAB: Tensor, group_TP: Tensor) -> Tensor:
    """Of each token the values of its groups, (T, P, B); a token's P groups must differ."""
    return _TakeGroups.apply(x_TAB, group_TP)


def turn_round(x_TBD: Tensor, turn_TB: Tensor) -> Tensor:
    """y[t, b] = x[turn[t, b], b] for a `turn` that is its own inverse, such as that of sentences read backwards."""
    return _TurnRound.apply(x_TBD, turn_TB)


def take_rows(x_MD: Tensor, index_N: Tensor) -> Tensor:
    """x[index] for an index without repetitions."""
    return _TakeRows.apply(x_MD, index_N)


def put_rows(x_ND: Tensor, index_N: Tensor, num_rows: int) -> Tensor:
    """The inverse of `take_rows`: x at rows `index` of a zero tensor of `num_rows` rows."""
    return x_ND.new_zeros(num_rows, *x_ND.shape[1:]).index_copy(0, index_N, x_ND)


def route_rows(x_TD: Tensor, order_R: Tensor, row_S: Tensor) -> Tensor:
    """Row r of the result is the token of slot order[r], where slot t * K + j is token t's j-th place for an expert.

    `row_S` is the inverse: the row of each slot, R or more for a slot that is empty.
    """
    return _RouteRows.apply(x_TD, order_R, row_S)


def combine_rows(rows_RD: Tensor, gates_TK: Tensor, order_R: Tensor, row_S: Tensor) -> Tensor:
    """The way back from `route_rows`: y_t = sum_j gates[t, j] * (the row of slot t * K + j). Empty slots give 0."""
    return _CombineRows.apply(rows_RD, gates_TK, order_R, row_S)


def inverse_permutation(order_R: Tensor) -> Tensor:
    """p^-1 with p^-1[p[i]] = i."""
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), dtype=order_R.dtype, device=order_R.device)
    return inverse_R
