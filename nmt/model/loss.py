"""Softmax and cross-entropy over the vocabulary in chunks of tokens, so that no batch needs all its logits at once.

Letters: N target tokens, D width, V vocabulary, M tokens per chunk, K outputs with a teacher's probabilities.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from nmt.model.kernels.cross_entropy import softmax_gradient, taught_softmax_gradient, two_softmax_gradients

# Logits per chunk: enough to fill a GPU, but not much larger than its cache.
_PIECE_ELEMENTS = 2**26


class Lesson(NamedTuple):
    """A teacher's probabilities for the tokens of a batch."""

    ids_NK: Tensor
    """Outputs, all different."""
    probability_NK: Tensor
    """Their probabilities, in any proportion: they are made to sum to 1. All 0: this token has no teacher."""
    weight: float
    """Weight of the teacher in the loss of a token, against that of the target: 0 to 1."""


class _LinearCrossEntropy(Function):
    """Losses of one pass, with or without a teacher, or of two over the same tokens (`r_drop` = alpha).

    The forward pass also computes the gradients of the sum, while a chunk's logits are in memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        label_smoothing: float,
        real_N: Tensor | None,
        r_drop: float,
        lesson: Lesson | None,
        *passes_ND: Tensor,
    ) -> tuple[Tensor, Tensor]:
        first_ND = passes_ND[0]
        weight = weight_VD.to(first_ND.dtype)
        exact = torch.promote_types(first_ND.dtype, torch.float32)
        vocabulary = weight.shape[0]
        loss = first_ND.new_zeros((), dtype=exact)
        nll = first_ND.new_zeros((), dtype=exact)
        wants_weight, wants_bias = ctx.needs_input_grad[:2]
        wants_x = ctx.needs_input_grad[-len(passes_ND) :]
        x_grads_ND = [torch.empty_like(x_ND) if wants else None for x_ND, wants in zip(passes_ND, wants_x, strict=True)]
        weight_grad_VD = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        bias_grad_V = torch.zeros_like(bias_V, dtype=exact) if bias_V is not None and wants_bias else None
        piece = max(_PIECE_ELEMENTS // len(passes_ND) // vocabulary, 1)
        for start in range(0, len(target_N), piece):
            here = slice(start, start + piece)
            logits = [_logits(x_ND[here], weight, bias_V) for x_ND in passes_ND]
            if len(logits) == 1 and lesson is None:
                nll_M, uniform_M, *grads_MV = softmax_gradient(logits[0], target_N[here], label_smoothing)
                sums_M = [nll_M, uniform_M]
            elif lesson is not None:
                rest = lesson.ids_NK[here], lesson.probability_NK[here], lesson.weight
                *sums_M, grad_MV = taught_softmax_gradient(logits[0], target_N[here], label_smoothing, *rest)
                grads_MV = [grad_MV]
            else:
                *sums_M, first_MV, second_MV = two_softmax_gradients(
                    logits[0], logits[1], target_N[here], label_smoothing, r_drop
                )
                grads_MV = [first_MV, second_MV]
            if real_N is not None:
                padding_M = ~real_N[here]
                sums_M = [each_M.masked_fill(padding_M, 0.0) for each_M in sums_M]
                grads_MV = [grad_MV.masked_fill_(padding_M[:, None], 0.0) for grad_MV in grads_MV]
            piece_nll, uniform, *apart = (each_M.sum() for each_M in sums_M)
            nll += piece_nll
            loss += (1.0 - label_smoothing) * piece_nll + label_smoothing * uniform
            for each in apart:
                loss += each if lesson else r_drop / 4 * each
            for x_ND, x_grad_ND, grad_MV in zip(passes_ND, x_grads_ND, grads_MV, strict=True):
                if bias_grad_V is not None:
                    bias_grad_V += grad_MV.sum(0)
                if x_grad_ND is not None:
                    x_grad_ND[here] = grad_MV @ weight
                if weight_grad_VD is not None:
                    weight_grad_VD += grad_MV.T @ x_ND[here]
        ctx.save_for_backward(weight_grad_VD, bias_grad_V, *x_grads_ND)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        # `grad_loss` stays on its device: reading its value would wait for the device.
        scaled = [None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors]
        return *scaled[:2], None, None, None, None, None, *scaled[2:]


def _logits(x_MD: Tensor, weight: Tensor, bias_V: Tensor | None) -> Tensor:
    logits_MV = x_MD @ weight.T
    if bias_V is not None:
        logits_MV += bias_V.to(logits_MV.dtype)
    return logits_MV


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
    return _losses(weight_VD, bias_V, target_N, label_smoothing, real_N, 0.0, None, x_ND)


def taught_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    label_smoothing: float,
    lesson: Lesson,
    real_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (loss, nll) with a teacher: word-level distillation (Kim & Rush 2016, section 3.1).

    nll is that of `linear_cross_entropy`. The loss of a token is (1 - w) times that of `linear_cross_entropy`, plus
    w times -sum_k p_k log softmax(x W^T + b)_k, with the teacher's probabilities p and its weight w. A token without a
    teacher has w = 0. Labels are smoothed, but not the teacher's probabilities. Deviation from the
    paper: p is not the whole distribution. It is made to sum to 1 over the outputs that are stored.
    """
    return _losses(weight_VD, bias_V, target_N, label_smoothing, real_N, 0.0, lesson, x_ND)


def r_drop_cross_entropy(
    first_ND: Tensor,
    second_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    label_smoothing: float,
    alpha: float,
    real_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (loss, nll) of two passes with different dropout over the same N tokens: R-Drop (Liang et al. 2021).

    nll is the mean of both passes. loss = the mean of both losses of `linear_cross_entropy`, plus
    alpha / 4 sum(KL(p || q) + KL(q || p)) with the distributions p and q of the passes. Deviation from the paper: this
    is half of its loss (eq. 4), which adds up the passes. So alpha has the paper's scale, and the loss has the scale of
    one pass.
    """
    return _losses(weight_VD, bias_V, target_N, label_smoothing, real_N, alpha, None, first_ND, second_ND)


def _losses(
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    label_smoothing: float,
    real_N: Tensor | None,
    r_drop: float,
    lesson: Lesson | None,
    *passes_ND: Tensor,
) -> tuple[Tensor, Tensor]:
    if not torch.is_grad_enabled():
        # A Function sees which inputs are parameters, but not that gradients are off.
        passes_ND, weight_VD = tuple(x_ND.detach() for x_ND in passes_ND), weight_VD.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    return _LinearCrossEntropy.apply(weight_VD, bias_V, target_N, label_smoothing, real_N, r_drop, lesson, *passes_ND)


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


class SoftmaxInput(NamedTuple):
    """What the softmax of a model reads: the decoder's output, the weights and the bias."""

    x_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None


def top_probabilities(inputs: Sequence[SoftmaxInput], count: int) -> tuple[Tensor, Tensor]:
    """Return (ids_NK, probability_NK) of the `count` most probable outputs of each token, the most probable first.

    Of several models, these are the means of their probabilities. The logits are the same as in a search, and only a
    chunk of them is in memory at once. For passes without gradient.
    """
    piece = max(_PIECE_ELEMENTS // len(inputs) // inputs[0].weight_VD.shape[0], 1)
    pieces = []
    for start in range(0, len(inputs[0].x_ND), piece):
        found = [output_logits(x_ND[start : start + piece], w_VD, b_V).softmax(1) for x_ND, w_VD, b_V in inputs]
        pieces.append((sum(found[1:], found[0]) / len(found)).topk(count))
    probabilities, ids = zip(*pieces, strict=True)
    return torch.cat(ids), torch.cat(probabilities)
