"""Training text in other subwords each epoch: BPE-dropout, and sampling from a unigram model.

SentencePiece can sample, too, but draws other numbers in each process, so that a resumed run would not be exact. Here
all pairs of an epoch are cut anew in NumPy: their subwords are spelled in characters, and joined again at random. The
text stays the same to the letter. Symbols and bytes are no text, and stay as they are.

Legend: N characters or subwords, one after the other; B pairs.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from nmt.config import CorpusConfig
from nmt.data.batching import EpochText, TrainingText
from nmt.data.shards import DTYPES, SIDES, ParallelShards, positions
from nmt.data.subwords import Subwords

_CHUNK = 10_000  # pairs that are cut together; another number gives other draws
_THREADS = min(os.cpu_count() or 1, 8)
_BLANK = "▁"
_NONE = np.iinfo(np.int64).max


def resampled(text: TrainingText, subwords: Subwords, corpus: CorpusConfig, seed: int) -> TrainingText:
    """Return `text` with subwords drawn anew in each epoch, by `corpus.subwords.sampling`; `text` itself if it is 0."""
    rate = corpus.subwords.sampling
    return Resampled(text, subwords, rate, corpus.filters.max_pieces, seed) if rate else text


class Resampled:
    """Training text with other subwords in each epoch (`nmt.data.batching.TrainingText`).

    The subwords of an epoch are a pure function of the text, `seed` and the number of the epoch. An epoch is in memory,
    with 2 bytes per subword, or 4 if the vocabulary has more than 65,536.
    """

    def __init__(self, text: TrainingText, subwords: Subwords, rate: float, most: int, seed: int) -> None:
        """Cut the pairs of `text` anew. A side that would have more than `most` subwords keeps its own; 0: none does.

        `rate` is the probability of BPE-dropout or the alpha of a unigram model; `subwords` decides.
        """
        self._text, self._rate, self._most, self._seed = text, rate, most, seed
        self._dtype = DTYPES[subwords.size > 1 << 16]
        self._resegment = _Resegment(subwords)

    def epoch(self, number: int) -> EpochText:
        """Return the pairs of an epoch in new subwords."""
        drawn = self._text.epoch(number)
        starts = range(0, len(drawn.source_lengths), _CHUNK)
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="Resampled") as pool:
            chunks = list(pool.map(lambda start: self._chunk(drawn, number, start), starts))
        pieces, offsets = {}, {}
        for place, side in enumerate(SIDES):
            pieces[side] = np.concatenate([chunk[place][0] for chunk in chunks])
            lengths_B = np.concatenate([chunk[place][1] for chunk in chunks])
            offsets[side] = np.concatenate([[0], np.cumsum(lengths_B)])
        return ParallelShards(pieces, offsets)

    def _chunk(self, drawn: EpochText, number: int, start: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (subwords, lengths) of both sides of the pairs from `start` on."""
        generator = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(number, start, 0)))
        pairs_B = np.arange(start, min(start + _CHUNK, len(drawn.source_lengths)))
        sides = []
        for side in SIDES:
            old_N, old_B = drawn.gather(side, pairs_B)
            new_N, new_B = self._resegment(old_N, old_B, self._rate, generator)
            kept_B = (new_B > self._most) & bool(self._most)
            if kept_B.any():
                new_N, new_B = _chosen(kept_B, (old_N, old_B), (new_N, new_B))
            sides.append((new_N.astype(self._dtype), new_B))
        return sides


def _chosen(
    first_B: np.ndarray, one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the (subwords, lengths) of texts, those of `one` where `first_B`, else those of `other`."""
    lengths_B = np.where(first_B, one[1], other[1])
    starts_B = np.cumsum(lengths_B) - lengths_B
    ids_N = np.empty(lengths_B.sum(), dtype=np.int64)
    for chosen_B, (from_N, from_B) in ((first_B, one), (~first_B, other)):
        from_starts_B = np.cumsum(from_B) - from_B
        source = positions(from_starts_B[chosen_B], from_B[chosen_B])
        ids_N[positions(starts_B[chosen_B], from_B[chosen_B])] = from_N[source]
    return ids_N, lengths_B


class _Resegment:
    """Cuts texts of subwords anew, with the tables of one vocabulary.

    A text is spelled in characters, each the id of its subword. A word begins with a blank. No subword reaches beyond
    a word, so that words are drawn independently. A symbol, a byte or an unknown character is a word by itself.
    """

    def __init__(self, subwords: Subwords) -> None:
        ids, scores = subwords.learned()
        spelled = [[number] for number in range(subwords.size)]
        self._is_alone = np.ones(subwords.size, dtype=bool)
        for piece, number in ids.items():
            if all(character in ids for character in piece):
                spelled[number] = [ids[character] for character in piece]
                self._is_alone[number] = False
        self._num_characters = np.array([len(characters) for characters in spelled])
        self._starts = np.cumsum(self._num_characters) - self._num_characters
        self._characters = np.concatenate(spelled)
        self._blank = ids.get(_BLANK, -1)
        self._draw = _Merges(ids, scores) if subwords.is_bpe else _Lattice(ids, scores)

    def __call__(
        self, ids_N: np.ndarray, lengths_B: np.ndarray, rate: float, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (subwords, lengths) of texts of the given subwords, drawn anew."""
        counts_N = self._num_characters[ids_N]
        characters_N = self._characters[positions(self._starts[ids_N], counts_N)]
        # Where texts begin and end, in characters.
        bounds_B = np.concatenate([[0], np.cumsum(counts_N)])[np.concatenate([[0], np.cumsum(lengths_B)])]
        alone_N, blank_N = self._is_alone[characters_N], characters_N == self._blank
        begins_N = alone_N | blank_N
        begins_N[1:] |= alone_N[:-1]
        begins_N[1:] &= ~(blank_N[1:] & blank_N[:-1])
        begins_N[bounds_B[bounds_B < len(begins_N)]] = True
        symbols_N, stays_N = self._draw(characters_N, begins_N, rate, generator)
        return symbols_N[stays_N], np.diff(np.concatenate([[0], np.cumsum(stays_N)])[bounds_B])


class _Merges:
    """BPE-dropout (Provilkov et al. 2020, algorithm 1), on all words at once.

    A word starts as characters. In each round, each merge that is possible is left out with probability p, and the
    first of the others in the order of the vocabulary is done. The word is finished when none is left in a round.
    """

    def __init__(self, ids: Mapping[str, int], scores: np.ndarray) -> None:
        self._size = len(scores)
        pairs = sorted(
            (ids[piece[:cut]] * self._size + ids[piece[cut:]], number)
            for piece, number in ids.items()
            for cut in range(1, len(piece))
            if piece[:cut] in ids and piece[cut:] in ids
        )
        # The last entry, which no pair has, ends all searches.
        self._pairs = np.array([pair for pair, _ in pairs] + [_NONE])
        self._merged = np.array([number for _, number in pairs] + [-1])
        self._rank = np.argsort(np.argsort(-scores, kind="stable"))

    def __call__(
        self, characters_N: np.ndarray, begins_N: np.ndarray, rate: float, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (symbols, which of them stay). A merged symbol is at its first character; the others do not stay."""
        size = len(characters_N)
        # One symbol more, in no word, is the neighbour of the first and the last.
        symbols_N = np.append(characters_N, 0)
        word_N = np.append(np.cumsum(begins_N), -1)
        left_N, right_N = np.arange(-1, size), np.arange(1, size + 2)
        left_N[0] = right_N[size] = size
        stays_N = np.ones(size + 1, dtype=bool)
        merged_N = self._merge(symbols_N, word_N, right_N, np.arange(size + 1))
        # The symbols of the words that are not finished.
        open_N = np.flatnonzero(np.isin(word_N, word_N[merged_N >= 0]))
        while len(open_N):
            merged = merged_N[open_N]
            possible = (merged >= 0) & (generator.random(len(open_N), dtype=np.float32) >= rate)
            order = np.where(possible, self._rank[merged] * (size + 1) + open_N, _NONE)
            firsts = np.flatnonzero(np.diff(word_N[open_N], prepend=-2))
            best = np.minimum.reduceat(order, firsts)
            goes_on = best != _NONE
            at = best[goes_on] % (size + 1)
            gone = right_N[at]
            symbols_N[at] = merged_N[at]
            stays_N[gone] = False
            right_N[at] = right_N[gone]
            left_N[right_N[gone]] = at
            for changed in (at, left_N[at]):
                merged_N[changed] = self._merge(symbols_N, word_N, right_N, changed)
            in_open_word = np.repeat(goes_on, np.diff(firsts, append=len(open_N)))
            open_N = open_N[in_open_word & stays_N[open_N]]
        return symbols_N[:size], stays_N[:size]

    def _merge(self, symbols_N: np.ndarray, word_N: np.ndarray, right_N: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Return what each symbol becomes with the next one of its word; -1: no subword."""
        next_ = right_N[at]
        pairs = symbols_N[at] * self._size + symbols_N[next_]
        found = np.searchsorted(self._pairs, pairs)
        return np.where((self._pairs[found] == pairs) & (word_N[at] == word_N[next_]), self._merged[found], -1)


class _Lattice:
    """Sampling from a unigram model (Kudo 2018, section 3.2, over all segmentations), on all words at once.

    P(x) is in proportion to the product of p(piece)^alpha. Forward: the sum over all segmentations of the beginning of
    a word. Backward: its last subword is drawn, then the one before it.
    """

    def __init__(self, ids: Mapping[str, int], scores: np.ndarray) -> None:
        self._size, self._scores = len(scores), scores
        nodes: dict[tuple[int, int], int] = {}
        ends: dict[int, int] = {}
        for piece, number in ids.items():
            node = 0
            for character in piece if all(character in ids for character in piece) else "":
                node = nodes.setdefault((node, ids[character]), len(nodes) + 1)
            if node:
                ends[node] = number
        edges = sorted((node * self._size + character, after) for (node, character), after in nodes.items())
        # The last entry, which no edge has, ends all searches.
        self._edges = np.array([edge for edge, _ in edges] + [_NONE])
        self._after = np.array([node for _, node in edges] + [-1])
        self._piece = np.array([ends.get(node, -1) for node in range(len(nodes) + 1)])

    def __call__(
        self, characters_N: np.ndarray, begins_N: np.ndarray, rate: float, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (symbols, which of them stay). A subword is at its first character; the others do not stay."""
        size = len(characters_N)
        begin_N = np.maximum.accumulate(np.where(begins_N, np.arange(size), 0))
        start_M, end_M, piece_M = self._matches(characters_N, begins_N)
        weight_M = np.where(piece_M >= 0, rate * self._scores[piece_M], 0.0)
        total_N = self._forward(begin_N, start_M, end_M, weight_M)
        from_begin_M = start_M == begin_N[start_M]
        share_M = np.exp(np.where(from_begin_M, 0.0, total_N[start_M - 1]) + weight_M - total_N[end_M])
        sums_M = np.cumsum(share_M)
        symbols_N, stays_N = characters_N.copy(), np.zeros(size, dtype=bool)
        last_M = np.searchsorted(end_M, np.arange(size), side="right") - 1
        first_M = np.searchsorted(end_M, np.arange(size))
        # Of each word, the character that ends the next subword to be drawn.
        at = np.flatnonzero(np.append(begins_N[1:], True)) if size else np.zeros(0, dtype=np.int64)
        while len(at):
            before = sums_M[first_M[at]] - share_M[first_M[at]]
            drawn = before + generator.random(len(at)) * (sums_M[last_M[at]] - before)
            match = np.clip(np.searchsorted(sums_M, drawn, side="right"), first_M[at], last_M[at])
            start, piece = start_M[match], piece_M[match]
            stays_N[start] = True
            symbols_N[start] = np.where(piece >= 0, piece, characters_N[start])
            at = start[~from_begin_M[match]] - 1
        return symbols_N, stays_N

    def _matches(self, characters_N: np.ndarray, begins_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (first character, last character, id) of all subwords in the words, by last character.

        A character that is no subword of the model, such as a symbol, has the id -1.
        """
        start = np.arange(len(characters_N))
        node = self._edge(np.zeros_like(start), characters_N)
        alone = start[node < 0]
        found = [(alone, alone, np.full(len(alone), -1))]
        start, node, length = start[node >= 0], node[node >= 0], 1
        ends_N = np.append(begins_N[1:], True) if len(begins_N) else begins_N
        while len(start):
            is_piece = self._piece[node] >= 0
            found.append((start[is_piece], start[is_piece] + length - 1, self._piece[node[is_piece]]))
            longer = ~ends_N[start + length - 1]
            start, node = start[longer], node[longer]
            node = self._edge(node, characters_N[start + length])
            start, node, length = start[node >= 0], node[node >= 0], length + 1
        start_M, end_M, piece_M = (np.concatenate(each) for each in zip(*found, strict=True))
        order = np.argsort(end_M, kind="stable")
        return start_M[order], end_M[order], piece_M[order]

    def _edge(self, node: np.ndarray, character: np.ndarray) -> np.ndarray:
        edges = node * self._size + character
        found = np.searchsorted(self._edges, edges)
        return np.where(self._edges[found] == edges, self._after[found], -1)

    def _forward(self, begin_N: np.ndarray, start_M: np.ndarray, end_M: np.ndarray, weight_M: np.ndarray) -> np.ndarray:
        """Return, for each character, the logarithm of the sum over all segmentations of its word up to it."""
        total_N = np.zeros(len(begin_N))
        place_M = end_M - begin_N[end_M]
        by_place = np.argsort(place_M, kind="stable")
        # All words advance by one character at a time.
        for matches in np.split(by_place, np.cumsum(np.bincount(place_M))[:-1]):
            start, end = start_M[matches], end_M[matches]
            before = np.where(start == begin_N[start], 0.0, total_N[start - 1])
            firsts = np.flatnonzero(np.diff(end, prepend=-1))
            total_N[end[firsts]] = np.logaddexp.reduceat(before + weight_M[matches], firsts)
        return total_N
