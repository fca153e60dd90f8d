"""The mixture-of-experts layer: gate, dispatch, experts, combine (S17 section 2).

No token is dropped and there is no capacity: rows are sorted by expert, each expert works on as many as it got (none
included), and the results go back weighted by their gates. Experts never learn whether they are alone: the dispatcher
hands them rows grouped by expert, and a parallel one can be put in its place.

Letters: T tokens, K experts per token, R = T * K routed rows, E experts, D width, H hidden units of an expert.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from nmt.config import MoEConfig
from nmt.model.gating import GateOutput, NoisyTopKGate
from nmt.model.grouped import grouped_matmul, grouped_outer
from nmt.model.rows import combine_rows, inverse_permutation, route_rows


class _ExpertFunction(Function):
    """relu(rows . w1[e]) . w2[e] with its backward written out: four grouped products, the hidden layer kept once."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, w1_EDH: Tensor, w2_EHD: Tensor, ends_E: Tensor) -> Tensor:
        hidden_RH = grouped_matmul(rows_RD, w1_EDH, ends_E).relu_()
        ctx.save_for_backward(rows_RD, w1_EDH, w2_EHD, ends_E, hidden_RH)
        return grouped_matmul(hidden_RH, w2_EHD, ends_E)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        rows_RD, w1_EDH, w2_EHD, ends_E, hidden_RH = ctx.saved_tensors
        grad_RD = grad_RD.contiguous()
        w2_grad_EHD = grouped_outer(hidden_RH, grad_RD, ends_E)
        hidden_grad_RH = grouped_matmul(grad_RD, w2_EHD.transpose(1, 2), ends_E)
        hidden_grad_RH = torch.ops.aten.threshold_backward(hidden_grad_RH, hidden_RH, 0)
        w1_grad_EDH = grouped_outer(rows_RD, hidden_grad_RH, ends_E)
        rows_grad_RD = grouped_matmul(hidden_grad_RH, w1_EDH.transpose(1, 2), ends_E)
        return rows_grad_RD, w1_grad_EDH, w2_grad_EHD, None


class Experts(nn.Module):
    """E feed-forward networks D -> H -> D with ReLU and no biases (S17 sections 2 and C.1; Tables 7-8 fix 'no biases').

    Weights are cast to the type of the rows, so that float32 weights work in bf16 products.
    """

    def __init__(self, num_experts: int, hidden_size: int, expert_size: int) -> None:
        super().__init__()
        self.w1_EDH = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))
        self.w2_EHD = nn.Parameter(torch.empty(num_experts, expert_size, hidden_size))

    def forward(self, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Rows sorted by expert, those of expert e ending before row ends_E[e] (int32)."""
        return _ExpertFunction.apply(rows_RD, self.w1_EDH.to(rows_RD.dtype), self.w2_EHD.to(rows_RD.dtype), ends_E)


class Route(NamedTuple):
    """How rows were sorted, for the way back. Slot t * K + j is token t's j-th choice."""

    order_R: Tensor  # int64, the slot of each sorted row
    inverse_R: Tensor  # int64, the sorted row of each slot


class LocalDispatcher:
    """Sorts rows by expert on one device."""

    def dispatch(self, x_TD: Tensor, expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Route]:
        """(rows_RD grouped by expert, ends_E int32 as `Experts` wants them, the way back)."""
        sorted_R, order_R = expert_TK.reshape(-1).to(torch.int32).sort(stable=True)
        route = Route(order_R, inverse_permutation(order_R))
        expert_E = torch.arange(num_experts, dtype=torch.int32, device=x_TD.device)
        ends_E = torch.searchsorted(sorted_R, expert_E, right=True, out_int32=True)
        return route_rows(x_TD, route.order_R, route.inverse_R), ends_E, route

    def combine(self, rows_RD: Tensor, gates_TK: Tensor, route: Route) -> Tensor:
        """y_t = sum_j gate_tj row_tj (S17 eq. 1)."""
        return combine_rows(rows_RD, gates_TK, route.order_R, route.inverse_R)


class MoE(nn.Module):
    """y = sum_i G(x)_i E_i(x) over the K chosen experts (S17 eq. 1); `output: sigmoid` as in appendix E."""

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.gate = NoisyTopKGate(hidden_size, config.num_experts, config.k)
        self.experts = Experts(config.num_experts, hidden_size, config.hidden_size)
        self.num_experts = config.num_experts
        self.sigmoid_output = config.output == "sigmoid"
        self.dispatcher = LocalDispatcher()

    def forward(self, x_TD: Tensor) -> tuple[Tensor, GateOutput]:
        """All tokens of the batch at once, padding already taken out (S17 section 3.1, 'convolutional')."""
        gate = self.gate(x_TD)
        rows_RD, ends_E, route = self.dispatcher.dispatch(x_TD, gate.expert_TK, self.num_experts)
        y_TD = self.dispatcher.combine(self.experts(rows_RD, ends_E), gate.gates_TK, route)
        return (y_TD.sigmoid() if self.sigmoid_output else y_TD), gate
