"""Find repeated keys among those of tens of millions of pairs, and choose the pairs that are held out, in arrays."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

_AT_ONCE = 1 << 23
"""Keys that are compared at a time: about 250 MB. More keys need more passes over the files."""

Columns = Callable[[], Iterable[np.ndarray]]
"""Yields the keys (uint64) of all blocks in order; called once per pass."""


def repeated(columns: Columns, total: int) -> np.ndarray:
    """Return, for each of `total` keys in order, whether the same key came before it (bool)."""
    passes = max(1, -(-total // _AT_ONCE))
    repeated_N = np.zeros(total, dtype=bool)
    for number in range(passes):
        found: list[np.ndarray] = []
        places: list[np.ndarray] = []
        start = 0
        for keys in columns():
            # Keys are hashes, so that passes have about equally many.
            mine = np.flatnonzero(keys % np.uint64(passes) == number)
            found.append(keys[mine])
            places.append(mine + start)
            start += len(keys)
        assert start == total
        keys_K = np.concatenate(found) if found else np.zeros(0, np.uint64)
        place_K = np.concatenate(places) if places else np.zeros(0, np.int64)
        order_K = np.argsort(keys_K, kind="stable")  # of equal keys, the earliest comes first
        sorted_K = keys_K[order_K]
        repeated_N[place_K[order_K[1:][sorted_K[1:] == sorted_K[:-1]]]] = True
    return repeated_N


class HeldOutRanks:
    """The pairs of dev and test that are held out of the training text, by the ranks of pairs.

    A rank is a hash of the two texts: dev takes the smallest ranks, test the largest. So the choice does not depend on
    the order of the text, and the choice for one split does not depend on the size of the other.
    """

    def __init__(self, num_dev: int, num_test: int) -> None:
        self._most = {"dev": num_dev, "test": num_test}
        self._chosen = {split: np.zeros(0, np.uint64) for split in self._most}

    @property
    def wanted(self) -> int:
        """Number of pairs to hold out."""
        return sum(self._most.values())

    def offer(self, ranks: np.ndarray) -> None:
        """Consider pairs by their ranks (uint64)."""
        for split, most in self._most.items():
            if most:
                distinct = np.unique(np.concatenate([self._chosen[split], ranks]))
                self._chosen[split] = distinct[:most] if split == "dev" else distinct[-most:]

    def ranks(self, split: str) -> np.ndarray:
        """Return the ranks of the pairs of "dev" or "test", in the order of the split."""
        chosen = self._chosen[split]
        return chosen if split == "dev" else chosen[::-1]

    def holds(self, ranks: np.ndarray) -> np.ndarray:
        """Return which ranks are those of pairs that are held out (bool)."""
        if not self.wanted:
            return np.zeros(len(ranks), dtype=bool)
        return np.isin(ranks, np.concatenate([*self._chosen.values()]))


def evenly(count: int, total: int, start: int, length: int) -> np.ndarray:
    """Return which of the items `start` .. `start` + `length` - 1 of `total` are in an even sample of `count` (int64).

    After n items, the sample has n * count / total of them, rounded down. Places are counted from `start`.
    """
    number = np.arange(start, start + length + 1, dtype=np.int64)
    return np.flatnonzero(np.diff(number * count // total))


def split_at(mask_N: np.ndarray, lengths: Iterable[int]) -> Iterator[np.ndarray]:
    """Yield consecutive parts of an array, of these lengths."""
    start = 0
    for length in lengths:
        yield mask_N[start : start + length]
        start += length
