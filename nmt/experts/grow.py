"""More experts for a trained network, without changing what it computes.

At the moment of growth the network translates exactly as before (outside training, up to rounding); what makes the
new experts differ is the training that follows.

Letters: D width, A groups of B experts before the growth, C copies of each.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nmt.config import ModelConfig
from nmt.errors import UserError
from nmt.experts.surgery import NetworkWeights, TrainedWeight, Weights, select_experts
from nmt.model.names import expert_matrix
from nmt.model.seq2seq import Seq2Seq


def grow(network: NetworkWeights, num_experts: int, seed: int) -> NetworkWeights:
    """`network` with `num_experts` experts in each MoE layer. UserError where that cannot be done exactly.

    - From none: the experts and noisy top-k gates of a new network, but the last matrix of every expert is zero, so
      the layer adds 0 to its input. Gates start at zero as always.
    - From E experts under a noisy top-k gate to C E: a hierarchical gate. The old gate becomes the primary one and
      wakes k of E groups; group i holds C copies of the old expert i, of which each token wakes one. With one expert
      of a group its gate within the group is 1, whichever it is.
    - From A groups of B under a hierarchical gate with k = 1, such as that of an earlier growth: C copies of each
      expert in its group.

    Which copy a token wakes is drawn at the start: columns u_1 .. u_C, normal with std D^-1/2 (logits of unit scale,
    a little above the noise), are added to the copies' columns of the gate, so that different tokens meet different
    copies, also without noise, and these grow apart. Without them all would tie, and translation would always use
    the first. The C columns are those of the group, the same for all its B old experts j: the logit of copy c is
    x . w_j + x . u_c, so the largest belongs to a copy of the expert that won before, whatever u is.

    Old parameters keep the optimiser's moments, copies those of their original; new parameters start without.
    """
    moe = network.config.moe
    if not moe.num_experts:
        return _first_experts(network, num_experts, seed)
    config = _grown_config(network.config, num_experts)
    # Not the same columns again when grown again, or the sums of old and new ones would be alike.
    (mixed,) = np.random.SeedSequence([seed, num_experts]).generate_state(1).tolist()
    generator = torch.Generator().manual_seed(mixed)
    layers = {}
    for layer in network.config.moe_layer_names():
        weights = network.layer(layer)
        width, before = weights["gate.w_gate_DE"].value.shape
        u_DAC = torch.randn(width, config.moe.branching, num_experts // before, generator=generator) * width**-0.5
        if not moe.is_hierarchical:
            weights = _as_groups_of_one(weights)
        layers[layer] = _copied(weights, u_DAC)
    return network.with_layers(config, layers)


def _first_experts(network: NetworkWeights, num_experts: int, seed: int) -> NetworkWeights:
    old = network.config.moe
    if old.output == "sigmoid":
        raise UserError(
            "--grow: with model.moe.output=sigmoid new experts would add 1/2 to every number, not 0: "
            "only model.moe.output=none can begin without experts"
        )
    moe = replace(old, num_experts=num_experts, gating="noisy_top_k", branching=0)
    config = replace(network.config, moe=moe)
    if not config.moe_layer_names():
        raise UserError("--grow: model.encoder_moe_after and model.decoder_moe_after name no place for experts")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values = {n: p.detach() for n, p in Seq2Seq(config, network.vocab_size).named_parameters()}
    fresh = NetworkWeights(
        config, network.vocab_size, {name: TrainedWeight.new(value) for name, value in values.items()}
    )
    last = expert_matrix(len(moe.hidden_sizes))
    layers = {}
    for layer in config.moe_layer_names():
        weights = fresh.layer(layer)
        layers[layer] = weights | {last: TrainedWeight.new(torch.zeros_like(weights[last].value))}
    return network.with_layers(config, layers)


def _grown_config(config: ModelConfig, num_experts: int) -> ModelConfig:
    """The settings after growing; UserError if these experts cannot grow to so many."""
    moe = config.moe
    if not (moe.is_noisy and (moe.k == 1 or not moe.is_hierarchical)):
        k = f" and k={moe.k}" if moe.is_hierarchical else ""
        raise UserError(
            f"--grow: experts under gating={moe.gating}{k} cannot grow; what can are a network without experts, "
            "gating=noisy_top_k, and gating=hierarchical with k=1"
        )
    counts = {layer: moe.experts_at(layer) for layer in config.moe_layer_names()}
    if len(set(counts.values())) != 1:
        shown = ", ".join(f"{layer} {count}" for layer, count in counts.items())
        raise UserError(f"--grow: the layers have different numbers of experts ({shown or 'there is none'})")
    (before,) = set(counts.values())
    if num_experts % before or num_experts <= before:
        multiples = ", ".join(str(before * factor) for factor in (2, 3, 4))
        raise UserError(f"--grow {num_experts}: {before} experts can become {multiples} or another multiple")
    branching, primary_k = (moe.branching, moe.primary_k) if moe.is_hierarchical else (before, moe.k)
    grown = replace(
        moe,
        num_experts=num_experts,
        num_experts_at={},
        gating="hierarchical",
        branching=branching,
        primary_k=primary_k,
        k=1,
    )
    return replace(config, moe=grown)


def _as_groups_of_one(weights: Weights) -> Weights:
    """A layer under a flat gate as one whose groups have a single expert each: the gate becomes the primary one."""
    renamed = {
        "gate.w_gate_DE": "gate.primary_w_gate_DA",
        "gate.w_noise_DE": "gate.primary_w_noise_DA",
    }
    grouped = {renamed.get(name, name): weight for name, weight in weights.items()}
    return grouped | {name: TrainedWeight.new(torch.zeros_like(weights[name].value)) for name in renamed}


def _copied(weights: Weights, u_DAC: Tensor) -> Weights:
    """C copies of every expert of a layer under a hierarchical gate, expert (i, j)'s at (i B + j) C + c."""
    _, groups, copies = u_DAC.shape
    w_gate_DE = weights["gate.w_gate_DE"].value
    num_experts = w_gate_DE.shape[1]
    grown = select_experts(weights, torch.arange(num_experts).repeat_interleave(copies))
    column = grown["gate.w_gate_DE"]
    u_DABC = u_DAC[:, :, None].expand(-1, -1, num_experts // groups, -1)
    value = column.value + u_DABC.reshape(column.value.shape).to(column.value.dtype)
    return grown | {"gate.w_gate_DE": column._replace(value=value)}
