"""What one pass through the network collects at its MoE layers, and what it may change there.

Letters: N rows (tokens), D width.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from nmt.model.experts import MoE
from nmt.model.gating import GateOutput

Gates = dict[str, GateOutput]
"""The gates of one pass by the name of their layer: "encoder.2" is the MoE after encoder LSTM 2."""

ChangeGate = Callable[[str, GateOutput], GateOutput]
"""change_gate(layer, gate) returns the decisions with which the experts of a layer run, for a pass that differs from
the model's own, such as one without some expert."""


class LastGate(Exception):  # noqa: N818 - not an error
    """The pass has reached the gate of its last layer, and ends there."""


class Pass:
    """One pass: it takes tokens through MoE layers, and keeps the gates.

    Outside training, each token has `experts_per_token` active experts; 0: as many as in training. With `last`, the
    pass ends after the gate of that layer with LastGate: its experts and all later layers are not computed.
    """

    def __init__(self, experts_per_token: int = 0, change_gate: ChangeGate | None = None, last: str = "") -> None:
        self.experts_per_token, self.change_gate, self.last = experts_per_token, change_gate, last
        self.gates: Gates = {}

    def through(self, layer: str, moe: MoE, x_ND: Tensor, real_N: Tensor | None) -> Tensor:
        """Return the output of an MoE layer for the rows `x_ND`; `real_N` as in `Rows`."""
        if layer == self.last:
            self.gates[layer] = moe.gate(x_ND, self.experts_per_token, real_N)
            raise LastGate
        own_change = partial(self.change_gate, layer) if self.change_gate else None
        y_ND, self.gates[layer] = moe(x_ND, self.experts_per_token, real_N, own_change)
        return y_ND


def of_both_passes(first: Gates, second: Gates) -> Gates:
    """Return the gates of a batch that was read twice, see `GateOutput.with_second_pass`."""
    return {layer: gate.with_second_pass(second[layer]) for layer, gate in first.items()}
