"""Attention of all target rows of a packed batch over the source rows of their sentences.

`attend` chooses between a plain and a fused implementation. The plain one makes padded tensors. The fused one reads
rows in place and computes nothing for padding. It never stores the T x S x B x A values of the additive function's
tanh. Its backward pass computes them again, twice.

Letters: M target rows, N source rows, B sentences, T target positions, S source positions, A size of queries and keys,
D size of values.
"""

import torch
from torch import Tensor

from nmt.batch import Rows
from nmt.model.rows import pack, unpack

# The fused form for a search holds the scores of all source positions at once.
_MOST_FUSED_POSITIONS = 512


def attend(
    query_MA: Tensor, keys_NA: Tensor, values_ND: Tensor, v_A: Tensor, target: Rows, source: Rows, function: str
) -> Tensor:
    """Return context_MD: for each target row, the mean of its sentence's values, weighted by the softmax of scores.

    The score of query q and key k is q . k for the function "product", whose V is part of the query. For all others, it
    is sum_a V_a tanh(q_a + k_a). Softmax is float32 or better. Rows of padding get zeros, as do their gradients.
    Queries and keys have one type; contexts have the type of the values.
    """
    types = torch.bfloat16, torch.float16, torch.float32
    if query_MA.is_cuda and query_MA.dtype in types and values_ND.dtype in types:
        from nmt.model.kernels.attention_triton import fused_attend

        return fused_attend(query_MA, keys_NA, values_ND, v_A, target, source, function)
    return plain_attend(query_MA, keys_NA, values_ND, v_A, target, source, function)


def plain_attend(
    query_MA: Tensor, keys_NA: Tensor, values_ND: Tensor, v_A: Tensor, target: Rows, source: Rows, function: str
) -> Tensor:
    """Return `attend` computed with PyTorch operations on padded tensors."""
    query_TBA, keys_SBA, values_SBD = unpack(query_MA, target), unpack(keys_NA, source), unpack(values_ND, source)
    return pack(plain_padded_attend(query_TBA, keys_SBA, values_SBD, padding_of(source), v_A, function)[0], target)


def padding_of(source: Rows) -> Tensor:
    """Return padding_SB, bool, with one position that is not padding for an absent sentence: its row of zeros.

    A softmax over no position would be NaN.
    """
    position_S1 = torch.arange(source.num_positions, device=source.length_B.device)[:, None]
    return position_S1 >= source.length_B.clamp_min(1)


def padded_attend(
    query_TBA: Tensor, keys_SBA: Tensor, values_SBD: Tensor, padding_SB: Tensor, v_A: Tensor, function: str
) -> tuple[Tensor, Tensor]:
    """Return (context_TBD, weights_TBS) of `attend` for padded tensors.

    Weights are float32 or better, and add up to 1 over the source positions that are not padding.
    """
    types = torch.bfloat16, torch.float16, torch.float32
    known = query_TBA.dtype in types and values_SBD.dtype in types and len(keys_SBA) <= _MOST_FUSED_POSITIONS
    if query_TBA.is_cuda and known and not torch.is_grad_enabled():
        from nmt.model.kernels.attention_step_triton import fused_attend_step

        return fused_attend_step(query_TBA, keys_SBA, values_SBD, padding_SB, v_A, function)
    return plain_padded_attend(query_TBA, keys_SBA, values_SBD, padding_SB, v_A, function)


def plain_padded_attend(
    query_TBA: Tensor, keys_SBA: Tensor, values_SBD: Tensor, padding_SB: Tensor, v_A: Tensor, function: str
) -> tuple[Tensor, Tensor]:
    """Return `padded_attend` computed with PyTorch operations."""
    if function == "product":
        score_BTS = torch.bmm(query_TBA.transpose(0, 1), keys_SBA.permute(1, 2, 0))
    else:
        # In the layout of the inputs, with tanh in place: this is the largest tensor of a model with this attention.
        hidden_TSBA = (query_TBA.unsqueeze(1) + keys_SBA.unsqueeze(0)).tanh_()
        score_BTS = torch.mv(hidden_TSBA.flatten(0, 2), v_A).view(hidden_TSBA.shape[:3]).permute(2, 0, 1)
    score_BTS = score_BTS.masked_fill(padding_SB.T.unsqueeze(1), -torch.inf)
    weights_BTS = score_BTS.softmax(dim=2, dtype=torch.promote_types(score_BTS.dtype, torch.float32))
    context_BTD = torch.bmm(weights_BTS.to(values_SBD.dtype), values_SBD.transpose(0, 1))
    return context_BTD.transpose(0, 1), weights_BTS.transpose(0, 1)
