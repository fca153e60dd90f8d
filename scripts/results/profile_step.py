"""Draw the time of training steps at two commits, by part: python scripts/results/profile_step.py

scripts/bench/step.py measures it into results/steps/before.json and after.json. The picture is
docs/results/step.svg. Each kind of step has two bars, with a piece for each part.
"""

import json
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STEPS, PICTURE = ROOT / "results" / "steps", ROOT / "docs" / "results" / "step.svg"
COLOURS = {
    "LSTM": "#3b6ea8",
    "attention": "#8a63b0",
    "experts": "#d9822b",
    "gate": "#f0c24b",
    "softmax": "#4c9a6a",
    "optimiser": "#b5485a",
    "other": "#9aa4ae",
    "idle": "#ffffff",
}
_LEFT, _WIDE, _BAR, _GAP, _TOP = 215, 560, 20, 16, 64
_SMALLEST = 26
"""Width of the smallest piece that has its milliseconds in it."""

Steps = dict[str, Any]
"""A file of scripts/bench/step.py."""


def picture(before: Steps, after: Steps) -> str:
    """An SVG of the steps that both files have, on white so that it is seen in a dark page too."""
    names = [name for name in before["steps"] if name in after["steps"]]
    longest = max(of["steps"][name]["ms"] for of in (before, after) for name in names)
    height = _TOP + len(names) * (2 * _BAR + _GAP) + 4
    width = _LEFT + _WIDE + 80
    title = "Milliseconds of one training step, by part"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="sans-serif" font-size="13" fill="#24292f">',
        f"<title>{title}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-weight="bold">{title}</text>',
    ]
    x = _LEFT
    for part, colour in COLOURS.items():
        lines += [
            f'<rect x="{x}" y="32" width="12" height="12" fill="{colour}" stroke="#24292f" stroke-width="0.5"/>',
            f'<text x="{x + 17}" y="43">{part}</text>',
        ]
        x += 32 + 8 * len(part)
    for place, name in enumerate(names):
        top = _TOP + place * (2 * _BAR + _GAP)
        lines.append(f'<text x="8" y="{top + _BAR + 5}" font-weight="bold">{escape(name)}</text>')
        for bar, of in enumerate((before, after)):
            y = top + bar * _BAR
            lines.append(f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(of["commit"][:7])}</text>')
            lines += _pieces(of["steps"][name], y, _WIDE / longest)
    return "\n".join([*lines, "</svg>", ""])


def _pieces(step: dict[str, Any], y: float, scale: float) -> list[str]:
    """The pieces of one bar, and its length beside it."""
    lines, x = [], float(_LEFT)
    for part, colour in COLOURS.items():
        ms = step["idle"] if part == "idle" else step["parts"][part]
        wide = ms * scale
        lines.append(
            f'<rect x="{x:.1f}" y="{y + 1}" width="{wide:.1f}" height="{_BAR - 2}" fill="{colour}" stroke="#24292f" '
            f'stroke-width="0.5"><title>{part} {ms:.1f} ms</title></rect>'
        )
        if wide >= _SMALLEST:
            ink = "#24292f" if part in ("gate", "idle", "other") else "white"
            middle = x + wide / 2
            lines.append(
                f'<text x="{middle:.1f}" y="{y + 14}" text-anchor="middle" font-size="11" fill="{ink}">{ms:.1f}</text>'
            )
        x += wide
    return [*lines, f'<text x="{x + 6:.1f}" y="{y + 15}">{step["ms"]:.1f} ms</text>']


def read() -> tuple[Steps, Steps]:
    """The figures before and after."""
    before, after = (json.loads((STEPS / f"{when}.json").read_text(encoding="utf-8")) for when in ("before", "after"))
    return before, after


def main() -> None:
    """Write the picture."""
    PICTURE.write_text(picture(*read()), encoding="utf-8")


if __name__ == "__main__":
    main()
