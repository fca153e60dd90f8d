"""Numbers in words and tables: one form of each for pages, cards, messages and the terminal."""

from collections.abc import Iterable

Units = tuple[tuple[float, str], ...]
"""Sizes and names of units, the largest first."""


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, whose plural ends in -s: "1 step", "2,000 steps"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def steps_of(steps: Iterable[int]) -> str:
    """Return "step 500" or "steps 500, 1,000"."""
    found = [f"{step:,}" for step in steps]
    return f"step{'s' * (len(found) != 1)} {', '.join(found)}"


def shortened(text: str, most: int = 300) -> str:
    """Return the first `most` characters of a text, with "..." in place of the rest."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def percent(share: float) -> str:
    """Return a share in percent, with three significant digits from 1% up and two below."""
    return f"{100 * share:.{3 if share >= 0.01 else 2}g}%"


def brief(count: int) -> str:
    """Return a count in full below a million, and in millions from a million up."""
    return millions(count) if count >= 1e6 else f"{count:,}"


def millions(count: float, digits: int = 1) -> str:
    """Return a count in millions: "1,234.5M"."""
    return f"{count / 1e6:,.{digits}f}M"


def scaled(count: float, units: Units) -> str:
    """Return a count with four digits in the largest unit that is not above it, or else in the smallest unit."""
    scale, unit = next((each for each in units if count >= each[0]), units[-1])
    return f"{count / scale:,.4g} {unit}"


def duration(seconds: float) -> str:
    """Return a time in the largest unit that gives a number of at least 2, or else in seconds."""
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} seconds"
