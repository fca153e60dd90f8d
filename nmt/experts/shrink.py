"""Remove experts from a trained network: prune the least useful ones, or merge pairs of similar ones.

Letters: D width, E experts, H hidden units, I and O inputs and outputs of one layer of an expert.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nmt.config import MoEConfig
from nmt.errors import UserError
from nmt.experts.observe import ExpertUse
from nmt.experts.surgery import NetworkWeights, Weights, select_experts, with_counts
from nmt.model.gate_statistics import relative_load
from nmt.model.names import expert_dim, is_expert
from nmt.training.optim import COLUMN, ROW
from nmt.wording import counted

IDLE_SHARE = 0.05
"""An expert is idle if its load is less than this share of the mean load."""


class MergePair(NamedTuple):
    """Two experts to merge; the merged expert replaces `first`."""

    first: int
    second: int
    similarity: float
    share: float  # weight of `first` in the average


# ------------------------------------------------------------------------------------------------------ pruning


def least_useful(moe: MoEConfig, layer: str, use: ExpertUse, count: int) -> list[int]:
    """Return the `count` experts of a layer with the least output mass, the same number from each group."""
    groups = moe.groups_at(layer)
    each = per_group(f"--prune {count}", moe, layer, count)
    return sorted(expert for group in groups for expert in _least(use, group)[:each])


def idle(moe: MoEConfig, layer: str, use: ExpertUse) -> list[int]:
    """Return the experts with less than IDLE_SHARE of the mean load.

    Each group gives the same number of experts: as many as the group with the fewest idle ones.
    """
    load_E = relative_load(use.load_E)
    idle_by_group = [
        [expert for expert in _least(use, group) if load_E[expert] < IDLE_SHARE] for group in moe.groups_at(layer)
    ]
    each = min(map(len, idle_by_group))
    per_group("--prune idle", moe, layer, each * len(idle_by_group))
    return sorted(expert for group in idle_by_group for expert in group[:each])


def prune(network: NetworkWeights, removed: dict[str, list[int]]) -> NetworkWeights:
    """Return `network` without these experts. The other experts and their columns of the gates do not change.

    With gates that choose the top k, translation changes only where a token chose a removed expert: the next best
    replaces it. The softmax of a strictly balanced gate has fewer experts afterwards, so more of the others pass their
    thresholds until training has adapted these.
    """
    layers = {}
    counts = {}
    for layer, gone in removed.items():
        kept = [expert for expert in range(network.config.moe.experts_at(layer)) if expert not in set(gone)]
        layers[layer], counts[layer] = select_experts(network.layer(layer), torch.tensor(kept)), len(kept)
    return network.with_layers(with_counts(network.config, counts), layers)


def per_group(option: str, moe: MoEConfig, layer: str, count: int, merging: bool = False) -> int:
    """Return how many experts to take from each group of a layer, for `count` in total.

    UserError if `count` is not a multiple of the groups, if fewer than k experts would be left per group or, when
    `merging`, if there are too few experts for that many pairs.
    """
    groups = moe.groups_at(layer)
    size, grouped = len(groups[0]), len(groups) > 1
    each, rest = divmod(count, len(groups))
    if rest:
        raise UserError(
            f"{option}: the groups of a hierarchical gate must stay equally large, so N must be a multiple of "
            f"model.moe.branching={moe.branching}"
        )
    of_group = " of each group" if grouped else ""
    if size - each < moe.k:
        raise UserError(
            f"{option} would leave {max(size - each, 0)} of {size} experts{of_group} in {layer}, "
            f"but each token needs model.moe.k={moe.k}"
        )
    if merging and 2 * each > size:
        raise UserError(
            f"{option}: an expert is merged at most once, so the {size} experts{of_group} in {layer} make at most "
            f"{counted(size // 2 * len(groups), 'pair')}"
        )
    return each


def _least(use: ExpertUse, experts: Iterable[int]) -> list[int]:
    """Sort `experts` by output mass, the least first. Among equals, fewer tokens, then the higher number come first."""
    return sorted(experts, key=lambda expert: (float(use.output_E[expert]), float(use.load_E[expert]), -expert))


# ------------------------------------------------------------------------------------------------------ merging


def redundant_pairs(moe: MoEConfig, layer: str, use: ExpertUse, similarity_EE: Tensor, count: int) -> list[MergePair]:
    """Return the `count` pairs of a layer's experts that lose least by merging, the same number in each group.

    The loss of a pair is m_i m_j / (m_i + m_j) (1 - cos_ij), where m is the output mass (Ward's criterion for joining
    clusters). It is 0 for two equal experts, or if one adds nothing, and largest for busy experts that differ. By the
    cosine alone, the first pair to merge in the demo's decoder was the worst of all 28 (perplexity 1.04 -> 1.63). By
    this loss, it is the best (1.09). No expert is in two pairs, because the similarity of a merged expert is unknown
    before it is merged.
    """
    mass_E = use.output_E
    joint_EE = torch.outer(mass_E, mass_E) / (mass_E[:, None] + mass_E).clamp_min(torch.finfo(mass_E.dtype).tiny)
    loss_EE = joint_EE * (1.0 - similarity_EE).clamp_min(0.0)
    each = per_group(f"--merge {count}", moe, layer, count, merging=True)
    pairs = []
    for group in moe.groups_at(layer):
        free = set(group)
        ranked = sorted(
            ((first, second) for first in group for second in group if first < second),
            key=lambda pair: (float(loss_EE[pair]), -float(similarity_EE[pair])),
        )
        for first, second in ranked:
            if len(group) - len(free) < 2 * each and {first, second} <= free:
                free -= {first, second}
                gates = float(use.gate_E[first]), float(use.gate_E[second])
                share = gates[0] / sum(gates) if sum(gates) else 0.5
                pairs.append(MergePair(first, second, float(similarity_EE[first, second]), share))
    return pairs


def merge(network: NetworkWeights, pairs: dict[str, list[MergePair]]) -> NetworkWeights:
    """Return `network` with each pair of experts merged into the average of both, weighted by their gate mass.

    First, the hidden units of the second expert are put into the order of the most similar units of the first. An
    expert's function does not depend on that order. So an expert merged with a copy of itself, in whatever order, keeps
    exactly its function. The columns of the gate, the thresholds and the optimiser moments are averaged in the same
    way. The merged expert replaces the first.

    Even merging exact copies changes the layer for tokens that chose both: they now choose the merged expert once, and
    the next best expert as well.
    """
    layers = {}
    counts = {}
    for layer, merged in pairs.items():
        weights = {name: weight.changed(torch.clone) for name, weight in network.layer(layer).items()}
        for pair in merged:
            _merge_in_place(weights, pair)
        gone = {pair.second for pair in merged}
        kept = [expert for expert in range(network.config.moe.experts_at(layer)) if expert not in gone]
        layers[layer], counts[layer] = select_experts(weights, torch.tensor(kept)), len(kept)
    return network.with_layers(with_counts(network.config, counts), layers)


def _merge_in_place(weights: Weights, pair: MergePair) -> None:
    """Replace the first expert by the average of both. The second does not change."""
    names = list(filter(is_expert, weights))
    matrices = [[weights[name].value[expert] for name in names] for expert in pair[:2]]
    all_D = torch.arange(matrices[0][0].shape[0])
    order = [all_D, *aligned_units(*matrices), all_D]
    for name, weight in weights.items():
        for kind, tensor in {"value": weight.value, **weight.moments}.items():
            if is_expert(name):
                place = names.index(name)
                second = _reordered(tensor[pair.second], kind, order[place], order[place + 1])
                tensor[pair.first] = second.lerp(tensor[pair.first], pair.share)
            elif expert_dim(name) is not None:
                tensor[..., pair.first] = tensor[..., pair.second].lerp(tensor[..., pair.first], pair.share)


def _reordered(tensor: Tensor, kind: str, order_I: Tensor, order_O: Tensor) -> Tensor:
    """Return an expert's matrix, or one of its moments, with inputs and outputs in another order."""
    if kind == ROW:
        return tensor[order_I]
    if kind == COLUMN:
        return tensor[order_O]
    return tensor[order_I][:, order_O]


def aligned_units(first_IO: Sequence[Tensor], second_IO: Sequence[Tensor]) -> list[Tensor]:
    """Return, for each hidden layer, the unit of the second expert that matches each unit of the first.

    Arguments are the matrices of each expert, from its input to its output. Units are matched greedily by the cosine of
    their weights, each unit once. The weights of a unit are its incoming ones and, in the last hidden layer, its
    outgoing ones. In lower layers, outgoing weights lead to units that are not matched yet.
    """
    orders = [torch.arange(first_IO[0].shape[0])]
    for place in range(len(first_IO) - 1):
        units_of_first_HX = first_IO[place].T
        units_of_second_HX = second_IO[place][orders[-1]].T
        if place == len(first_IO) - 2:
            units_of_first_HX = torch.cat([units_of_first_HX, first_IO[-1]], dim=1)
            units_of_second_HX = torch.cat([units_of_second_HX, second_IO[-1]], dim=1)
        orders.append(greedy_matching(F.normalize(units_of_first_HX) @ F.normalize(units_of_second_HX).T))
    return orders[1:]


def greedy_matching(similarity_HH: Tensor) -> Tensor:
    """Return the column of each row under greedy matching.

    Greedy matching takes the largest entry first, then the largest in the remaining rows and columns, and so on. Here
    all rows and columns that are each other's best are taken at once: no larger entry can separate them.
    """
    left_HH = similarity_HH.clone()
    row_H = torch.arange(len(left_HH))
    column_H = torch.full_like(row_H, -1)
    while (column_H < 0).any():
        best_H = left_HH.argmax(1)
        mutual = row_H[(left_HH.argmax(0)[best_H] == row_H) & (column_H < 0)]
        column_H[mutual] = best_H[mutual]
        left_HH[mutual] = -torch.inf
        left_HH[:, best_H[mutual]] = -torch.inf
    return column_H
