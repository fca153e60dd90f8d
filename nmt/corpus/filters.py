"""Filter training pairs, and choose the pairs that are held out of the training text."""

import hashlib
import heapq

from nmt.config import FilterConfig
from nmt.corpus.pairs import SentencePair
from nmt.wording import counted


class Filters:
    """Filters of training pairs, applied in a fixed order; `dropped` counts the pairs that each was first to reject."""

    def __init__(self, config: FilterConfig) -> None:
        self.config = config
        self.dropped = dict.fromkeys(
            ("blank", "identical", "duplicates", "max_words", "max_length_ratio", "max_pieces"), 0
        )
        self._seen: set[int] = set()

    def keep(self, pair: SentencePair) -> bool:
        """Return whether the text of a pair passes."""
        reason = self._refusal(pair)
        if reason:
            self.dropped[reason] += 1
        return not reason

    def keep_encoded(self, num_source_pieces: int, num_target_pieces: int) -> bool:
        """Return whether an encoded pair passes. A side without subwords is blank."""
        reason = ""
        longer = max(num_source_pieces, num_target_pieces)
        if self.config.blank and min(num_source_pieces, num_target_pieces) == 0:
            reason = "blank"
        elif self.config.max_pieces and longer > self.config.max_pieces:
            reason = "max_pieces"
        if reason:
            self.dropped[reason] += 1
        return not reason

    def describe(self) -> str:
        """List how many pairs each filter dropped and why: "5 with more than 200 subwords (max_pieces)"."""
        config = self.config
        why = {
            "blank": "with a blank side",
            "identical": "the same on both sides",
            "duplicates": "seen before",
            "max_words": f"with more than {counted(config.max_words, 'word')}",
            "max_length_ratio": f"with one side more than {config.max_length_ratio:g} times as long",
            "max_pieces": f"with more than {counted(config.max_pieces, 'subword')}",
        }
        return ", ".join(f"{count:,} {why[name]} ({name})" for name, count in self.dropped.items() if count)

    def _refusal(self, pair: SentencePair) -> str:
        config, source, target = self.config, pair.source, pair.target
        if config.blank and not (source.strip() and target.strip()):
            return "blank"
        if config.identical and source.strip() == target.strip():
            return "identical"
        if config.duplicates and self._is_duplicate(pair):
            return "duplicates"
        if config.max_words or config.max_length_ratio:
            fewer, more = sorted((len(source.split()), len(target.split())))
            if config.max_words and more > config.max_words:
                return "max_words"
            if config.max_length_ratio and more > config.max_length_ratio * fewer:
                return "max_length_ratio"
        return ""

    def _is_duplicate(self, pair: SentencePair) -> bool:
        # The same text in other languages is another pair.
        source = f"{pair.direction}\n{pair.source}" if pair.direction else pair.source
        fingerprint = _fingerprint(source, pair.target)
        if fingerprint in self._seen:
            return True
        self._seen.add(fingerprint)
        return False


class HoldOut:
    """Choose the pairs of dev and test that are held out of the training text, and find all copies of them.

    Pairs are chosen by a hash of their two texts: dev takes the smallest hashes, test the largest. The choice does not
    depend on the order of the text, and the choice for one split does not depend on the size of the other. Memory does
    not grow with the text.
    """

    def __init__(self, num_dev: int, num_test: int) -> None:
        self._splits = {"dev": _Smallest(num_dev), "test": _Smallest(num_test)}

    @property
    def wanted(self) -> int:
        """Number of pairs to hold out."""
        return sum(split.most for split in self._splits.values())

    @property
    def num_copies(self) -> int:
        """Number of offered pairs that are held out, copies included."""
        return sum(split.num_copies for split in self._splits.values())

    def offer(self, pair: SentencePair) -> None:
        """Consider a pair of the training text."""
        rank = _rank(pair.source, pair.target)
        self._splits["dev"].offer(rank, pair)
        self._splits["test"].offer(_LARGEST - rank, pair)

    def pairs(self, split: str) -> list[SentencePair]:
        """Return the pairs of "dev" or "test", each once, in the order of their hashes."""
        return self._splits[split].pairs()

    def holds(self, source: str, target: str) -> bool:
        """Return whether a pair of the training text is held out."""
        rank = _rank(source, target)
        return rank in self._splits["dev"] or _LARGEST - rank in self._splits["test"]


class _Smallest:
    """The `most` pairs with the smallest ranks, and how often each was offered."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._heap: list[int] = []  # negated ranks: the largest rank is first
        self._kept: dict[int, tuple[SentencePair, int]] = {}

    @property
    def num_copies(self) -> int:
        return sum(count for _, count in self._kept.values())

    def offer(self, rank: int, pair: SentencePair) -> None:
        if rank in self._kept:
            first, count = self._kept[rank]
            self._kept[rank] = (first, count + 1)
        elif len(self._heap) < self.most:
            heapq.heappush(self._heap, -rank)
            self._kept[rank] = (pair, 1)
        elif self.most and rank < -self._heap[0]:
            # A removed pair never comes back, since the largest kept rank only falls.
            del self._kept[-heapq.heapreplace(self._heap, -rank)]
            self._kept[rank] = (pair, 1)

    def pairs(self) -> list[SentencePair]:
        return [self._kept[rank][0] for rank in sorted(self._kept)]

    def __contains__(self, rank: int) -> bool:
        return rank in self._kept


_LARGEST = (1 << 64) - 1


def _rank(source: str, target: str) -> int:
    # Blanks around a sentence do not count.
    return _fingerprint(source.strip(), target.strip())


def _fingerprint(source: str, target: str) -> int:
    # 64 bits: among 40 million pairs, the probability of a collision, which drops a pair, is 4e-5.
    digest = hashlib.blake2b(f"{source}\n{target}".encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
