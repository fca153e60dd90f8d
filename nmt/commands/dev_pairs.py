"""Pairs of a run's dev set, each in its direction: what networks are compared on."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from nmt.config import Config, Direction
from nmt.decoding.directions import places_by_direction
from nmt.decoding.normalising import Pairs
from nmt.decoding.translator import Translator
from nmt.errors import DataError
from nmt.evaluation.scores import Comparison, paired_bootstrap
from nmt.evaluation.tokenizers import bleu_tokenizer, describe
from nmt.run import RunDirectory


class DevPairs(NamedTuple):
    """Sentences, their translations, and the direction of each; None: the only one of the run."""

    sources: list[str]
    targets: list[str]
    directions: list[Direction | None]

    @classmethod
    def of(cls, run: RunDirectory) -> "DevPairs":
        """Return the whole dev set. DataError if there is none."""
        sources, targets, _ = run.text("dev")
        if not sources:
            raise DataError(f"{run.path} has no dev set, which resizing measures with: give a run that has one")
        return cls(sources, targets, [*run.directions("dev")] or [None] * len(sources))

    def places(self) -> dict[Direction | None, list[int]]:
        """Return the places of the pairs of each direction."""
        return places_by_direction(self.directions)

    def spread(self, count: int) -> "DevPairs":
        """Return at most `count` pairs, or one of each direction, spread evenly over those of each direction."""
        places = self.places()
        most = max(count // len(places), 1)
        chosen = [
            some[index * len(some) // min(most, len(some))]
            for some in places.values()
            for index in range(min(most, len(some)))
        ]
        return DevPairs(
            [self.sources[place] for place in chosen],
            [self.targets[place] for place in chosen],
            [self.directions[place] for place in chosen],
        )

    def read(self, translator: Translator) -> Pairs:
        """Return the pairs as a model reads them."""
        return translator.pairs(self.sources, self.targets, directions=self.directions)

    def translations(self, translator: Translator) -> list[str]:
        """Return the translation of each source."""
        found = [""] * len(self.sources)
        for direction, places in self.places().items():
            options = replace(translator.options, direction=direction)
            translated = translator.translate([self.sources[place] for place in places], options)
            for place, translation in zip(places, translated, strict=True):
                found[place] = translation.text
        return found

    def compared(
        self, baseline: Sequence[str], system: Sequence[str], config: Config
    ) -> tuple[dict[Direction | None, list[Comparison]], str]:
        """Return (the scores of two systems' translations by direction, a line on their tokenisers)."""
        found, tokenizers = {}, {}
        for direction, places in self.places().items():
            target = (direction or config.corpus.direction).target
            tokenizers[target] = bleu_tokenizer(config.evaluation.tokenize, target)
            first, second, references = (
                [lines[place] for place in places] for lines in (baseline, system, self.targets)
            )
            found[direction] = paired_bootstrap(first, second, [references], tokenizers[target].name)
        return found, describe(tokenizers)
