"""How good the model in training is on held-out text, besides perplexity: BLEU of its own translations."""

from collections.abc import Sequence

from nmt.config import TrainingConfig
from nmt.decoding.translator import Translator
from nmt.errors import UserError
from nmt.evaluation.scores import Tokenizer, corpus_scores, misfit
from nmt.parallel.expert_parallel import independent_passes
from nmt.parallel.mesh import World

LEAST_BLEU = 1.0
"""Models with less cannot be told apart by it: a few words in common decide."""


def validation_bleu(
    translator: Translator, sources: Sequence[str], targets: Sequence[str], tokenizer: str, world: World
) -> float:
    """Greedy BLEU of these sentences, shared out over all processes: a cheap figure to watch, not the one to report."""
    # Neighbours may be alike in length, and cost alike: each process gets every `size`th.
    with independent_passes(translator.model):
        own = [translation.text for translation in translator.translate(sources[world.rank :: world.size])]
    hypotheses = [""] * len(sources)
    for rank, share in enumerate(world.gather(own)):
        hypotheses[rank :: world.size] = share
    return world.on_main(lambda: corpus_scores(hypotheses, [list(targets)], tokenizer)[0].value)


def doubts(training: TrainingConfig, tokenizer: Tokenizer, targets: Sequence[str]) -> list[str]:
    """Lines for a person: why validation on these references may say nothing, or is not what is usual.

    UserError if `training.best_by` is bleu and BLEU would mean nothing.
    """
    if not "".join(targets).strip():
        return ["every target sentence of the dev set is blank: validation says nothing"]
    if not training.validation_sentences:
        return []
    doubt = misfit(tokenizer.name, targets[: training.validation_sentences])
    if doubt and training.best_by == "bleu":
        raise UserError(f"training.best_by=bleu: {doubt}, or training.best_by=perplexity")
    return [doubt] if doubt else [str(tokenizer)] if tokenizer.name != "13a" else []
