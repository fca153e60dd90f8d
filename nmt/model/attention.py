"""Attention of the decoder over the source, with three score functions; keys are projected once per sentence.

Letters: T queries per sentence (target positions in training; hypotheses in a beam), S source positions,
B sentences, D width, N = attention size.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nmt.config import AttentionConfig


class Memory(NamedTuple):
    """The encoded source, in the form that scores need, and the vector V of the scores."""

    values_SBD: Tensor
    keys_SBN: Tensor  # projected; plus bias in the normalised form; after tanh in the product form
    padding_SB: Tensor  # bool, True for padding
    v_N: Tensor  # V, in the type of the keys

    def select(self, sentences_B: Tensor) -> "Memory":
        """Return the memory of these sentences."""
        values_SBD, keys_SBN, padding_SB = (tensor.index_select(1, sentences_B) for tensor in self[:3])
        return Memory(values_SBD, keys_SBN, padding_SB, self.v_N)


class Attention(nn.Module):
    """Softmax over source positions of one of three scores of key x_i and query y_j:

    product (S17 eq. 22):      sum_n V_n tanh((x_i U)_n) tanh((y_j W)_n); two matrix products
    additive (S17 eq. 21):     sum_n V_n tanh((x_i U)_n + (y_j W)_n); the one of GNMT
    normalised (GNMT v2):      additive, with V = gain v / |v| and a bias inside the tanh

    V starts at the scale 1/sqrt(N). With V = 1, the product form saturates the softmax, which cost more perplexity than
    any other choice measured (see `init_parameters`). With feedback wiring, the first query is zero.
    """

    def __init__(self, hidden_size: int, config: AttentionConfig) -> None:
        super().__init__()
        self.function = config.function
        self.key = nn.Linear(hidden_size, config.size, bias=False)
        self.query = nn.Linear(hidden_size, config.size, bias=False)
        self.v_N = nn.Parameter(torch.empty(config.size))
        if self.function == "normalised":
            self.gain = nn.Parameter(torch.empty(()))
            self.bias_N = nn.Parameter(torch.empty(config.size))

    def memory(self, values_SBD: Tensor, padding_SB: Tensor) -> Memory:
        """Return the memory of an encoded source, with its keys projected."""
        keys_SBN, v_N = self.key(values_SBD), self.v_N
        if self.function == "product":
            keys_SBN = keys_SBN.tanh()
        elif self.function == "normalised":
            keys_SBN = keys_SBN + self.bias_N.to(keys_SBN.dtype)
            v_N = self.gain * v_N / v_N.norm()
        return Memory(values_SBD, keys_SBN, padding_SB, v_N.to(keys_SBN.dtype))

    def forward(self, query_TBD: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Return (context_TBD, weights_TBS): weighted sums of the source; weights add up to 1 over real positions."""
        score_BTS = self._scores(self.query(query_TBD), memory)
        score_BTS = score_BTS.masked_fill(memory.padding_SB.T.unsqueeze(1), -torch.inf)
        weights_BTS = score_BTS.softmax(dim=2, dtype=torch.promote_types(score_BTS.dtype, torch.float32))
        values_BSD = memory.values_SBD.transpose(0, 1)
        context_BTD = torch.bmm(weights_BTS.to(values_BSD.dtype), values_BSD)
        return context_BTD.transpose(0, 1), weights_BTS.transpose(0, 1)

    def _scores(self, query_TBN: Tensor, memory: Memory) -> Tensor:
        if self.function == "product":
            weighted_TBN = query_TBN.tanh() * memory.v_N
            return torch.bmm(weighted_TBN.transpose(0, 1), memory.keys_SBN.permute(1, 2, 0))
        # In the layout of the inputs, with tanh in place: this is the largest tensor of a model with this attention.
        hidden_TSBN = (query_TBN.unsqueeze(1) + memory.keys_SBN.unsqueeze(0)).tanh_()
        return torch.mv(hidden_TSBN.flatten(0, 2), memory.v_N).view(hidden_TSBN.shape[:3]).permute(2, 0, 1)
