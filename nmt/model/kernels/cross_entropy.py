"""Losses and logit gradients of the vocabulary softmax for one chunk of tokens.

`softmax_gradient` chooses between a plain and a fused implementation. The fused one runs on a GPU: it reads bf16 logits
once from memory and overwrites them with the gradient. The plain one makes about ten passes over float32 logits.

Letters: M tokens, V vocabulary.
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
