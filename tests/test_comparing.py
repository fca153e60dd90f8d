"""Comparing and sampling the pairs of a whole corpus in arrays, against plain loops; tallies that add up."""

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nmt.preparation.duplicates
from nmt.preparation.duplicates import HeldOutRanks, evenly, repeated, split_at
from nmt.preparation.tally import EXAMPLES, RATIO_BINS, WORD_BINS, Tally, count_characters, count_lengths, ranks

KEYS = st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=6)


def arrays_of(blocks: list[list[int]]) -> list[np.ndarray]:
    # Keys are spread over all 64 bits, as hashes are.
    return [ranks(0, np.array(block, dtype=np.int64)) for block in blocks]


@settings(max_examples=150)
@given(KEYS, st.integers(1, 20))
def test_repeated_keys_are_those_seen_before(blocks: list[list[int]], at_once: int) -> None:
    expected, seen = [], set()
    for key in (key for block in blocks for key in block):
        expected.append(key in seen)
        seen.add(key)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nmt.preparation.duplicates, "_AT_ONCE", at_once)
        found = repeated(lambda: iter(arrays_of(blocks)), sum(map(len, blocks)))
    assert found.tolist() == expected
    parts = list(split_at(found, map(len, blocks)))
    assert [part.tolist() for part in parts] == [
        expected[start:end] for start, end in pairwise(np.cumsum([0, *map(len, blocks)]).tolist())
    ]


@settings(max_examples=150)
@given(KEYS, st.integers(0, 5), st.integers(0, 5))
def test_held_out_ranks_are_the_smallest_and_the_largest(blocks: list[list[int]], num_dev: int, num_test: int) -> None:
    chosen, other = HeldOutRanks(num_dev, num_test), HeldOutRanks(num_dev, num_test)
    for block in blocks:
        chosen.offer(np.array(block, dtype=np.uint64))
    for block in reversed(blocks):
        other.offer(np.array(block, dtype=np.uint64)[::-1])
    distinct = sorted({key for block in blocks for key in block})
    dev, test = distinct[:num_dev], distinct[::-1][:num_test]
    assert (chosen.ranks("dev").tolist(), chosen.ranks("test").tolist()) == (dev, test)
    assert (other.ranks("dev").tolist(), other.ranks("test").tolist()) == (dev, test)
    every = np.array(distinct, dtype=np.uint64)
    assert every[chosen.holds(every)].tolist() == [key for key in distinct if key in {*dev, *test}]


@given(st.integers(0, 300), st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_samples_are_even(count: int, lengths: list[int]) -> None:
    total = sum(lengths)
    count = min(count, total)
    found, start = [], 0
    for length in lengths:
        found += (start + evenly(count, max(total, 1), start, length)).tolist()
        start += length
    taken, expected = 0, []
    for number in range(1, total + 1):
        if number * count // total > taken:
            taken += 1
            expected.append(number - 1)
    assert found == expected
    assert len(found) == count


def tally_of(block: int, words: list[tuple[int, int]]) -> Tally:
    tally = Tally()
    tally.counts["read"] = len(words)
    count_lengths(tally, "read", *np.array([*words, (1, 1)], dtype=np.int64).T)
    for number, rank in enumerate(ranks(block << 32, np.arange(len(words))).tolist()):
        tally.show("dropped", rank, {"source": f"{block} {number}", "row": number})
    tally.characters["source"] = count_characters(f"{a}{b}é" for a, b in words)
    return tally


@settings(max_examples=60)
@given(st.lists(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=15), max_size=5), st.randoms())
def test_tallies_add_up_in_any_order(blocks: list[list[tuple[int, int]]], random: Any) -> None:
    tallies = [tally_of(number, words) for number, words in enumerate(blocks)]
    there, shuffled = Tally(), Tally()
    for tally in tallies:
        there.add(Tally.of(json.loads(json.dumps(tally.to_dict()))))
    random.shuffle(tallies)
    for tally in tallies:
        shuffled.add(tally)
    assert json.dumps(there.to_dict(), sort_keys=True) == json.dumps(shuffled.to_dict(), sort_keys=True)
    assert len(there.shown("dropped")) == min(EXAMPLES, sum(map(len, blocks)))
    assert there.characters.get("source", Counter())["é"] == sum(map(len, blocks))


def test_lengths_fall_into_their_bins() -> None:
    tally = Tally()
    pairs = [(10, 10), (11, 10), (10, 12), (0, 5), (0, 0), (1, 1000), (19, 10)]
    count_lengths(tally, "x", *np.array(pairs, dtype=np.int64).T)
    ratio = tally.histograms["x.ratio"]
    assert {place: int(ratio[place]) for place in np.flatnonzero(ratio)} == {0: 1, 1: 1, 2: 1, 9: 1, RATIO_BINS - 1: 3}
    assert tally.histograms["x.words.target"][WORD_BINS - 1] == 1
    assert tally.histograms["x.words.source"][10] == 2


def test_long_texts_are_cut_in_examples() -> None:
    tally = Tally()
    tally.show("final", 1, {"source": "x" * 5000, "row": 3})
    (shown,) = tally.shown("final")
    assert len(shown["source"]) == 300
    assert shown["source"].endswith("…")
    assert shown["row"] == 3
