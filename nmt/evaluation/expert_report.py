"""What the experts of a trained model do: how they share the work, and which domains each prefers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nmt.data.batching import eval_batches
from nmt.data.subwords import Subwords
from nmt.device import autocast
from nmt.model.gating import cv_squared
from nmt.model.seq2seq import Seq2Seq

# An expert "prefers" a domain that it sees this much more often than chance.
_LEAST_LIFT = 1.15
_MAX_DOMAINS = 3


@dataclass(frozen=True)
class ExpertRow:
    """One expert of one layer."""

    expert: int
    share: float
    """Of all (token, choice) pairs of its layer."""
    mean_gate: float
    """Mean gate value when chosen."""
    domains: dict[str, float]
    """Lift of every domain: share of the expert's tokens from it, over the domain's share of all tokens."""


@dataclass(frozen=True)
class LayerReport:
    """One MoE layer over a corpus, without gate noise."""

    layer: str
    k: int
    num_tokens: int
    cv_importance: float
    cv_load: float
    max_over_mean_load: float
    idle_experts: int
    experts: list[ExpertRow]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.layer}: {len(self.experts)} experts, {self.k} per token, {self.num_tokens:,} tokens; "
            f"CV(importance) {self.cv_importance:.2f}, CV(load) {self.cv_load:.2f}, "
            f"max/mean load {self.max_over_mean_load:.2f}, idle {self.idle_experts}",
            f"  {'expert':>6}  {'share':>6}  {'gate':>5}  prefers (times its chance)",
        ]
        for row in self.experts:
            ranked = sorted(row.domains.items(), key=lambda item: -item[1])
            shown = [f"{name} x{lift:.1f}" for name, lift in ranked if lift >= _LEAST_LIFT][:_MAX_DOMAINS]
            lines.append(f"  {row.expert:>6}  {row.share:>6.1%}  {row.mean_gate:>5.2f}  {', '.join(shown) or '-'}")
        return "\n".join(lines)


class _LayerCounts:
    """Sums over batches for one layer."""

    def __init__(self, num_experts: int, num_domains: int) -> None:
        self.importance_E = torch.zeros(num_experts, dtype=torch.float64)
        self.count_EM = torch.zeros(num_experts, num_domains, dtype=torch.float64)  # experts x domains
        self.k = 0

    def add(self, expert_TK: Tensor, gates_TK: Tensor, domain_T: Tensor) -> None:
        self.k = expert_TK.shape[1]
        flat_R, gates_R = expert_TK.flatten().cpu(), gates_TK.flatten().double().cpu()
        self.importance_E.index_add_(0, flat_R, gates_R)
        domain_R = domain_T.repeat_interleave(self.k)
        cell_R = flat_R * self.count_EM.shape[1] + domain_R
        self.count_EM += torch.bincount(cell_R, minlength=self.count_EM.numel()).view_as(self.count_EM)

    def report(self, layer: str, domains: list[str]) -> LayerReport:
        count_E, count_M = self.count_EM.sum(1), self.count_EM.sum(0)
        total = float(count_E.sum())
        lift_EM = (self.count_EM / count_E.clamp_min(1)[:, None]) / (count_M / total)
        rows = [
            ExpertRow(
                expert,
                float(count_E[expert]) / total,
                float(self.importance_E[expert] / count_E[expert].clamp_min(1)),
                {name: float(lift_EM[expert, place]) for place, name in enumerate(domains) if count_M[place]},
            )
            for expert in range(len(count_E))
        ]
        return LayerReport(
            layer=layer,
            k=self.k,
            num_tokens=round(total / self.k),
            cv_importance=float(cv_squared(self.importance_E).sqrt()),
            cv_load=float(cv_squared(count_E).sqrt()),
            max_over_mean_load=float(count_E.max() / count_E.mean()),
            idle_experts=int((count_E == 0).sum()),
            experts=rows,
        )


@torch.inference_mode()
def expert_report(
    model: Seq2Seq,
    subwords: Subwords,
    sources: Sequence[str],
    targets: Sequence[str],
    domains: Sequence[str],
    device: torch.device,
    precision: str,
) -> list[LayerReport]:
    """A report for each MoE layer from one pass over sentence pairs; `domains` labels them, or is empty.

    The model must be in evaluation mode. Every real token counts, end of sentence included. Empty without MoE layers.
    """
    names = sorted(set(domains))
    label = torch.tensor([names.index(domain) for domain in domains] or [0] * len(sources))
    counts: dict[str, _LayerCounts] = {}
    encoded = (subwords.encode_batch(list(sources)), subwords.encode_batch(list(targets)))
    for batch in eval_batches(*encoded, 4096):
        domain_B = label[batch.pairs_B]
        with autocast(device, precision):
            gates = model(batch.to(device)).gates
        for layer, gate in gates.items():
            rows_N = batch.source_rows_N if layer.startswith("encoder") else batch.target_rows_N
            tally = counts.setdefault(layer, _LayerCounts(gate.sums.count_E.numel(), max(len(names), 1)))
            tally.add(gate.expert_TK, gate.gates_TK, domain_B[rows_N % len(domain_B)])
    return [tally.report(layer, names) for layer, tally in counts.items()]
