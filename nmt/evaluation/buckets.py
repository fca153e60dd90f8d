"""Divide the sentences of a test set into buckets, by what makes them easy or hard to translate.

Each function returns a `Grouping`, in which every sentence is in exactly one bucket. No bucket is empty.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from nmt.text.words import num_words, words

# Quantiles of the lengths at which buckets end: fifths, and the longest twentieth by itself.
_LENGTH_QUANTILES = (0.2, 0.4, 0.6, 0.8, 0.95)
_FREQUENCIES = {0: "never", 1: "once", 9: "2 to 9 times", 99: "10 to 99 times", 999: "100 to 999 times"}
_MOST_FREQUENT, _NO_WORD = "1,000 times or more", "no word"


class Bucket(NamedTuple):
    """Sentences that have something in common."""

    label: str
    places: list[int]
    """Indices of the sentences, ascending."""


class Grouping(NamedTuple):
    """All sentences of a set, in buckets."""

    name: str
    """Key in JSON."""
    title: str
    note: str
    """What the buckets are, for the reader."""
    buckets: list[Bucket]


def by_length(sources: Sequence[str]) -> Grouping:
    """Return buckets by the number of words in the source: about a fifth of the sentences in each, and the longest."""
    lengths_N = np.array([num_words(source) for source in sources])
    ends = np.unique([*np.quantile(lengths_N, _LENGTH_QUANTILES, method="lower"), lengths_N.max()])
    begins = [int(lengths_N.min()), *(int(end) + 1 for end in ends[:-1])]
    names = [f"{low:,}" if low == high else f"{low:,} to {high:,}" for low, high in zip(begins, ends, strict=True)]
    labels = [f"{name} word{'s' * (name != '1')}" for name in names]
    note = "Words and numbers of the source sentence."
    found = [labels[place] for place in np.searchsorted(ends, lengths_N)]
    return Grouping("length", "Length of the source", note, _in_order(labels, found))


def by_rare_words(sources: Sequence[str], counts: Mapping[str, int], where: str) -> Grouping:
    """Return buckets by how often the rarest word of the source occurs, given the `counts` of words `where`."""
    labels = [*_FREQUENCIES.values(), _MOST_FREQUENT, _NO_WORD]
    found = []
    for source in sources:
        rarest = min((counts.get(word, 0) for word in words(source)), default=None)
        if rarest is None:
            found.append(_NO_WORD)
        else:
            found.append(next((name for most, name in _FREQUENCIES.items() if rarest <= most), _MOST_FREQUENT))
    note = f"How often the rarest word of the source sentence occurs in {where}. Numbers do not count as words."
    return Grouping("rare_words", "Rarest word of the source", note, _in_order(labels, found))


def by_numbers(sources: Sequence[str]) -> Grouping:
    """Return two buckets: the sources with digits, and those without."""
    labels = ["with digits", "without digits"]
    found = [labels[not any(character.isdigit() for character in source)] for source in sources]
    return Grouping(
        "numbers", "Numbers in the source", "Whether the source sentence has digits.", _in_order(labels, found)
    )


def by_label(name: str, title: str, note: str, labels: Sequence[str]) -> Grouping:
    """Return a bucket for each different label of `labels`, the largest first."""
    sizes = {label: labels.count(label) for label in set(labels)}
    return Grouping(name, title, note, _in_order(sorted(sizes, key=lambda label: (-sizes[label], label)), labels))


def _in_order(labels: Sequence[str], found: Sequence[str]) -> list[Bucket]:
    """Return the buckets that are not empty, in the order of `labels`; `found` has the label of each sentence."""
    places: dict[str, list[int]] = {label: [] for label in labels}
    for place, label in enumerate(found):
        places[label].append(place)
    return [Bucket(label, each) for label, each in places.items() if each]
