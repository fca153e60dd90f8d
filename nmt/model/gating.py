"""Gates, which select the experts of each token, and the losses that balance their load (S17 = Shazeer et al. 2017).

The file has pure functions, and one small module per kind of gate. Gates compute in float32 whatever the precision of
other layers. The decisions of a gate are return values, never state.

Letters: T tokens, D width, E experts, A groups of B experts (hierarchical), P groups per token, K experts per token
(per group, for the hierarchical gate).
"""

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmt.config import MoEConfig
from nmt.model.kernels.experts import group_rows
from nmt.model.kernels.gate import (
    AS_IN_S17,
    MIN_NOISE_STD,
    Choice,
    Rule,
    count_tokens,
    keep_top_k,
    mark_padding,
    noisy_top_k,
    prob_in_top_k,
    top_k_gate,
    where_real,
)
from nmt.model.routes import grouped_product, sort_rows
from nmt.model.rows import put_rows, sum_by_group, take_groups, take_rows

# log T_i of the strictly balanced gate is its parameter times this. Adam moves every parameter by about the learning
# rate per step, and thresholds must follow gates that sharpen by several nats within the first thousand steps.
THRESHOLD_SCALE = 10.0


class GateSums(NamedTuple):
    """Input of the balance losses: sums over tokens, which can be added up over batches and devices.

    All are float32. `importance_E` is differentiable through the gates. In training, `load_E` and `primary_load_A` are
    differentiable through the noise model. Outside training, and for gates without noise, the load is the count.
    """

    importance_E: Tensor  # sum of gate values (S17 eq. 6 and 12)
    load_E: Tensor  # smooth count of tokens (S17 eq. 10); for a hierarchical gate, of those in the expert's group
    count_E: Tensor  # count of tokens
    primary_load_A: Tensor | None = None  # smooth count of tokens per group; hierarchical gates in training
    group_count_A: Tensor | None = None  # count of tokens per group, |X^(i)|

    def load(self) -> Tensor:
        """Return Load(X) (S17 eq. 10), or Load_H(X)_ij = Load_primary(X)_i Load_i(X^(i))_j / |X^(i)| (eq. 13), (E)."""
        if self.primary_load_A is None or self.group_count_A is None:
            return self.load_E
        load_AB = self.load_E.view(self.group_count_A.numel(), -1)
        return (load_AB * (self.primary_load_A / self.group_count_A.clamp_min(1.0))[:, None]).flatten()

    def parts(self) -> list[Tensor]:
        """Return the sums that are not None, in order."""
        return [part for part in self if part is not None]

    def plus(self, other: "GateSums") -> "GateSums":
        """Return the sums over the tokens of both."""
        return GateSums(*(a + b for a, b in zip(self.parts(), other.parts(), strict=True)))

    def detach(self) -> "GateSums":
        """Return the same numbers without their graph."""
        return GateSums(*(part.detach() for part in self.parts()))

    def with_gradient_of(self, own: "GateSums") -> "GateSums":
        """Return the values of `self`, sums over many batches, with the gradient of `own`, those of one batch."""
        return GateSums(*(a + (b - b.detach()) for a, b in zip(self.parts(), own.parts(), strict=True)))


class GateOutput(NamedTuple):
    """Decisions of a gate for T tokens. Each token has K slots; a slot holds one expert or is empty."""

    expert_TK: Tensor  # int64, the experts of each token; E in an empty slot
    gates_TK: Tensor  # float32, 0 in an empty slot; a row sums to 1, or to 0 for a token without experts
    num_routed: int | None  # number of full slots; None: unknown on the host, because some tokens are padding
    sums: GateSums
    noise_std: Tensor  # float32 scalar, mean standard deviation of the noise (of the primary gate, if there are two)
    own_loss: Tensor  # float32 scalar, the gate's loss besides the balance losses: L_batchwise, else 0
    real_T: Tensor | None = None  # bool, False for padding: its slots are empty, no sum counts it; None: all are real

    def with_second_pass(self, other: "GateOutput") -> "GateOutput":
        """Return these decisions with the sums of both of two passes over the same tokens, and the mean `own_loss`.

        Balance losses thus see both passes as one batch. Other losses keep the scale of one pass.
        """
        own_loss = (self.own_loss + other.own_loss) / 2
        return self._replace(sums=self.sums.plus(other.sums), own_loss=own_loss)

    def detach(self) -> "GateOutput":
        """Return the same decisions without their graph."""
        return self._replace(
            gates_TK=self.gates_TK.detach(),
            sums=self.sums.detach(),
            noise_std=self.noise_std.detach(),
            own_loss=self.own_loss.detach(),
        )


def batchwise_mask(x_TE: Tensor, m: int) -> Tensor:
    """Return M_batchwise(X, m) (S17 eq. 18), bool: entry (j, i) is True iff X_ji is among the m largest of column i."""
    token_mE = x_TE.T.topk(m, dim=1, sorted=False).indices.T
    return torch.zeros_like(x_TE, dtype=torch.bool).scatter_(0, token_mE, True)


def batchwise_loss(x_TE: Tensor, threshold_E: Tensor, mask_TE: Tensor) -> Tensor:
    """Return L_batchwise = sum of (M_threshold - M_batchwise)_ji (X_ji - T_i) (S17 eq. 20); 0 if the masks agree."""
    difference_TE = x_TE - threshold_E
    return ((difference_TE > 0).to(x_TE.dtype) - mask_TE.to(x_TE.dtype)).mul(difference_TE).sum()


def cv_squared(x_E: Tensor) -> Tensor:
    """Return CV(x)^2, the squared coefficient of variation (population variance over squared mean; S17 eq. 7)."""
    return x_E.var(correction=0) / (x_E.mean().square() + 1e-10)


def balance_loss(sums: GateSums, w_importance: float, w_load: float) -> Tensor:
    """Return w_importance CV(Importance)^2 + w_load CV(Load)^2 (S17 eq. 7 and 11).

    The paper does not define the scale of the token loss to which this is added. Here, the token loss is the mean over
    target tokens. `sums` are those of all micro-batches and devices of a step. The losses of all MoE layers are added
    up (nmt/training/).
    """
    return w_importance * cv_squared(sums.importance_E) + w_load * cv_squared(sums.load())


def _with_noise(
    x_TD: Tensor, w_gate_DE: Tensor, w_noise_DE: Tensor, k: int, real_T: Tensor | None, rule: Rule = AS_IN_S17
) -> Choice:
    """Return the decisions of softmax(KeepTopK(x . w_gate + noise, k)) with noise drawn for each token and expert."""
    # One product, whose result is read once.
    logits_T2E = x_TD @ torch.cat([w_gate_DE, w_noise_DE], 1)
    noise_TE = torch.randn_like(logits_T2E[:, : w_gate_DE.shape[1]])
    return noisy_top_k(logits_T2E, noise_TE, k, real_T, rule)


def _without_noise(logits_TE: Tensor, k: int, real_T: Tensor | None, rule: Rule = AS_IN_S17) -> Choice:
    """Return the decisions of softmax(KeepTopK(logits, k)); the load is the count."""
    gates_TK, expert_TK, importance_E, count_E = top_k_gate(logits_TE, k, real_T, rule)
    return Choice(gates_TK, expert_TK, importance_E, count_E, count_E, logits_TE.new_zeros(()))


def _full_slots(choice: Choice, real_T: Tensor | None) -> GateOutput:
    """Return the decisions of a gate that fills all K slots of every real token and none of padding."""
    gates_TK, expert_TK, importance_E, load_E, count_E, noise_std = choice
    num_routed = expert_TK.numel() if real_T is None else None
    sums = GateSums(importance_E, load_E, count_E)
    return GateOutput(expert_TK, gates_TK, num_routed, sums, noise_std, gates_TK.new_zeros(()), real_T)


def _bias(size: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size), requires_grad=False)


def _move(bias_X: Tensor, count_X: Tensor, rate: float | Tensor) -> None:
    """Move biases against the counts in the last dimension, in place. Counts equal to their mean move nothing."""
    # Sums of counts are exact in float64, so that all processes get the same signs.
    count_X = count_X.double()
    direction_X = (count_X.mean(-1, keepdim=True) - count_X).sign()
    bias_X.add_(direction_X.to(bias_X.dtype).view_as(bias_X) * rate)


class Gate(nn.Module):
    """Base of all gates: the matrix w_gate_DE, and the number k of active experts per token.

    Outside training, a pass may set another number, `experts_per_token`; 0 means as many as in training.

    Two deviations from the paper are for gates that choose the top k. `straight_through` gives gates with k = 1 a
    gradient (`straight_through_factor`). With `biased`, `bias_E` is added to the logits by which experts are chosen.
    `move_biases` changes it after each step; it has no gradient. Both are off unless `make_gate` sets them.
    """

    noisy: ClassVar[bool] = False
    """True if noise breaks ties in training, so that all experts can start equally likely."""

    def __init__(self, hidden_size: int, num_experts: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.num_experts = num_experts
        self.w_gate_DE = nn.Parameter(torch.zeros(hidden_size, num_experts))
        self.straight_through = False
        self.bias_E: nn.Parameter | None = None

    def add_biases(self) -> None:
        """Create the biases, which are 0."""
        self.bias_E = _bias(self.num_experts)

    @torch.no_grad()
    def move_biases(self, sums: GateSums, rate: float | Tensor) -> None:
        """Move each bias by `rate` towards an equal number of tokens: b_e += rate sign(mean count - count_e).

        Wang et al. 2024, algorithm 1. `sums` are those of all tokens of a step. Biases change in place, and the host
        does not wait.
        """
        assert self.bias_E is not None, "for gates with biases"
        _move(self.bias_E, sums.count_E, rate)

    def rule(self) -> Rule:
        """Return how experts are chosen and weighed."""
        return Rule(self.bias_E, self.straight_through and self.training)

    def check_experts_per_token(self, count: int) -> None:
        """Raise ValueError if a pass cannot activate `count` experts per token; 0 is always possible."""
        if not 0 <= count <= self.num_experts:
            raise ValueError(f"decoding.experts_per_token={count} must lie in 1..{self.num_experts}, or be 0")

    def forward(self, x_TD: Tensor, experts_per_token: int = 0, real_T: Tensor | None = None) -> GateOutput:
        """Select experts for each of T tokens. In training, `experts_per_token` has no effect.

        `real_T` (bool) is False for padding (None: all tokens are real). Padding gets empty slots; no sum counts it.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            return self.choose(x_TD.to(self.w_gate_DE.dtype), 0 if self.training else experts_per_token, real_T)

    def choose(self, x_TD: Tensor, experts_per_token: int, real_T: Tensor | None) -> GateOutput:
        """Do `forward`'s work on an input in the type of the gate's weights."""
        raise NotImplementedError


class NoisyTopKGate(Gate):
    """Softmax over the top k of H(x)_i = (x . w_gate)_i + N(0, 1) softplus((x . w_noise)_i) (S17 eq. 3-5).

    There is noise only in training, drawn for each token and expert. Both weights start at zero, so that all experts
    start equally likely (S17 appendix A); `init_parameters` sets them. With k = E, every token activates every expert.
    The load is then the count and carries no gradient. Deviation from the paper: the standard deviation of the noise is
    larger by MIN_NOISE_STD, as in its authors' code.
    """

    noisy = True

    def __init__(self, hidden_size: int, num_experts: int, k: int) -> None:
        super().__init__(hidden_size, num_experts, k)
        self.w_noise_DE = nn.Parameter(torch.zeros(hidden_size, num_experts))

    def choose(self, x_TD: Tensor, experts_per_token: int, real_T: Tensor | None) -> GateOutput:
        if not self.training:
            choice = _without_noise(x_TD @ self.w_gate_DE, experts_per_token or self.k, real_T, self.rule())
        else:
            choice = _with_noise(x_TD, self.w_gate_DE, self.w_noise_DE, self.k, real_T, self.rule())
        return _full_slots(choice, real_T)


class SoftmaxTopKGate(Gate):
    """Softmax over the top k of x . w_gate: S17 eq. 2 with the mask of eq. 16-17, which is eq. 3 without noise.

    The load is the count, so only the importance loss or biases can balance it. w_gate starts random instead of zero,
    because nothing would break ties between equal experts.
    """

    def choose(self, x_TD: Tensor, experts_per_token: int, real_T: Tensor | None) -> GateOutput:
        choice = _without_noise(x_TD @ self.w_gate_DE, experts_per_token or self.k, real_T, self.rule())
        return _full_slots(choice, real_T)


class HierarchicalGate(Gate):
    """Two levels of noisy top-k gates (S17 appendix B, eq. 12-14): y = sum_ij G_primary(x)_i G_i(x)_j E_ij(x).

    A primary gate selects P of A groups. The gate of each selected group selects K of its B experts. Expert j of group
    i has index i B + j. `GateSums` defines Importance_H and Load_H.

    Logits are computed for the selected groups alone: tokens are sorted by group, as they are by expert later. Memory
    and operations per token therefore grow with A + P B and not with the number of experts.
    """

    noisy = True

    def __init__(self, hidden_size: int, num_experts: int, branching: int, primary_k: int, k: int) -> None:
        super().__init__(hidden_size, num_experts, k)
        self.branching, self.primary_k = branching, primary_k
        self.w_noise_DE = nn.Parameter(torch.zeros(hidden_size, num_experts))
        self.primary_w_gate_DA = nn.Parameter(torch.zeros(hidden_size, branching))
        self.primary_w_noise_DA = nn.Parameter(torch.zeros(hidden_size, branching))
        self.primary_bias_A: nn.Parameter | None = None

    def add_biases(self) -> None:
        """Create the biases of experts within their groups, and of groups; all are 0."""
        super().add_biases()
        self.primary_bias_A = _bias(self.branching)

    @torch.no_grad()
    def move_biases(self, sums: GateSums, rate: float | Tensor) -> None:
        """Move the biases of groups as if these were experts, and those of experts by the mean of their group."""
        assert self.bias_E is not None, "for gates with biases"
        assert self.primary_bias_A is not None, "for gates with biases"
        count_AB = sums.count_E.view(self.branching, -1)
        _move(self.primary_bias_A, count_AB.sum(1), rate)
        _move(self.bias_E, count_AB, rate)

    def check_experts_per_token(self, count: int) -> None:
        """Raise ValueError if `levels` cannot divide `count` over the groups."""
        super().check_experts_per_token(count)
        groups, experts = self.levels(count)
        if count and (count % groups or experts > self.num_experts // self.branching):
            raise ValueError(
                f"decoding.experts_per_token={count} must be at most {self.primary_k}, or {self.primary_k} times 1.."
                f"{self.num_experts // self.branching}: each token selects {self.primary_k} groups"
            )

    def levels(self, count: int) -> tuple[int, int]:
        """Return (groups, experts per group) that a token selects; as many groups as in training if `count` allows."""
        groups = min(count, self.primary_k) if count else self.primary_k
        return groups, count // groups if count else self.k

    def choose(self, x_TD: Tensor, experts_per_token: int, real_T: Tensor | None) -> GateOutput:
        primary_k, k = self.levels(experts_per_token)
        straight_through = self.straight_through and self.training
        of_groups = Rule(self.primary_bias_A, straight_through and primary_k == 1)
        if self.training:
            primary = _with_noise(x_TD, self.primary_w_gate_DA, self.primary_w_noise_DA, primary_k, real_T, of_groups)
        else:
            primary = _without_noise(x_TD @ self.primary_w_gate_DA, primary_k, real_T, of_groups)
        # Padding has logits too, of the first group; nothing counts them.
        group_TP = where_real(primary.expert_TK, real_T)
        group_S = group_TP.flatten()
        size = self.num_experts // self.branching
        weights: list[Tensor] = [self.w_gate_DE, self.w_noise_DE] if self.training else [self.w_gate_DE]
        clean_TPB, *noise_logit_TPB = self._of_groups(x_TD, weights, group_TP).split(size, dim=2)
        noisy_TPB = clean_TPB
        if self.training:
            std_TPB = F.softplus(noise_logit_TPB[0].contiguous()) + MIN_NOISE_STD
            noisy_TPB = clean_TPB + torch.randn_like(clean_TPB) * std_TPB
        bias_TPB = None if self.bias_E is None else self.bias_E.view(self.branching, size)[group_TP]
        rule = Rule(bias_TPB, straight_through)
        # The first K, and one more for the load. X is their number.
        inner_TPK, local_TPX, top_TPX = keep_top_k(noisy_TPB, k, rule, spare=1)
        local_TPK = local_TPX[:, :, :k]
        gates_TPK = primary.gates_TK[:, :, None] * inner_TPK
        importance_E = self._by_expert(torch.zeros_like(noisy_TPB).scatter(2, local_TPK, gates_TPK), group_S)
        expert_TK = (group_TP[:, :, None] * size + local_TPK).flatten(1)
        expert_TK = mark_padding(expert_TK, self.num_experts, real_T)
        count_E = load_E = count_tokens(expert_TK, self.num_experts)
        if self.training and k < size:
            prob_TPB = prob_in_top_k(rule.biased(clean_TPB), std_TPB, top_TPX, local_TPX)
            load_E = self._by_expert(where_real(prob_TPB, real_T), group_S)
        choice = Choice(gates_TPK.flatten(1), expert_TK, importance_E, load_E, count_E, primary.noise_std)
        gate = _full_slots(choice, real_T)
        if not self.training:
            return gate
        return gate._replace(sums=gate.sums._replace(primary_load_A=primary.load_E, group_count_A=primary.count_E))

    def _of_groups(self, x_TD: Tensor, weights: list[Tensor], group_TP: Tensor) -> Tensor:
        """Return the logits of each token's groups, (T, P, ...): B for each of the weights, one after the other."""
        ends_A, route = sort_rows(group_TP, self.branching, group_TP.numel())
        w_ADX = torch.cat([w_DE.unflatten(1, (self.branching, -1)).transpose(0, 1) for w_DE in weights], 2)
        groups = group_rows(ends_A, group_TP.numel(), x_TD.dtype)
        logits_RX = grouped_product(x_TD.contiguous(), w_ADX.contiguous(), groups, route)
        return take_rows(logits_RX, route.row_R).view(*group_TP.shape, w_ADX.shape[2])

    def _by_expert(self, values_TPB: Tensor, group_S: Tensor) -> Tensor:
        return sum_by_group(values_TPB.flatten(0, 1), group_S, self.branching).flatten()


class StrictlyBalancedGate(Gate):
    """Gate that gives every expert the same number of tokens of a training batch (S17 appendix F, eq. 15-20). No noise.

    G(x)_i = softmax(x . w_gate)_i M_i / sum_j softmax(x . w_gate)_j M_j. In training, M = M_batchwise: each expert
    takes the m = k T / E tokens (rounded, at least 1) with its largest softmax values. A token has k experts on
    average. If it has none, its gates are all 0 and the experts contribute nothing. Outside training, M_i = 1 iff
    softmax_i > T_i, with thresholds learned by L_batchwise. With `decoding.experts_per_token`, M = TopK (eq. 17).

    Choices that the paper leaves open:
    - m and M are computed over the tokens of one device's micro-batch.
    - L_batchwise is divided by the number of these tokens, and its gradient goes to T only. It uses logarithms of X and
      T: masks are the same, and changes of T are relative.
    - Load is the count, which is constant, so only the balance loss of importance has an effect.
    - There is one level, since the paper does not define the mask for two.
    - w_gate starts random, since equal logits would give all experts the same tokens.

    In the decoder, the training mask depends on later target tokens, which decoding does not have. Noisy top-k gates
    have no such leak.
    """

    def __init__(self, hidden_size: int, num_experts: int, k: int) -> None:
        super().__init__(hidden_size, num_experts, k)
        self.threshold_E = nn.Parameter(torch.zeros(num_experts))

    def choose(self, x_TD: Tensor, experts_per_token: int, real_T: Tensor | None) -> GateOutput:
        if real_T is not None:
            # m and L_batchwise depend on the number of real tokens, and this gate waits for the device in any case.
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
        # Eq. 16 as a softmax over the selected logarithms, which cannot underflow to 0/0. For a token with no expert,
        # mask nothing so that the softmax is defined, then zero its gates.
        kept_TE = mask_TE | (count_T == 0)[:, None]
        gates_TE = log_TE.masked_fill(~kept_TE, -math.inf).softmax(1) * mask_TE
        # Only this gate must wait for the device, to learn how many slots tokens need.
        num_slots, num_routed = torch.stack([count_T.max(), count_T.sum()]).tolist() if len(count_T) else (0, 0)
        expert_TK = (mask_TE + gates_TE.detach()).topk(max(num_slots, 1), dim=1).indices
        empty_TK = ~mask_TE.gather(1, expert_TK)
        gates_TK = take_groups(gates_TE[:, :, None], expert_TK)[:, :, 0]
        count_E = mask_TE.sum(0).float()
        sums = GateSums(gates_TE.sum(0), count_E, count_E)
        expert_TK = expert_TK.masked_fill(empty_TK, self.num_experts)
        return GateOutput(expert_TK, gates_TK, num_routed, sums, log_TE.new_zeros(()), own_loss)


def make_gate(hidden_size: int, num_experts: int, config: MoEConfig) -> Gate:
    """Return a new gate of the kind `config.gating`."""
    gate = _new_gate(hidden_size, num_experts, config)
    gate.straight_through = config.straight_through
    if config.bias_rate:
        gate.add_biases()
    return gate


def _new_gate(hidden_size: int, num_experts: int, config: MoEConfig) -> Gate:
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
