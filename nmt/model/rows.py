"""Gather and scatter rows without accumulation: every backward pass here is a gather, a plain copy or an ordered sum.

PyTorch's backward pass of an index is an accumulating scatter. A GPU computes it with atomics, slowly and in an order
that changes from run to run. It is not needed if the index is known to be unique, or if its inverse is known.

Letters: T tokens, K slots per token, S = T * K slots, R <= S routed rows, N selected rows, M rows to select from,
D width, P of A groups of B values; in `unpack` and `pack`, L positions of B sentences.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from nmt.batch import Rows
from nmt.model.kernels.row_sums import sum_rows, sum_rows_backward


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


class _RouteRows(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, row_R: Tensor, begin_T: Tensor) -> Tensor:
        ctx.save_for_backward(row_R, begin_T)
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        row_R, begin_T = ctx.saved_tensors
        return sum_rows(grad_RD, row_R, begin_T), None, None, None


class _CombineRows(Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, gates: Tensor, token_R: Tensor, order_R: Tensor, row_R: Tensor, begin_T: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows_RD, gates, token_R, order_R)
        gates_R = gates.flatten()
        if len(row_R) < len(gates_R):
            gates_R = gates_R.index_select(0, order_R.index_select(0, row_R))
        # One sum per token over the rows it has, which makes and keeps no copy of the rows.
        return sum_rows(rows_RD, row_R, begin_T, gates_R)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        return *sum_rows_backward(grad_TD, *ctx.saved_tensors), None, None, None, None


class _AddRows(Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, token_R: Tensor, row_R: Tensor, begin_T: Tensor) -> Tensor:
        ctx.save_for_backward(token_R)
        return sum_rows(rows_RD, row_R, begin_T)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, None]:
        (token_R,) = ctx.saved_tensors
        return grad_TD.index_select(0, token_R), None, None, None


class _SumByGroup(Function):
    @staticmethod
    def forward(ctx: Any, values_SB: Tensor, group_S: Tensor, num_groups: int) -> Tensor:
        ctx.save_for_backward(group_S)
        # A product in float64, since float32 products may round their inputs.
        member_AS = torch.arange(num_groups, device=group_S.device)[:, None] == group_S
        return (member_AS.double() @ values_SB.double()).to(values_SB.dtype)

    @staticmethod
    def backward(ctx: Any, grad_AB: Tensor) -> tuple[Tensor, None, None]:
        (group_S,) = ctx.saved_tensors
        return grad_AB.index_select(0, group_S), None, None


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
    def forward(ctx: Any, x_ND: Tensor, turn_N: Tensor) -> Tensor:
        ctx.save_for_backward(turn_N)
        return x_ND.index_select(0, turn_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        (turn_N,) = ctx.saved_tensors
        return grad_ND.index_select(0, turn_N), None


def sum_by_group(values_SB: Tensor, group_S: Tensor, num_groups: int) -> Tensor:
    """Return the sum of the values of each group, (A, B), added up in the same order every time."""
    return _SumByGroup.apply(values_SB, group_S, num_groups)


def take_groups(x_TAB: Tensor, group_TP: Tensor) -> Tensor:
    """Return the values of each token's groups, (T, P, B); the P groups of a token must be distinct."""
    return _TakeGroups.apply(x_TAB, group_TP)


def turn_round(x_ND: Tensor, turn_N: Tensor) -> Tensor:
    """Return x[turn] for a `turn` that is its own inverse, such as the reversal of sentences."""
    return _TurnRound.apply(x_ND, turn_N)


def take_rows(x_MD: Tensor, index_N: Tensor) -> Tensor:
    """Return x[index] for an index without repetitions."""
    return _TakeRows.apply(x_MD, index_N)


def put_rows(x_ND: Tensor, index_N: Tensor, num_rows: int) -> Tensor:
    """Return a tensor of `num_rows` rows with x at rows `index`, zeros elsewhere: the inverse of `take_rows`."""
    return x_ND.new_zeros(num_rows, *x_ND.shape[1:]).index_copy(0, index_N, x_ND)


def unpack(x_ND: Tensor, rows: Rows) -> Tensor:
    """Return the padded layout of packed rows, x_LBD, with zeros at padding."""
    cells = rows.num_positions * rows.num_sentences
    if rows.real_N is None and rows.num_rows == cells:
        return x_ND.view(rows.num_positions, rows.num_sentences, *x_ND.shape[1:])  # sentences of equal lengths
    # The last cell takes the rows of padding.
    x_MD = put_rows(x_ND, rows.cell_N, cells + (rows.real_N is not None))
    return x_MD[:cells].view(rows.num_positions, rows.num_sentences, *x_ND.shape[1:])


def pack(x_LBD: Tensor, rows: Rows) -> Tensor:
    """Return the rows of a padded layout, x_ND, with zeros in rows of padding: the inverse of `unpack`."""
    x_MD = x_LBD.flatten(0, 1)
    if rows.real_N is None and rows.num_rows == len(x_MD):
        return x_MD
    if rows.real_N is not None:
        x_MD = torch.cat([x_MD, x_MD.new_zeros(1, *x_MD.shape[1:])])
    return take_rows(x_MD, rows.cell_N)


def route_rows(x_TD: Tensor, token_R: Tensor, row_R: Tensor, begin_T: Tensor) -> Tensor:
    """Return rows of which row r is token token_R[r]; a token may have any number of rows.

    Token t has the rows row_R[begin_T[t]] .. row_R[begin_T[t + 1] - 1].
    """
    return _RouteRows.apply(x_TD, token_R, row_R, begin_T)


def add_rows(rows_RD: Tensor, token_R: Tensor, row_R: Tensor, begin_T: Tensor) -> Tensor:
    """Return y_t = sum of the rows that `route_rows` made of token t, added up in the order of `row_R`."""
    return _AddRows.apply(rows_RD, token_R, row_R, begin_T)


def combine_rows(
    rows_RD: Tensor, gates: Tensor, token_R: Tensor, order_R: Tensor, row_R: Tensor, begin_T: Tensor
) -> Tensor:
    """Return y_t = sum of gate_r * rows[r] over the rows r that `route_rows` made of token t.

    gate_r is the gate of slot order_R[r]. `gates` has the slots of all tokens in turn, in any shape. In `row_R`, the
    rows of a token are in the order of its slots. It has a row for every slot, or for full slots only. If for every
    slot, those that are not in `order_R` must have gates of 0 and refer to a row of zeros.
    """
    return _CombineRows.apply(rows_RD, gates, token_R, order_R, row_R, begin_T)


def inverse_permutation(order_R: Tensor) -> Tensor:
    """Return p^-1 with p^-1[p[i]] = i."""
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), dtype=order_R.dtype, device=order_R.device)
    return inverse_R
