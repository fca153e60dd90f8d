"""The mixture-of-experts layer: gate, dispatch, experts, combine (S17 section 2).

Experts have no capacity limit and drop no token. Rows are sorted by expert, each expert processes all of its rows, and
the results are weighted by their gates and added up per token. Expert code does not depend on the number of processes:
the dispatcher passes it rows grouped by expert, and a parallel dispatcher can replace the local one.

Letters: T tokens, K slots per token, S = T * K slots, R routed rows (full slots), M tokens or routed rows, E experts,
D width, I and O inputs and outputs of one layer of an expert.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function

from nmt.config import MoEConfig
from nmt.model.gating import GateOutput, make_gate
from nmt.model.kernels.dispatch import SortedSlots, sort_slots
from nmt.model.kernels.experts import Groups, group_rows, grouped_matmul, grouped_outer
from nmt.model.kernels.row_sums import sum_rows
from nmt.model.rows import combine_rows, inverse_permutation


class Route(NamedTuple):
    """Mapping between tokens and sorted rows. Slot s = t * K + j is the j-th slot of token t.

    Its size does not depend on the number of empty slots, as tokens may have very different numbers of experts.
    """

    token_R: Tensor  # int64, the token of each sorted row
    order_R: Tensor  # int64, the slot of each sorted row
    row_R: Tensor  # int64, the sorted row of each full slot, in the order of slots
    begin_T: Tensor  # int64, index in row_R of the first slot of each token


class _Layer(Function):
    """One layer of all experts: the product of the rows of expert e and w[e], in the type of the rows, and its ReLU.

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
        return grouped_matmul(rows_MI, w_EIO.to(rows_MI.dtype), groups, route.token_R if route else None, relu)

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
        rows_MI, w_EIO, *saved = ctx.saved_tensors
        grad_RO, groups, route = grad_RO.contiguous(), ctx.groups, Route(*saved) if saved else None
        w_EOI = w_EIO.to(grad_RO.dtype).transpose(1, 2)
        grad_MI = grouped_matmul(grad_RO, w_EOI, groups, relu_output_RO=rows_MI if ctx.follows_relu else None)
        if route:
            grad_MI = sum_rows(grad_MI, route.row_R, route.begin_T)
        grad_EIO = grouped_outer(rows_MI, grad_RO, groups, route.token_R if route else None, w_EIO.dtype)
        return grad_MI, grad_EIO, None, None, None, None


class ExpertShard(NamedTuple):
    """The experts of one process: part `rank` of `size` equal consecutive parts of all experts."""

    rank: int = 0
    size: int = 1


ALL_EXPERTS = ExpertShard()


class Experts(nn.Module):
    """E feed-forward networks D -> H1 -> ... -> D with ReLU and no biases (S17 sections 2, C.1; Tables 7-8 fix it).

    `weights` has one tensor (E, inputs, outputs) per layer. Products are computed in the type of the rows, whatever the
    type of the weights. With a share, whose size must divide E, only the experts of the share are created.
    """

    def __init__(
        self, num_experts: int, hidden_size: int, hidden_sizes: list[int], share: ExpertShard = ALL_EXPERTS
    ) -> None:
        super().__init__()
        sizes = [hidden_size, *hidden_sizes, hidden_size]
        held = num_experts // share.size
        self.first = share.rank * held
        """Number of this share's first expert."""
        self.weights = nn.ParameterList(torch.empty(held, inputs, outputs) for inputs, outputs in pairwise(sizes))

    def forward(self, rows_MD: Tensor, ends_E: Tensor, route: Route | None = None) -> Tensor:
        """Return the outputs for rows sorted by expert, (R, D); the rows of expert e end before row ends_E[e] (int32).

        With a route, `rows_MD` are tokens, and the sorted rows are copies of them. Rows past the last end belong to no
        expert: their outputs and gradients are zeros.
        """
        num_rows, last = len(route.token_R if route else rows_MD), len(self.weights) - 1
        groups = group_rows(ends_E, num_rows, rows_MD.dtype)
        rows_RD: Tensor = rows_MD.contiguous()
        for layer, w_EIO in enumerate(self.weights):
            rows_RD = _Layer.apply(rows_RD, w_EIO, groups, None if layer else route, layer < last, layer > 0)
        return rows_RD


class Dispatcher(Protocol):
    """Sender of rows to their experts, and of the results back."""

    def run(self, experts: Experts, x_TD: Tensor, gate: GateOutput) -> Tensor:
        """Return y_t = sum_j gate_tj E_j(x_t) (S17 eq. 1)."""


class LocalDispatcher:
    """Dispatcher for one device, which sorts rows by expert."""

    def run(self, experts: Experts, x_TD: Tensor, gate: GateOutput) -> Tensor:
        """Sort the slots by expert, run the experts, and combine their results per token."""
        ends_E, route = self.sort(gate)
        return self.combine(experts(x_TD, ends_E, route), gate.gates_TK, route)

    def sort(self, gate: GateOutput) -> tuple[Tensor, Route]:
        """Return (ends_E int32 as `Experts` takes it, the route of the rows that the gate sends to experts).

        If the number of full slots is not known, those of empty slots come last and belong to no expert.
        """
        num_experts = gate.sums.count_E.numel()
        slots = sort_slots(gate.expert_TK.flatten(), num_experts)
        return slots.ends_E, _route(slots, gate.expert_TK, gate.num_routed, num_experts)

    def combine(self, rows_RD: Tensor, gates_TK: Tensor, route: Route) -> Tensor:
        """Return y_t = sum_j gate_tj row_tj (S17 eq. 1)."""
        return combine_rows(rows_RD, gates_TK, route.order_R, route.row_R, route.begin_T)


def _route(slots: SortedSlots, expert_TK: Tensor, num_routed: int | None, num_experts: int) -> Route:
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


class MoE(nn.Module):
    """y = sum_i G(x)_i E_i(x) over the K selected experts (S17 eq. 1); `output: sigmoid` as in appendix E.

    For a token without experts (possible with strictly balanced gates), y = 0, which a sigmoid turns into 1/2.
    """

    def __init__(self, hidden_size: int, num_experts: int, config: MoEConfig, share: ExpertShard = ALL_EXPERTS) -> None:
        super().__init__()
        self.gate = make_gate(hidden_size, num_experts, config)
        self.experts = Experts(num_experts, hidden_size, config.hidden_sizes, share)
        self.num_experts = num_experts
        self.sigmoid_output = config.output == "sigmoid"
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(
        self,
        x_TD: Tensor,
        experts_per_token: int = 0,
        real_T: Tensor | None = None,
        change_gate: Callable[[GateOutput], GateOutput] | None = None,
    ) -> tuple[Tensor, GateOutput]:
        """Return (y, decisions of the gate) for all tokens of a batch without padding (S17 3.1, 'convolutional').

        Outside training, each token has `experts_per_token` active experts; 0: as many as in training. `real_T` is as
        in `Gate`. The experts run with the decisions that `change_gate` returns, if given.
        """
        gate = self.gate(x_TD, experts_per_token, real_T)
        if change_gate:
            gate = change_gate(gate)
        y_TD = self.dispatcher.run(self.experts, x_TD, gate)
        return (y_TD.sigmoid() if self.sigmoid_output else y_TD), gate
