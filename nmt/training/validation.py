"""Validation during training: perplexity of the dev set and of watched texts, and BLEU of greedy translations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import NamedTuple

from nmt.config import Config, Direction, TrainingConfig
from nmt.data.held_out import LONGEST_SIDE
from nmt.data.mixture import Corpora
from nmt.decoding.directions import Directions, places_by_direction
from nmt.decoding.loading import longest_source
from nmt.decoding.translation import Options
from nmt.decoding.translator import Translator
from nmt.errors import UserError
from nmt.evaluation.perplexity import Perplexity, perplexity
from nmt.evaluation.scores import corpus_scores
from nmt.evaluation.tokenizers import Tokenizer, bleu_tokenizer, misfit
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.expert_parallel import independent_passes
from nmt.parallel.mesh import World
from nmt.training.watching import WatchedText, watched_texts
from nmt.wording import counted

LEAST_BLEU = 1.0
"""BLEU below this does not rank models: it depends on a few words in common."""


@dataclass(frozen=True)
class Validated:
    """Figures of one dev text."""

    perplexity: float
    """Per subword."""
    word_perplexity: float
    bleu: float | None
    """Greedy BLEU, of several directions the mean; None with training.validation_sentences=0."""
    cut: int
    """Pairs that were cut to `LONGEST_SIDE` subwords per side."""
    translated: int
    """Sentences of which BLEU is."""
    directions: Mapping[str, "Validated"] = field(default_factory=dict)
    """Figures of each direction; empty for a text in a single one."""

    def score(self, best_by: str) -> float | None:
        """Return what selects the best checkpoint: lower is better. None if BLEU is too low to rank models."""
        if best_by != "bleu" or self.bleu is None:
            return self.perplexity
        return None if self.bleu < LEAST_BLEU else -self.bleu

    def curves(self) -> dict[str, float]:
        """Return the figures that curves show, by their names."""
        figures = {"perplexity": self.perplexity, "bleu": self.bleu}
        return {name: figure for name, figure in figures.items() if figure is not None}

    def __str__(self) -> str:
        line = f"dev perplexity {self.perplexity:.2f}"
        if self.cut:
            line += f" ({counted(self.cut, 'pair')} cut to {LONGEST_SIDE:,} subwords per side)"
        if self.bleu is not None:
            line += f", greedy BLEU {self.bleu:.1f} of {self.translated} sentences"
        return line + self._extremes()

    def _extremes(self) -> str:
        """Return which directions are best and worst, by BLEU if it was measured; empty for a single direction."""
        bleu = {name: each.bleu for name, each in self.directions.items() if each.bleu is not None}
        values = bleu or {name: each.perplexity for name, each in self.directions.items()}
        if len(values) < 2:
            return ""
        digits, ranked = 1 if bleu else 2, sorted(values, key=lambda name: values[name])
        low, high = (f"{name} {values[name]:.{digits}f}" for name in (ranked[0], ranked[-1]))
        mean = "mean of " if bleu else ""
        return f" ({mean}{len(values)} directions, {high} the highest, {low} the lowest)"


class DevPart(NamedTuple):
    """The pairs of one direction in a dev text."""

    direction: Direction
    sources: list[str]
    targets: list[str]
    translated: int
    """Number of its first sentences that are translated for BLEU."""
    tokenizer: Tokenizer


def dev_parts(
    config: Config, sources: Sequence[str], targets: Sequence[str], directions: Sequence[Direction]
) -> list[DevPart]:
    """Return a dev text by direction, given that of each pair.

    `training.validation_sentences` counts the first lines of the whole text, in which directions take turns.
    """
    count = config.training.validation_sentences
    parts = []
    for direction, own in places_by_direction(directions).items():
        parts.append(
            DevPart(
                direction,
                [sources[place] for place in own],
                [targets[place] for place in own],
                sum(place < count for place in own),
                bleu_tokenizer(config.evaluation.tokenize, direction.target),
            )
        )
    return parts


class Validation:
    """Validation of a run on its dev set, and on the texts of `training.watch`, by all processes together.

    UserError if `training.best_by` is bleu and BLEU of this dev set would be meaningless, or if a watched text is in a
    direction that the run does not know. Errors of watched texts are those of `watched_texts`.
    """

    def __init__(self, config: Config, corpora: Corpora, world: World) -> None:
        self._world, self._training = world, config.training
        prepared, record = corpora.own, corpora.record()
        self._subwords = prepared.subwords()
        known = Directions.of(config, record, config.run.name, str(prepared.path))
        sources, targets, _ = prepared.text("dev")
        own = corpora.directions("dev") or [config.corpus.direction] * len(sources)
        self._own = dev_parts(config, sources, targets, own)
        self.doubts = doubts(config.training, self._own)
        watched = watched_texts(config.training.watch, [str(part.direction) for part in self._own])
        for text in watched:
            _check_known(text, known)
        self._watched = {text.name: dev_parts(config, *text[1:]) for text in watched}
        trained = (*known.trained, *own, *(each for text in watched for each in text.directions))
        self._directions = replace(known, trained=tuple(dict.fromkeys(trained)))
        # Experts as in training: validation scores must not depend on settings for translation.
        self._greedy = replace(
            config.decoding, beam_size=1, precision=config.training.precision, experts_per_token=0, retry=False
        )
        self._longest = longest_source(record, config)

    def run(self, model: Seq2Seq) -> tuple[Validated, dict[str, Validated]]:
        """Return the scores of the dev set and of each watched text, by its name, with a model in training.

        The model is in training mode again after that.
        """
        # In bf16, the translator has a copy of the parameters, which is freed when this function returns.
        translator = Translator(
            model.eval(), self._subwords, self._greedy, self._world.device, self._longest, directions=self._directions
        )
        own = self._scored(translator, self._own)
        watched = {name: self._scored(translator, parts) for name, parts in self._watched.items()}
        model.train()
        return own, watched

    def _scored(self, translator: Translator, parts: list[DevPart]) -> Validated:
        """Return the scores of a dev text in several parts: all its pairs count equally, and all its directions."""
        if len(parts) == 1:
            return self._scored_part(translator, parts[0])[1]
        measured = [self._scored_part(translator, part) for part in parts]
        whole = Perplexity.of_all([each for each, _ in measured])
        found = {str(part.direction): scores for part, (_, scores) in zip(parts, measured, strict=True)}
        bleu = [each.bleu for each in found.values() if each.bleu is not None]
        cut, translated = (sum(getattr(each, name) for each in found.values()) for name in ("cut", "translated"))
        return Validated(whole.pieces, whole.words, fmean(bleu) if bleu else None, cut, translated, found)

    def _scored_part(self, translator: Translator, part: DevPart) -> tuple[Perplexity, Validated]:
        options = replace(translator.options, direction=part.direction)
        read = translator.pairs(part.sources, part.targets, options)
        measured = perplexity(
            translator.model,
            self._subwords,
            read.sources,
            read.targets,
            self._training.batch_tokens,
            self._world,
            prefixes=read.symbols,
        )
        bleu, count = None, part.translated
        if count:
            sentences = part.sources[:count], part.targets[:count]
            bleu = validation_bleu(translator, *sentences, part.tokenizer.name, self._world, options)
        return measured, Validated(measured.pieces, measured.words, bleu, len(measured.cut), count)


def _check_known(text: WatchedText, known: Directions) -> None:
    """Raise UserError if a watched text has a direction that the model can have learned nothing of."""
    for direction in dict.fromkeys(text.directions):
        if direction not in known.trained and direction.target not in known.symbols.languages:
            raise UserError(
                f"training.watch: {text.name} is {direction}, but this run translates "
                f"{', '.join(map(str, known.trained))}: watch texts in its own directions"
            )


def validation_bleu(
    translator: Translator,
    sources: Sequence[str],
    targets: Sequence[str],
    tokenizer: str,
    world: World,
    options: Options,
) -> float:
    """Return greedy BLEU of these sentences, translated by all processes: cheap enough to watch, not one to publish."""
    # Each process gets every `size`th sentence, as neighbours may have similar lengths and costs.
    with independent_passes(translator.model):
        own = [translation.text for translation in translator.translate(sources[world.rank :: world.size], options)]
    hypotheses = [""] * len(sources)
    for rank, share in enumerate(world.gather(own)):
        hypotheses[rank :: world.size] = share
    return world.on_main(lambda: corpus_scores(hypotheses, [list(targets)], tokenizer)[0].value)


def doubts(training: TrainingConfig, parts: Sequence[DevPart]) -> list[str]:
    """Return lines to print: why validation on a dev text may be meaningless, or which unusual tokenisers it uses.

    UserError if `training.best_by` is bleu and BLEU would be meaningless.
    """
    if not any("".join(part.targets).strip() for part in parts):
        return ["every target sentence of the dev set is blank: validation is meaningless"]
    found = []
    for part in parts:
        if not part.translated:
            continue
        doubt = misfit(part.tokenizer.name, part.targets[: part.translated])
        if doubt and training.best_by == "bleu":
            raise UserError(f"training.best_by=bleu: {doubt}, or training.best_by=perplexity")
        found.append(doubt or (str(part.tokenizer) if part.tokenizer.name != "13a" else ""))
    return [line for line in dict.fromkeys(found) if line]
