"""Statistics of how evenly a gate distributes tokens over experts, for training, reports and pruning.

S17 Table 6 has typical values for 256 experts and k = 4. CV(load) is 3.0 and max/mean load 17.8 without balance losses;
they are 0.05 to 0.3 and 1.1 to 1.5 with them.

Letters: T tokens of a micro-batch, E experts, K slots per token.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nmt.config import MoEConfig
from nmt.model.gating import GateOutput, GateSums, cv_squared

# Lower bound of divisors, for sums and means that are 0.
_LEAST = 1e-20


def shares(x_E: Tensor) -> Tensor:
    """Return x_e divided by the sum of x; all 0 if that sum is 0."""
    return x_E / x_E.sum().clamp_min(_LEAST)


def relative_load(count_E: Tensor) -> Tensor:
    """Return each expert's tokens divided by the mean of all experts: 1 is an equal share. All 0 without tokens."""
    return count_E / count_E.mean().clamp_min(_LEAST)


def process_load(count_E: Tensor, processes: int) -> float:
    """Return the tokens of the busiest process over the mean, if `processes` of them hold equal runs of experts.

    At most the largest `relative_load` of an expert. 0 without tokens.
    """
    return float(relative_load(count_E.view(processes, -1).sum(1)).max())


def num_idle(count_E: Tensor) -> int:
    """Return the number of experts without a token."""
    return int((count_E == 0).sum())


def entropy(gates_TK: Tensor) -> Tensor:
    """Return the entropy of each token's gates, in nats, summed over the tokens; at most T log K.

    With -0 log 0 = 0, empty slots and tokens without experts add nothing.
    """
    return torch.special.entr(gates_TK).sum()


class GateFigures(NamedTuple):
    """Statistics of one MoE layer in one line of metrics."""

    cv_importance: float  # of the latest step
    cv_load: float  # of the latest step, S17 eq. 10 and 13
    max_over_mean_load: float  # tokens since the previous line
    gate_entropy: float  # in nats, mean over tokens with experts of the latest micro-batch; at most log k
    idle_experts: int  # experts without a token since the previous line
    importance_loss: float  # w_importance CV(Importance)^2 in the loss of the latest step
    load_loss: float  # w_load CV(Load)^2 in the loss of the latest step
    noise_std: float  # mean over the latest micro-batch (of the primary gate, if there are two)
    tokens_without_experts: float  # share of the latest micro-batch
    batchwise_loss: float  # S17 eq. 20, of the latest micro-batch
    count_E: Tensor  # float64 on the CPU: tokens per expert since the previous line
    importance_E: Tensor  # float64 on the CPU: sum of gate values per expert since the previous line
    processes: int = 1  # that share one copy of the experts

    @property
    def max_over_mean_process(self) -> float:
        """`process_load` since the previous line."""
        return process_load(self.count_E, self.processes)

    def to_dict(self, moe: MoEConfig) -> dict[str, float]:
        """Return the statistics that this kind of gate has, by name; that of processes if several share the experts."""
        figures: dict[str, float] = {
            "cv_importance": self.cv_importance,
            "cv_load": self.cv_load,
            "max_over_mean_load": self.max_over_mean_load,
            "gate_entropy": self.gate_entropy,
            "idle_experts": self.idle_experts,
            "importance_loss": self.importance_loss,
            "load_loss": self.load_loss,
        }
        if moe.is_noisy:
            figures["noise_std"] = self.noise_std
        if self.processes > 1:
            figures["max_over_mean_process"] = self.max_over_mean_process
        if moe.k_is_average:
            figures["tokens_without_experts"] = self.tokens_without_experts
            figures["batchwise_loss"] = self.batchwise_loss
        return figures


class LayerTally:
    """Sums of one MoE layer since the previous line of metrics, on the device."""

    def __init__(self, sums: GateSums, gate: GateOutput) -> None:
        self.sums, self.gate = sums, gate
        self.count_E, self.importance_E = sums.count_E, sums.importance_E

    def add(self, sums: GateSums, gate: GateOutput) -> None:
        """Add a step: the sums of the whole step, and the gate's output for its last micro-batch."""
        self.sums, self.gate = sums, gate
        self.count_E = self.count_E + sums.count_E
        self.importance_E = self.importance_E + sums.importance_E

    @torch.no_grad()
    def measure(self) -> Tensor:
        """Return the input of `read_tally`, float64 (6 + 2 E)."""
        gate = self.gate
        has_expert_T = (gate.expert_TK < self.count_E.numel()).any(1)
        num_with = has_expert_T.sum()
        num_tokens = torch.ones_like(has_expert_T).sum() if gate.real_T is None else gate.real_T.sum()
        figures = (
            cv_squared(self.sums.importance_E),
            cv_squared(self.sums.load()),
            entropy(gate.gates_TK) / num_with.clamp_min(1),
            gate.noise_std,
            (num_tokens - num_with) / num_tokens.clamp_min(1),
            gate.own_loss,
        )
        scalars = torch.stack([figure.double() for figure in figures])
        return torch.cat([scalars, self.count_E.double(), self.importance_E.double()])


def read_tally(values: Tensor, weights: tuple[float, float], processes: int) -> GateFigures:
    """Return the statistics of a layer from the result of `LayerTally.measure`, now on the CPU.

    `weights` is (w_importance, w_load); `processes` share one copy of the experts.
    """
    cv2_importance, cv2_load, mean_entropy, noise_std, without, own_loss = values[:6].tolist()
    count_E, importance_E = values[6:].view(2, -1)
    return GateFigures(
        cv_importance=math.sqrt(cv2_importance),
        cv_load=math.sqrt(cv2_load),
        max_over_mean_load=float(relative_load(count_E).max()),
        gate_entropy=mean_entropy,
        idle_experts=num_idle(count_E),
        importance_loss=weights[0] * cv2_importance,
        load_loss=weights[1] * cv2_load,
        noise_std=noise_std,
        tokens_without_experts=without,
        batchwise_loss=own_loss,
        count_E=count_E,
        importance_E=importance_E,
        processes=processes,
    )


def first_not_finite(gates: dict[str, GateFigures]) -> str | None:
    """Return the first layer, in the order of a pass, whose gates were not finite since the previous line, or None.

    A logit that is NaN or +inf makes the gates of its token NaN, and these make all later layers NaN.
    """
    return next((layer for layer, gate in gates.items() if not gate.importance_E.isfinite().all()), None)
