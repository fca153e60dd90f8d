"""How good the model is on held-out text: perplexity of the references, BLEU of its own translations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nmt.data.batching import eval_batches
from nmt.data.subwords import Subwords
from nmt.decoding.translator import Translator
from nmt.device import autocast
from nmt.evaluation.scores import corpus_scores
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.mesh import World


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood, end of sentence included.

    `pieces` counts the subword pieces of the references (the paper's "wordpiece perplexity"); `words` counts their
    blank-separated words, so that vocabularies can be compared.
    """

    pieces: float
    words: float


@torch.inference_mode()
def perplexity(
    model: Seq2Seq,
    subwords: Subwords,
    sources: Sequence[str],
    targets: Sequence[str],
    batch_tokens: int,
    world: World,
    precision: str,
    experts_per_token: int = 0,
) -> Perplexity:
    """Perplexity of `targets` given `sources`, shared out over all processes; the model must be in evaluation mode.

    Each token wakes `experts_per_token` experts, or for 0 as many as in training.
    """
    encoded = (subwords.encode_batch(list(sources)), subwords.encode_batch(list(targets)))
    batches = list(eval_batches(*encoded, batch_tokens))
    nll = torch.zeros((), dtype=torch.float64, device=world.device)
    for first in range(0, len(batches), world.size):
        # Experts need all processes in every pass: in the last round some repeat a batch that does not count.
        mine = first + world.rank
        with autocast(world.device, precision):
            output = model(batches[min(mine, len(batches) - 1)].to(world.device), 0.0, experts_per_token)
        if mine < len(batches):
            nll += output.nll
    pieces = sum(batch.num_target_tokens for batch in batches)
    words = sum(len(target.split()) + 1 for target in targets)
    total = float(world.sum(nll))
    return Perplexity(math.exp(min(total / pieces, 50.0)), math.exp(min(total / words, 50.0)))


def validation_bleu(translator: Translator, sources: Sequence[str], targets: Sequence[str]) -> float:
    """Greedy BLEU of these sentences: a cheap figure to watch, not the one to report."""
    hypotheses = [translation.text for translation in translator.translate(sources)]
    return corpus_scores(hypotheses, list(targets))[0].value
