"""Kinds of dropout for small corpora, besides the ordinary one on the outputs of layers.

All draw from the default generator of the tensors' device, which training seeds for every micro-batch. So a resumed run
draws the same numbers. Callers skip these functions outside training and at a probability of 0.

Letters: N rows (tokens) of a side, D width, T tokens, K slots per token, R rows of experts, H hidden units of an
expert.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


def drop_tokens(x_ND: Tensor, p: float) -> Tensor:
    """Return the embeddings, each 0 as a whole with probability `p`, and else divided by 1 - p.

    Word dropout (Gal & Ghahramani 2016; Sennrich & Zhang 2019 for translation). Deviation from the former: they drop
    all occurrences of a word in a sentence together, and here each token is drawn by itself.
    """
    return x_ND * F.dropout(x_ND.new_ones(len(x_ND), 1), p)


def mask_outputs(gates_TK: Tensor, p: float) -> Tensor:
    """Return the gates, each 0 with probability `p`: the output of that expert is left out for that token.

    Expert output masking (EOM: NLLB Team 2022; Elbayad et al. 2023). Each pair of a token and one of its experts is
    drawn by itself, so that a token may lose any number of its experts. The other gates are not scaled up. Deviation
    from the published code of NLLB: outside training, outputs are not multiplied by 1 - p.
    """
    return gates_TK * gates_TK.new_empty(gates_TK.shape).bernoulli_(1.0 - p)


class _DropHidden(Function):
    """Dropout on hidden units h >= 0 whose gradient is 0 wherever the result is 0: no mask needs to be kept."""

    @staticmethod
    def forward(ctx: Any, h_RH: Tensor, p: float) -> Tensor:
        ctx.p = p
        return F.dropout(h_RH, p)

    @staticmethod
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, None]:
        return grad_RH / (1.0 - ctx.p), None


def drop_hidden(h_RH: Tensor, p: float) -> Tensor:
    """Return the hidden units of experts, each 0 with probability `p`, and else divided by 1 - p.

    Expert dropout (Fedus et al. 2021, Switch Transformer, section 2.4; Zoph et al. 2022, ST-MoE). `h_RH` are results of
    a `grouped_product` with `relu`. The next product, with `follows_relu`, makes the gradient 0 wherever a unit is 0,
    whether by its ReLU or by dropout.
    """
    return _DropHidden.apply(h_RH, p)
