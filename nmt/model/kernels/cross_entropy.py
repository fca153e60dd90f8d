"""Losses and logit gradients of the vocabulary softmax for one chunk of tokens, read once or twice (R-Drop).

`softmax_gradient` and `two_softmax_gradients` choose between a plain and a fused implementation. The fused one runs on
a GPU: it reads bf16 logits once from memory and overwrites them with the gradient. The plain one makes about ten passes
over float32 logits. `taught_softmax_gradient` adds a teacher's probabilities to either of them.

Letters: M tokens, V vocabulary, K outputs with a teacher's probabilities.
"""

import torch
from torch import Tensor


def softmax_gradient(logits_MV: Tensor, target_M: Tensor, label_smoothing: float) -> tuple[Tensor, ...]:
    """Return (nll_M, uniform_M, gradient_MV), and may overwrite `logits_MV`.

    nll is -log softmax at the target, and uniform is its mean over the vocabulary. The gradient, in the type of the
    logits, is that of sum((1 - s) nll + s uniform) with respect to the logits; s is `label_smoothing`.
    """
    if logits_MV.is_cuda and logits_MV.dtype == torch.bfloat16:
        from nmt.model.kernels.cross_entropy_triton import fused_softmax_gradient

        return fused_softmax_gradient(logits_MV, target_M, label_smoothing)
    return plain_softmax_gradient(logits_MV, target_M, label_smoothing)


def plain_softmax_gradient(logits_MV: Tensor, target_M: Tensor, label_smoothing: float) -> tuple[Tensor, ...]:
    """Return `softmax_gradient` computed with PyTorch operations, in float32 or better."""
    exact_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    lse_M = exact_MV.logsumexp(dim=1)
    nll_M = lse_M - exact_MV.gather(1, target_M[:, None]).squeeze(1)
    uniform_M = lse_M - exact_MV.mean(dim=1)
    # d loss / d logits = softmax - smoothed target distribution
    gradient_MV = (exact_MV - lse_M[:, None]).exp_().sub_(label_smoothing / logits_MV.shape[1])
    gradient_MV[torch.arange(len(target_M), device=target_M.device), target_M] -= 1.0 - label_smoothing
    return nll_M, uniform_M, gradient_MV.to(logits_MV.dtype)


def taught_softmax_gradient(
    logits_MV: Tensor,
    target_M: Tensor,
    label_smoothing: float,
    ids_MK: Tensor,
    probability_MK: Tensor,
    weight: float,
) -> tuple[Tensor, ...]:
    """Return (nll_M, uniform_M, apart_M, gradient_MV), and may overwrite `logits_MV`.

    nll and uniform are those of `softmax_gradient`. With own = (1 - s) nll + s uniform, a teacher's probabilities p of
    the outputs `ids_MK`, which are made to sum to 1, and w = `weight`:

        taught = -sum_k p_k log softmax_k        apart = w (taught - own)

    The gradient is that of sum(own + apart) = sum((1 - w) own + w taught). apart is 0 where all p are 0. The ids of a
    token must differ from each other where p is above 0.
    """
    exact = torch.promote_types(logits_MV.dtype, torch.float32)
    p_MK = probability_MK.to(exact)
    mass_M = p_MK.sum(1)
    p_MK = p_MK / mass_M.clamp(min=torch.finfo(exact).tiny)[:, None]
    weight_M = weight * (mass_M > 0).to(exact)
    # Read now: the gradient may overwrite them.
    wanted_M = logits_MV.gather(1, target_M[:, None]).squeeze(1).to(exact)
    logits_MK = logits_MV.gather(1, ids_MK).to(exact)
    nll_M, uniform_M, gradient_MV = softmax_gradient(logits_MV, target_M, label_smoothing)
    taught_M = (p_MK * ((nll_M + wanted_M)[:, None] - logits_MK)).sum(1)
    apart_M = weight_M * (taught_M - ((1.0 - label_smoothing) * nll_M + label_smoothing * uniform_M))
    # d apart / d logits = w (smoothed target distribution - p). Each of the additions changes a place at most once, so
    # that a GPU adds in a fixed order.
    dtype = gradient_MV.dtype
    if label_smoothing:
        gradient_MV += (weight_M * (label_smoothing / logits_MV.shape[1]))[:, None].to(dtype)
    gradient_MV.scatter_add_(1, target_M[:, None], ((1.0 - label_smoothing) * weight_M)[:, None].to(dtype))
    gradient_MV.scatter_add_(1, ids_MK, (-weight_M[:, None] * p_MK).to(dtype))
    return nll_M, uniform_M, apart_M, gradient_MV


def two_softmax_gradients(
    first_MV: Tensor, second_MV: Tensor, target_M: Tensor, label_smoothing: float, alpha: float
) -> tuple[Tensor, ...]:
    """Return (nll_M, uniform_M, apart_M, first_gradient_MV, second_gradient_MV) for the logits of two passes.

    It may overwrite the logits.
    nll and uniform are those of `softmax_gradient`, as means of both passes. apart is KL(p || q) + KL(q || p) for the
    distributions p and q of the passes. The gradients, in the type of the logits, are those of
    sum((1 - s) nll + s uniform + alpha / 4 apart); s is `label_smoothing`.
    """
    if first_MV.is_cuda and first_MV.dtype == torch.bfloat16:
        from nmt.model.kernels.cross_entropy_triton import fused_two_softmax_gradients

        return fused_two_softmax_gradients(first_MV, second_MV, target_M, label_smoothing, alpha)
    return plain_two_softmax_gradients(first_MV, second_MV, target_M, label_smoothing, alpha)


def plain_two_softmax_gradients(
    first_MV: Tensor, second_MV: Tensor, target_M: Tensor, label_smoothing: float, alpha: float
) -> tuple[Tensor, ...]:
    """Return `two_softmax_gradients` computed with PyTorch operations, in float32 or better."""
    exact = torch.promote_types(first_MV.dtype, torch.float32)
    log_p_MV, log_q_MV = (logits_MV.to(exact).log_softmax(1) for logits_MV in (first_MV, second_MV))
    token_M = torch.arange(len(target_M), device=target_M.device)
    nll_M = (log_p_MV[token_M, target_M] + log_q_MV[token_M, target_M]) / -2
    uniform_M = (log_p_MV.mean(1) + log_q_MV.mean(1)) / -2
    apart_M, gradients = torch.zeros_like(nll_M), []
    for log_own_MV, log_other_MV in ((log_p_MV, log_q_MV), (log_q_MV, log_p_MV)):
        own_MV, ratio_MV = log_own_MV.exp(), log_own_MV - log_other_MV
        kl_M = (own_MV * ratio_MV).sum(1)
        apart_M += kl_M
        # d KL(p || q) / d logits of p = p (log p/q - KL(p || q)), and d KL(q || p) / d logits of p = p - q
        gradient_MV = ratio_MV.sub_(kl_M[:, None] - 1.0).mul_(own_MV).sub_(log_other_MV.exp()).mul_(alpha / 4)
        # d loss / d logits = half of softmax - smoothed target distribution
        gradient_MV.add_(own_MV, alpha=0.5).sub_(label_smoothing / 2 / own_MV.shape[1])
        gradient_MV[token_M, target_M] -= (1.0 - label_smoothing) / 2
        gradients.append(gradient_MV.to(first_MV.dtype))
    return nll_M, uniform_M, apart_M, *gradients
