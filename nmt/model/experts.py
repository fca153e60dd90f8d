"""The mixture-of-experts layer: gate, dispatch, experts, combine (S17 section 2).

No token is dropped and there is no capacity: rows are sorted by expert, each expert works on as many as it got (none
included), and the results go back weighted by their gates. Experts never learn whether they are alone: the dispatcher
hands them rows grouped by expert, and a parallel one can be put in its place.

Letters: T tokens, K places for experts a token has, S = T * K slots, R routed rows (slots that are not empty),
E experts, D width, I and O inputs and outputs of one layer of an expert.
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
    """Rows of expert e times w[e], in the type of the rows.

    Weights of another type are cast, and cast again in the backward pass: that takes less time than the product, and no
    copy of all experts is kept in between. One matrix at a time, so that its gradient is added up before the next.
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
    """The part of all experts that one process holds: part `rank` of `size` equal ones, in the order of experts."""

    rank: int = 0
    size: int = 1


ALL_EXPERTS = ExpertShard()


class Experts(nn.Module):
    """E feed-forward networks D -> H1 -> ... -> D with ReLU and no biases (S17 sections 2, C.1; Tables 7-8 fix it).

    `weights` holds one matrix per layer and expert, (E, inputs, outputs). Products are computed in the type of the
    rows, whatever theirs is. With a share, which must divide E, only its experts are ever made.
    """

    def __init__(
        self, num_experts: int, hidden_size: int, hidden_sizes: list[int], share: ExpertShard = ALL_EXPERTS
    ) -> None:
        super().__init__()
        sizes = [hidden_size, *hidden_sizes, hidden_size]
        held = num_experts // share.size
        self.first = share.rank * held
        """The number of the first expert here."""
        self.weights = nn.ParameterList(torch.empty(held, inputs, outputs) for inputs, outputs in pairwise(sizes))

    def forward(self, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Rows sorted by expert, those of expert e ending before row ends_E[e] (int32)."""
        *hidden_EIO, last_EIO = self.weights
        for w_EIO in hidden_EIO:
            rows_RD = _GroupedProduct.apply(rows_RD, w_EIO, ends_E).relu_()
        return _GroupedProduct.apply(rows_RD, last_EIO, ends_E)


class Route(NamedTuple):
    """How rows were sorted, for the way back. Slot s = t * K + j is token t's j-th place for an expert.

    Nothing here grows with slots that stay empty: tokens may have very different numbers of experts.
    """

    order_R: Tensor  # int64, the slot of each sorted row
    row_R: Tensor  # int64, the sorted row of each slot that is not empty, in the order of slots
    begin_T: Tensor  # int64, where the slots of each token begin in row_R


class Dispatcher(Protocol):
    """Brings rows to their experts and back."""

    def run(self, experts: Callable[[Tensor, Tensor], Tensor], x_TD: Tensor, gate: GateOutput) -> Tensor:
        """y_t = sum_j gate_tj E_j(x_t) (S17 eq. 1); `experts` takes (rows_RD, ends_E) as `Experts` does."""


class LocalDispatcher:
    """Sorts rows by expert on one device."""

    def run(self, experts: Callable[[Tensor, Tensor], Tensor], x_TD: Tensor, gate: GateOutput) -> Tensor:
        """Dispatch, experts, combine."""
        rows_RD, ends_E, route = self.dispatch(x_TD, gate)
        if gate.num_routed is not None:
            return self.combine(experts(rows_RD, ends_E), gate.gates_TK, route)
        # The rows of empty slots come last and belong to no expert, which leaves them unspecified, their gradients
        # too: as zeros they add nothing to any token.
        empty_R1 = (torch.arange(len(rows_RD), device=x_TD.device) >= ends_E[-1])[:, None]
        y_RD = experts(rows_RD.masked_fill(empty_R1, 0.0), ends_E).masked_fill(empty_R1, 0.0)
        return self.combine(y_RD, gate.gates_TK, route)

    def dispatch(self, x_TD: Tensor, gate: GateOutput) -> tuple[Tensor, Tensor, Route]:
        """(rows_RD grouped by expert, ends_E int32 as `Experts` wants them, the way back)."""
        sorted_S, order_S = gate.expert_TK.reshape(-1).to(torch.int32).sort(stable=True)
        # Empty slots, whose expert is E, come last. A copy, so that they are not kept for the backward pass.
        order_R = order_S[: gate.num_routed].clone()
        num_experts, num_slots = gate.sums.count_E.numel(), gate.expert_TK.shape[1]
        route = _way_back(gate.expert_TK, order_R, num_experts)
        expert_E = torch.arange(num_experts, dtype=torch.int32, device=x_TD.device)
        ends_E = torch.searchsorted(sorted_S, expert_E, right=True, out_int32=True)
        return route_rows(x_TD, order_R // num_slots, route.row_R, route.begin_T), ends_E, route

    def combine(self, rows_RD: Tensor, gates_TK: Tensor, route: Route) -> Tensor:
        """y_t = sum_j gate_tj row_tj (S17 eq. 1)."""
        return combine_rows(rows_RD, gates_TK, *route)


def _way_back(expert_TK: Tensor, order_R: Tensor, num_experts: int) -> Route:
    """The route of rows that were sorted so; slots of expert `num_experts` are empty."""
    num_tokens, num_slots = expert_TK.shape
    if len(order_R) == expert_TK.numel():
        # Each slot is its own place: none is empty, or the host does not know how many are.
        begin_T = torch.arange(num_tokens, device=order_R.device) * num_slots
        return Route(order_R, inverse_permutation(order_R), begin_T)
    filled_TK = expert_TK < num_experts
    # Filled slots before each: its place among them, if it is one.
    before_TK = filled_TK.flatten().cumsum(0).view_as(filled_TK) - filled_TK.long()
    row_R = inverse_permutation(before_TK.flatten().index_select(0, order_R))
    return Route(order_R, row_R, before_TK[:, 0].clone())


class MoE(nn.Module):
    """y = sum_i G(x)_i E_i(x) over the K chosen experts (S17 eq. 1); `output: sigmoid` as in appendix E.

    A token without experts (strictly balanced gates know them) gets y = 0, which a sigmoid makes 1/2.
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
        """All tokens of the batch at once, padding already taken out (S17 section 3.1, 'convolutional').

        Outside training each token wakes `experts_per_token` experts; 0: as many as in training. `real_T` as in `Gate`.
        """
        gate = self.gate(x_TD, experts_per_token, real_T)
        if change_gate:
            gate = change_gate(gate)
        y_TD = self.dispatcher.run(self.experts, x_TD, gate)
        return (y_TD.sigmoid() if self.sigmoid_output else y_TD), gate
