"""Charts as SVG for a page: bars, curves, histograms, heat maps of lifts, and bars within a line of text."""

from collections.abc import Mapping, Sequence
from math import ceil, log2

from nmt.pages.document import text
from nmt.wording import brief, percent

_WIDTH, _HEIGHT = 520, 200  # of a chart, in SVG units
_NARROW, _LOW = 400, 150  # of a histogram: legible on a telephone, too
_LEFT = 40  # width of the numbers at the axis
_MAX_NAME = 20  # most characters shown of a column's name
_STRONGEST = 4.0  # lift with full colour
_INTERVAL = 116  # width of an interval's figure, in SVG units


class _Scale:
    """The vertical scale of a chart, from 0 at the axis to a little above the largest share."""

    def __init__(self, series: Mapping[str, Sequence[float]]) -> None:
        self.top = max(max(values) for values in series.values()) * 1.08 or 1.0

    def y(self, share: float) -> float:
        """Return the distance of a share from the top of the chart."""
        return _HEIGHT - share / self.top * (_HEIGHT - 12)


def bars(series: Mapping[str, Sequence[float]], noun: str, label: str) -> str:
    """Return a bar chart of the shares of each member, with one bar per series; `noun` names a member.

    The names of the series must be classes in CHARTS.
    """
    scale, count = _Scale(series), len(next(iter(series.values())))
    step = (_WIDTH - _LEFT) / count
    wide = min(step * 0.36, 22)
    parts = []
    for member in range(count):
        middle = _LEFT + (member + 0.5) * step
        for place, (kind, values) in enumerate(series.items()):
            share, x = values[member], middle + (place - len(series) / 2) * wide
            y = scale.y(share)
            size = f'x="{x:.1f}" y="{y:.1f}" width="{wide * 0.94:.1f}" height="{_HEIGHT - y:.1f}"'
            tip = f"<title>{noun} {member}: {kind} {percent(share)}</title>"
            parts.append(f'<rect class="{kind}" {size}>{tip}</rect>')
        if member % ceil(22 / step) == 0:
            parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT + 16}" text-anchor="middle">{member}</text>')
    return _framed(parts, scale, series, label)


def profiles(series: Mapping[str, Sequence[float]], label: str) -> str:
    """Return each series as a curve of its shares, the largest first: for more members than bars can show."""
    scale, count = _Scale(series), len(next(iter(series.values())))
    step = (_WIDTH - _LEFT) / count
    parts = []
    for kind, values in series.items():
        ranked = enumerate(sorted(values, reverse=True))
        points = " ".join(f"{_LEFT + (rank + 0.5) * step:.1f},{scale.y(share):.1f}" for rank, share in ranked)
        parts.append(f'<polyline class="{kind}" points="{points}"/>')
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT + 16}">busiest</text>')
    parts.append(f'<text x="{_WIDTH}" y="{_HEIGHT + 16}" text-anchor="end">rank {count:,}</text>')
    return _framed(parts, scale, series, label)


def _framed(parts: Sequence[str], scale: _Scale, series: Mapping[str, Sequence[float]], label: str) -> str:
    """Return a chart of `parts` with numbers, the axis, a line for the equal share, and a key."""
    fair = 1 / len(next(iter(series.values())))
    levels = [0.0, scale.top / 1.08] + ([fair] if 0.1 < fair / scale.top < 0.8 else [])
    numbers = [f'<text x="0" y="{scale.y(level) + 4:.1f}">{percent(level)}</text>' for level in levels]
    lines = [
        f'<path class="{kind}" d="M{_LEFT} {scale.y(level):.1f}H{_WIDTH}"/>'
        for kind, level in (("axis", 0.0), ("fair", fair))
    ]
    names = "".join(f'<i class="{kind}"></i>{kind}' for kind in series)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 22}" role="img" aria-label="{text(label)}">'
        f'{"".join([*numbers, *parts, *lines])}</svg><p class="key">{names}<i class="fair"></i>fair share '
        f"{percent(fair)}</p>"
    )


def heat_map(rows: Sequence[str], columns: Sequence[str], lift: Sequence[Sequence[float]], label: str) -> str:
    """Return a heat map coloured by log lift: orange above chance, blue below.

    If rows and columns have the same names, the diagonal is empty.
    """
    left, longest = 8 + 7 * max(map(len, rows)), min(_MAX_NAME, max(map(len, columns)))
    slanted = rows != columns and 6.8 * longest > (_WIDTH - left) / len(columns)
    wide = min((_WIDTH - left - 4 * slanted * longest) / len(columns), 62)
    high = min(wide, 26, max(10, 560 / len(rows)))
    top = 10 + 4.8 * longest if slanted else 18
    parts = [f'<svg viewBox="0 0 {_WIDTH} {top + high * len(rows):.0f}" role="img" aria-label="{text(label)}">']
    for i, name in enumerate(columns):
        x, y = left + (i + 0.5) * wide, top - 6
        turn = f'transform="rotate(-40 {x:.1f} {y:.1f})"' if slanted else 'text-anchor="middle"'
        if i % ceil(18 / wide) == 0:
            parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {turn}>{text(name[:_MAX_NAME])}</text>')
    for j, name in enumerate(rows):
        y = top + j * high
        if j % ceil(11 / high) == 0:
            parts.append(f'<text x="{left - 6}" y="{y + high / 2 + 4:.1f}" text-anchor="end">{name}</text>')
        for i, column in enumerate(columns):
            if rows == columns and i == j:
                continue
            strength = max(-1.0, min(1.0, log2(max(lift[j][i], 1e-9)) / log2(_STRONGEST)))
            x, kind = left + i * wide, "hot" if strength > 0 else "cold"
            size = f'x="{x:.1f}" y="{y:.1f}" width="{wide - 1:.1f}" height="{high - 1:.1f}"'
            parts.append(
                f'<rect class="{kind}" fill-opacity="{abs(strength) * 0.9:.2f}" {size}>'
                f"<title>{name}, {text(column)}: {lift[j][i]:.2f} times chance</title></rect>"
            )
            if wide >= 26 and high >= 14:
                middle = f'x="{x + wide / 2:.1f}" y="{y + high / 2 + 4:.1f}"'
                parts.append(f'<text class="in" {middle}>{lift[j][i]:.1f}</text>')
    return "".join(parts) + "</svg>"


HEAT_KEY = '<p class="key"><i class="cold"></i>rarer than chance<i class="hot"></i>more often; full colour: 4 times</p>'
"""Key to the colours of `heat_map`."""


def weight_map(rows: Sequence[str], columns: Sequence[str], weights: Sequence[Sequence[float]], label: str) -> str:
    """Return a heat map of weights from 0 to 1: the stronger the colour, the larger the weight."""
    left = 8 + 7 * max(map(len, rows))
    size = min((_WIDTH - left) / len(columns), 30)
    top = 12 + 6.8 * min(_MAX_NAME, max(map(len, columns)))
    parts = [f'<svg viewBox="0 0 {_WIDTH} {top + size * len(rows):.0f}" role="img" aria-label="{text(label)}">']
    for i, name in enumerate(columns):
        x, y = left + (i + 0.5) * size + 4, top - 6
        turn = f'transform="rotate(-90 {x:.1f} {y:.1f})"'
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {turn}>{text(name[:_MAX_NAME])}</text>')
    for j, name in enumerate(rows):
        y = top + j * size
        parts.append(f'<text x="{left - 6}" y="{y + size / 2 + 4:.1f}" text-anchor="end">{text(name)}</text>')
        for i, column in enumerate(columns):
            weight = weights[j][i]
            place = f'x="{left + i * size:.1f}" y="{y:.1f}" width="{size - 1:.1f}" height="{size - 1:.1f}"'
            parts.append(
                f'<rect class="cold" fill-opacity="{weight:.2f}" {place}>'
                f"<title>{text(name)} from {text(column)}: {percent(weight)}</title></rect>"
            )
    return "".join(parts) + "</svg>"


def meter(width: str, kind: str = "") -> str:
    """Return a bar within a line, filled to a CSS width such as 25% of its track."""
    return f'<span class=bar><i class="{kind}" style="width:{width}"></i></span>'


def interval(value: float, low: float, high: float, widest: float, kind: str) -> str:
    """Return a figure within a table: a dot at `value` and a line from `low` to `high`, about zero in the middle.

    The figure ends at -`widest` and `widest`. `kind` is a class in COMPARISON: gain, loss or "".
    """
    half = _INTERVAL / 2

    def x(position: float) -> float:
        return half + half * max(-1.0, min(1.0, position / widest if widest else 0.0))

    return (
        f'<svg class="interval" viewBox="0 0 {_INTERVAL} 14" role="img" aria-label="{value:+.2f}">'
        f'<path class="axis" d="M{half:g} 0V14"/><path class="{kind}" d="M{x(low):.1f} 7H{x(high):.1f}"/>'
        f'<circle class="{kind}" cx="{x(value):.1f}" cy="7" r="3.5"/></svg>'
    )


def histogram(series: Mapping[str, Sequence[int]], labels: Sequence[str], noun: str, label: str) -> str:
    """Return a histogram of counts of `noun` with a label per bin; each series is drawn over those before it.

    The names of the series must be classes in CHARTS or in another part of the style sheet.
    """
    top = max(max(counts) for counts in series.values()) or 1
    step = _NARROW / len(labels)
    parts = []
    for kind, counts in series.items():
        for place, count in enumerate(counts):
            high = (_LOW - 16) * count / top
            if count:
                size = f'x="{place * step:.2f}" y="{_LOW - high:.2f}" width="{step * 0.92:.2f}" height="{high:.2f}"'
                parts.append(f'<rect class="{kind}" {size}/>')
    for place, name in enumerate(labels):
        # A column as high as the chart, so that small bins have a tip too.
        tip = f"{name}: " + ", ".join(f"{kind} {counts[place]:,}" for kind, counts in series.items())
        column = f'x="{place * step:.2f}" y="0" width="{step:.2f}" height="{_LOW}"'
        parts.append(f'<rect class="tip" {column}><title>{text(tip)}</title></rect>')
    last = len(labels) - 1
    every = ceil(len(labels) / 6)
    # The last label is at the right edge; one beside it would overlap it.
    for place in range(0, max(1, len(labels) - every), every):
        x, anchor = ((place + 0.5) * step, "middle") if place else (0.0, "start")
        name = labels[place].split(" to ")[0]
        parts.append(f'<text x="{x:.1f}" y="{_LOW + 15}" text-anchor="{anchor}">{text(name)}</text>')
    if last:
        parts.append(f'<text x="{_NARROW}" y="{_LOW + 15}" text-anchor="end">{text(labels[last])}</text>')
    parts.append(f'<text x="0" y="10">{brief(top)} {noun}</text><path class="axis" d="M0 {_LOW}H{_NARROW}"/>')
    return f'<svg viewBox="0 0 {_NARROW} {_LOW + 20}" role="img" aria-label="{text(label)}">{"".join(parts)}</svg>'
