"""The mixture-of-experts layer: gate, dispatch, experts, combine (S17 section 2).

Experts have no capacity limit and drop no token. Rows are sorted by expert, each expert processes all of its rows, and
the results are weighted by their gates and added up per token. Expert code does not depend on the number of processes:
the dispatcher passes it rows grouped by expert, and a parallel dispatcher can replace the local one.

Letters: T tokens, K slots per token, S = T * K slots, R routed rows (full slots), M tokens or routed rows, E experts,
D width, I and O inputs and outputs of one layer of an expert.
"""

from collections.abc import Callable, Collection
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nmt.config import MoEConfig
from nmt.model.dropout import drop_hidden, mask_outputs
from nmt.model.gating import GateOutput, make_gate
from nmt.model.kernels.experts import group_rows
from nmt.model.routes import Route, grouped_product, sort_rows
from nmt.model.rows import combine_rows


class ExpertShard(NamedTuple):
    """The experts of one process: part `rank` of `size` equal consecutive parts of all experts."""

    rank: int = 0
    size: int = 1


ALL_EXPERTS = ExpertShard()


class Experts(nn.Module):
    """E feed-forward networks D -> H1 -> ... -> D with ReLU and no biases (S17 sections 2, C.1; Tables 7-8 fix it).

    `weights` has one tensor (E, inputs, outputs) per layer. Products are computed in the type of the rows, whatever the
    type of the weights. With a share, whose size must divide E, only the experts of the share are created. `dropout` is
    the probability of `drop_hidden` in training.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        hidden_sizes: list[int],
        share: ExpertShard = ALL_EXPERTS,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        sizes = [hidden_size, *hidden_sizes, hidden_size]
        held = num_experts // share.size
        self.first = share.rank * held
        """Number of this share's first expert."""
        self.when_woken: Callable[[Collection[int]], None] | None = None
        """Called before products on a CPU with the experts that have rows, if their weights must be verified first."""
        self.weights = nn.ParameterList(torch.empty(held, inputs, outputs) for inputs, outputs in pairwise(sizes))

    def forward(self, rows_MD: Tensor, ends_E: Tensor, route: Route | None = None) -> Tensor:
        """Return the outputs for rows sorted by expert, (R, D); the rows of expert e end before row ends_E[e] (int32).

        With a route, `rows_MD` are tokens, and the sorted rows are copies of them. Rows past the last end belong to no
        expert: their outputs and gradients are zeros.
        """
        num_rows, last = len(route.token_R if route else rows_MD), len(self.weights) - 1
        groups = group_rows(ends_E, num_rows, rows_MD.dtype)
        if self.when_woken:
            self.when_woken(groups.sizes)
        rows_RD: Tensor = rows_MD.contiguous()
        for layer, w_EIO in enumerate(self.weights):
            rows_RD = grouped_product(rows_RD, w_EIO, groups, None if layer else route, layer < last, layer > 0)
            if self.dropout and self.training and layer < last:
                rows_RD = drop_hidden(rows_RD, self.dropout)
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
        return sort_rows(gate.expert_TK, gate.sums.count_E.numel(), gate.num_routed)

    def combine(self, rows_RD: Tensor, gates_TK: Tensor, route: Route) -> Tensor:
        """Return y_t = sum_j gate_tj row_tj (S17 eq. 1)."""
        return combine_rows(rows_RD, gates_TK, *route)


class MoE(nn.Module):
    """y = sum_i G(x)_i E_i(x) over the K selected experts (S17 eq. 1); `output: sigmoid` as in appendix E.

    For a token without experts (possible with strictly balanced gates), y = 0, which a sigmoid turns into 1/2. In
    training, `output_masking` is the probability of `mask_outputs`.
    """

    def __init__(self, hidden_size: int, num_experts: int, config: MoEConfig, share: ExpertShard = ALL_EXPERTS) -> None:
        super().__init__()
        self.gate = make_gate(hidden_size, num_experts, config)
        self.experts = Experts(num_experts, hidden_size, config.hidden_sizes, share, config.expert_dropout)
        self.num_experts = num_experts
        self.sigmoid_output = config.output == "sigmoid"
        self.output_masking = config.output_masking
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
        used = gate
        if self.output_masking and self.training:
            # The gate's decisions, sums and losses stay. Its process draws, whichever processes have the experts.
            used = gate._replace(gates_TK=mask_outputs(gate.gates_TK, self.output_masking))
        y_TD = self.dispatcher.run(self.experts, x_TD, used)
        return (y_TD.sigmoid() if self.sigmoid_output else y_TD), gate
