"""Encode much text fast: each word is cut into subwords once, and looked up from then on.

SentencePiece cuts a line as a whole. With a vocabulary of byte-pair encoding, no subword goes across a blank and no
merge depends on another word, so the ids of a line are those of its words. A unigram vocabulary compares sums of
probabilities over the whole line, whose rounding may decide between two ways to cut a word: its lines are not cut.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from nmt.data.shards import ids_dtype
from nmt.data.subwords import Subwords

_MOST_WORDS = 300_000
"""Words in the cache: about 70 MB."""
_AT_ONCE = 500  # texts whose words are in the processor's cache together


class Cut(NamedTuple):
    """Texts in subwords."""

    ids: np.ndarray
    """Subword ids of all texts, concatenated, of the type `nmt.data.shards.ids_dtype`."""
    lengths: np.ndarray
    """int32: number of subwords of each text."""
    num_words: np.ndarray
    """int32: number of words of each text, which blanks separate."""
    num_whole: int
    """Words that are a single subword."""


class WordEncoder:
    """Encodes text as `Subwords.encode` does, with exactly the same ids. For one thread."""

    def __init__(self, subwords: Subwords, most_words: int = _MOST_WORDS) -> None:
        self.is_byte = np.zeros(subwords.size, dtype=bool)
        """For each id, whether it is a byte of a character without a subword of its own, or unknown."""
        self.is_byte[subwords.byte_ids()] = True
        self._subwords = subwords
        self._dtype = ids_dtype(subwords.size)
        self._begins = np.array([piece.startswith("▁") for piece in subwords.pieces(range(subwords.size))])
        self._most_words = most_words
        self._ids: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> Cut:
        """Return the texts in subwords."""
        return self._by_words(texts) if self._subwords.cuts_words_apart else self._by_lines(texts)

    def _by_words(self, texts: Sequence[str]) -> Cut:
        parts = [self._some_by_words(texts[start : start + _AT_ONCE]) for start in range(0, len(texts), _AT_ONCE)]
        ids, lengths_B, words_B = (
            np.concatenate([part[field] for part in parts]) if parts else np.zeros(0, dtype)
            for field, dtype in enumerate((self._dtype, np.int32, np.int32))
        )
        return Cut(ids, lengths_B, words_B, sum(part.num_whole for part in parts))

    def _some_by_words(self, texts: Sequence[str]) -> Cut:
        words = [text.split(" ") for text in texts]
        every = list(chain.from_iterable(words))
        new = list(set(every).difference(self._ids))
        if len(self._ids) + len(new) > self._most_words:
            self._ids = {}
            new = list(set(every))
        cut = self._subwords.encode_batch(new, threads=1)
        self._ids.update(zip(new, (ids.astype(self._dtype).tobytes() for ids in cut), strict=True))
        found = list(map(self._ids.__getitem__, every))
        pieces_W = np.fromiter(map(len, found), np.int64, len(found)) // self._dtype.itemsize
        ids = np.frombuffer(b"".join(found), self._dtype)
        starts_B = np.cumsum([0, *map(len, words)])[:-1]
        counts_2B = [np.add.reduceat(values, starts_B) for values in (pieces_W, pieces_W > 0)]
        lengths_B, words_B = (each.astype(np.int32) for each in counts_2B)
        # Other blanks, such as those of French punctuation, separate words too. None of them is printable.
        for place, text in enumerate(texts):
            if not text.isprintable():
                words_B[place] = len(text.split())
        return Cut(ids, lengths_B, words_B, int((pieces_W == 1).sum()))

    def _by_lines(self, texts: Sequence[str]) -> Cut:
        cut = self._subwords.encode_batch(list(texts), threads=1)
        lengths_B = np.fromiter(map(len, cut), np.int32, len(cut))
        ids = np.concatenate(cut).astype(self._dtype) if cut else np.zeros(0, self._dtype)
        words_B = np.fromiter((len(text.split()) for text in texts), np.int32, len(texts))
        # A word is whole if the next subword begins another word, or belongs to another text.
        begins_N = self._begins[ids]
        ends_N = np.ones(len(ids), dtype=bool)
        ends_N[:-1] = begins_N[1:]
        ends_N[np.cumsum(lengths_B)[lengths_B > 0] - 1] = True
        return Cut(ids, lengths_B, words_B, int((begins_N & ends_N).sum()))
