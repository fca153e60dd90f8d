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

    With `heads` H > 1, for the product, each head has N/H of the n, a softmax of its own, and D/H of the values, which
    are projected first (Vaswani et al. 2017 section 3.2.2). The contexts of all heads are concatenated. The attention's
    weights are the mean of the heads' weights.

    V starts at the scale sqrt(H/N), so that scores have unit scale. With V = 1, the product form saturates the softmax,
    which cost more perplexity than any other choice measured (see `init_parameters`). With feedback wiring, the first
    query is zero.
    """

    def __init__(self, hidden_size: int, config: AttentionConfig) -> None:
        super().__init__()
        self.function, self.heads = config.function, config.heads
        self.key = nn.Linear(hidden_size, config.size, bias=False)
        self.query = nn.Linear(hidden_size, config.size, bias=False)
        self.v_N = nn.Parameter(torch.empty(config.size))
        if self.heads > 1:
            self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        if self.function == "normalised":
            self.gain = nn.Parameter(torch.empty(()))
            self.bias_N = nn.Parameter(torch.empty(config.size))

    def memory(self, values_ND: Tensor, source: Rows) -> Memory:
        """Return the memory of a packed encoded source."""
        keys_NA, v_A = self._keys(values_ND)
        values_ND = self._values(values_ND)
        return Memory(unpack(values_ND, source), unpack(keys_NA, source), padding_of(source), v_A)

    def attend(self, query_MD: Tensor, values_ND: Tensor, target: Rows, source: Rows) -> Tensor:
        """Return context_MD for the queries of whole target sentences, each over its own source sentence."""
        keys_NA, v_A = self._keys(values_ND)
        query_MA = self._query(query_MD, v_A)
        values_ND = self._values(values_ND)
        if self.heads == 1:
            return attend(query_MA, keys_NA, values_ND, v_A, target, source, self.function)
        parts = (tensor.chunk(self.heads, 1) for tensor in (query_MA, keys_NA, values_ND))
        contexts = [
            attend(query.contiguous(), keys.contiguous(), values.contiguous(), v_A, target, source, self.function)
            for query, keys, values in zip(*parts, strict=True)
        ]
        return torch.cat(contexts, 1)

    def forward(self, query_TBD: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Return (context_TBD, weights_TBS): weighted sums of the source; weights add up to 1 over real positions."""
        query_TBA = self._query(query_TBD, memory.v_A)
        keys_SBA, values_SBD, padding_SB = memory.keys_SBA, memory.values_SBD, memory.padding_SB
        if self.heads == 1:
            return padded_attend(query_TBA, keys_SBA, values_SBD, padding_SB, memory.v_A, self.function)
        # A head of a sentence is like a sentence of its own, in the same memory. V is in the query.
        queries, keys, values = (_by_head(each, self.heads) for each in (query_TBA, keys_SBA, values_SBD))
        padding = padding_SB.repeat_interleave(self.heads, 1)
        context, weights = padded_attend(queries, keys, values, padding, memory.v_A, self.function)
        return context.reshape(*query_TBD.shape[:2], -1), weights.unflatten(1, (-1, self.heads)).mean(2)

    def _keys(self, values_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return (keys, V) of `Memory`."""
        keys_NA, v_A = self.key(values_ND), self.v_N
        if self.function == "product":
            keys_NA = keys_NA.tanh()
        elif self.function == "normalised":
            keys_NA = keys_NA + self.bias_N.to(keys_NA.dtype)
            v_A = self.gain * v_A / v_A.norm()
        return keys_NA, v_A.to(keys_NA.dtype)

    def _values(self, values_ND: Tensor) -> Tensor:
        """Return the values that contexts are means of."""
        return self.value(values_ND) if self.heads > 1 else values_ND

    def _query(self, query: Tensor, v_A: Tensor) -> Tensor:
        """Return projected queries; in the product form after tanh, and times V."""
        query = self.query(query)
        return query.tanh() * v_A if self.function == "product" else query


def _by_head(x_XBA: Tensor, heads: int) -> Tensor:
    """Return x_XBA as B * H sentences of A/H values each, which are the heads of sentence 0, then those of 1, ..."""
    return x_XBA.unflatten(2, (heads, -1)).flatten(1, 2)
