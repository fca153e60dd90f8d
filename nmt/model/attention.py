"""Attention of the decoder over the source, with three score functions; keys are projected once per sentence.

Letters: T queries per sentence (target positions, or hypotheses in a beam), S source positions, B sentences, D width,
A attention size (in the names of stored parameters: N); in packed batches, M target rows and N source rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nmt.batch import Rows
from nmt.config import AttentionConfig
from nmt.model.kernels.attention import attend, padded_attend, padding_of
from nmt.model.rows import unpack


class Memory(NamedTuple):
    """The encoded source of a batch, in the form that a search needs, and the vector V of the scores."""

    values_SBD: Tensor
    keys_SBA: Tensor  # projected; plus bias in the normalised form; after tanh in the product form
    padding_SB: Tensor  # bool, True for padding
    v_A: Tensor  # V, in the type of the keys

    def select(self, sentences_B: Tensor) -> "Memory":
        """Return the memory of these sentences."""
        values_SBD, keys_SBA, padding_SB = (tensor.index_select(1, sentences_B) for tensor in self[:3])
        return Memory(values_SBD, keys_SBA, padding_SB, self.v_A)

    def first(self, count: int) -> "Memory":
        """Return the memory of the first `count` sentences, without a copy."""
        return Memory(self.values_SBD[:, :count], self.keys_SBA[:, :count], self.padding_SB[:, :count], self.v_A)


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

    def memory(self, values_ND: Tensor, source: Rows) -> Memory:
        """Return the memory of a packed encoded source."""
        keys_NA, v_A = self._keys(values_ND)
        return Memory(unpack(values_ND, source), unpack(keys_NA, source), padding_of(source), v_A)

    def attend(self, query_MD: Tensor, values_ND: Tensor, target: Rows, source: Rows) -> Tensor:
        """Return context_MD for the queries of whole target sentences, each over its own source sentence."""
        keys_NA, v_A = self._keys(values_ND)
        query_MA = self._query(query_MD, v_A)
        return attend(query_MA, keys_NA, values_ND, v_A, target, source, self.function)

    def forward(self, query_TBD: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Return (context_TBD, weights_TBS): weighted sums of the source; weights add up to 1 over real positions."""
        query_TBA = self._query(query_TBD, memory.v_A)
        keys_SBA, values_SBD = memory.keys_SBA, memory.values_SBD
        return padded_attend(query_TBA, keys_SBA, values_SBD, memory.padding_SB, memory.v_A, self.function)

    def _keys(self, values_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return (keys, V) of `Memory`."""
        keys_NA, v_A = self.key(values_ND), self.v_N
        if self.function == "product":
            keys_NA = keys_NA.tanh()
        elif self.function == "normalised":
            keys_NA = keys_NA + self.bias_N.to(keys_NA.dtype)
            v_A = self.gain * v_A / v_A.norm()
        return keys_NA, v_A.to(keys_NA.dtype)

    def _query(self, query: Tensor, v_A: Tensor) -> Tensor:
        """Return projected queries; in the product form after tanh, and times V."""
        query = self.query(query)
        return query.tanh() * v_A if self.function == "product" else query
