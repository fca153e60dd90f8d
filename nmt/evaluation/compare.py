"""Compare translations of one test set by several systems: scores, significance, buckets, and single sentences.

The first system is the baseline. A difference is the score of a system minus that of the baseline.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nmt.evaluation.buckets import Grouping
from nmt.evaluation.content import content_kept
from nmt.evaluation.scores import BOOTSTRAP_SAMPLES, RANDOMISATION_TRIALS, SEED, SystemScores
from nmt.evaluation.sets import EvaluationSet
from nmt.text.checks import Kept
from nmt.wording import counted

LEAST_SENTENCES = 30
"""Buckets of fewer sentences are not scored: corpus scores of them say little."""
MOST_PAIRS = 20
"""Wins and losses that are shown, each."""
SENTENCE_METRIC = "chrF2"
LOWER_IS_BETTER = ("TER",)
KEPT_NAMES = {"numbers": "numbers", "placeholder": "placeholders", "tag": "tags", "url": "URLs and e-mail addresses"}
"""Names of the kinds of `KEPT`, for the reader."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class System:
    """One system, and its translation of each source."""

    name: str
    origin: str
    """Where the translations come from, for the reader."""
    hypotheses: list[str]


@dataclass(frozen=True)
class Result:
    """Score of a system on some of the sentences, and its difference from the baseline."""

    score: float
    difference: float
    interval: Interval
    """95 % interval of the difference, by bootstrap; (0, 0) for the baseline."""


@dataclass(frozen=True)
class Overall:
    """Results of a system by one metric on all sentences."""

    result: Result
    score_interval: Interval
    """95 % interval of the score."""
    bootstrap: float
    """p-value of the paired bootstrap; 1 for the baseline."""
    randomisation: float
    """p-value of approximate randomisation; 1 for the baseline."""


@dataclass(frozen=True)
class BucketScores:
    """Results on the sentences of one bucket."""

    label: str
    sentences: int
    results: dict[str, list[Result]]
    """By metric, for each system. Empty if the bucket has fewer than `LEAST_SENTENCES`."""


@dataclass(frozen=True)
class ScoredGrouping:
    """As `Grouping`, with scores."""

    name: str
    title: str
    note: str
    buckets: list[BucketScores]


@dataclass(frozen=True)
class Pair:
    """One sentence, translated better or worse than by the baseline."""

    place: int
    """Index of the sentence, from 0."""
    baseline: float
    """chrF2 of the baseline's translation."""
    system: float
    """chrF2 of the system's translation."""


@dataclass(frozen=True)
class Versus:
    """A system against the baseline, sentence by sentence."""

    better: int
    """Number of sentences with a higher chrF2 than the baseline's; `worse` likewise."""
    worse: int
    identical: int
    """Number of sentences with the same translation."""
    wins: list[Pair]
    """The sentences that gain most, the largest gain first."""
    losses: list[Pair]
    """The sentences that lose most, the largest loss first."""

    def __str__(self) -> str:
        """Return the counts in words."""
        return (
            f"{counted(self.better, 'sentence')} better than the baseline by {SENTENCE_METRIC}, {self.worse:,} worse, "
            f"{self.identical:,} translated identically"
        )


@dataclass(frozen=True)
class Compared:
    """All results."""

    text: EvaluationSet
    systems: list[System]
    signatures: dict[str, str]
    """By metric."""
    overall: dict[str, list[Overall]]
    """By metric, for each system."""
    groupings: list[ScoredGrouping]
    versus: list[Versus]
    """For each system after the baseline."""
    kept: dict[str, list[Kept]]
    """How many numbers, placeholders, tags and URLs of the sources each system kept, by kind, if there are any."""

    def __str__(self) -> str:
        """Return the scores of all sentences as a table, with what they mean."""
        size = max(len(system.name) for system in self.systems)
        lines = [f"        {'':<{size}}   score  95 % interval   difference  95 % interval     p boots.  p rand."]
        for metric, results in self.overall.items():
            for place, (system, found) in enumerate(zip(self.systems, results, strict=True)):
                low, high = found.score_interval
                line = f"{'' if place else metric:<6}  {system.name:<{size}}  {found.result.score:>6.2f}"
                line += f"  {low:>6.2f} to {high:>6.2f}"
                if place:
                    low, high = found.result.interval
                    line += f"  {found.result.difference:>+9.2f}  {low:>+6.2f} to {high:>+6.2f}"
                    line += f"  {found.bootstrap:>8.4f}  {found.randomisation:>8.4f}"
                lines.append(line)
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON has them. Differences are against the first system."""
        return {
            **self.text.to_dict(),
            "sentences": len(self.text.sources),
            "systems": [{"name": system.name, "origin": system.origin} for system in self.systems],
            "signatures": self.signatures,
            "tests": {"seed": SEED, "bootstrap": BOOTSTRAP_SAMPLES, "randomisation": RANDOMISATION_TRIALS},
            "overall": {metric: [asdict(each) for each in results] for metric, results in self.overall.items()},
            "kept": {kind: [each._asdict() for each in counts] for kind, counts in self.kept.items()},
            "buckets": [asdict(grouping) for grouping in self.groupings],
            "sentence_metric": SENTENCE_METRIC,
            "against_baseline": [
                {"system": system.name, **asdict(versus)}
                for system, versus in zip(self.systems[1:], self.versus, strict=True)
            ],
        }


def compare(
    text: EvaluationSet, systems: list[System], groupings: Sequence[Grouping], tokenizer: str, ter: bool = False
) -> Compared:
    """Return the comparison of all `systems` with the first one. DataError as in `corpus_scores`."""
    scores = SystemScores([system.hypotheses for system in systems], text.references, tokenizer, ter)
    tested = scores.tested()
    everything = range(len(text.sources))
    overall = {
        metric: [
            Overall(result, each.interval, each.bootstrap, each.randomisation)
            for result, each in zip(_results(scores, metric, everything), tested[metric], strict=True)
        ]
        for metric in scores.metrics
    }
    by_sentence = scores.sentence_scores(SENTENCE_METRIC)
    versus = [
        _versus(systems[0].hypotheses, system.hypotheses, by_sentence[0], found)
        for system, found in zip(systems[1:], by_sentence[1:], strict=True)
    ]
    scored = [_scored(grouping, scores) for grouping in groupings]
    return Compared(text, systems, scores.signatures(), overall, scored, versus, _kept(text.sources, systems))


def _results(scores: SystemScores, metric: str, places: Sequence[int]) -> list[Result]:
    values = scores.scores(metric, places)
    intervals = scores.intervals(metric, places)
    return [Result(value, value - values[0], interval) for value, interval in zip(values, intervals, strict=True)]


def _scored(grouping: Grouping, scores: SystemScores) -> ScoredGrouping:
    buckets = []
    for label, places in grouping.buckets:
        enough = len(places) >= LEAST_SENTENCES
        results = {metric: _results(scores, metric, places) for metric in scores.metrics} if enough else {}
        buckets.append(BucketScores(label, len(places), results))
    return ScoredGrouping(grouping.name, grouping.title, grouping.note, buckets)


def _versus(baseline: Sequence[str], system: Sequence[str], before: Sequence[float], after: Sequence[float]) -> Versus:
    """Return the result of two systems, given their translations and the score of each."""
    pairs = [Pair(place, *values) for place, values in enumerate(zip(before, after, strict=True))]
    gains = sorted(
        (pair for pair in pairs if pair.system > pair.baseline), key=lambda pair: pair.baseline - pair.system
    )
    falls = sorted(
        (pair for pair in pairs if pair.system < pair.baseline), key=lambda pair: pair.system - pair.baseline
    )
    identical = sum(first == second for first, second in zip(baseline, system, strict=True))
    return Versus(len(gains), len(falls), identical, gains[:MOST_PAIRS], falls[:MOST_PAIRS])


def _kept(sources: Sequence[str], systems: Sequence[System]) -> dict[str, list[Kept]]:
    """Return what each system kept of the sources, by kind, without the kinds that the sources do not have."""
    found = [content_kept(sources, system.hypotheses) for system in systems]
    return {kind: [each[kind] for each in found] for kind in found[0]}
