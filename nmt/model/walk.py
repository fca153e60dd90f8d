"""Run several batches of different shapes through the network in one pass.

LSTMs and attention work on a padded batch of sentences of similar lengths. Gates, experts and the softmax work on
tokens, whatever their sentence. So a batch's pass is a generator, a walk: it pauses at every MoE layer, yields its
tokens, and continues with the layer's output. Several walks, each over sentences of another length, run in parallel:
at an MoE layer, their tokens form one batch.

Letters: N real (not padding) tokens, D width.
"""

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from nmt.model.experts import MoE
from nmt.model.gating import GateOutput

T = TypeVar("T")

Gates = dict[str, GateOutput]
"""The gates of one pass by the name of their layer: "encoder.2" is the MoE after encoder LSTM 2."""

ChangeGate = Callable[[str, GateOutput], GateOutput]
"""change_gate(layer, gate) returns the decisions with which the experts of a layer run, for a pass that differs from
the model's own, such as one without some expert."""


class Visit(NamedTuple):
    """The tokens of one batch at the input of an MoE layer."""

    layer: str
    moe: MoE
    x_ND: Tensor
    real_N: Tensor | None  # bool, False for padding; None: all are real, as in a batch that was not padded to a bucket


Walk = Generator[Visit, Tensor, T]
"""Generator that yields visits, receives y_ND of each, and returns a result."""


def walk_together(
    walks: Sequence[Walk[T]], experts_per_token: int, last: str = "", change_gate: ChangeGate | None = None
) -> tuple[list[T], Gates]:
    """Return (results of the walks, gates). Each MoE layer is called once, on the tokens of all walks.

    All walks must visit the same layers. With `last`, the pass ends after the gate of that layer: its experts and all
    later layers are not computed, and there are no results.
    """
    gates: Gates = {}
    answers: Sequence[Tensor | None] = [None] * len(walks)
    while True:
        visits, results = [], []
        for walk, y_ND in zip(walks, answers, strict=True):
            try:
                # The first send must be None: it starts the generator.
                visits.append(walk.send(y_ND))  # type: ignore[arg-type]
            except StopIteration as end:
                results.append(end.value)
        if not visits:
            return results, gates
        layer, moe, x_ND, _ = visits[0]
        assert not results
        assert all(visit.layer == layer for visit in visits)
        if len(visits) > 1:
            x_ND = torch.cat([visit.x_ND for visit in visits])
        real_N = real_of_all([visit.real_N for visit in visits], [visit.x_ND for visit in visits])
        if layer == last:
            gates[layer] = moe.gate(x_ND, experts_per_token, real_N)
            return [], gates
        own_change = partial(change_gate, layer) if change_gate else None
        y_ND, gates[layer] = moe(x_ND, experts_per_token, real_N, own_change)
        answers = y_ND.split([len(visit.x_ND) for visit in visits])


def real_of_all(reals: Sequence[Tensor | None], rows: Sequence[Tensor]) -> Tensor | None:
    """Return which rows of several batches together are real (bool); None if all are. `reals`: see `Visit.real_N`."""
    if all(real_N is None for real_N in reals):
        return None
    pairs = zip(reals, rows, strict=True)
    return torch.cat([x.new_ones(len(x), dtype=torch.bool) if real_N is None else real_N for real_N, x in pairs])
