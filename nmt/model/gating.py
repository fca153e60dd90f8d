"""Which experts each token wakes, and the losses that keep them equally busy (S17 = Shazeer et al. 2017).

Pure functions and one small module; everything is computed in float32 whatever the precision around it. A gate's
output is a return value, never state. Further gates return the same `GateOutput`.

Letters: T tokens, D width, E experts, K experts per token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Least standard deviation of the gate noise. The paper has none; without one a gate that learns away its noise makes
# the load estimate 0/0. softplus(x . w_noise) starts at ln 2 = 0.69, far above.
MIN_NOISE_STD = 1.0e-2


class GateOutput(NamedTuple):
    """What a gate decided for T tokens.

    `importance_E` is differentiable through the gates, `load_E` through the noise model in training; outside
    training (no noise) load is the hard count. `count_E` is always the hard count.
    """

    expert_TK: Tensor  # int64, the experts of each token, by falling gate value
    gates_TK: Tensor  # float32, each row sums to 1
    importance_E: Tensor  # float32, sum of gate values (S17 eq. 6)
    load_E: Tensor  # float32, smooth number of tokens (S17 eq. 10)
    count_E: Tensor  # float32, number of tokens


def keep_top_k(noisy_logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """G(x) = softmax(KeepTopK(H(x), k)) (S17 eq. 3 and 5): (gates_TK, expert_TK). The softmax comes after the top-k."""
    top_TK, expert_TK = noisy_logits_TE.topk(k, dim=1)
    return top_TK.softmax(dim=1), expert_TK


def prob_in_top_k(clean_TE: Tensor, noisy_TE: Tensor, noise_std_TE: Tensor, k: int) -> Tensor:
    """P(x, i) = Phi((clean_i - kth_excluding(noisy, k, i)) / std_i) (S17 eq. 8-9), shape (T, E); needs k < E.

    The probability that expert i is among the top k if only its own noise is drawn again. kth_excluding, the k-th
    largest of the others, is the (k+1)-th largest of all for an expert that is in, the k-th for one that is not.
    """
    top_TK1 = noisy_TE.topk(k + 1, dim=1).values
    threshold_if_out_T1, threshold_if_in_T1 = top_TK1[:, k - 1 : k], top_TK1[:, k : k + 1]
    threshold_TE = torch.where(noisy_TE > threshold_if_in_T1, threshold_if_in_T1, threshold_if_out_T1)
    return torch.special.ndtr((clean_TE - threshold_TE) / noise_std_TE)


def count_tokens(expert_TK: Tensor, num_experts: int) -> Tensor:
    """Tokens routed to each expert, float32 (E). Integer sums, so the same in every run; no host synchronisation."""
    count_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_TK.device)
    flat = expert_TK.reshape(-1)
    return count_E.scatter_add_(0, flat, torch.ones_like(flat)).float()


def cv_squared(x_E: Tensor) -> Tensor:
    """CV(x)^2, the squared coefficient of variation (population variance over squared mean; S17 eq. 7)."""
    return x_E.var(correction=0) / (x_E.mean().square() + 1e-10)


def balance_loss(gate: GateOutput, w_importance: float, w_load: float) -> Tensor:
    """w_importance CV(Importance)^2 + w_load CV(Load)^2 (S17 eq. 7 and 11)."""
    return w_importance * cv_squared(gate.importance_E) + w_load * cv_squared(gate.load_E)


class NoisyTopKGate(nn.Module):
    """H(x)_i = (x . w_gate)_i + N(0, 1) softplus((x . w_noise)_i), the top k of it through a softmax (S17 eq. 3-5).

    Noise only in training, fresh for each token and expert. Both weights start at zero, so that all experts start
    equally likely (S17 appendix A); `Seq2Seq` sets them. With k = E every token wakes every expert: then the load is
    the hard count and carries no gradient. Deviation from the paper: the noise never gets smaller than
    MIN_NOISE_STD.
    """

    def __init__(self, hidden_size: int, num_experts: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.w_gate_DE = nn.Parameter(torch.zeros(hidden_size, num_experts))
        self.w_noise_DE = nn.Parameter(torch.zeros(hidden_size, num_experts))

    def forward(self, x_TD: Tensor) -> GateOutput:
        """Choose among E experts for each of T tokens."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.to(self.w_gate_DE.dtype)
            num_experts = self.w_gate_DE.shape[1]
            noisy_TE = clean_TE = x_TD @ self.w_gate_DE
            if self.training:
                noise_std_TE = F.softplus(x_TD @ self.w_noise_DE).clamp_min(MIN_NOISE_STD)
                noisy_TE = clean_TE + torch.randn_like(clean_TE) * noise_std_TE
            gates_TK, expert_TK = keep_top_k(noisy_TE, self.k)
            importance_E = torch.zeros_like(clean_TE[:1]).squeeze(0)
            importance_E = importance_E.scatter_add(0, expert_TK.reshape(-1), gates_TK.reshape(-1))
            load_E = count_E = count_tokens(expert_TK, num_experts)
            if self.training and self.k < num_experts:
                load_E = prob_in_top_k(clean_TE, noisy_TE, noise_std_TE, self.k).sum(0)
            return GateOutput(expert_TK, gates_TK, importance_E, load_E, count_E)
