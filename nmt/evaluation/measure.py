"""Translate a set of sentences and score the translations."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nmt.config import Config
from nmt.decoding.translation import Options
from nmt.decoding.translator import Translator
from nmt.errors import CheckpointError
from nmt.evaluation.perplexity import Perplexity, perplexity
from nmt.evaluation.scores import Score
from nmt.evaluation.sets import EvaluationSet
from nmt.parallel.mesh import World

_BATCH_TOKENS = 8192

Scorer = Callable[[list[str], Sequence[list[str]]], list[Score]]
"""A function that scores translations against the references of each translator."""


@dataclass(frozen=True)
class Measured:
    """Translations of a set and their scores."""

    hypotheses: list[str]
    seconds: float
    """Time of the translation."""
    scores: list[Score]
    perplexity: Perplexity
    """Perplexity of the references by the first translator."""


def timed(translator: Translator, sources: Sequence[str], options: Options) -> tuple[list[str], float]:
    """Return (translations, seconds they took)."""
    started = time.perf_counter()
    hypotheses = [translation.text for translation in translator.translate(sources, options)]
    return hypotheses, time.perf_counter() - started


def measure(
    translator: Translator, text: EvaluationSet, scorer: Scorer, config: Config, options: Options | None = None
) -> Measured:
    """Translate `text` with `options` (None: the translator's own) and score the translations.

    CheckpointError if the model's outputs are not finite.
    """
    options = text.options(options or translator.options)
    hypotheses, seconds = timed(translator, text.sources, options)
    scores = scorer(hypotheses, text.references)
    read = translator.pairs(text.sources, text.references[0], options)
    found = perplexity(
        translator.model,
        translator.subwords,
        read.sources,
        read.targets,
        min(config.training.batch_tokens, _BATCH_TOKENS),
        World(translator.device),
        options.experts_per_token,
        translator.models[1:],
        read.symbols,
    )
    if math.isnan(found.pieces):
        raise CheckpointError("the perplexity is not a number: choose other parameters with decoding.checkpoint=STEP")
    return Measured(hypotheses, seconds, scores, found)
