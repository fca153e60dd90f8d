"""The mixture-of-experts layer: gate, dispatch, experts, combine (S17 section 2).

Experts have no capacity limit and drop no token. Rows are sorted by expert, each expert processes all of its rows, and
the results are weighted by their gates and added up per token. Expert code does not depend on the number of processes:
the dispatcher passes it rows grouped by expert, and a parallel dispatcher can replace the local one.

Letters: T tokens, K slots per token, S = T * K slots, R routed rows (full slots), E experts, D width, I and O inputs
and outputs of one layer of an expert.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function

from nmt.config import MoEConfig
from nmt.model.gating import GateOutput, make_gate
from nmt.model.grouped import grouped_matmul, grouped_outer
from nmt.model.rows import combine_rows, inverse_permutation, route_rows


class _GroupedProduct(Function):
    """Product of the rows of expert e and w[e], in the type of the rows.

    Weights of another type are cast, and cast again in the backward pass. This takes less time than the product, and
    keeps no copy of all experts between the passes. There is one call per matrix, so that its gradient is accumulated
    before the next matrix's gradient is allocated.
    """

    @staticmethod
    def forward(ctx: Any, rows_RI: Tensor, w_EIO: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RI, w_EIO, ends_E)
        return grouped_matmul(rows_RI, w_EIO.to(rows_RI.dtype), ends_E)

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_RI, w_EIO, ends_E = ctx.saved_tensors
        grad_RO = grad_RO.contiguous()
        grad_RI = grouped_matmul(grad_RO, w_EIO.to(grad_RO.dtype).transpose(1, 2), ends_E)
        return grad_RI, grouped_outer(rows_RI, grad_RO, ends_E).to(w_EIO.dtype), None


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

    def forward(self, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Return the outputs for rows sorted by expert; the rows of expert e end before row ends_E[e] (int32)."""
        *hidden_EIO, last_EIO = self.weights
        for w_EIO in hidden_EIO:
            rows_RD = _GroupedProduct.apply(rows_RD, w_EIO, ends_E).relu_()
        return _GroupedProduct.apply(rows_RD, last_EIO, ends_E)


class Route(NamedTuple):
    """Mapping from sorted rows back to tokens. Slot s = t * K + j is the j-th slot of token t.

    Its size does not depend on the number of empty slots, as tokens may have very different numbers of experts.
    """

    order_R: Tensor  # int64, the slot of each sorted row
    row_R: Tensor  # int64, the sorted row of each full slot, in the order of slots
    begin_T: Tensor  # int64, index in row_R of the first slot of each token


class Dispatcher(Protocol):
    """Sender of rows to their experts, and of the results back."""

    def run(self, experts: Callable[[Tensor, Tensor], Tensor], x_TD: Tensor, gate: GateOutput) -> Tensor:
        """Return y_t = sum_j gate_tj E_j(x_t) (S17 eq. 1); `experts` takes (rows_RD, ends_E) as `Experts` does."""


class LocalDispatcher:
    """Dispatcher for one device, which sorts rows by expert."""

    def run(self, experts: Callable[[Tensor, Tensor], Tensor], x_TD: Tensor, gate: GateOutput) -> Tensor:
        """Sort the rows by expert, run the experts, and combine their results per token."""
        rows_RD, ends_E, route = self.dispatch(x_TD, gate)
        if gate.num_routed is not None:
            return self.combine(experts(rows_RD, ends_E), gate.gates_TK, route)
        # The rows of empty slots come last and belong to no expert, so their values and gradients are unspecified. Set
        # to zero, they add nothing to any token.
        empty_R1 = (torch.arange(len(rows_RD), device=x_TD.device) >= ends_E[-1])[:, None]
        y_RD = experts(rows_RD.masked_fill(empty_R1, 0.0), ends_E).masked_fill(empty_R1, 0.0)
        return self.combine(y_RD, gate.gates_TK, route)

    def dispatch(self, x_TD: Tensor, gate: GateOutput) -> tuple[Tensor, Tensor, Route]:
        """Return (rows_RD grouped by expert, ends_E int32 as `Experts` takes it, the route back)."""
        sorted_S, order_S = gate.expert_TK.reshape(-1).to(torch.int32).sort(stable=True)
        # Empty slots, whose expert is E, come last. The copy keeps them from being saved for the backward pass.
        order_R = order_S[: gate.num_routed].clone()
        num_experts, num_slots = gate.sums.count_E.numel(), gate.expert_TK.shape[1]
        route = _way_back(gate.expert_TK, order_R, num_experts)
        expert_E = torch.arange(num_experts, dtype=torch.int32, device=x_TD.device)
        ends_E = torch.searchsorted(sorted_S, expert_E, right=True, out_int32=True)
        return route_rows(x_TD, order_R // num_slots, route.row_R, route.begin_T), ends_E, route

    def combine(self, rows_RD: Tensor, gates_TK: Tensor, route: Route) -> Tensor:
        """Return y_t = sum_j gate_tj row_tj (S17 eq. 1)."""
        return combine_rows(rows_RD, gates_TK, *route)


def _way_back(expert_TK: Tensor, order_R: Tensor, num_experts: int) -> Route:
    """Return the route back of rows sorted by `order_R`; slots with expert `num_experts` are empty."""
    num_tokens, num_slots = expert_TK.shape
    if len(order_R) == expert_TK.numel():
        # Every slot counts as full: none is empty, or the host does not know how many are.
        begin_T = torch.arange(num_tokens, device=order_R.device) * num_slots
        return Route(order_R, inverse_permutation(order_R), begin_T)
    filled_TK = expert_TK < num_experts
    # Number of full slots before each slot. For a full slot, this is its index among the full ones.
    before_TK = filled_TK.flatten().cumsum(0).view_as(filled_TK) - filled_TK.long()
    row_R = inverse_permutation(before_TK.flatten().index_select(0, order_R))
    return Route(order_R, row_R, before_TK[:, 0].clone())


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
