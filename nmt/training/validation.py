"""Validation during training: perplexity of the dev set, and BLEU of its greedy translations."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nmt.config import Config, TrainingConfig
from nmt.data.held_out import LONGEST_SIDE
from nmt.data.prepare import Prepared
from nmt.decoding.directions import Directions
from nmt.decoding.loading import longest_source
from nmt.decoding.translator import Translator
from nmt.errors import UserError
from nmt.evaluation.perplexity import perplexity
from nmt.evaluation.scores import corpus_scores
from nmt.evaluation.tokenizers import Tokenizer, bleu_tokenizer, misfit
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.expert_parallel import independent_passes
from nmt.parallel.mesh import World
from nmt.wording import counted

LEAST_BLEU = 1.0
"""BLEU below this does not rank models: it depends on a few words in common."""


@dataclass(frozen=True)
class Validated:
    """Figures of one validation."""

    perplexity: float
    """Per subword."""
    word_perplexity: float
    bleu: float | None
    """Greedy BLEU; None with training.validation_sentences=0."""
    cut: int
    """Pairs that were cut to `LONGEST_SIDE` subwords per side."""
    translated: int
    """Sentences of which BLEU is."""

    def score(self, best_by: str) -> float | None:
        """Return what selects the best checkpoint: lower is better. None if BLEU is too low to rank models."""
        if best_by != "bleu" or self.bleu is None:
            return self.perplexity
        return None if self.bleu < LEAST_BLEU else -self.bleu

    def __str__(self) -> str:
        line = f"dev perplexity {self.perplexity:.2f}"
        if self.cut:
            line += f" ({counted(self.cut, 'pair')} cut to {LONGEST_SIDE:,} subwords per side)"
        if self.bleu is not None:
            line += f", greedy BLEU {self.bleu:.1f} of {self.translated} sentences"
        return line


class Validation:
    """Validation of a run on its dev set, by all processes together.

    UserError if `training.best_by` is bleu and BLEU of this dev set would be meaningless.
    """

    def __init__(self, config: Config, prepared: Prepared, world: World) -> None:
        self._world, self._training = world, config.training
        self._directions = Directions.of(config, prepared.manifest, config.run.name, str(prepared.path))
        self._subwords = prepared.subwords()
        self._sources, self._targets, _ = prepared.text("dev")
        self._tokenizer = bleu_tokenizer(config.evaluation.tokenize, config.corpus.target_language)
        self.doubts = doubts(config.training, self._tokenizer, self._targets)
        # Experts as in training: validation scores must not depend on settings for translation.
        self._greedy = replace(
            config.decoding, beam_size=1, precision=config.training.precision, experts_per_token=0, retry=False
        )
        self._longest = longest_source(prepared.manifest, config)

    def run(self, model: Seq2Seq) -> Validated:
        """Score the dev set with a model in training, which is in training mode again after that."""
        # In bf16, the translator has a copy of the parameters, which is freed when this function returns.
        translator = Translator(
            model.eval(), self._subwords, self._greedy, self._world.device, self._longest, directions=self._directions
        )
        measured = perplexity(
            translator.model, self._subwords, self._sources, self._targets, self._training.batch_tokens, self._world
        )
        bleu, count = None, self._training.validation_sentences
        sources, targets = self._sources[:count], self._targets[:count]
        if count:
            bleu = validation_bleu(translator, sources, targets, self._tokenizer.name, self._world)
        model.train()
        return Validated(measured.pieces, measured.words, bleu, len(measured.cut), len(sources))


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
