"""Subwords drawn anew in each epoch: by the methods of the papers, of the same text, and the same draws anywhere."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice, pairwise
from math import exp
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nmt.data.resampling
from nmt.checkpoint import list_checkpoints
from nmt.config import Direction, SubwordConfig, TrainingConfig
from nmt.data.batching import BatchStream, EpochText
from nmt.data.mixture import Mixture
from nmt.data.prepared import Part, prepared_path
from nmt.data.resampling import Resampled, _Resegment, resampled
from nmt.data.shards import SIDES, ParallelShards
from nmt.data.subwords import Subwords, train_subwords
from nmt.preparation.prepare import prepare
from tests.test_batching import equal
from tests.toy import HARD, saved, toy_config, train

LINES = [
    "the small dog runs over a green meadow this morning, and looks for smaller dogs",
    "lower, lowest, newer, newest, wider and widest: the lowest of the newest",
    "der kleine Hund läuft über eine grüne Wiese am Morgen und sucht kleinere Hunde",
    "die grünen Wiesen, 12 345 Hunde: größer, am größten; newest 日本語",
]
USUAL = {"bpe": 0.1, "unigram": 0.2}


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vocabularies")
    for kind, size in (("bpe", 110), ("unigram", 69)):
        config = SubwordConfig(kind=kind, vocab_size=size)
        train_subwords(
            LINES[:3] * 40 + ["die grünen Wiesen, 12 345 Hunde: größer, am größten; newest"], config, folder / kind
        )
    return {kind: folder / kind for kind in USUAL}


@pytest.fixture(scope="module")
def subwords(vocabularies: dict[str, Path]) -> dict[str, Subwords]:
    return {kind: Subwords.load(path) for kind, path in vocabularies.items()}


def shards_of(sources: list[np.ndarray], targets: list[np.ndarray]) -> ParallelShards:
    sides = dict(zip(SIDES, (sources, targets), strict=True))
    offsets = {side: np.cumsum([0, *map(len, ids)]) for side, ids in sides.items()}
    return ParallelShards({side: np.concatenate(ids).astype("<u2") for side, ids in sides.items()}, offsets)


def text_of(vocabulary: Subwords, copies: int = 30) -> ParallelShards:
    lines = LINES * copies
    return shards_of(vocabulary.encode_batch(lines), vocabulary.encode_batch(lines[::-1]))


def lines_of(epoch: EpochText, side: str = "source") -> list[list[int]]:
    ids, lengths = epoch.gather(side, np.arange(len(epoch.source_lengths)))
    return [each.tolist() for each in np.split(ids, np.cumsum(lengths)[:-1])]


def drawn(vocabulary: Subwords, lines: list[str], rate: float, seed: int = 1) -> list[list[int]]:
    """The subwords of these lines, drawn once."""
    ids = vocabulary.encode_batch(lines)
    flat, lengths = np.concatenate(ids).astype(np.int64), np.array([len(each) for each in ids])
    new, counts = _Resegment(vocabulary)(flat, lengths, rate, np.random.default_rng(seed))
    assert counts.sum() == len(new)
    return [each.tolist() for each in np.split(new, np.cumsum(counts)[:-1])]


# ---------------------------------------------------------------------------------------------------- the methods


def after_dropout(symbols: tuple[str, ...], rank: dict[str, float], rate: float) -> Counter[tuple[str, ...]]:
    """The exact probabilities of all results of algorithm 1 of Provilkov et al. 2020."""
    merges = sorted(
        (rank[left + right], place) for place, (left, right) in enumerate(pairwise(symbols)) if left + right in rank
    )
    found: Counter[tuple[str, ...]] = Counter({symbols: rate ** len(merges)})
    for better, (_, place) in enumerate(merges):
        merged = (*symbols[:place], symbols[place] + symbols[place + 1], *symbols[place + 2 :])
        for result, share in after_dropout(merged, rank, rate).items():
            found[result] += rate**better * (1 - rate) * share
    return found


def segmentations(word: str, scores: dict[str, float], alpha: float) -> Counter[tuple[str, ...]]:
    """The exact probabilities of all segmentations of a word (Kudo 2018, eq. 8 with l = infinity)."""

    def all_of(rest: str) -> Iterator[tuple[str, ...]]:
        if not rest:
            yield ()
        for end in range(1, len(rest) + 1):
            if rest[:end] in scores:
                yield from ((rest[:end], *more) for more in all_of(rest[end:]))

    weights = {each: exp(alpha * sum(scores[piece] for piece in each)) for each in all_of(word)}
    return Counter({each: weight / sum(weights.values()) for each, weight in weights.items()})


@pytest.mark.parametrize(("kind", "rate"), [("bpe", 0.1), ("bpe", 0.5), ("unigram", 0.2), ("unigram", 0.4)])
@pytest.mark.parametrize("word", ["lowest", "newest", "Hunde"])
def test_draws_have_the_probabilities_of_the_paper(
    subwords: dict[str, Subwords], kind: str, rate: float, word: str
) -> None:
    vocabulary, count = subwords[kind], 20_000
    ids, scores = vocabulary.learned()
    table = {piece: scores[number] for piece, number in ids.items()}
    if kind == "bpe":
        expected = after_dropout(("▁", *word), {piece: -score for piece, score in table.items()}, rate)
    else:
        expected = segmentations(f"▁{word}", table, rate)
    assert sum(expected.values()) == pytest.approx(1.0)
    found = Counter(tuple(vocabulary.pieces(each)) for each in drawn(vocabulary, [word] * count, rate))
    assert len(found) > 3
    distance = sum(abs(found[each] / count - share) for each, share in expected.items()) / 2
    assert found.keys() <= expected.keys()
    assert distance < 0.03


@given(st.lists(st.text(alphabet="the smalldogrunöüß.,1日\t", max_size=30), min_size=1, max_size=5))
@settings(deadline=None, max_examples=50)
def test_bpe_without_dropout_is_sentencepiece(subwords: dict[str, Subwords], lines: list[str]) -> None:
    vocabulary = subwords["bpe"]
    assert drawn(vocabulary, lines, 0.0) == [each.tolist() for each in vocabulary.encode_batch(lines)]


def test_unigram_with_a_high_exponent_is_sentencepiece(subwords: dict[str, Subwords]) -> None:
    vocabulary = subwords["unigram"]
    assert drawn(vocabulary, LINES, 1000.0) == [each.tolist() for each in vocabulary.encode_batch(LINES)]


# ------------------------------------------------------------------------------------------------------- the text


@pytest.mark.slow
@pytest.mark.parametrize("kind", USUAL)
@given(lines=st.lists(st.text(max_size=25) | st.sampled_from(LINES), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=80)
def test_the_text_stays_the_same(subwords: dict[str, Subwords], kind: str, lines: list[str], seed: int) -> None:
    vocabulary = subwords[kind]
    before = [each.tolist() for each in vocabulary.encode_batch(lines)]
    after = drawn(vocabulary, lines, USUAL[kind], seed)
    assert vocabulary.decode_batch(after) == vocabulary.decode_batch(before)


@pytest.mark.parametrize("kind", USUAL)
def test_symbols_stay_in_their_place(subwords: dict[str, Subwords], kind: str) -> None:
    vocabulary = subwords[kind]
    slot, term = vocabulary.symbol("slot", 3), vocabulary.symbol("term", 0)
    part = Part("a", Direction("en", "de"), "", text_of(vocabulary, 1), (vocabulary.symbol("language", 1),))
    sources = vocabulary.encode_parts(
        [["the ", slot, " runs"], [term, "lowest", slot], ["a", slot, slot, "b"], ["newest"]]
    )
    part = part._replace(shards=shards_of(sources, vocabulary.encode_batch(["a b"] * 4)))
    epoch = Resampled(Mixture([part], [1.0], 1), vocabulary, USUAL[kind], 0, 1).epoch(0)
    for new, old in zip(lines_of(epoch), sources, strict=True):
        assert new[0] == part.prefix[0]
        assert vocabulary.decode_parts(new[1:]) == vocabulary.decode_parts(old.tolist())
        assert [each for each in new[1:] if each in (slot, term)] == [each for each in old if each in (slot, term)]


@pytest.mark.parametrize("kind", USUAL)
def test_every_epoch_has_other_subwords_of_the_same_pairs(subwords: dict[str, Subwords], kind: str) -> None:
    vocabulary, shards = subwords[kind], text_of(subwords[kind])
    text = Resampled(shards, vocabulary, USUAL[kind], 0, 1)
    epochs = [text.epoch(number) for number in (0, 1)]
    assert lines_of(epochs[0]) != lines_of(epochs[1])
    for side in SIDES:
        for epoch in epochs:
            assert vocabulary.decode_batch(lines_of(epoch, side)) == vocabulary.decode_batch(lines_of(shards, side))
    # The same line is drawn anew at each of its places.
    assert len(set(map(tuple, lines_of(epochs[0])[::4]))) > 5
    assert lines_of(epochs[0]) != lines_of(Resampled(shards, vocabulary, USUAL[kind], 0, 2).epoch(0))


def test_a_side_that_becomes_too_long_keeps_its_subwords(subwords: dict[str, Subwords]) -> None:
    vocabulary, shards = subwords["bpe"], text_of(subwords["bpe"], 200)
    free = Resampled(shards, vocabulary, 0.1, 0, 1).epoch(0)
    most = int(np.median(free.source_lengths))
    held = Resampled(shards, vocabulary, 0.1, most, 1).epoch(0)
    kept = 0
    for side in SIDES:
        for old, new, limited in zip(lines_of(shards, side), lines_of(free, side), lines_of(held, side), strict=True):
            assert limited == (old if len(new) > most else new)
            kept += limited != new
    assert 100 < kept < 1500


def test_pairs_with_an_empty_side(subwords: dict[str, Subwords]) -> None:
    nothing = np.zeros(0, dtype=np.int32)
    for kind, vocabulary in subwords.items():
        line = vocabulary.encode(LINES[0])
        epoch = Resampled(shards_of([nothing, line, nothing], [nothing] * 3), vocabulary, USUAL[kind], 0, 1).epoch(0)
        assert epoch.target_lengths.tolist() == [0, 0, 0]
        assert vocabulary.decode_batch(lines_of(epoch)) == ["", LINES[0], ""]


def test_without_sampling_the_text_is_as_it_was(subwords: dict[str, Subwords], shared_text: Path) -> None:
    corpus, shards = toy_config(shared_text).corpus, text_of(subwords["bpe"])
    assert resampled(shards, subwords["bpe"], corpus, 1) is shards
    sampled = replace(corpus, subwords=replace(corpus.subwords, sampling=0.1))
    assert isinstance(resampled(shards, subwords["bpe"], sampled, 1), Resampled)
    assert prepared_path(sampled) == prepared_path(corpus)


# ----------------------------------------------------------------------------------------------- the same anywhere


def digest(epoch: EpochText) -> str:
    return hashlib.sha256(json.dumps([lines_of(epoch, side) for side in SIDES]).encode()).hexdigest()


_ELSEWHERE = """
import sys
from pathlib import Path
from nmt.data.resampling import Resampled
from nmt.data.subwords import Subwords
from tests.test_resampling import USUAL, digest, text_of
for kind, rate in USUAL.items():
    vocabulary = Subwords.load(Path(sys.argv[1]) / kind)
    print(digest(Resampled(text_of(vocabulary), vocabulary, rate, 0, 7).epoch(3)))
"""


@pytest.mark.slow
def test_draws_are_the_same_in_another_process(vocabularies: dict[str, Path], subwords: dict[str, Subwords]) -> None:
    command = [sys.executable, "-c", _ELSEWHERE, str(vocabularies["bpe"].parent)]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    for kind, found in zip(USUAL, there, strict=True):
        assert found == digest(Resampled(text_of(subwords[kind]), subwords[kind], USUAL[kind], 0, 7).epoch(3))


@pytest.mark.parametrize("kind", USUAL)
def test_draws_are_the_same_in_any_thread_and_order(
    subwords: dict[str, Subwords], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nmt.data.resampling, "_CHUNK", 50)
    vocabulary = subwords[kind]
    text = Resampled(text_of(vocabulary), vocabulary, USUAL[kind], 0, 7)
    with ThreadPoolExecutor(3) as pool:
        found = [*map(digest, pool.map(text.epoch, [2, 3, 4, 3]))]
    assert found[3] == found[1] == digest(text.epoch(3))
    assert len(set(found)) == 3


@pytest.mark.parametrize("fitted", [False, True])
def test_a_stream_resumes_anywhere(subwords: dict[str, Subwords], fitted: bool) -> None:
    vocabulary = subwords["bpe"]
    parts = [
        Part(name, Direction("en", "de"), "", text_of(vocabulary, copies), prefix)
        for name, copies, prefix in (("a", 9, ()), ("b", 3, (vocabulary.symbol("tag", 0),)))
    ]
    text = Resampled(Mixture(parts, [1.0, 1.0], 3), vocabulary, 0.1, 0, 3)
    config = TrainingConfig(batch_tokens=300, micro_batches=2, seed=3)
    steps, states = [], []
    with BatchStream(text, config, fitted=fitted) as whole:
        for step in islice(whole, 20):
            steps.append(step)
            states.append(whole.state_dict())
    assert states[-1]["epoch"] >= 1
    for stop in (0, 4, 12):
        with BatchStream(text, config, fitted=fitted) as resumed:
            resumed.load_state_dict(json.loads(json.dumps(states[stop])))
            for expected in steps[stop + 1 :]:
                assert all(map(equal, next(resumed), expected))


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(corpus: Path, shared_text: Path) -> None:
    config = toy_config(shared_text).corpus
    short = prepare(replace(config, name="short", filters=replace(config.filters, max_pieces=12)), lambda _line: None)
    for changes in ((), (f"corpus.mixture={{{short.path}: 1}}",)):
        changes = (*HARD, "corpus.subwords.sampling=0.2", *changes)
        whole = train(corpus, f"whole{len(changes)}", 8, *changes)
        assert list_checkpoints(whole / "checkpoints")[-1].state()["data"]["epoch"] >= 1
        for steps in (1, 4, 7, 8):
            stopped = train(corpus, f"stopped{len(changes)}", steps, *changes)
        assert saved(stopped) == saved(whole)
        assert saved(train(corpus, f"plain{len(changes)}", 8, *changes, "corpus.subwords.sampling=0")) != saved(whole)
