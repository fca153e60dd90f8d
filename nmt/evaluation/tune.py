"""Choose alpha, beta and the beam size by BLEU on a development set.

Every point of the grid is a real search, since the three settings decide which hypotheses survive. One setting is tuned
after the other: alpha, beta, beam size. Each walks from its present value to both sides of its grid, and stops on a
side after some values in a row without a better BLEU. It is changed only if that gain is beyond noise (`SURE`).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from nmt.config import DecodingConfig
from nmt.decoding.translation import Options
from nmt.decoding.translator import Translator
from nmt.evaluation.measure import timed
from nmt.evaluation.results import aligned
from nmt.evaluation.scores import Comparison, paired_bootstrap
from nmt.evaluation.sets import EvaluationSet

SURE = 0.05
"""A setting is changed if the better BLEU has a smaller p-value than this in the paired bootstrap."""
FEW_SENTENCES = 500
"""With fewer, only large gains are beyond noise."""


class _Grid(NamedTuple):
    """Values of a setting, in order, and how many in a row without a better BLEU end the walk upwards or downwards."""

    name: str
    values: Sequence[float]
    up: int = 2
    down: int = 2


_GRIDS = (
    _Grid("alpha", [round(0.2 * step, 1) for step in range(11)]),
    _Grid("beta", (0.0, 0.1, 0.2, 0.4, 0.8)),
    # The time of a search grows with its beam: a wider one must be better at once.
    _Grid("beam_size", (1, 2, 4, 8, 16), up=1),
)


class Point(NamedTuple):
    """Settings of a search."""

    alpha: float
    beta: float
    beam_size: int

    def __str__(self) -> str:
        return f"alpha {self.alpha}, beta {self.beta}, beam {self.beam_size}"


@dataclass(frozen=True)
class Tried:
    """Results of one point, and how they compare with those of the values before its setting was tuned."""

    setting: str
    """The setting that was tuned."""
    point: Point
    against: Point
    comparisons: list[Comparison]
    """BLEU and chrF compared with those of `against`."""
    length: float
    """Characters of the translations per character of the first references."""
    sentences_per_second: float

    @property
    def bleu(self) -> Comparison:
        """BLEU of both points."""
        return self.comparisons[0]

    @property
    def better(self) -> bool:
        """True if the gain is beyond noise."""
        return self.bleu.difference > 0 and self.bleu.p_value < SURE

    def row(self) -> list[str]:
        """Return the cells of a table."""
        low, high = self.bleu.system_interval
        difference = f"{self.bleu.difference:+.2f}, p = {self.bleu.p_value:.3f}"
        return [
            f"{self.point.alpha:.1f}",
            f"{self.point.beta:.1f}",
            f"{self.point.beam_size}",
            f"{self.bleu.system:.2f} ({low:.2f}-{high:.2f})",
            f"{self.comparisons[1].system:.2f}",
            f"{self.length:.3f}",
            f"{self.sentences_per_second:,.1f}",
            "" if self.point == self.against else difference,
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON has them."""
        return {
            "setting": self.setting,
            **self.point._asdict(),
            "against": self.against._asdict(),
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "length": self.length,
            "sentences_per_second": self.sentences_per_second,
        }


HEAD = ["alpha", "beta", "beam", "BLEU (95 %)", "chrF2", "length", "sentences/s", "difference"]


@dataclass(frozen=True)
class Tuned:
    """Chosen settings, and what was tried."""

    before: Point
    chosen: Point
    tried: list[Tried]

    def table(self) -> str:
        """Return a table of what was tried, with a part per setting."""
        rows = [HEAD, *(each.row() for each in self.tried)]
        head, *lines = aligned(rows)
        parts = [head]
        for number, (each, line) in enumerate(zip(self.tried, lines, strict=True)):
            if number and self.tried[number - 1].setting != each.setting:
                parts.append("")
            parts.append(line)
        return "\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON has them."""
        return {"before": self.before._asdict(), "tried": [each.to_dict() for each in self.tried]}

    def verdicts(self) -> list[str]:
        """Return a line per setting: its old and new value, and why."""
        found = []
        for grid in _GRIDS:
            old, new = getattr(self.before, grid.name), getattr(self.chosen, grid.name)
            best = max((each for each in self.tried if each.setting == grid.name), key=lambda each: each.bleu.system)
            gain = f"{best.bleu.difference:+.2f} BLEU, p = {best.bleu.p_value:.3f}"
            if old != new:
                found.append(f"decoding.{grid.name}: {old} -> {new} ({gain})")
            elif best.bleu.difference <= 0:
                found.append(f"decoding.{grid.name} stays {old}: no other value is better")
            else:
                other = getattr(best.point, grid.name)
                found.append(f"decoding.{grid.name} stays {old}: the gain of {other} is inside noise ({gain})")
        return found


class _Trial:
    """Searches on a set; each point is searched once."""

    def __init__(self, translator: Translator, text: EvaluationSet, tokenizer: str, say: Callable[[str], None]) -> None:
        self._translator, self._text, self._tokenizer, self._say = translator, text, tokenizer, say
        self._found: dict[Point, tuple[list[str], float]] = {}

    def translations(self, point: Point) -> tuple[list[str], float]:
        """Return (translations, seconds) of a point."""
        if point not in self._found:
            options: Options = replace(self._text.options(self._translator.options), **point._asdict())
            self._found[point] = timed(self._translator, self._text.sources, options)
        return self._found[point]

    def compare(self, setting: str, point: Point, against: Point) -> Tried:
        """Return the results of a point beside those of another."""
        references, first = self._text.references, point not in self._found
        hypotheses, seconds = self.translations(point)
        compared = paired_bootstrap(self.translations(against)[0], hypotheses, references, self._tokenizer)
        if first:
            self._say(f"{point}: BLEU {compared[0].system:.2f}, {self._text.size / seconds:,.1f} sentences/s")
        length = sum(map(len, hypotheses)) / max(sum(map(len, references[0])), 1)
        return Tried(setting, point, against, compared, length, self._text.size / seconds)


def tune(translator: Translator, text: EvaluationSet, tokenizer: str, say: Callable[[str], None]) -> Tuned:
    """Return the settings that are best for `text`, which should be a development set.

    Alpha and beta have no effect on greedy search. If that is the present search, they are tuned for the default beam.
    `say` is called with a line after each search.
    """
    trial = _Trial(translator, text, tokenizer, say)
    options = translator.options
    before = chosen = Point(options.alpha, options.beta, options.beam_size)
    tried: list[Tried] = []
    for grid in _GRIDS:
        base = chosen
        if grid.name != "beam_size" and base.beam_size == 1:
            base = base._replace(beam_size=DecodingConfig.beam_size)
        walked = _walk(grid, base, trial)
        tried += walked
        best = max(walked, key=lambda each: each.bleu.system)
        if best.better:
            chosen = _with(chosen, grid.name, getattr(best.point, grid.name))
    return Tuned(before, chosen, tried)


def _with(point: Point, name: str, value: float) -> Point:
    return Point(**{**point._asdict(), name: value})


def _walk(grid: _Grid, base: Point, trial: _Trial) -> list[Tried]:
    """Return what was tried from `base` along the grid to both sides, in the order of the values."""
    start = getattr(base, grid.name)
    tried = [trial.compare(grid.name, base, base)]
    upwards = [value for value in grid.values if value > start]
    downwards = [value for value in reversed(grid.values) if value < start]
    for values, patience in ((upwards, grid.up), (downwards, grid.down)):
        best, worse = tried[0].bleu.system, 0
        for value in values:
            tried.append(trial.compare(grid.name, _with(base, grid.name, value), base))
            bleu = tried[-1].bleu.system
            best, worse = (bleu, 0) if bleu > best else (best, worse + 1)
            if worse == patience:
                break
    return sorted(tried, key=lambda each: getattr(each.point, grid.name))
