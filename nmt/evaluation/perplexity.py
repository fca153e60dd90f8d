"""Perplexity of reference translations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from nmt.batch import Batch
from nmt.data.held_out import HeldOut, encode_pairs, eval_batches
from nmt.data.subwords import Subwords
from nmt.decoding.scoring import ensemble_log_probs
from nmt.device import shortage_told
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.mesh import World
from nmt.wording import counted

_MOST_NATS = 50.0  # per subword or word, so that a perplexity is always a number


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood, end of sentence included.

    `pieces` is per subword of the references (the paper's "wordpiece perplexity"). `words` is per blank-separated word,
    so that models with different vocabularies can be compared. So can `bits`, for languages without blanks too.
    """

    nll: float
    """Negative log-likelihood of all references, in nats."""
    num_pieces: int
    num_words: int
    num_characters: int
    """The ends of sentences are in each of these three numbers."""
    cut: tuple[int, ...] = ()
    """Numbers, from 0, of the pairs with a side that was cut to `nmt.data.held_out.LONGEST_SIDE` subwords."""

    @property
    def pieces(self) -> float:
        """Per subword of the references."""
        return math.exp(min(self.nll / self.num_pieces, _MOST_NATS))

    @property
    def words(self) -> float:
        """Per blank-separated word of the references."""
        return math.exp(min(self.nll / self.num_words, _MOST_NATS))

    @property
    def bits(self) -> float:
        """Negative log-likelihood in bits per character, where the end of a sentence counts as a character."""
        return self.nll / math.log(2.0) / self.num_characters

    @classmethod
    def of_all(cls, parts: Sequence["Perplexity"]) -> "Perplexity":
        """Return the perplexity of several texts as one. `cut` is empty, since numbers count the pairs of one text."""
        return cls(
            math.fsum(each.nll for each in parts),
            sum(each.num_pieces for each in parts),
            sum(each.num_words for each in parts),
            sum(each.num_characters for each in parts),
        )


@torch.inference_mode()
def perplexity(
    model: Seq2Seq,
    subwords: Subwords,
    sources: Sequence[str],
    targets: Sequence[str],
    batch_tokens: int,
    world: World,
    experts_per_token: int = 0,
    others: Sequence[Seq2Seq] = (),
    prefixes: Sequence[Sequence[int]] = (),
) -> Perplexity:
    """Return the perplexity of `targets` given `sources`, computed by all processes together.

    The model must be in evaluation mode. It is used in its own precision (`WorkingWeights`). Each token has
    `experts_per_token` active experts; 0: as many as in training. With `others`, an ensemble predicts.
    `prefixes` are as for `encode_pairs`, which cuts very long pairs, to bound memory. MemoryLimitError, which names the
    longest pair of the batch, if memory still runs out.
    """
    held_out = encode_pairs(subwords, sources, targets, prefixes=prefixes)
    batches = list(eval_batches(held_out.sources, held_out.targets, batch_tokens))
    nll = torch.zeros((), dtype=torch.float64, device=world.device)
    for first in range(0, len(batches), world.size):
        # Experts need all processes in every pass: in the last round, some repeat a batch, which does not count.
        mine = first + world.rank
        batch = batches[min(mine, len(batches) - 1)]
        longest = partial(_longest_pair, batch, held_out)
        with shortage_told(longest, "shorten or remove that line"):
            log_prob_TB = ensemble_log_probs([model, *others], batch.to(world.device), experts_per_token)
        if mine < len(batches):
            nll -= log_prob_TB.sum(dtype=torch.float64)
    pieces = sum(batch.num_target_tokens for batch in batches)
    total = float(world.sum(nll))
    scored = _scored(subwords, targets, held_out)
    words = sum(len(target.split()) + 1 for target in scored)
    characters = sum(len(target) + 1 for target in scored)
    return Perplexity(total, pieces, words, characters, tuple(held_out.cut))


def _scored(subwords: Subwords, targets: Sequence[str], held_out: HeldOut) -> list[str]:
    """Return the text that was scored: of pairs that were cut, what is left."""
    scored = list(targets)
    for pair in held_out.cut:
        scored[pair] = subwords.decode(held_out.targets[pair].tolist())
    return scored


def _longest_pair(batch: Batch, held_out: HeldOut) -> str:
    """Describe a batch and its longest pair, for a message."""
    pairs_B = batch.pairs_B.numpy()
    lengths_2B = np.array([[len(side[pair]) for pair in pairs_B] for side in (held_out.sources, held_out.targets)])
    longest = int(lengths_2B.prod(0).argmax())
    source, target = lengths_2B[:, longest]
    return (
        f"scoring {counted(len(pairs_B), 'sentence pair')}, the longest of which, line "
        f"{pairs_B[longest] + 1:,}, has {source:,} and {target:,} subwords"
    )
