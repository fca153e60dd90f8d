"""How good the model in training is on held-out text, besides perplexity: BLEU of its own translations."""

from collections.abc import Sequence

from nmt.decoding.translator import Translator
from nmt.evaluation.scores import corpus_scores


def validation_bleu(translator: Translator, sources: Sequence[str], targets: Sequence[str], tokenizer: str) -> float:
    """Greedy BLEU of these sentences: a cheap figure to watch, not the one to report."""
    hypotheses = [translation.text for translation in translator.translate(sources)]
    return corpus_scores(hypotheses, [list(targets)], tokenizer)[0].value
