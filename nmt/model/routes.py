"""Rows sorted by expert, or by group of experts, and their products with one matrix per expert or group.

Letters: T tokens, K slots per token, S = T * K slots, R routed rows (full slots), M tokens or routed rows, E experts,
I and O inputs and outputs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from nmt.model.kernels.dispatch import SortedSlots, sort_slots
from nmt.model.kernels.experts import Groups, grouped_matmul, grouped_outer
from nmt.model.kernels.row_sums import sum_rows
from nmt.model.rows import inverse_permutation


class Route(NamedTuple):
    """Mapping between tokens and sorted rows. The slots of all tokens are numbered in turn.

    Its size does not depend on the number of empty slots, as tokens may have very different numbers of experts.
    """

    token_R: Tensor  # int64, the token of each sorted row
    order_R: Tensor  # int64, the slot of each sorted row
    row_R: Tensor  # int64, the sorted row of each full slot, in the order of slots
    begin_T: Tensor  # int64, index in row_R of the first slot of each token


def sort_rows(expert_TK: Tensor, num_experts: int, num_routed: int | None) -> tuple[Tensor, Route]:
    """Return (ends_E int32, the route of the rows): the rows of expert e are sorted and end before row ends_E[e].

    Slots with expert `num_experts` are empty. If the number `num_routed` of the other slots is not known (None), empty
    slots have rows too, which come last.
    """
    slots = sort_slots(expert_TK.flatten(), num_experts)
    return slots.ends_E, make_route(slots, expert_TK, num_experts, num_routed)


def make_route(slots: SortedSlots, expert_TK: Tensor, num_experts: int, num_routed: int | None) -> Route:
    """Return the route of the first `num_routed` sorted rows; slots with expert `num_experts` are empty."""
    num_tokens, num_slots = expert_TK.shape
    if num_routed is None or num_routed == expert_TK.numel():
        # Every slot counts as full: none is empty, or the host does not know how many are.
        begin_T = torch.arange(num_tokens, device=expert_TK.device) * num_slots
        return Route(slots.order_S // num_slots, slots.order_S, slots.row_S, begin_T)
    # Empty slots come last. The copy keeps them from being saved for the backward pass.
    order_R = slots.order_S[:num_routed].clone()
    filled_TK = expert_TK < num_experts
    # Number of full slots before each slot. For a full slot, this is its index among the full ones.
    before_TK = filled_TK.flatten().cumsum(0).view_as(filled_TK) - filled_TK.long()
    row_R = inverse_permutation(before_TK.flatten().index_select(0, order_R))
    return Route(order_R // num_slots, order_R, row_R, before_TK[:, 0].clone())


class _GroupedProduct(Function):
    """Product of the rows of expert e and w[e], in the type of the rows, and its ReLU.

    With a route, row r is rows[token[r]]. A ReLU's backward pass is done by the next layer, in the product that makes
    the gradient: the gradient that `backward` gets is 0 wherever its layer's ReLU gave 0.

    Weights of another type are cast, and cast again in the backward pass. This takes less time than the product, and
    keeps no copy of all experts between the passes. There is one call per matrix, so that its gradient is accumulated
    before the next matrix's gradient is allocated.
    """

    @staticmethod
    def forward(
        ctx: Any, rows_MI: Tensor, w_EIO: Tensor, groups: Groups, route: Route | None, relu: bool, follows_relu: bool
    ) -> Tensor:
        ctx.save_for_backward(rows_MI, w_EIO, *(route or ()))
        ctx.groups, ctx.follows_relu = groups, follows_relu
        return grouped_matmul(rows_MI, w_EIO, groups, route.token_R if route else None, relu)

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
        rows_MI, w_EIO, *saved = ctx.saved_tensors
        grad_RO, groups, route = grad_RO.contiguous(), ctx.groups, Route(*saved) if saved else None
        w_EOI = w_EIO.transpose(1, 2)
        grad_MI = grouped_matmul(grad_RO, w_EOI, groups, relu_output_RO=rows_MI if ctx.follows_relu else None)
        if route:
            grad_MI = sum_rows(grad_MI, route.row_R, route.begin_T)
        grad_EIO = None
        if ctx.needs_input_grad[1]:
            grad_EIO = grouped_outer(rows_MI, grad_RO, groups, route.token_R if route else None, w_EIO.dtype)
        return grad_MI, grad_EIO, None, None, None, None


def grouped_product(
    rows_MI: Tensor, w_EIO: Tensor, groups: Groups, route: Route | None, relu: bool = False, follows_relu: bool = False
) -> Tensor:
    """Return the rows of expert e times w[e], (R, O), in the type of the rows; zeros for rows of no expert.

    With a route, row r is rows[token[r]]. `relu`: negative results become 0, and the gradient of such a result must be
    0: this is the duty of the product that has this one's results as its rows, for which `follows_relu` is True.
    """
    return _GroupedProduct.apply(rows_MI, w_EIO, groups, route, relu, follows_relu)
