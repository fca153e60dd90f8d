"""Measure the experts of a trained model on a text: how much each adds, and how similar their outputs are.

Letters: T tokens, K slots of a token, R routed rows, D width, E experts, P sentence pairs, B those of a batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nmt.config import LayerName
from nmt.data.held_out import encode_pairs, eval_batches
from nmt.data.subwords import Subwords
from nmt.model.experts import LocalDispatcher, MoE
from nmt.model.gating import Gate, GateOutput
from nmt.model.seq2seq import Seq2Seq

_BATCH_TOKENS = 4096
# Rows per pass when the experts of a layer are compared, summed over experts.
_COMPARED_ROWS = 65536


class ExpertUse(NamedTuple):
    """How much each expert of a layer is used on a text: sums over its tokens, float64, on the CPU."""

    load_E: Tensor  # number of tokens
    gate_E: Tensor  # sum of gate values
    output_E: Tensor  # output mass m_i = sum_t g_ti |E_i(x_t)|


@dataclass(frozen=True)
class Observation:
    """Use of the experts and a sample of the inputs, by MoE layer."""

    use: dict[str, ExpertUse]
    sample: dict[str, Tensor]
    """A uniform random sample of the layer's input tokens (T, D)."""


@torch.inference_mode()
def observe(
    model: Seq2Seq,
    subwords: Subwords,
    sources: Sequence[str],
    targets: Sequence[str],
    prefixes: Sequence[Sequence[int]] = (),
    sample_tokens: int = 2000,
) -> Observation:
    """Run sentence pairs through `model`, which must be in evaluation mode, and return the use of its experts.

    Counts all tokens except padding, including the end of each sentence and the symbols before a source (`prefixes`, as
    for `encode_pairs`). The decoder reads the given targets; there is no search.
    """
    encoded = encode_pairs(subwords, sources, targets, prefixes=prefixes)[:2]
    tokens = {
        side: sum(map(len, lines)) + len(lines) for side, lines in zip(("encoder", "decoder"), encoded, strict=True)
    }
    generator = torch.Generator().manual_seed(1)
    layers = model.moe_layers()
    use: dict[str, ExpertUse] = {}
    sample: dict[str, list[Tensor]] = {}
    with _inputs(layers) as inputs:
        for batch in eval_batches(*encoded, _BATCH_TOKENS):
            for layer, gate in model.gates(batch.to(model.device)).items():
                x_TD = inputs[layer]
                found = use_of(layers[layer], x_TD, gate)
                use[layer] = ExpertUse(*map(torch.add, use[layer], found)) if layer in use else found
                share = min(1.0, sample_tokens / tokens[LayerName.of(layer).side])
                drawn_T = torch.rand(len(x_TD), generator=generator) < share
                sample.setdefault(layer, []).append(x_TD[drawn_T.to(x_TD.device)])
    return Observation(use, {layer: torch.cat(parts) for layer, parts in sample.items()})


@torch.inference_mode()
def most_used(
    model: Seq2Seq,
    subwords: Subwords,
    sources: Sequence[str],
    targets: Sequence[str],
    layer: str,
    experts_per_token: int = 0,
    prefixes: Sequence[Sequence[int]] = (),
) -> list[int]:
    """Return the most-used expert of a MoE layer for each sentence pair; -1 if its tokens have no expert.

    That is the expert with the largest sum of gate values over the sentence's tokens. The model must be in evaluation
    mode. A decoder layer reads the given targets. `prefixes` are as for `encode_pairs`.
    """
    encoded = encode_pairs(subwords, sources, targets, prefixes=prefixes)[:2]
    found_P = torch.full((len(sources),), -1)
    for batch in eval_batches(*encoded, _BATCH_TOKENS):
        gate = model.gates(batch.to(model.device), experts_per_token)[layer]
        rows = batch.source if LayerName.of(layer).side == "encoder" else batch.target
        sentence_T = rows.cell_N % len(batch.pairs_B)
        # Empty slots have the number after the last expert.
        num_experts = gate.sums.count_E.numel()
        sum_BE = torch.zeros(len(batch.pairs_B), num_experts + 1, dtype=torch.float64)
        cells = sentence_T[:, None].expand(gate.expert_TK.shape), gate.expert_TK.cpu()
        sum_BE.index_put_(cells, gate.gates_TK.double().cpu(), accumulate=True)
        most_B, expert_B = sum_BE[:, :num_experts].max(1)
        found_P[batch.pairs_B] = torch.where(most_B > 0, expert_B, -1)
    return found_P.tolist()


@contextmanager
def _inputs(layers: dict[str, MoE]) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary with the tokens (T, D) that the gate of each layer read last, by layer."""
    inputs: dict[str, Tensor] = {}

    def note(layer: str, _gate: Gate, arguments: tuple[Tensor], _output: GateOutput) -> None:
        inputs[layer] = arguments[0]

    handles = [moe.gate.register_forward_hook(partial(note, layer)) for layer, moe in layers.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def use_of(moe: MoE, x_TD: Tensor, gate: GateOutput) -> ExpertUse:
    """Return the use of each expert of a layer, given its input tokens and their gates."""
    ends_E, route = LocalDispatcher().sort(gate)
    norm_R = moe.experts(x_TD, ends_E, route).float().norm(dim=1)
    expert_R = gate.expert_TK.flatten()[route.order_R].cpu()
    gate_R = gate.gates_TK.flatten()[route.order_R]

    def by_expert(values_R: Tensor) -> Tensor:
        return torch.zeros(moe.num_experts, dtype=torch.float64).index_add_(0, expert_R, values_R.double().cpu())

    return ExpertUse(by_expert(torch.ones_like(gate_R)), by_expert(gate_R), by_expert(gate_R * norm_R))


@torch.inference_mode()
def output_similarity(moe: MoE, x_TD: Tensor) -> Tensor:
    """Return the cosine between the outputs of each pair of experts for the same tokens: (E, E), on the CPU.

    An expert's outputs for all tokens are one vector.
    """
    experts = moe.num_experts
    product_EE = torch.zeros(experts, experts, dtype=torch.float64)
    for part_TD in x_TD.float().split(max(1, _COMPARED_ROWS // experts)):
        ends_E = len(part_TD) * torch.arange(1, experts + 1, dtype=torch.int32, device=x_TD.device)
        output_EX = moe.experts(part_TD.repeat(experts, 1), ends_E).view(experts, -1)
        product_EE += (output_EX @ output_EX.T).double().cpu()
    norm_E = product_EE.diagonal().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return product_EE / norm_E[:, None] / norm_E
