"""Sampling: each subword is drawn from the model's distribution, sharpened or cut off as requested.

    p(v) = softmax(logits / temperature), over the `top_k` most probable subwords and, of these, over the fewest most
    probable ones whose probabilities add up to at least `top_p`; without `top_k`, over 1,000 at most

A draw is the argmax of log p(v) + g(v), with independent g(v) = -log(-log u(v)) and u uniform (the "Gumbel-max trick").
Here, u is a hash of the sentence's random stream, the position and the subword. So a draw depends neither on the batch
nor on the order of sentences, and needs no state that a recorded position would have to keep.

A sentence of n draws is searched as n sentences with a beam of 1, each with its own stream.

Letters: B sentences (draws), K hypotheses per sentence, which is 1, V vocabulary, J subwords that may be drawn.
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
_MOST_SORTED = 1000  # subwords among which `top_p` chooses
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
        log_weight_BJ, token_BJ = self.log_weights(logits_BV)
        noise_BJ = gumbel(rules.stream_B, length, token_BJ)
        token_B1 = token_BJ.gather(1, (log_weight_BJ + noise_BJ).argmax(dim=1, keepdim=True))
        token_log_prob_1B = (logits_BV.gather(1, token_B1) - normaliser_B[:, None]).T
        token_1B = token_B1.T
        return Candidates(log_prob_KB + token_log_prob_1B, token_log_prob_1B, torch.zeros_like(token_1B), token_1B)

    def log_weights(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """Return (log p of subwords but for a constant, minus infinity if they are not drawn; the ids of these)."""
        size = logits_BV.shape[1]
        if not self.top_k and self.top_p == 1.0:
            return logits_BV / self.temperature, torch.arange(size, device=logits_BV.device).expand_as(logits_BV)
        # The most probable ones in falling order; to sort the whole vocabulary would take longer than all else.
        most_BJ, token_BJ = logits_BV.topk(min(self.top_k or _MOST_SORTED, size), dim=1)
        scaled_BJ = most_BJ / self.temperature
        if self.top_p < 1.0:
            among = scaled_BJ if self.top_k else logits_BV / self.temperature
            share_BJ = (scaled_BJ - among.logsumexp(dim=1, keepdim=True)).exp()
            # One is kept if the more probable ones do not add up to top_p yet. So the first always is.
            scaled_BJ = scaled_BJ.masked_fill(share_BJ.cumsum(1) - share_BJ >= self.top_p, NEVER)
        return scaled_BJ, token_BJ


def gumbel(stream_B: Tensor, length: Tensor, token_BJ: Tensor) -> Tensor:
    """Return g_BJ, float32 draws of the standard Gumbel distribution: for subwords as number `length` of a stream."""
    key_B1 = mix(stream_B ^ mix(length))[:, None]
    bits_BJ = mix(key_B1 ^ token_BJ)
    # The largest g, which decide a draw, come from the smallest -log(1 - u). Those are exact for u near 0, not near 1.
    uniform_BJ = bits_BJ.float().add_(0.5).mul_(2.0**-_BITS).clamp_(max=_ALMOST_ONE)
    return uniform_BJ.neg_().log1p_().neg_().log_().neg_()


def stream_of(seed: int, draw: int, source: np.ndarray) -> int:
    """Return the random stream of one draw for a source (subword ids), from 0 to 2^32 - 1.

    Equal lines have equal streams, so they get equal translations wherever they are.
    """
    content = struct.pack("<qq", seed, draw) + source.astype("<i4").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=_BITS // 8).digest(), "little")
