"""Add experts to a trained network without changing what it computes, unless part of the copies is redrawn.

Right after growth, the network translates exactly as before (outside training, up to rounding). Only the training that
follows makes the new experts differ.

Letters: D width, A groups of B experts before growth, C copies of each expert, H hidden units, I and O inputs and
outputs of one layer of an expert.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from nmt.config import ModelConfig
from nmt.errors import UserError
from nmt.experts.surgery import NetworkWeights, TrainedWeight, Weights, select_experts
from nmt.model.names import expert_dim, expert_matrix, is_expert
from nmt.model.seq2seq import Seq2Seq


def grow(network: NetworkWeights, num_experts: int, seed: int, redraw: float = 0.0) -> NetworkWeights:
    """Return `network` with `num_experts` experts in each MoE layer. UserError if that cannot be done exactly.

    - From no experts: the network gets the experts and noisy top-k gates of a new network. The last matrix of every
      expert is zero, so the layer adds 0 to its input. Gates start at zero, as in every new network. The first step
      moves the last matrices, and every later step all of the layer.
    - From E experts under a noisy top-k gate to C E: the gate becomes hierarchical. The old gate becomes the primary
      gate, which selects k of E groups. Group i has C copies of the old expert i, and each token activates one of them.
      As only one expert of a group is active, its gate within the group is 1, whichever copy it is.
    - From A groups of B experts under a hierarchical gate with k = 1, for example after an earlier growth: each group
      gets C copies of each of its experts.

    Copy c of the old expert e is the new expert C e + c. Copy 0 is the old one.

    A gate value that is always 1 has no gradient, so grown gates with k = 1 are `straight_through`. Random columns
    u_1 .. u_C decide which copy a token activates. They are normal with std D^-1/2, which gives logits of unit scale, a
    little above the noise. They are added to the gate's columns of the copies. Different tokens then activate different
    copies, even without noise, so that training makes the copies differ. Without these columns, all copies would tie,
    and translation would always use the first. Each group has C columns, the same for all its B old experts j. The
    logit of copy c is x . w_j + x . u_c, so the largest logit belongs to a copy of the expert that was chosen before,
    whatever u is.

    Equal copies give the gate between them no gradient, and they separate slowly. `redraw` is the share of the hidden
    units of each copy but copy 0 that are drawn again (Drop-Upcycling, Nakamura et al. 2025, with 0.5). The function
    then changes. For these units, all weights that lead to and from them are drawn from a normal distribution with the
    mean and the standard deviation of the same matrix of the old expert.

    Old parameters keep their optimiser moments, and so does copy 0. Other copies get the second moments of the old
    expert, but no first moment, which would move all copies in the same direction. Without second moments, they would
    take steps that are far too large: Adam counts steps for all experts together, so it would no longer correct the
    bias of a moment that starts at 0. New parameters have no moments and count their own steps.
    """
    moe = network.config.moe
    if not 0.0 <= redraw <= 1.0:
        raise UserError(f"--redraw {redraw:g}: give a share of the hidden units, from 0 to 1")
    if not moe.num_experts:
        if redraw:
            raise UserError("--redraw: the network has no experts, so there are no copies of which to redraw a part")
        return _first_experts(network, num_experts, seed)
    config = _grown_config(network.config, num_experts)
    # Mix in num_experts: a second growth with the same columns would add them to themselves.
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
    if redraw:
        for weights in layers.values():
            _redraw(weights, config.moe.copies, redraw, generator)
    return network.with_layers(config, layers)


def _first_experts(network: NetworkWeights, num_experts: int, seed: int) -> NetworkWeights:
    old = network.config.moe
    if old.output == "sigmoid":
        raise UserError(
            "--grow: with model.moe.output=sigmoid, new experts would add 1/2 to every number, not 0: "
            "only a network with model.moe.output=none can grow its first experts"
        )
    straight_through = old.k == 1
    moe = replace(
        old, num_experts=num_experts, gating="noisy_top_k", branching=0, straight_through=straight_through, copies=1
    )
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
    """Return the settings after growth. UserError if these experts cannot grow to that number."""
    moe = config.moe
    if not (moe.is_noisy and (moe.k == 1 or not moe.is_hierarchical)):
        k = f" and k={moe.k}" if moe.is_hierarchical else ""
        raise UserError(
            f"--grow: experts under model.moe.gating={moe.gating}{k} cannot grow: the network must have no experts, "
            "gating=noisy_top_k, or gating=hierarchical with k=1"
        )
    counts = {layer: moe.experts_at(layer) for layer in config.moe_layer_names()}
    if len(set(counts.values())) != 1:
        shown = ", ".join(f"{layer} {count}" for layer, count in counts.items())
        raise UserError(f"--grow: all MoE layers must have the same number of experts ({shown or 'there is none'})")
    (before,) = set(counts.values())
    if num_experts % before or num_experts <= before:
        multiples = ", ".join(str(before * factor) for factor in (2, 3, 4))
        raise UserError(f"--grow {num_experts}: {before} experts can grow to {multiples} or another multiple")
    branching, primary_k = (moe.branching, moe.primary_k) if moe.is_hierarchical else (before, moe.k)
    grown = replace(
        moe,
        num_experts=num_experts,
        num_experts_at={},
        gating="hierarchical",
        branching=branching,
        primary_k=primary_k,
        k=1,
        straight_through=True,
        copies=num_experts // before,
    )
    return replace(config, moe=grown)


def _as_groups_of_one(weights: Weights) -> Weights:
    """Return a layer under a flat gate as a layer of groups of one expert: the gate becomes the primary gate."""
    renamed = {
        "gate.w_gate_DE": "gate.primary_w_gate_DA",
        "gate.w_noise_DE": "gate.primary_w_noise_DA",
        "gate.bias_E": "gate.primary_bias_A",
    }
    renamed = {name: primary for name, primary in renamed.items() if name in weights}
    grouped = {renamed.get(name, name): weight for name, weight in weights.items()}
    return grouped | {name: TrainedWeight.new(torch.zeros_like(weights[name].value)) for name in renamed}


def _copied(weights: Weights, u_DAC: Tensor) -> Weights:
    """Return a layer under a hierarchical gate with C copies of each expert. Copy c of (i, j) is (i B + j) C + c."""
    _, groups, copies = u_DAC.shape
    w_gate_DE = weights["gate.w_gate_DE"].value
    num_experts = w_gate_DE.shape[1]
    grown = select_experts(weights, torch.arange(num_experts).repeat_interleave(copies))
    for name, weight in grown.items():
        dim, first_moment = expert_dim(name), weight.moments.get("exp_avg")
        if dim is not None and first_moment is not None:
            by_copy = first_moment.unflatten(dim, (num_experts, copies))  # a view
            by_copy.narrow(dim + 1, 1, copies - 1).zero_()
    column = grown["gate.w_gate_DE"]
    u_DABC = u_DAC[:, :, None].expand(-1, -1, num_experts // groups, -1)
    value = column.value + u_DABC.reshape(column.value.shape).to(column.value.dtype)
    return grown | {"gate.w_gate_DE": column._replace(value=value)}


def _redraw(weights: Weights, copies: int, share: float, generator: torch.Generator) -> None:
    """Draw a share of the hidden units of all copies again, in place, except those of the copies that come first."""
    matrices = [weight.value for name, weight in weights.items() if is_expert(name)]
    for expert in range(len(matrices[0])):
        if expert % copies:
            _redraw_units([w_EIO[expert] for w_EIO in matrices], share, generator)


def _redraw_units(matrices_IO: Sequence[Tensor], share: float, generator: torch.Generator) -> None:
    """Draw a share of the units of each hidden layer of an expert again: columns of one matrix, rows of the next."""
    drawn = []
    for w_IO in matrices_IO:
        new_IO = torch.randn(w_IO.shape, generator=generator)
        drawn.append((new_IO * w_IO.std(correction=0) + w_IO.mean()).to(w_IO.dtype))
    for place, (first_IH, second_HO) in enumerate(pairwise(matrices_IO)):
        size = first_IH.shape[1]
        unit_N = torch.randperm(size, generator=generator)[: round(share * size)]
        first_IH[:, unit_N] = drawn[place][:, unit_N]
        second_HO[unit_N] = drawn[place + 1][unit_N]
