"""Results of `nmt evaluate` on several sets: a table, JSON with sacreBLEU's keys, and the report of each set."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from statistics import fmean
from typing import Any

from nmt.evaluation.content import content_kept
from nmt.evaluation.measure import Measured
from nmt.evaluation.scores import Score
from nmt.evaluation.sets import EvaluationSet
from nmt.text.checks import Kept


@dataclass(frozen=True)
class SetResult:
    """Scores of the translations of one set."""

    text: EvaluationSet
    hypotheses: list[str]
    scores: list[Score]
    measured: Measured | None = None
    """What was measured while the run translated; None for translations made elsewhere."""

    @cached_property
    def kept(self) -> dict[str, Kept]:
        """How many numbers, placeholders, tags and URLs of the sources the translations have; empty without sources."""
        return content_kept(self.text.sources, self.hypotheses) if self.text.sources else {}

    def cells(self) -> dict[str, str]:
        """Return the row of the table, by heading."""
        row = {
            "set": self.text.title,
            "sentences": f"{self.text.size:,}",
            "references": f"{len(self.text.references)}",
            **{score.name: f"{score.value:.2f}" for score in self.scores},
            **{f"{kind} kept": f"{each.percent:.1f} %" for kind, each in self.kept.items()},
        }
        if self.measured:
            found = self.measured.perplexity
            row |= {
                "perplexity": f"{found.pieces:,.3f}",
                "per word": f"{found.words:,.2f}",
                "bits/character": f"{found.bits:.3f}",
                "sentences/s": f"{self.text.size / self.measured.seconds:,.1f}",
            }
        return row

    def json_scores(self) -> list[dict[str, Any]]:
        """Return one object per score: sacreBLEU's keys, and the set."""
        figures = {name: value for name, value in self.figures().items() if name in _NAMES}
        others = [{"name": f"{kind} kept", "score": each.percent} for kind, each in self.kept.items()]
        others += [{"name": _NAMES[name], "score": value} for name, value in figures.items()]
        return [{"set": self.text.title, **each} for each in (*(score.to_dict() for score in self.scores), *others)]

    def figures(self) -> dict[str, float]:
        """Return all but the scores, by their names in the report; empty for translations made elsewhere."""
        if not self.measured:
            return {}
        found = self.measured.perplexity
        return {
            "perplexity": found.pieces,
            "word_perplexity": found.words,
            "bits_per_character": found.bits,
            "seconds": self.measured.seconds,
        }

    def report(self) -> dict[str, Any]:
        """Return the report of the set, as JSON has it."""
        scores = {score.name: score.to_dict() for score in self.scores}
        kept = {kind: each._asdict() for kind, each in self.kept.items()}
        return {**self.text.to_dict(), "sentences": self.text.size, "scores": scores, "kept": kept, **self.figures()}


@dataclass(frozen=True)
class MeanResult:
    """Means over the directions of a set; the BLEU of all lines together would mix languages."""

    title: str
    results: list[SetResult]

    def cells(self) -> dict[str, str]:
        """Return the row of the table, by heading."""
        sentences = sum(result.text.size for result in self.results)
        means = self.figures()
        row = {"set": self.title, "sentences": f"{sentences:,}", "references": ""}
        row |= {name: f"{means[name]:.2f}" for name in (score.name for score in self.results[0].scores)}
        if seconds := means.get("seconds"):
            row |= {
                "perplexity": f"{means['perplexity']:,.3f}",
                "per word": f"{means['word_perplexity']:,.2f}",
                "bits/character": f"{means['bits_per_character']:.3f}",
                "sentences/s": f"{sentences / (seconds * len(self.results)):,.1f}",
            }
        return row

    def figures(self) -> dict[str, float]:
        """Return the mean of each score and of each figure, by name."""
        each = [{score.name: score.value for score in result.scores} | result.figures() for result in self.results]
        return {name: fmean(figures[name] for figures in each) for name in each[0]}

    def json_scores(self) -> list[dict[str, Any]]:
        """Return one object per mean, as `SetResult.json_scores` does for scores."""
        return [
            {"set": self.title, "name": _NAMES.get(name, name), "score": value}
            for name, value in self.figures().items()
            if name != "seconds"
        ]


def means(results: Sequence[SetResult]) -> list[MeanResult]:
    """Return the means over the directions of each set of several, apart for those that were not trained."""
    found = []
    parts = [result for result in results if result.text.part_of]
    for title, group in groupby(parts, key=lambda result: result.text.part_of):
        members = list(group)
        for zero_shot in (False, True):
            some = [result for result in members if result.text.zero_shot == zero_shot]
            if len(some) > 1:
                kind = "zero-shot directions" if zero_shot else "directions"
                found.append(MeanResult(f"{title}, mean of {len(some)} {kind}", some))
    return found


_NAMES = {
    "perplexity": "perplexity",
    "word_perplexity": "perplexity per word",
    "bits_per_character": "bits per character",
}


def table(results: Sequence[SetResult]) -> str:
    """Return a table with a row per set, means over directions, and the signatures of the scores."""
    rows = [result.cells() for result in results] + [mean.cells() for mean in means(results)]
    head = list({name: None for row in rows for name in row})
    lines = aligned([head, *([row.get(name, "") for name in head] for row in rows)])
    by_metric = zip(*(result.scores for result in results), strict=True)
    signatures = {(score.name, score.signature): None for scores in by_metric for score in scores}
    return "\n".join([*lines, "", *aligned(signatures)])


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return rows as lines with columns of equal width: the first aligned to the left, numbers to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = [all(cell[:1] in "-+0123456789" for cell in column[1:]) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number and place else cell.ljust(width)
            for place, (cell, width, number) in enumerate(zip(row, widths, numbers, strict=True))
        ).rstrip()
        for row in rows
    ]
