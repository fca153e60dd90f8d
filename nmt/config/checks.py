"""What the settings are checked with: errors that name the full key, the value and what is allowed."""

from collections.abc import Collection
from typing import Any


def one_of(key: str, value: Any, allowed: Collection[Any]) -> None:
    """Refuse a value that is not in `allowed`."""
    if value not in allowed:
        raise ValueError(f"{key}={value} is not one of {', '.join(map(str, allowed))}")


def at_least(key: str, value: float, minimum: float) -> None:
    """Refuse a value below `minimum`."""
    # Written so that NaN is refused too.
    if not value >= minimum:
        raise ValueError(f"{key}={value} must be at least {minimum}")


def above(key: str, value: float, bound: float) -> None:
    """Refuse a value that is not greater than `bound`."""
    if not value > bound:
        raise ValueError(f"{key}={value} must be greater than {bound}")


def fraction(key: str, value: float) -> None:
    """Refuse a value outside 0 <= value < 1."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{key}={value} must lie in 0 <= value < 1")
