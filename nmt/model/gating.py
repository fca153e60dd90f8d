"""Which experts each token wakes, and the losses that keep them equally busy (S17 = Shazeer et al. 2017).

Pure functions and one small module for each kind of gate; everything is computed in float32 whatever the precision
around it. What a gate decided is a return value, never state.

Letters: T tokens, D width, E experts, A groups of B experts (hierarchical), P groups per token, K experts per token
(in a group, for the hierarchical gate).
"""

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmt.config import MoEConfig
from nmt.model.rows import put_rows, take_groups, take_rows

# Added to the standard deviation of the gate noise, softplus(x . w_noise), which starts at ln 2 = 0.69. The paper has
# no such floor, its authors' code (tensor2tensor) this one: without any, a gate that learns away its noise makes the
# load estimate 0/0. It is added, since a bound from below would leave no gradient to come back by.
MIN_NOISE_STD = 1.0e-2

# log T_i of the strictly balanced gate is this times its parameter. Adam moves every parameter by about the learning
# rate, and thresholds must follow gates that sharpen by several nats within the first thousand updates.
THRESHOLD_SCALE = 10.0


class GateSums(NamedTuple):
    """What the balance losses see: sums over tokens, so those of several batches or devices may be added up.

    All float32. `importance_E` is differentiable through the gates, `load_E` and `primary_load_A` through the noise
    model in training; outside training, and for gates without noise, load is the hard count.
    """

    importance_E: Tensor  # sum of gate values (S17 eq. 6 and 12)
    load_E: Tensor  # smooth number of tokens (S17 eq. 10); in a hierarchical gate, of those in the expert's group
    count_E: Tensor  # hard number of tokens
    primary_load_A: Tensor | None = None  # smooth number of tokens of each group; hierarchical gates in training
    group_count_A: Tensor | None = None  # hard number of tokens of each group, |X^(i)|

    def load(self) -> Tensor:
        """Load(X) (S17 eq. 10), or Load_H(X)_ij = Load_primary(X)_i Load_i(X^(i))_j / |X^(i)| (eq. 13); shape (E)."""
        if self.primary_load_A is None or self.group_count_A is None:
            return self.load_E
        load_AB = self.load_E.view(self.group_count_A.numel(), -1)
        return (load_AB * (self.primary_load_A / self.group_count_A.clamp_min(1.0))[:, None]).flatten()

    def parts(self) -> list[Tensor]:
        """The sums that are there, in order."""
        return [part for part in self if part is not None]

    def plus(self, other: "GateSums") -> "GateSums":
        """The sums over the tokens of both."""
        return GateSums(*(a + b for a, b in zip(self.parts(), other.parts(), strict=True)))

    def detach(self) -> "GateSums":
        """The same numbers without their graph."""
        return GateSums(*(part.detach() for part in self.parts()))

    def with_gradient_of(self, own: "GateSums") -> "GateSums":
        """The numbers of `self`, the sums over many batches, with the gradient of one of them."""
        return GateSums(*(a + (b - b.detach()) for a, b in zip(self.parts(), own.parts(), strict=True)))


class GateOutput(NamedTuple):
    """What a gate decided for T tokens. A slot is one of the K places a token has for experts."""

    expert_TK: Tensor  # int64, the experts of each token; E in a slot that stays empty
    gates_TK: Tensor  # float32, 0 in an empty slot; a row sums to 1, or to 0 for a token without experts
    num_routed: int | None  # slots that are not empty; None: the host does not know, some tokens being padding
    sums: GateSums
    noise_std: Tensor  # float32 scalar, mean standard deviation of the noise (of the primary gate, if there are two)
    own_loss: Tensor  # float32 scalar, what the gate needs to learn besides balance: L_batchwise, else 0
    real_T: Tensor | None = None  # bool, False for padding, which has empty slots and counts nowhere; None: all real

    def detach(self) -> "GateOutput":
        """The same decision without its graph."""
        return self._replace(
            gates_TK=self.gates_TK.detach(),
            sums=self.sums.detach(),
            noise_std=self.noise_std.detach(),
            own_loss=self.own_loss.detach(),
        )


def keep_top_k(noisy_logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """G(x) = softmax(KeepTopK(H(x), k)) (S17 eq. 3 and 5): (gates_TK, expert_TK). The softmax comes after the top-k."""
    top_TK, expert_TK = noisy_logits_TE.topk(k, dim=-1)
    return top_TK.softmax(dim=-1), expert_TK


def prob_in_top_k(clean_TE: Tensor, noisy_TE: Tensor, noise_std_TE: Tensor, k: int) -> Tensor:
    """P(x, i) = Phi((clean_i - kth_excluding(noisy, k, i)) / std_i) (S17 eq. 8-9), shape (..., T, E).

    The probability that expert i is among the top k if only its own noise is drawn again. kth_excluding, the k-th
    largest of the others, is the (k+1)-th largest of all for an expert that is in, the k-th for one that is not. With
    k = E every expert is in: 1, without a gradient.
    """
    if k == clean_TE.shape[-1]:
        return torch.ones_like(clean_TE)
    top_TK1 = noisy_TE.topk(k + 1, dim=-1).values
    threshold_if_out_T1, threshold_if_in_T1 = top_TK1[..., k - 1 : k], top_TK1[..., k : k + 1]
    threshold_TE = torch.where(noisy_TE > threshold_if_in_T1, threshold_if_in_T1, threshold_if_out_T1)
    return torch.special.ndtr((clean_TE - threshold_TE) / noise_std_TE)


def batchwise_mask(x_TE: Tensor, m: int) -> Tensor:
    """M_batchwise(X, m) (S17 eq. 18), bool: entry (j, i) is set iff X_ji is among the m largest of column i."""
    token_mE = x_TE.T.topk(m, dim=1, sorted=False).indices.T
    return torch.zeros_like(x_TE, dtype=torch.bool).scatter_(0, token_mE, True)


def batchwise_loss(x_TE: Tensor, threshold_E: Tensor, mask_TE: Tensor) -> Tensor:
    """L_batchwise (S17 eq. 20), sum of (M_threshold - M_batchwise)_ji (X_ji - T_i); 0 if the masks agree, else more."""
    difference_TE = x_TE - threshold_E
    return ((difference_TE > 0).to(x_TE.dtype) - mask_TE.to(x_TE.dtype)).mul(difference_TE).sum()


def count_tokens(expert_TK: Tensor, num_experts: int) -> Tensor:
    """Tokens routed to each expert, float32 (E). Integer sums, so the same in every run; no host synchronisation."""
    count_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_TK.device)
    flat = expert_TK.reshape(-1)
    return count_E.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts].float()


def cv_squared(x_E: Tensor) -> Tensor:
    """CV(x)^2, the squared coefficient of variation (population variance over squared mean; S17 eq. 7)."""
    return x_E.var(correction=0) / (x_E.mean().square() + 1e-10)


def balance_loss(sums: GateSums, w_importance: float, w_load: float) -> Tensor:
    """w_importance CV(Importance)^2 + w_load CV(Load)^2 (S17 eq. 7 and 11).

    The paper does not say what these stand beside: here the sums are those of all micro-batches and devices of an
    update, the token loss is its mean over target tokens, and the losses of all MoE layers are added (nmt/training/).
    """
    return w_importance * cv_squared(sums.importance_E) + w_load * cv_squared(sums.load())


def _sum_over_tokens(values: Tensor, real_T: Tensor | None) -> Tensor:
    """The sum of (T, ...) over the tokens that are real; None: all are."""
    return (values if real_T is None else _where_real(values, real_T)).sum(0)


def _where_real(values: Tensor, real_T: Tensor) -> Tensor:
    """(T, ...) with 0 for tokens that are padding."""
    return values.masked_fill(~real_T.view(-1, *[1] * (values.dim() - 1)), 0)


def _sum_by_expert(values_TK: Tensor, index_TK: Tensor, num_experts: int) -> Tensor:
    # Spread out and summed, rather than added up in place, which a GPU does in another order every time.
    spread_TE = values_TK.new_zeros(values_TK.shape[0], num_experts, *values_TK.shape[2:])
    return spread_TE.scatter(1, index_TK, values_TK).sum(0)


def _noise_std(x_TD: Tensor, w_noise_DE: Tensor) -> Tensor:
    return F.softplus(x_TD @ w_noise_DE) + MIN_NOISE_STD


def _full_slots(
    expert_TK: Tensor,
    gates_TK: Tensor,
    num_experts: int,
    load_E: Tensor | None,
    noise_std_TX: Tensor | None,
    real_T: Tensor | None,
) -> GateOutput:
    """The decision of a gate that fills all K slots of every token, but leaves those of padding empty."""
    num_routed: int | None = expert_TK.numel()
    zero = noise_std = gates_TK.new_zeros(())
    if real_T is not None:
        num_routed, gates_TK = None, _where_real(gates_TK, real_T)
    importance_E = _sum_by_expert(gates_TK, expert_TK, num_experts)
    if real_T is not None:
        expert_TK = expert_TK.masked_fill(~real_T[:, None], num_experts)
    if noise_std_TX is not None and real_T is None:
        noise_std = noise_std_TX.mean()
    elif noise_std_TX is not None and real_T is not None:
        noise_std = _where_real(noise_std_TX, real_T).sum() / (real_T.sum() * noise_std_TX.shape[1])
    count_E = count_tokens(expert_TK, num_experts)
    sums = GateSums(importance_E, count_E if load_E is None else load_E, count_E)
    return GateOutput(expert_TK, gates_TK, num_routed, sums, noise_std, zero, real_T)


class Gate(nn.Module):
    """What all gates share: the matrix w_gate_DE, and the number k of experts that a token wakes.

    Outside training a pass may ask for another number, `experts_per_token`; 0 means as many as in training.
    """

    noisy: ClassVar[bool] = False
    """Whether noise breaks ties in training, so that all experts may start equally likely."""

    def __init__(self, hidden_size: int, num_experts: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.num_experts = num_experts
        self.w_gate_DE = nn.Parameter(torch.zeros(hidden_size, num_experts))

    def check_experts_per_token(self, count: int) -> None:
        """ValueError if no pass can wake `count` experts for each token; 0 is always possible."""
        if not 0 <= count <= self.num_experts:
            raise ValueError(f"decoding.experts_per_token={count} must lie in 1..{self.num_experts}, or be 0")

    def forward(self, x_TD: Tensor, experts_per_token: int = 0, real_T: Tensor | None = None) -> GateOutput:
        """Choose among E experts for each of T tokens. In training `experts_per_token` has no effect.

        `real_T` (bool) says which tokens are no padding (None: all). The others get empty slots and count nowhere.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            return self.choose(x_TD.to(self.w_gate_DE.dtype), 0 if self.training else experts_per_token, real_T)

    def choose(self, x_TD: Tensor, experts_per_token: int, real_T: Tensor | None) -> GateOutput:
        """`forward` in the precision of the gate's weights."""
        raise NotImplementedError


class NoisyTopKGate(Gate):
    """H(x)_i = (x . w_gate)_i + N(0, 1) softplus((x . w_noise)_i), the top k of it through a softmax (S17 eq. 3-5).

    Noise only in training, fresh for each token and expert. Both weights start at zero, so that all experts start
    equally likely (S17 appendix A); `init_parameters` sets them. With k = E every token wakes every expert: then the
    load is the hard count and carries no gradient. Deviation from the paper: the standard deviation of the noise is
    larger by MIN_NOISE_STD, as in its authors' code.
    """

    noisy = True

    def __init__(self, hidden_size: int, num_experts: int, k: int) -> None:
        super().__init__(hidden_size, num_experts, k)
        self.w_noise_DE = nn.Parameter(torch.zeros(hidden_size, num_experts))

    def choose(self, x_TD: Tensor, experts_per_token: int, real_T: Tensor | None) -> GateOutput:
        clean_TE = x_TD @ self.w_gate_DE
        if not self.training:
            gates_TK, expert_TK = keep_top_k(clean_TE, experts_per_token or self.k)
            return _full_slots(expert_TK, gates_TK, self.num_experts, None, None, real_T)
        noise_std_TE = _noise_std(x_TD, self.w_noise_DE)
        noisy_TE = clean_TE + torch.randn_like(clean_TE) * noise_std_TE
        gates_TK, expert_TK = keep_top_k(noisy_TE, self.k)
        load_E = _sum_over_tokens(prob_in_top_k(clean_TE, noisy_TE, noise_std_TE, self.k), real_T)
        return _full_slots(expert_TK, gates_TK, self.num_experts, load_E, noise_std_TE, real_T)


class SoftmaxTopKGate(Gate):
    """softmax over the top k of x . w_gate: S17 eq. 2 with the mask of eq. 16-17, which is eq. 3 without noise.

    Load is the hard count, so only the importance loss can balance it. Nothing breaks ties between experts that start
    alike: w_gate starts random instead of zero.
    """

    def choose(self, x_TD: Tensor, experts_per_token: int, real_T: Tensor | None) -> GateOutput:
        gates_TK, expert_TK = keep_top_k(x_TD @ self.w_gate_DE, experts_per_token or self.k)
        return _full_slots(expert_TK, gates_TK, self.num_experts, None, None, real_T)


class HierarchicalGate(Gate):
    """Two levels of noisy top-k gates (S17 appendix B, eq. 12-14): y = sum_ij G_primary(x)_i G_i(x)_j E_ij(x).

    A primary gate wakes P of A groups; the gate of each of these wakes K of the group's B experts. Expert j of group i
    has index i B + j. Importance_H and Load_H: `GateSums`. The logits of all groups are computed in one product and
    those of the chosen groups taken from it: on today's devices that is quicker than sorting tokens by group, though
    not fewer operations (`nmt cost` counts the chosen groups, as the paper does).
    """

    noisy = True

    def __init__(self, hidden_size: int, num_experts: int, branching: int, primary_k: int, k: int) -> None:
        super().__init__(hidden_size, num_experts, k)
        self.branching, self.primary_k = branching, primary_k
        self.w_noise_DE = nn.Parameter(torch.zeros(hidden_size, num_experts))
        self.primary_w_gate_DA = nn.Parameter(torch.zeros(hidden_size, branching))
        self.primary_w_noise_DA = nn.Parameter(torch.zeros(hidden_size, branching))

    def check_experts_per_token(self, count: int) -> None:
        """ValueError unless `count` can be shared out as `levels` does."""
        super().check_experts_per_token(count)
        groups, experts = self.levels(count)
        if count and (count % groups or experts > self.num_experts // self.branching):
            raise ValueError(
                f"decoding.experts_per_token={count} must be at most {self.primary_k}, or {self.primary_k} times 1.."
                f"{self.num_experts // self.branching}: each token wakes {self.primary_k} groups"
            )

    def levels(self, count: int) -> tuple[int, int]:
        """(groups, experts in each) that a token wakes: as many groups as in training if `count` allows it."""
        groups = min(count, self.primary_k) if count else self.primary_k
        return groups, count // groups if count else self.k

    def choose(self, x_TD: Tensor, experts_per_token: int, real_T: Tensor | None) -> GateOutput:
        primary_k, k = self.levels(experts_per_token)
        clean_TA = noisy_TA = x_TD @ self.primary_w_gate_DA
        if self.training:
            std_TA = _noise_std(x_TD, self.primary_w_noise_DA)
            noisy_TA = clean_TA + torch.randn_like(clean_TA) * std_TA
        primary_TP, group_TP = keep_top_k(noisy_TA, primary_k)
        clean_TPB = noisy_TPB = self._of_groups(x_TD @ self.w_gate_DE, group_TP)
        if self.training:
            std_TPB = self._of_groups(_noise_std(x_TD, self.w_noise_DE), group_TP)
            noisy_TPB = clean_TPB + torch.randn_like(clean_TPB) * std_TPB
        secondary_TPK, local_TPK = keep_top_k(noisy_TPB, k)
        gates_TPK = primary_TP[:, :, None] * secondary_TPK
        expert_TPK = group_TP[:, :, None] * clean_TPB.shape[2] + local_TPK
        load_E = std = None
        if self.training:
            std = std_TA
            prob_TPB = prob_in_top_k(clean_TPB, noisy_TPB, std_TPB, k)
            load_E = self._by_expert(prob_TPB if real_T is None else _where_real(prob_TPB, real_T), group_TP)
        gate = _full_slots(expert_TPK.flatten(1), gates_TPK.flatten(1), self.num_experts, load_E, std, real_T)
        if not self.training:
            return gate
        primary_load_A = _sum_over_tokens(prob_in_top_k(clean_TA, noisy_TA, std_TA, primary_k), real_T)
        if real_T is not None:
            group_TP = group_TP.masked_fill(~real_T[:, None], self.branching)
        sums = gate.sums._replace(primary_load_A=primary_load_A, group_count_A=count_tokens(group_TP, self.branching))
        return gate._replace(sums=sums)

    def _of_groups(self, values_TE: Tensor, group_TP: Tensor) -> Tensor:
        values_TAB = values_TE.view(len(values_TE), self.branching, self.num_experts // self.branching)
        return take_groups(values_TAB, group_TP)

    def _by_expert(self, values_TPB: Tensor, group_TP: Tensor) -> Tensor:
        return _sum_by_expert(values_TPB, group_TP[:, :, None].expand_as(values_TPB), self.branching).flatten()


class StrictlyBalancedGate(Gate):
    """Every expert gets equally many tokens of each training batch (S17 appendix F, eq. 15-20). No noise.

    G(x)_i = softmax(x . w_gate)_i M_i / sum_j softmax(x . w_gate)_j M_j, with M = M_batchwise in training: each expert
    takes the m = k T / E tokens (rounded, at least 1) that want it most, so a token has k experts on average, and
    possibly none: then its gates are all 0 and the layer gives it nothing. Elsewhere M_i = 1 iff softmax_i > T_i, with
    thresholds learned by L_batchwise; where `decoding.experts_per_token` is given, M = TopK (eq. 17).

    Choices where the paper is silent: m and M are taken over the tokens of one device's micro-batch; L_batchwise is
    divided by their number, acts on logarithms of X and T (masks are the same, and steps of T are relative), and gives
    its gradient to T alone; Load is the hard count, which is constant, so that of the two balance losses only that of
    importance acts. There is one level: how the mask goes with two is not said. In the decoder the mask of training
    looks at later target tokens, which decoding cannot; noisy top-k has no such leak. w_gate starts random, since equal
    logits would give all experts the same tokens.
    """

    def __init__(self, hidden_size: int, num_experts: int, k: int) -> None:
        super().__init__(hidden_size, num_experts, k)
        self.threshold_E = nn.Parameter(torch.zeros(num_experts))

    def choose(self, x_TD: Tensor, experts_per_token: int, real_T: Tensor | None) -> GateOutput:
        if real_T is not None:
            # m and the thresholds' loss hang on the number of real tokens, and the device is asked below in any case.
            index_N = real_T.nonzero().flatten()
            gate = self.choose(take_rows(x_TD, index_N), experts_per_token, None)
            empty_TK = gate.expert_TK.new_full((len(x_TD), gate.expert_TK.shape[1]), self.num_experts)
            expert_TK = empty_TK.index_copy(0, index_N, gate.expert_TK)
            gates_TK = put_rows(gate.gates_TK, index_N, len(x_TD))
            return gate._replace(expert_TK=expert_TK, gates_TK=gates_TK, real_T=real_T)
        log_TE = (x_TD @ self.w_gate_DE).log_softmax(1)
        own_loss = log_TE.new_zeros(())
        log_threshold_E = THRESHOLD_SCALE * self.threshold_E
        if self.training:
            num_tokens = len(log_TE)
            m = min(num_tokens, max(1, round(self.k * num_tokens / self.num_experts)))
            mask_TE = batchwise_mask(log_TE.detach(), m)
            own_loss = batchwise_loss(log_TE.detach(), log_threshold_E, mask_TE) / max(num_tokens, 1)
        elif experts_per_token:
            mask_TE = torch.zeros_like(log_TE, dtype=torch.bool)
            mask_TE = mask_TE.scatter_(1, log_TE.topk(experts_per_token, dim=1).indices, True)
        else:
            mask_TE = log_TE > log_threshold_E
        count_T = mask_TE.sum(1)
        # Eq. 16 is a softmax over the kept logarithms, which no underflow makes 0/0. A token without experts keeps all
        # of them for it, and none of the result.
        kept_TE = mask_TE | (count_T == 0)[:, None]
        gates_TE = log_TE.masked_fill(~kept_TE, -math.inf).softmax(1) * mask_TE
        # The one gate that must ask the device: how many slots a token needs.
        num_slots, num_routed = torch.stack([count_T.max(), count_T.sum()]).tolist() if len(count_T) else (0, 0)
        expert_TK = (mask_TE + gates_TE.detach()).topk(max(num_slots, 1), dim=1).indices
        empty_TK = ~mask_TE.gather(1, expert_TK)
        gates_TK = take_groups(gates_TE[:, :, None], expert_TK)[:, :, 0]
        count_E = mask_TE.sum(0).float()
        sums = GateSums(gates_TE.sum(0), count_E, count_E)
        expert_TK = expert_TK.masked_fill(empty_TK, self.num_experts)
        return GateOutput(expert_TK, gates_TK, num_routed, sums, log_TE.new_zeros(()), own_loss)


def make_gate(hidden_size: int, num_experts: int, config: MoEConfig) -> Gate:
    """The gate that `config.gating` names."""
    match config.gating:
        case "noisy_top_k":
            return NoisyTopKGate(hidden_size, num_experts, config.k)
        case "softmax_top_k":
            return SoftmaxTopKGate(hidden_size, num_experts, config.k)
        case "hierarchical":
            return HierarchicalGate(hidden_size, num_experts, config.branching, config.primary_k, config.k)
        case "strictly_balanced":
            return StrictlyBalancedGate(hidden_size, num_experts, config.k)
    raise ValueError(f"model.moe.gating={config.gating} is unknown")
