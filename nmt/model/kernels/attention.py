"""Attention of all target rows of a packed batch over the source rows of their sentences.

`attend` chooses between a plain and a fused implementation. The plain one makes padded tensors. The fused one reads
rows in place and computes nothing for padding. It never stores the T x S x B x A values of the additive function's
tanh. The backward pass computes them again, twice.

A side of a packed batch is three int32 tensors (begin_L, rank_B, length_B): row begin_L[t] + rank_B[b] is position
t < length_B[b] of sentence b. `begin_L` has L + 1 values; the last is the number of real rows. Rows of padding may
follow the real ones. A sentence of length 0 on both sides is absent.

Letters: M target rows, N source rows, B sentences, T target positions, S source positions, L positions of either side,
A size of queries and keys, D size of values.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Side = tuple[Tensor, Tensor, Tensor]
"""(begin_L, rank_B, length_B), see above."""


def attend(
    query_MA: Tensor, keys_NA: Tensor, values_ND: Tensor, v_A: Tensor, target: Side, source: Side, function: str
) -> Tensor:
    """Return context_MD: for each target row, the mean of its sentence's values, weighted by the softmax of scores.

    The score of query q and key k is q . k for the function "product", whose V is part of the query. For all others, it
    is sum_a V_a tanh(q_a + k_a). Softmax is float32 or better. Rows of padding get zeros, as do their gradients.
    Queries, keys and values have one type.
    """
    assert query_MA.dtype == keys_NA.dtype == values_ND.dtype
    if query_MA.is_cuda and query_MA.dtype in (torch.bfloat16, torch.float16, torch.float32):
        from nmt.model.kernels.attention_triton import fused_attend

        return fused_attend(query_MA, keys_NA, values_ND, v_A, target, source, function)
    return plain_attend(query_MA, keys_NA, values_ND, v_A, target, source, function)


def plain_attend(
    query_MA: Tensor, keys_NA: Tensor, values_ND: Tensor, v_A: Tensor, target: Side, source: Side, function: str
) -> Tensor:
    """Return `attend` computed with PyTorch operations on padded tensors."""
    weights_TBS = attention_weights(query_MA, keys_NA, v_A, target, source, function)
    values_BSD = _unpack(values_ND, source).transpose(0, 1)
    context_BTD = torch.bmm(weights_TBS.transpose(0, 1).to(values_BSD.dtype), values_BSD)
    return _pack(context_BTD.transpose(0, 1), target, len(query_MA))


def attention_weights(
    query_MA: Tensor, keys_NA: Tensor, v_A: Tensor, target: Side, source: Side, function: str
) -> Tensor:
    """Return the weights of `attend`, padded: weights_TBS, float32 or better, with zeros at source padding."""
    keys_SBA = _unpack(keys_NA, source)
    position_S1 = torch.arange(len(keys_SBA), device=keys_SBA.device)[:, None]
    # An absent sentence attends to one row of zeros. Without any row, its softmax would be NaN.
    padding_SB = position_S1 >= source[2].clamp(min=1)
    return padded_weights(_unpack(query_MA, target), keys_SBA, padding_SB, v_A, function)


def padded_weights(query_TBA: Tensor, keys_SBA: Tensor, padding_SB: Tensor, v_A: Tensor, function: str) -> Tensor:
    """Return weights_TBS, float32 or better, which add up to 1 over the source positions that are not padding."""
    if function == "product":
        score_BTS = torch.bmm(query_TBA.transpose(0, 1), keys_SBA.permute(1, 2, 0))
    else:
        # In the layout of the inputs, with tanh in place: this is the largest tensor of a model with this attention.
        hidden_TSBA = (query_TBA.unsqueeze(1) + keys_SBA.unsqueeze(0)).tanh_()
        score_BTS = torch.mv(hidden_TSBA.flatten(0, 2), v_A).view(hidden_TSBA.shape[:3]).permute(2, 0, 1)
    score_BTS = score_BTS.masked_fill(padding_SB.T.unsqueeze(1), -torch.inf)
    return score_BTS.softmax(dim=2, dtype=torch.promote_types(score_BTS.dtype, torch.float32)).transpose(0, 1)


class _MoveRows(Function):
    """y = x[index], with zeros where an index is the number of rows of x; `inverse` is the same for the way back."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, index_M: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(index_M, inverse_N)
        return torch.cat([x_ND, x_ND.new_zeros(1, x_ND.shape[1])]).index_select(0, index_M)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        index_M, inverse_N = ctx.saved_tensors
        return _MoveRows.apply(grad_MD, inverse_N, index_M), None, None


def _unpack(x_ND: Tensor, side: Side) -> Tensor:
    """Return the padded layout of packed rows, x_LBD, with zeros at padding."""
    row_C, cell_N = _places(side, len(x_ND))
    return _MoveRows.apply(x_ND, row_C, cell_N).view(len(side[0]) - 1, len(side[1]), -1)


def _pack(x_LBD: Tensor, side: Side, num_rows: int) -> Tensor:
    """Return the rows of a padded layout, x_ND, with zeros in rows of padding: the inverse of `_unpack`."""
    row_C, cell_N = _places(side, num_rows)
    return _MoveRows.apply(x_LBD.flatten(0, 1), cell_N, row_C)


def _places(side: Side, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return (row of each of C = L B cells, cell t B + b of each row); `num_rows` and C mean none."""
    begin_L, rank_B, length_B = side
    position_L1 = torch.arange(len(begin_L) - 1, device=begin_L.device)[:, None]
    row_C = torch.where(position_L1 < length_B, begin_L[:-1, None] + rank_B, num_rows).flatten().long()
    cell_N = row_C.new_full((num_rows + 1,), len(row_C))
    cell_N[row_C] = torch.arange(len(row_C), device=row_C.device)
    return row_C, cell_N[:-1]
