"""Softmax and cross-entropy over the vocabulary in chunks of tokens, so that no batch needs all its logits at once.

Letters: N target tokens, D width, V vocabulary, M tokens per chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from nmt.model.kernels.cross_entropy import softmax_gradient

# Logits per chunk: enough to fill a GPU, but not much larger than its cache.
_PIECE_ELEMENTS = 2**26


class _LinearCrossEntropy(Function):
    """Losses. The forward pass also computes the gradients of their sum, while a chunk's logits are in memory."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        label_smoothing: float,
        real_N: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        weight = weight_VD.to(x_ND.dtype)
        exact = torch.promote_types(x_ND.dtype, torch.float32)
        num_tokens, vocabulary = x_ND.shape[0], weight.shape[0]
        loss = x_ND.new_zeros((), dtype=exact)
        nll = x_ND.new_zeros((), dtype=exact)
        grads = ctx.needs_input_grad
        x_grad_ND = torch.empty_like(x_ND) if grads[0] else None
        weight_grad_VD = torch.zeros_like(weight, dtype=exact) if grads[1] else None
        bias_grad_V = torch.zeros_like(bias_V, dtype=exact) if bias_V is not None and grads[2] else None
        piece = max(_PIECE_ELEMENTS // vocabulary, 1)
        for start in range(0, num_tokens, piece):
            x_MD, target_M = x_ND[start : start + piece], target_N[start : start + piece]
            logits_MV = x_MD @ weight.T
            if bias_V is not None:
                logits_MV += bias_V.to(logits_MV.dtype)
            nll_M, uniform_M, grad_MV = softmax_gradient(logits_MV, target_M, label_smoothing)
            if real_N is not None:
                padding_M = ~real_N[start : start + piece]
                nll_M, uniform_M = nll_M.masked_fill(padding_M, 0.0), uniform_M.masked_fill(padding_M, 0.0)
                grad_MV = grad_MV.masked_fill_(padding_M[:, None], 0.0)
            piece_nll = nll_M.sum()
            nll += piece_nll
            loss += (1.0 - label_smoothing) * piece_nll + label_smoothing * uniform_M.sum()
            if bias_grad_V is not None:
                bias_grad_V += grad_MV.sum(0)
            if x_grad_ND is not None:
                x_grad_ND[start : start + piece] = grad_MV @ weight
            if weight_grad_VD is not None:
                weight_grad_VD += grad_MV.T @ x_MD
        ctx.save_for_backward(x_grad_ND, weight_grad_VD, bias_grad_V)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        # `grad_loss` stays on its device: reading its value would wait for the device.
        scaled = (None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors)
        return *scaled, None, None, None


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    label_smoothing: float,
    real_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (loss, nll), float32 sums over the N tokens, without those where `real_N` (bool) is False.

    nll = -sum log softmax(x W^T + b)[target]. loss = (1 - s) nll + s times the mean over the vocabulary of
    -log softmax, with s = label_smoothing. Only `loss` has a gradient. Products run in the precision of x, softmax and
    sums in float32.
    """
    if not torch.is_grad_enabled():
        # A Function sees which inputs are parameters, but not that gradients are off.
        x_ND, weight_VD = x_ND.detach(), weight_VD.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    return _LinearCrossEntropy.apply(x_ND, weight_VD, bias_V, target_N, label_smoothing, real_N)


def output_logits(x: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """Return the logits of decoder outputs, (..., D) -> (..., V), in float32 or better; for passes without gradient.

    In bf16, an eighth of all hypotheses would have an exact tie among their five best subwords (measured for a small
    model, 300 sentences), and a search breaks ties arbitrarily. On a GPU, products of bf16 are summed and returned in
    float32. Elsewhere, the inputs are float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        if not (x.is_cuda and x.dtype == torch.bfloat16):
            return F.linear(x.to(weight_VD.dtype), weight_VD, bias_V)
        logits_RV = torch.mm(x.flatten(0, -2), weight_VD.to(x.dtype).T, out_dtype=torch.float32)
        logits = logits_RV.view(*x.shape[:-1], -1)
        return logits if bias_V is None else logits + bias_V


def token_log_probs(x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor) -> Tensor:
    """Return log softmax(x W^T + b)[target] of each token, float32 or better, (N,); for passes without gradient.

    The logits are the same as in a search (`output_logits`), and only a chunk of them is in memory at once.
    """
    piece = max(_PIECE_ELEMENTS // weight_VD.shape[0], 1)
    pieces = []
    for x_MD, target_M in zip(x_ND.split(piece), target_N.split(piece), strict=True):
        logits_MV = output_logits(x_MD, weight_VD, bias_V)
        pieces.append(logits_MV.gather(1, target_M[:, None]).squeeze(1) - logits_MV.logsumexp(dim=1))
    return torch.cat(pieces)
