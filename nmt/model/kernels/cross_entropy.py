"""Losses and logit gradients of one piece of the vocabulary softmax, in one pass over the logits on a GPU.

`softmax_gradient` chooses between the plain form and its fused twin, which reads bf16 logits once and writes the
gradient over them, where the plain one makes some ten passes over float32.

Letters: M tokens, V vocabulary.
"""

import torch
from torch import Tensor


def softmax_gradient(logits_MV: Tensor, target_M: Tensor, label_smoothing: float) -> tuple[Tensor, ...]:
    """(nll_M, uniform_M, gradient_MV): -log softmax at the target, its mean over the vocabulary, and the gradient of
    sum((1 - s) nll + s uniform) by the logits, in their type. Consumes `logits_MV`."""
    if logits_MV.is_cuda and logits_MV.dtype == torch.bfloat16:
        from nmt.model.kernels.cross_entropy_triton import fused_softmax_gradient

        return fused_softmax_gradient(logits_MV, target_M, label_smoothing)
    return plain_softmax_gradient(logits_MV, target_M, label_smoothing)


def plain_softmax_gradient(logits_MV: Tensor, target_M: Tensor, label_smoothing: float) -> tuple[Tensor, ...]:
    """`softmax_gradient` in PyTorch operations, float32 or better inside."""
    exact_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    lse_M = exact_MV.logsumexp(dim=1)
    nll_M = lse_M - exact_MV.gather(1, target_M[:, None]).squeeze(1)
    uniform_M = lse_M - exact_MV.mean(dim=1)
    # d loss / d logits = softmax - smoothed target distribution
    gradient_MV = (exact_MV - lse_M[:, None]).exp_().sub_(label_smoothing / logits_MV.shape[1])
    gradient_MV[torch.arange(len(target_M), device=target_M.device), target_M] -= 1.0 - label_smoothing
    return nll_M, uniform_M, gradient_MV.to(logits_MV.dtype)
