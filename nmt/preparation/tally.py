"""Counts of a preparation that can be added up: by blocks of text, in any process, and over restarts."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

EXAMPLES = 10
"""Examples shown per rule."""
_MOST_CHARACTERS = 300  # of a text in an example
WORD_BINS = 201
"""Bins of numbers of words or subwords; the last one is for 200 and more."""
RATIO_BINS = 41
"""Bins of 0.1 of the ratio of lengths, from 1.0 on; the last one is for 5.0 and more."""
_SHAPE = {
    "counts": {str: int},
    "histograms": {str: [int]},
    "examples": {str: [object]},
    "characters": {str: {str: int}},
}


@dataclass
class Tally:
    """Counts, histograms and examples by name. Adding tallies in any order gives the same sums."""

    counts: Counter[str] = field(default_factory=Counter)
    histograms: dict[str, np.ndarray] = field(default_factory=dict)
    """int64; those of one name have the same length everywhere."""
    examples: dict[str, list[tuple[int, dict[str, Any]]]] = field(default_factory=dict)
    """(rank, example): those of the lowest ranks. Ranks are pseudorandom, so the examples are spread over the text."""
    characters: dict[str, Counter[str]] = field(default_factory=dict)

    def count(self, name: str, values: np.ndarray, bins: int) -> None:
        """Add values to a histogram with `bins` bins, the last of which has the larger values too."""
        found = np.bincount(np.minimum(values, bins - 1), minlength=bins)
        self.histograms[name] = self.histograms[name] + found if name in self.histograms else found

    def show(self, name: str, rank: int, example: Mapping[str, Any], most: int = EXAMPLES) -> None:
        """Keep an example if its rank is among the `most` lowest ones of its name."""
        kept = self.examples.setdefault(name, [])
        if len(kept) < most or rank < kept[-1][0]:
            kept.append((rank, {key: _cut(value) for key, value in example.items()}))
            kept.sort(key=lambda each: each[0])
            del kept[most:]

    def add(self, other: "Tally", most: Mapping[str, int] | None = None) -> None:
        """Add another tally; `most` has the number of examples by name where it is not `EXAMPLES`."""
        self.counts.update(other.counts)
        for name, bins in other.histograms.items():
            self.histograms[name] = self.histograms[name] + bins if name in self.histograms else bins
        for name, examples in other.examples.items():
            for rank, example in examples:
                self.show(name, rank, example, (most or {}).get(name, EXAMPLES))
        for name, counts in other.characters.items():
            self.characters.setdefault(name, Counter()).update(counts)

    def shown(self, name: str) -> list[dict[str, Any]]:
        """Return the examples of a name."""
        return [example for _, example in self.examples.get(name, [])]

    def to_dict(self) -> dict[str, Any]:
        """Return the tally in a form for JSON."""
        return {
            "counts": dict(self.counts),
            "histograms": {name: bins.tolist() for name, bins in self.histograms.items()},
            "examples": self.examples,
            "characters": self.characters,
        }

    @classmethod
    def of(cls, record: Any) -> "Tally":
        """Return the tally of a record that `to_dict` returned."""
        return cls(
            Counter(record["counts"]),
            {name: np.array(bins, dtype=np.int64) for name, bins in record["histograms"].items()},
            {name: [(rank, example) for rank, example in each] for name, each in record["examples"].items()},
            {name: Counter(counts) for name, counts in record["characters"].items()},
        )

    @staticmethod
    def shape() -> Any:
        """Return the shape of a record, for `nmt.files.differs`."""
        return _SHAPE


def count_lengths(tally: Tally, name: str, source_N: np.ndarray, target_N: np.ndarray) -> None:
    """Count pairs by the words of each side, and by the ratio of the longer side to the shorter one."""
    tally.count(f"{name}.words.source", source_N, WORD_BINS)
    tally.count(f"{name}.words.target", target_N, WORD_BINS)
    longer_N, shorter_N = np.maximum(source_N, target_N), np.minimum(source_N, target_N)
    tenths_N = longer_N * 10 // np.maximum(shorter_N, 1) - 10  # whole numbers: no rounding at 1.1, 1.2, ...
    tally.count(f"{name}.ratio", np.where(shorter_N > 0, np.maximum(tenths_N, 0), RATIO_BINS - 1), RATIO_BINS)


def ranks(seed: int, places: np.ndarray | int) -> np.ndarray:
    """Return pseudorandom numbers (uint64) of the rows at `places`, a function of (seed, place): SplitMix64."""
    with np.errstate(over="ignore"):
        mixed = np.asarray(places, dtype=np.uint64) + np.uint64(seed % (1 << 64))
        mixed = (mixed + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def count_characters(texts: Iterable[str]) -> Counter[str]:
    """Return how often each character occurs in the texts."""
    points = np.frombuffer("".join(texts).encode("utf-32-le", errors="replace"), dtype="<u4")
    counts = np.bincount(points) if len(points) else np.zeros(0, dtype=np.int64)
    there = np.flatnonzero(counts)
    return Counter(dict(zip(map(chr, there.tolist()), counts[there].tolist(), strict=True)))


def _cut(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _MOST_CHARACTERS:
        return f"{value[: _MOST_CHARACTERS - 1]}…"
    return value
