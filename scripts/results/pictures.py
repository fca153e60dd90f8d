"""Charts of results as SVG: horizontal bars, and points over a horizontal axis.

They are on white, so that they are seen on a dark page too.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple

Row = Mapping[str, Any]

COLOURS = ("#3b6ea8", "#c4632a", "#3c8c55", "#8b5aa8", "#a8423b", "#5b6570")
_SVG = 'xmlns="http://www.w3.org/2000/svg"'
_FONT = 'role="img" font-family="sans-serif" font-size="13" fill="#24292f"'


def bars(chart: Row, rows: Sequence[Row]) -> str:
    """Horizontal bars that begin at 0, one for each row."""
    left, wide, high = 8 + max(7 * len(chart["label"].format(**row)) for row in rows), 340, 26
    longest = max(row[chart["figure"]] for row in rows)
    width, height = left + wide + 90, 34 + high * len(rows) + 8
    lines = [
        *opening(chart["text"], width, height),
        f'<text x="{left}" y="20" font-weight="bold">{escape(chart["text"])}</text>',
    ]
    for place, row in enumerate(rows):
        top, length = 34 + high * place, wide * row[chart["figure"]] / longest
        label, value = (escape(chart[name].format(**row)) for name in ("label", "cell"))
        lines += [
            f'<text x="{left - 8}" y="{top + 16}" text-anchor="end">{label}</text>',
            f'<rect x="{left}" y="{top + 3}" width="{length:.1f}" height="{high - 8}" fill="#3b6ea8"/>',
            f'<text x="{left + length + 6:.1f}" y="{top + 16}">{value}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


class Series(NamedTuple):
    """Points that a line joins."""

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    """Beside the points; empty for none."""


class _Box(NamedTuple):
    """A rectangle that a label or a mark takes."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "_Box") -> bool:
        """Whether they have a point in common."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


_MARKED = 12
"""Curves of more points need no mark at each."""


class _Axis:
    """An axis from a little below the smallest value to a little above the largest.

    `log`: it is logarithmic. Zero then has a place of its own, left of the smallest value above it.
    """

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool) -> None:
        self._log, self._start, self.end = log, start, end
        self._values = sorted({*values})
        self._zero = math.log2(min((value for value in values if value > 0.0), default=4.0)) - 2.0
        low, high = (self._of(extreme(values)) for extreme in (min, max))
        margin = 0.06 * (high - low) or 0.5
        self._low, self._high = low - margin, high + margin

    def _of(self, value: float) -> float:
        if not self._log:
            return value
        return math.log2(value) if value > 0.0 else self._zero

    def at(self, value: float) -> float:
        """The place of a value in the picture."""
        share = (self._of(value) - self._low) / (self._high - self._low)
        return self._start + share * (self.end - self._start)

    def ticks(self) -> Iterator[float]:
        """At most seven values on the axis: round ones, or on a logarithmic axis the given ones if they are few."""
        if self._log:
            least = (self._high - self._low) / 8
            if all(self._of(after) - self._of(before) >= least for before, after in pairwise(self._values)):
                yield from self._values
                return
            first = math.ceil(self._zero + 2.0 if self._values[0] <= 0.0 else self._low)
            step = max(1, math.ceil((self._high - first) / 6))
            yield from self._values[: self._values[0] <= 0.0]
            yield from (2.0**power for power in range(first, math.floor(self._high) + 1, step))
            return
        least = (self._high - self._low) / 6
        unit = 10.0 ** math.floor(math.log10(least))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= least)
        for number in range(math.ceil(self._low / step), math.floor(self._high / step) + 1):
            yield number * step


def points(chart: Row, series: Sequence[Series]) -> str:
    """Points joined by a line for each series, with round numbers at the axes and a key.

    `chart` has `text`, the titles `x_title` and `y_title`, and perhaps `log`: the horizontal axis is logarithmic.
    """
    left, top, right, bottom = 64, 34, 560, 340
    x_axis = _Axis([x for each in series for x, _ in each.points], left, right, chart.get("log", False))
    y_axis = _Axis([y for each in series for _, y in each.points], bottom, top, False)
    lines = [
        *opening(chart["text"], 580, 400 + 18 * len(series)),
        f'<text x="8" y="20" font-weight="bold">{escape(chart["text"])}</text>',
    ]
    for y in y_axis.ticks():
        lines += [
            f'<path d="M{left} {y_axis.at(y):.1f}H{right}" stroke="#d8dee4"/>',
            f'<text x="{left - 8}" y="{y_axis.at(y) + 4:.1f}" text-anchor="end">{y:g}</text>',
        ]
    for x in x_axis.ticks():
        lines += [
            f'<path d="M{x_axis.at(x):.1f} {bottom}v5" stroke="#24292f"/>',
            f'<text x="{x_axis.at(x):.1f}" y="{bottom + 19}" text-anchor="middle">{_brief(x)}</text>',
        ]
    lines += [
        f'<path d="M{left} {bottom}H{right}" stroke="#24292f"/>',
        f'<text x="{(left + right) / 2}" y="{bottom + 40}" text-anchor="middle">{escape(chart["x_title"])}</text>',
        f'<text transform="translate(14 {(top + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(chart['y_title'])}</text>",
    ]
    marked = [place for each in series if len(each.points) <= _MARKED for place in each.points]
    taken = [_Box(x_axis.at(x) - 4, y_axis.at(y) - 4, x_axis.at(x) + 4, y_axis.at(y) + 4) for x, y in marked]
    for number, each in enumerate(series):
        lines += _drawn(each, COLOURS[number % len(COLOURS)], x_axis, y_axis, taken)
        key = bottom + 60 + 18 * number
        lines += [
            f'<circle cx="{left}" cy="{key - 4}" r="4" fill="{COLOURS[number % len(COLOURS)]}"/>',
            f'<text x="{left + 12}" y="{key}">{escape(each.name)}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def _drawn(series: Series, colour: str, x_axis: _Axis, y_axis: _Axis, taken: list[_Box]) -> Iterator[str]:
    """A series, with a label beside each point where there is room; `taken` is what has been drawn already."""
    places = [(x_axis.at(x), y_axis.at(y)) for x, y in series.points]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    yield f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    if len(places) <= _MARKED:
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in places)
    # From the top: of two near points, the upper one has its label above.
    for (x, y), label in sorted(zip(places, series.labels, strict=False), key=lambda each: each[0][1]):
        wide = 6.5 * len(label)
        for left, base in ((x + 6, y - 7), (x + 6, y + 15), (x - 6 - wide, y - 7), (x - 6 - wide, y + 15)):
            box = _Box(left, base - 9, left + wide, base + 2)
            if box.right < x_axis.end and not any(map(box.overlaps, taken)):
                taken.append(box)
                place, anchor = (left, "start") if left > x else (x - 6, "end")
                text = f'font-size="11" fill="{colour}" text-anchor="{anchor}">{escape(label)}'
                yield f'<text x="{place:.1f}" y="{base:.1f}" {text}</text>'
                break


def _brief(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value:,g}" if value < 1e5 else f"{value / 1e3:g}k"


def opening(text: str, width: float, height: float) -> list[str]:
    return [
        f'<svg {_SVG} viewBox="0 0 {width} {height}" width="{width}" height="{height}" {_FONT}>',
        f"<title>{escape(text)}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
