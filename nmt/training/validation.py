"""Validation by BLEU, beside perplexity: how good the model's translations of held-out text are during training."""

from collections.abc import Sequence

from nmt.config import TrainingConfig
from nmt.decoding.translator import Translator
from nmt.errors import UserError
from nmt.evaluation.scores import corpus_scores
from nmt.evaluation.tokenizers import Tokenizer, misfit
from nmt.parallel.expert_parallel import independent_passes
from nmt.parallel.mesh import World

LEAST_BLEU = 1.0
"""BLEU below this does not rank models: it depends on a few words in common."""


def validation_bleu(
    translator: Translator, sources: Sequence[str], targets: Sequence[str], tokenizer: str, world: World
) -> float:
    """Return greedy BLEU of these sentences, translated by all processes: cheap enough to watch, not one to publish."""
    # Each process gets every `size`th sentence, as neighbours may have similar lengths and costs.
    with independent_passes(translator.model):
        own = [translation.text for translation in translator.translate(sources[world.rank :: world.size])]
    hypotheses = [""] * len(sources)
    for rank, share in enumerate(world.gather(own)):
        hypotheses[rank :: world.size] = share
    return world.on_main(lambda: corpus_scores(hypotheses, [list(targets)], tokenizer)[0].value)


def doubts(training: TrainingConfig, tokenizer: Tokenizer, targets: Sequence[str]) -> list[str]:
    """Return lines to print: why validation on these references may be meaningless, or which unusual tokeniser it uses.

    UserError if `training.best_by` is bleu and BLEU would be meaningless.
    """
    if not "".join(targets).strip():
        return ["every target sentence of the dev set is blank: validation is meaningless"]
    if not training.validation_sentences:
        return []
    doubt = misfit(tokenizer.name, targets[: training.validation_sentences])
    if doubt and training.best_by == "bleu":
        raise UserError(f"training.best_by=bleu: {doubt}, or training.best_by=perplexity")
    return [doubt] if doubt else [str(tokenizer)] if tokenizer.name != "13a" else []
