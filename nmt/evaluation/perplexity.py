"""Perplexity of given translations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from nmt.batch import Batch
from nmt.data.held_out import HeldOut, encode_pairs, eval_batches
from nmt.data.subwords import Subwords
from nmt.decoding.scoring import score
from nmt.device import shortage_told
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.mesh import World
from nmt.wording import counted


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood, end of sentence included.

    `pieces` counts the subword pieces of the references (the paper's "wordpiece perplexity"); `words` counts their
    blank-separated words, so that vocabularies can be compared.
    """

    pieces: float
    words: float
    cut: tuple[int, ...] = ()
    """Pairs, from 0, that were longer than `nmt.data.held_out.LONGEST_SIDE`: the rest of them was not read."""


@torch.inference_mode()
def perplexity(
    model: Seq2Seq,
    subwords: Subwords,
    sources: Sequence[str],
    targets: Sequence[str],
    batch_tokens: int,
    world: World,
    experts_per_token: int = 0,
) -> Perplexity:
    """Perplexity of `targets` given `sources`, shared out over all processes.

    The model must be in evaluation mode, and is used in the precision that it has (`WorkingWeights`).
    `experts_per_token`: how many experts each token wakes, 0 for as many as in training. Of very long pairs only a
    beginning is scored, so that memory is bounded (`encode_pairs`). MemoryLimitError that names the longest pair if it
    does not suffice all the same.
    """
    held_out = encode_pairs(subwords, sources, targets)
    batches = list(eval_batches(held_out.sources, held_out.targets, batch_tokens))
    nll = torch.zeros((), dtype=torch.float64, device=world.device)
    for first in range(0, len(batches), world.size):
        # Experts need all processes in every pass: in the last round some repeat a batch that does not count.
        mine = first + world.rank
        batch = batches[min(mine, len(batches) - 1)]
        longest = partial(_longest_pair, batch, held_out)
        with shortage_told(longest, "shorten or remove that line"):
            log_prob_TB = score(model, batch.to(world.device), experts_per_token).log_prob_TR
        if mine < len(batches):
            nll -= log_prob_TB.sum(dtype=torch.float64)
    pieces = sum(batch.num_target_tokens for batch in batches)
    total = float(world.sum(nll))
    words = _num_words(subwords, targets, held_out)
    per_piece, per_word = (math.exp(min(total / count, 50.0)) for count in (pieces, words))
    return Perplexity(per_piece, per_word, tuple(held_out.cut))


def _num_words(subwords: Subwords, targets: Sequence[str], held_out: HeldOut) -> int:
    """Words and ends of sentence that were scored."""
    words = sum(len(target.split()) + 1 for target in targets)
    for pair in held_out.cut:
        read = subwords.decode(held_out.targets[pair].tolist())
        words -= len(targets[pair].split()) - len(read.split())
    return words


def _longest_pair(batch: Batch, held_out: HeldOut) -> str:
    """What is scored, for a message."""
    pairs_B = batch.pairs_B.numpy()
    lengths_2B = np.array([[len(side[pair]) for pair in pairs_B] for side in (held_out.sources, held_out.targets)])
    longest = int(lengths_2B.prod(0).argmax())
    source, target = lengths_2B[:, longest]
    return (
        f"scoring {counted(len(pairs_B), 'sentence pair')}, the longest of which, line "
        f"{pairs_B[longest] + 1:,}, has {source:,} and {target:,} pieces"
    )
