"""Sampling: each subword is drawn from the model's distribution, sharpened or cut off as requested.

    p(v) = softmax(logits / temperature), over the `top_k` most probable subwords and, of these, over the fewest most
    probable ones whose probabilities add up to at least `top_p`

A draw is the argmax of log p(v) + g(v), with independent g(v) = -log(-log u(v)) and u uniform (the "Gumbel-max trick").
Here, u is a hash of the sentence's random stream, the position and the subword. So a draw depends neither on the batch
nor on the order of sentences, and needs no state that a recorded position would have to keep.

A sentence of n draws is searched as n sentences with a beam of 1, each with its own stream.

Letters: B sentences (draws), K hypotheses per sentence, which is 1, V vocabulary.
"""

import hashlib
import struct
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nmt.decoding.rules import NEVER, Rules
from nmt.decoding.trace import Candidates
from nmt.model.kernels.mixing import mix

_BITS = 32
# The largest float32 below 1.
_ALMOST_ONE = 1.0 - 2.0**-24


class Sampling(NamedTuple):
    """A way to choose subwords: see the head of this file."""

    temperature: float  # above 0
    top_k: int  # 0: all
    top_p: float  # above 0; 1: all

    def choose(
        self, logits_KBV: Tensor, log_prob_KB: Tensor, rules: Rules, length: Tensor, history_KBL: Tensor
    ) -> Candidates:
        """Return one continuation per sentence, drawn at random; a `Choose` for a beam of 1.

        Its log-probability is that of the model, whatever the temperature. A subword that is forbidden is never drawn.
        """
        assert len(logits_KBV) == 1
        assert rules.stream_B is not None
        normaliser_B = logits_KBV[0].float().logsumexp(dim=1)
        rules.forbid_(logits_KBV, length, history_KBL)
        logits_BV = logits_KBV[0].float()
        noise_BV = gumbel(rules.stream_B, length, logits_BV.shape[1])
        token_1B = (self.log_weights(logits_BV) + noise_BV).argmax(dim=1)[None]
        token_log_prob_1B = logits_BV.gather(1, token_1B.T).T - normaliser_B
        return Candidates(log_prob_KB + token_log_prob_1B, token_log_prob_1B, torch.zeros_like(token_1B), token_1B)

    def log_weights(self, logits_BV: Tensor) -> Tensor:
        """Return log p of each subword, except for a constant; minus infinity for those that are never drawn.

        Subwords that are as probable as the last one kept are kept as well.
        """
        scaled_BV = logits_BV / self.temperature
        if 0 < self.top_k < scaled_BV.shape[1]:
            least_B1 = scaled_BV.topk(self.top_k, dim=1).values[:, -1:]
            scaled_BV = scaled_BV.masked_fill(scaled_BV < least_B1, NEVER)
        if self.top_p < 1.0:
            sorted_BV, _ = scaled_BV.sort(dim=1, descending=True)
            share_BV = sorted_BV.softmax(dim=1)
            # One is kept if the more probable ones do not add up to top_p yet. So the first always is.
            kept_B1 = (share_BV.cumsum(1) - share_BV < self.top_p).sum(1, keepdim=True)
            least_B1 = sorted_BV.gather(1, kept_B1.clamp(min=1) - 1)
            scaled_BV = scaled_BV.masked_fill(scaled_BV < least_B1, NEVER)
        return scaled_BV


def gumbel(stream_B: Tensor, length: Tensor, vocabulary: int) -> Tensor:
    """Return g_BV, float32 draws of the standard Gumbel distribution for subword number `length` of each stream."""
    key_B1 = mix(stream_B ^ mix(length))[:, None]
    bits_BV = mix(key_B1 ^ torch.arange(vocabulary, device=stream_B.device))
    # The largest g, which decide a draw, come from the smallest -log(1 - u). Those are exact for u near 0, not near 1.
    uniform_BV = ((bits_BV + 0.5) * 2.0**-_BITS).clamp(max=_ALMOST_ONE)
    return -(-torch.log1p(-uniform_BV)).log()


def stream_of(seed: int, draw: int, source: np.ndarray) -> int:
    """Return the random stream of one draw for a source (subword ids), from 0 to 2^32 - 1.

    Equal lines have equal streams, so they get equal translations wherever they are.
    """
    content = struct.pack("<qq", seed, draw) + source.astype("<i4").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=_BITS // 8).digest(), "little")
