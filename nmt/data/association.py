"""Find words that translate each other, by counting which words occur together in the training pairs.

The association of a source word s and a target word t is Dice's coefficient 2 n(s, t) / (n(s) + n(t)), where n counts
the pairs that have the word, or both words. Two words of a pair are linked if each is by far the other's best partner
there. Many words stay without a link, but few links are wrong.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from nmt.text.terms import Word, words

_SHORTEST = 3  # letters
_LEAST_COUNT = 3  # pairs with a word, or with both
_MOST_SHARE = 0.05  # of all pairs: more frequent words are function words
_LEAST_DICE = 0.3
# The next best partner of either word must have at most this share of their association.
_CLEAR = 0.6
_EQUAL = 2.0  # association of equal words
_GATHERED = 1 << 22  # keys before they are counted

Pairs = Iterable[tuple[str, str]]


class Link(NamedTuple):
    """A source word and a target word that translate each other."""

    source: Word
    target: Word


class Associations:
    """Words that occur together far more often than by chance."""

    def __init__(self, read: Callable[[], Pairs]) -> None:
        """Count the words of the sentence pairs that `read` yields; it is called twice, as the pairs are not kept."""
        source_ids, target_ids = _vocabularies(read())
        source_counts, target_counts = np.array([0, *source_ids.values()]), np.array([0, *target_ids.values()])
        sources = {word: number for number, word in enumerate(source_ids, start=1)}
        targets = {word: number for number, word in enumerate(target_ids, start=1)}
        keys, counts = _together(read(), sources, targets)
        source_N, target_N = keys // len(target_counts), keys % len(target_counts)
        dice_N = 2.0 * counts / (source_counts[source_N] + target_counts[target_N])
        self._dice: dict[str, dict[str, float]] = {}
        """Associations by source word and target word; only the strong ones."""
        names = list(sources), list(targets)
        for place in np.flatnonzero((dice_N >= _LEAST_DICE * _CLEAR) & (counts >= _LEAST_COUNT)):
            source, target = names[0][source_N[place] - 1], names[1][target_N[place] - 1]
            self._dice.setdefault(source, {})[target] = float(dice_N[place])

    def links(self, source: str, target: str) -> list[Link]:
        """Return the links of a sentence pair, in the order of the source. Each word is in one link at most.

        Words that occur more than once on their side have no link. Equal words with a capital letter, such as names,
        are linked.
        """
        sources, targets = _single(words(source)), _single(words(target))
        dice = {
            (one, other): association
            for one in sources
            for other, association in self._dice.get(one, {}).items()
            if other in targets
        }
        dice |= {(word, word): _EQUAL for word in sources if word in targets and word[0].isupper()}
        links = []
        for (one, other), association in dice.items():
            rivals = [each for (a, b), each in dice.items() if (a == one) != (b == other)]
            if association >= _LEAST_DICE and max(rivals, default=0.0) <= _CLEAR * association:
                links.append(Link(sources[one], targets[other]))
        return links


def _vocabularies(pairs: Pairs) -> tuple[dict[str, int], dict[str, int]]:
    """Return the words of each side that are neither rare nor frequent, with the numbers of pairs that have them."""
    counts: tuple[Counter[str], Counter[str]] = Counter(), Counter()
    num_pairs = 0
    for pair in pairs:
        num_pairs += 1
        for text, side in zip(pair, counts, strict=True):
            side.update({word.text for word in words(text) if _has_meaning(word.text)})
    most = max(_MOST_SHARE * num_pairs, _LEAST_COUNT)
    kept = [{word: count for word, count in side.items() if _LEAST_COUNT <= count <= most} for side in counts]
    return kept[0], kept[1]


def _together(pairs: Pairs, sources: dict[str, int], targets: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return (keys, counts) of the words that occur together; a key is source number x (target words + 1) + target."""
    keys, counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    gathered: list[np.ndarray] = []
    size = 0

    def counted() -> tuple[np.ndarray, np.ndarray]:
        new, times = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *gathered]), return_counts=True)
        both, places = np.unique(np.concatenate([keys, new]), return_inverse=True)
        return both, np.bincount(places, np.concatenate([counts, times]), len(both)).astype(np.int64)

    for source, target in pairs:
        source_M = np.array([*_numbers(source, sources)], dtype=np.int64)
        target_N = np.array([*_numbers(target, targets)], dtype=np.int64)
        gathered.append((source_M[:, None] * (len(targets) + 1) + target_N).ravel())
        size += len(gathered[-1])
        if size >= _GATHERED:
            keys, counts = counted()
            gathered, size = [], 0
    return counted()


def _numbers(text: str, known: dict[str, int]) -> Iterator[int]:
    return iter({known[word.text] for word in words(text) if word.text in known})


def _single(found: list[Word]) -> dict[str, Word]:
    """Return the words with a meaning that occur once, by their text."""
    counts = Counter(word.text for word in found)
    return {word.text: word for word in found if counts[word.text] == 1 and _has_meaning(word.text)}


def _has_meaning(word: str) -> bool:
    """Return whether a word has enough letters to be a term, and no digit."""
    return len(word) >= _SHORTEST and word.isalpha()
