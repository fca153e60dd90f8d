"""The noisy top-k gate from its logits to its decisions (S17 = Shazeer et al. 2017, section 2.1 and appendix A).

`noisy_top_k` chooses between a plain and a fused implementation. On a GPU, the plain one makes about 40 passes over
numbers per token and expert, forward and backward. The fused one makes seven.

Letters: T tokens, E experts, K experts per token, X = K + 1 experts, or E if there are no more.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Added to the standard deviation of the gate noise, softplus(x . w_noise), which starts at ln 2 = 0.69. The paper has
# no such floor; its authors' code (tensor2tensor) has this one. Without a floor, a gate that learns to remove its noise
# makes the load estimate 0/0. It is added because a clamp would stop the gradient that could raise the noise again.
MIN_NOISE_STD = 1.0e-2

# The fused form holds a row of all experts in registers, and finds the largest one by one.
_MAX_FUSED_EXPERTS, _MAX_FUSED_K = 4096, 15


class Choice(NamedTuple):
    """Decisions of a noisy top-k gate, and their sums over the tokens; padding has no part in any of them."""

    gates_TK: Tensor  # float32, in the order of choice (falling, if there is no bias); 0 for padding
    expert_TK: Tensor  # int64; E for padding
    importance_E: Tensor  # float32, sum of gates (S17 eq. 6)
    load_E: Tensor  # float32, sum of P(x, i) (S17 eq. 10); with k = E, the count, without a gradient
    count_E: Tensor  # float32, number of tokens
    noise_std: Tensor  # float32 scalar, mean standard deviation of the noise, without a gradient


class Rule(NamedTuple):
    """How experts are chosen and weighed, where that differs from S17; the default is S17's. Fused forms have S17's.

    With a bias (Wang et al. 2024, "auxiliary-loss-free load balancing"; DeepSeek-V3), the top k are those of
    H(x) + bias, but the gates are the softmax of H(x) over them. With `straight_through`, gates of k = 1 have the
    gradient of log p (`straight_through_gate`).
    """

    bias_E: Tensor | None = None  # float32 without gradient; (E), or (..., E) like the logits
    straight_through: bool = False

    @property
    def is_fused(self) -> bool:
        """Whether the fused forms have this rule."""
        return self.bias_E is None and not self.straight_through

    def biased(self, logits_TE: Tensor) -> Tensor:
        """Return the logits by which experts are chosen."""
        return logits_TE if self.bias_E is None else logits_TE + self.bias_E


AS_IN_S17 = Rule()


def noisy_top_k(logits_T2E: Tensor, noise_TE: Tensor, k: int, real_T: Tensor | None, rule: Rule = AS_IN_S17) -> Choice:
    """Return the decisions of G(x) = softmax(KeepTopK(H(x), k)), H(x) = clean + noise * std (S17 eq. 3-5).

    Row t of the logits has x . w_gate, then x . w_noise. The noise is N(0, 1); std = softplus(x . w_noise) plus
    MIN_NOISE_STD. `real_T` is False for padding (None: all tokens are real).
    """
    num_experts = noise_TE.shape[1]
    fits = num_experts <= _MAX_FUSED_EXPERTS and k <= _MAX_FUSED_K and rule.is_fused
    if logits_T2E.is_cuda and logits_T2E.dtype == torch.float32 and len(logits_T2E) and fits:
        from nmt.model.kernels.gate_triton import fused_noisy_top_k

        return fused_noisy_top_k(logits_T2E, noise_TE, k, real_T)
    return plain_noisy_top_k(logits_T2E, noise_TE, k, real_T, rule)


def top_k_gate(
    logits_TE: Tensor, k: int, real_T: Tensor | None, rule: Rule = AS_IN_S17
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (gates_TK, expert_TK, importance_E, count_E) of `Choice` for softmax(KeepTopK(logits, k)), without noise.

    On a GPU, passes without gradient are fused: plain, the sums take more launches than the experts.
    """
    num_experts = logits_TE.shape[1]
    fits = num_experts <= _MAX_FUSED_EXPERTS and k <= _MAX_FUSED_K and len(logits_TE)
    # Without a gradient, the straight-through factor is 1.
    fits = fits and rule.bias_E is None
    if logits_TE.is_cuda and logits_TE.dtype == torch.float32 and fits and not torch.is_grad_enabled():
        from nmt.model.kernels.gate_triton import fused_top_k_gate

        return fused_top_k_gate(logits_TE.contiguous(), k, real_T)
    return plain_top_k_gate(logits_TE, k, real_T, rule)


def plain_top_k_gate(
    logits_TE: Tensor, k: int, real_T: Tensor | None, rule: Rule = AS_IN_S17
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `top_k_gate` computed with PyTorch operations."""
    num_experts = logits_TE.shape[1]
    gates_TK, expert_TK = keep_top_k(logits_TE, k, rule)[:2]
    gates_TK = where_real(gates_TK, real_T)
    # Scatter, then sum. Adding in place would have a different order on a GPU every time.
    importance_E = torch.zeros_like(logits_TE).scatter(1, expert_TK, gates_TK).sum(0)
    expert_TK = mark_padding(expert_TK, num_experts, real_T)
    return gates_TK, expert_TK, importance_E, count_tokens(expert_TK, num_experts)


def plain_noisy_top_k(
    logits_T2E: Tensor, noise_TE: Tensor, k: int, real_T: Tensor | None, rule: Rule = AS_IN_S17
) -> Choice:
    """Return `noisy_top_k` computed with PyTorch operations."""
    num_experts = noise_TE.shape[1]
    clean_TE, noise_logit_TE = logits_T2E.split(num_experts, dim=1)
    # Copied: a CPU takes five times as long for the softplus of many short pieces of rows.
    std_TE = F.softplus(noise_logit_TE.contiguous()) + MIN_NOISE_STD
    noisy_TE = clean_TE + noise_TE * std_TE
    gates_TK, expert_TX, top_TX = keep_top_k(noisy_TE, k, rule, spare=1)
    expert_TK = expert_TX[:, :k]
    gates_TK = where_real(gates_TK, real_T)
    # Scatter, then sum. Adding in place would have a different order on a GPU every time.
    importance_E = torch.zeros_like(noisy_TE).scatter(1, expert_TK, gates_TK).sum(0)
    expert_TK = mark_padding(expert_TK, num_experts, real_T)
    count_E = load_E = count_tokens(expert_TK, num_experts)
    if k < num_experts:
        prob_TE = prob_in_top_k(rule.biased(clean_TE), std_TE, top_TX, expert_TX)
        load_E = where_real(prob_TE, real_T).sum(0)
    std_E = where_real(std_TE.detach(), real_T).sum(0)
    return Choice(gates_TK, expert_TK, importance_E, load_E, count_E, mean_std(std_E, noise_TE, real_T))


def keep_top_k(
    noisy_logits_TE: Tensor, k: int, rule: Rule = AS_IN_S17, spare: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (gates_TK, expert_TX, top_TX) of G(x) = softmax(KeepTopK(H(x), k)) (S17 eq. 3, 5): top-k, then softmax.

    `expert_TX` has the K experts and up to `spare` more, the next best. `top_TX` has the logits by which they were
    chosen, in falling order.
    """
    chooses_TE = rule.biased(noisy_logits_TE)
    top_TX, expert_TX = chooses_TE.topk(min(k + spare, chooses_TE.shape[-1]), dim=-1)
    kept_TK = top_TX[..., :k]
    if rule.bias_E is not None:
        kept_TK = noisy_logits_TE.gather(-1, expert_TX[..., :k])
    gates_TK = kept_TK.softmax(dim=-1)
    if rule.straight_through:
        gates_TK = gates_TK * straight_through_factor(top_TX[..., :1], chooses_TE)
    return gates_TK, expert_TX, top_TX


def straight_through_factor(chosen_T1: Tensor, chooses_TE: Tensor) -> Tensor:
    """Return p / stop_gradient(p), p = softmax(logits)_chosen: the value is 1, its gradient that of log p.

    It is for gates with k = 1. Their softmax over one logit is 1, so the task gives them no gradient (S17 section 2.1).
    As p is that of the logits that chose, with noise and bias, experts are chosen about as often as p predicts. The
    mean gradient of log p is then about 0: only differences between experts move the gate, not what all outputs have in
    common. Switch Transformer (Fedus et al. 2021) multiplies outputs by p instead. That would change the function of a
    network when it grows.
    """
    log_p_T1 = chosen_T1 - chooses_TE.logsumexp(-1, keepdim=True)
    return (log_p_T1 - log_p_T1.detach()).exp()


def prob_in_top_k(clean_TE: Tensor, noise_std_TE: Tensor, top_TX: Tensor, expert_TX: Tensor) -> Tensor:
    """Return P(x, i) = Phi((clean_i - kth_excluding(noisy, k, i)) / std_i) (S17 eq. 8-9), shape (..., T, E).

    This is the probability that expert i is among the top k if only its own noise is drawn again. kth_excluding is the
    k-th largest value of the other experts. That is the (k+1)-th largest of all for an expert in the top k, and the
    k-th largest of all for any other. `top_TX` and `expert_TX` are the k + 1 largest noisy logits of each token, in
    falling order, and their experts. With a bias, it is part of `clean_TE` and of `top_TX`: it decides with the noise
    who is chosen, and only the noise is drawn again.
    """
    threshold_if_out_T1, threshold_if_in_TK = top_TX[..., -2:-1], top_TX[..., -1:].expand_as(top_TX[..., :-1])
    # A CPU takes several times as long for a choice between two columns.
    threshold_TE = threshold_if_out_T1.expand_as(clean_TE).scatter(-1, expert_TX[..., :-1], threshold_if_in_TK)
    return torch.special.ndtr((clean_TE - threshold_TE) / noise_std_TE)


def count_tokens(expert_TK: Tensor, num_experts: int) -> Tensor:
    """Return the number of tokens per expert, float32 (E). Integer sums are deterministic. The host does not wait."""
    count_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_TK.device)
    flat = expert_TK.reshape(-1)
    return count_E.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts].float()


def where_real(values: Tensor, real_T: Tensor | None) -> Tensor:
    """Return values (T, ...) with 0 for padding; None: all tokens are real."""
    return values if real_T is None else values.masked_fill(~real_T.view(-1, *[1] * (values.dim() - 1)), 0)


def mark_padding(expert_TK: Tensor, num_experts: int, real_T: Tensor | None) -> Tensor:
    """Return the experts with `num_experts`, an empty slot, for padding; None: all tokens are real."""
    return expert_TK if real_T is None else expert_TK.masked_fill(~real_T[:, None], num_experts)


def mean_std(std_E: Tensor, noise_TE: Tensor, real_T: Tensor | None) -> Tensor:
    """Return the mean standard deviation of the noise from its sums over the real tokens."""
    return std_E.sum() / (noise_TE.numel() if real_T is None else real_T.sum() * noise_TE.shape[1])
