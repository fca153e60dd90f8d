"""Mixtures: how often each pair is seen, in which order, and which corpora fit together."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmt.checkpoint import list_checkpoints
from nmt.config import Config, CorpusConfig, Direction, TrainingConfig
from nmt.data.batching import BatchStream, TrainingText, plan_epoch
from nmt.data.mixture import Corpora, Mixture, _drawn, _rounded, tempered
from nmt.data.prepared import Part, Prepared, prepared_path
from nmt.data.shards import ParallelShards
from nmt.data.symbols import Symbols
from nmt.decoding.directions import Directions
from nmt.errors import DataError
from nmt.preparation.prepare import prepare
from nmt.run import RunDirectory
from tests.test_batching import equal
from tests.toy import HARD, Cli, saved, toy_config, train
from tests.toy import settings as words

TRAINING = TrainingConfig(batch_tokens=60, micro_batches=2, seed=3)


def part_of(name: str, num_pairs: int, first: int, prefix: tuple[int, ...] = ()) -> Part:
    """A part whose pair n has source [first + n] * (n % 5 + 1), and a target that is one longer."""
    sides: list[list[np.ndarray]] = [[], []]
    for pair in range(num_pairs):
        for side, length in enumerate((pair % 5 + 1, pair % 5 + 2)):
            sides[side].append(np.full(length, first + pair))
    pieces = {name: np.concatenate(each) for name, each in zip(("source", "target"), sides, strict=True)}
    offsets = {name: np.cumsum([0, *map(len, each)]) for name, each in zip(("source", "target"), sides, strict=True)}
    return Part(name, Direction("en", "de"), "", ParallelShards(pieces, offsets), prefix)


def pairs_of(text: TrainingText, number: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All pairs of an epoch as (source, target), read in an order of their own, and their lengths checked."""
    epoch = text.epoch(number)
    order = np.random.default_rng(number).permutation(len(epoch.source_lengths))
    sides = []
    for side, expected in (("source", epoch.source_lengths), ("target", epoch.target_lengths)):
        ids, lengths = epoch.gather(side, order)
        assert ids.dtype == lengths.dtype == np.int64
        assert np.array_equal(lengths, expected[order])
        sides.append([tuple(each.tolist()) for each in np.split(ids, np.cumsum(lengths)[:-1])])
    return list(zip(*sides, strict=True))


# ------------------------------------------------------------------------------------------------- what is drawn


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    weights=st.lists(st.floats(0.2, 50.0), min_size=5, max_size=5),
    epochs=st.integers(1, 6),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_pair_of_a_part_is_seen_equally_often(
    sizes: list[int], weights: list[float], epochs: int, seed: int
) -> None:
    counts = _rounded(weights[: len(sizes)], sum(sizes))
    assert sum(counts) == sum(sizes)
    for place, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        assert abs(count - weights[place] / sum(weights[: len(sizes)]) * sum(sizes)) < 1
        seen = np.zeros(size, dtype=int)
        for epoch in range(epochs):
            drawn = _drawn(size, count, epoch, (seed, place))
            assert len(drawn) == count
            seen += np.bincount(drawn, minlength=size)
            assert seen.max() - seen.min() <= 1
        assert seen.sum() == epochs * count


def test_epochs_follow_one_another_in_one_sequence() -> None:
    """An epoch of 7 of 10 pairs takes up where the last one stopped; its order is another in each pass."""
    seen = [set(_drawn(10, 5, epoch, (1, 0)).tolist()) for epoch in range(8)]
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert first | second == set(range(10))
    assert len({frozenset(each) for each in seen[::2]}) > 1
    assert _drawn(10, 5, 3, (1, 0)).tolist() != _drawn(10, 5, 3, (1, 1)).tolist()
    assert _drawn(10, 5, 3, (1, 0)).tolist() != _drawn(10, 5, 3, (2, 0)).tolist()


@pytest.mark.parametrize(
    ("sizes", "temperature", "expected"),
    [([90, 10], 1.0, [0.9, 0.1]), ([81, 16], 2.0, [9 / 13, 4 / 13]), ([7, 1000], 1e9, [0.5, 0.5])],
)
def test_shares_with_temperature(sizes: list[int], temperature: float, expected: list[float]) -> None:
    assert tempered(sizes, temperature) == pytest.approx(expected)


def test_weights_that_are_sizes_use_each_pair_once() -> None:
    parts = [part_of("a", 29, 0), part_of("b", 500, 100), part_of("c", 1, 900)]
    mixture = Mixture(parts, [29.0, 500.0, 1.0], seed=1)
    assert mixture.counts == [29, 500, 1]
    for number in (0, 3):
        assert set(Counter(pairs_of(mixture, number)).values()) == {1}


def test_a_mixture_of_one_to_one() -> None:
    mixture = Mixture([part_of("old", 50, 0), part_of("new", 10, 100)], [1.0, 1.0], seed=1)
    assert mixture.notes == ["pairs, and their share of an epoch: old 50 (50 %), new 10 (50 %)"]
    seen = Counter(source[0] for source, _ in pairs_of(mixture, 0))
    assert sorted(seen[pair] for pair in range(50)) == [0] * 20 + [1] * 30
    assert {seen[100 + pair] for pair in range(10)} == {3}


def test_a_weight_too_low_for_any_pair_is_refused() -> None:
    with pytest.raises(DataError, match="new has so low a weight that none of its pairs are among the 60"):
        Mixture([part_of("old", 50, 0), part_of("new", 10, 100)], [1.0, 0.001], seed=1)


def test_symbols_come_before_sources_and_count() -> None:
    mixture = Mixture(
        [part_of("a", 20, 100, prefix=(7, 8)), part_of("b", 30, 200), part_of("c", 9, 300, (9,))], [1.0] * 3, 1
    )
    plain = Mixture([part_of("a", 20, 100), part_of("b", 30, 200), part_of("c", 9, 300)], [1.0] * 3, 1)
    prefixes = {1: (7, 8), 2: (), 3: (9,)}
    expected = [(prefixes[source[0] // 100] + source, target) for source, target in pairs_of(plain, 2)]
    assert pairs_of(mixture, 2) == expected


# ------------------------------------------------------------------------------------------------------ the order


def test_one_part_without_symbols_is_used_as_it_is() -> None:
    part = part_of("a", 40, 10)
    assert Mixture([part], [0.3], seed=1).epoch(5) is part.shards


def test_one_part_with_symbols_has_the_order_of_one_without() -> None:
    """The symbols make all sources longer by the same, so that the plan deals out the same pairs."""
    plain, with_symbols = (Mixture([part_of("a", 40, 10, prefix)], [1.0], seed=1) for prefix in ((), (5,)))
    assert [(source[1:], target) for source, target in pairs_of(with_symbols, 1)] == pairs_of(plain, 1)


def stream_of(mixture: Mixture, **changes: Any) -> BatchStream:
    return BatchStream(mixture, TRAINING, **changes)


@pytest.fixture
def mixture() -> Mixture:
    return Mixture([part_of("a", 60, 10), part_of("b", 20, 100, (7,))], [1.0, 2.0], seed=3)


def test_the_order_does_not_depend_on_the_number_of_processes(mixture: Mixture) -> None:
    with (
        stream_of(mixture) as whole,
        stream_of(mixture, rank=0, num_ranks=2) as first,
        stream_of(mixture, rank=1, num_ranks=2) as second,
    ):
        for step, own, other in islice(zip(whole, first, second, strict=True), 30):
            assert all(map(equal, step, [*own, *other]))
        assert whole.state_dict()["epoch"] >= 2


@pytest.mark.parametrize("fitted", [False, True])
def test_a_stream_resumes_anywhere(mixture: Mixture, fitted: bool) -> None:
    with stream_of(mixture, fitted=fitted) as whole:
        steps, states = [], []
        for step in islice(whole, 25):
            steps.append(step)
            states.append(whole.state_dict())
    assert states[-1]["epoch"] >= 2
    for stop in (0, 3, 11, 20):
        with stream_of(mixture, fitted=fitted) as resumed:
            resumed.load_state_dict(json.loads(json.dumps(states[stop])))
            for expected in steps[stop + 1 :]:
                assert all(map(equal, next(resumed), expected))


# ------------------------------------------------------------------------------------------------ several corpora


def corpus_of(text: Path, **changes: Any) -> CorpusConfig:
    return replace(toy_config(text).corpus, **changes)


@pytest.fixture(scope="module")
def short(shared_text: Path) -> Prepared:
    """A second corpus with the vocabulary of the first: its shorter pairs."""
    corpus = corpus_of(shared_text, name="short")
    return prepare(replace(corpus, filters=replace(corpus.filters, max_pieces=12)), lambda _: None)


@pytest.fixture
def own(shared_text: Path) -> Prepared:
    return prepare(toy_config(shared_text).corpus, lambda _: None)


def test_settings_of_the_mixture_do_not_change_the_prepared_folder(shared_text: Path) -> None:
    plain = corpus_of(shared_text)
    mixed = replace(plain, mixture={"x": 1.0}, weight=2.0, temperature=5.0)
    assert prepared_path(mixed) == prepared_path(plain)


def test_shares_of_corpora(shared_text: Path, own: Prepared, short: Prepared) -> None:
    sizes = [len(each.parts()[0].shards) for each in (own, short)]
    assert 0 < sizes[1] < sizes[0]
    corpora = Corpora(corpus_of(shared_text, mixture={str(short.path): 1.0}, weight=3.0), own)
    mixture = corpora.mixture(1)
    assert mixture.counts == _rounded([3, 1], sum(sizes))
    share = 100 * mixture.counts[0] / sum(sizes)
    assert f" epoch: toy {sizes[0]} ({share:.3g} %), {short.path.name} {sizes[1]} (" in mixture.notes[0]
    record = corpora.record()
    assert record["pairs_kept"] == sum(sizes)
    assert record["fingerprint"] == own.fingerprint
    assert record["mixture"] == [short.fingerprint]
    assert record["longest_source_pieces"] == own.manifest["longest_source_pieces"]
    assert sum(record["dropped"].values()) == record["pairs_read"] - record["pairs_kept"]


def test_without_a_mixture_nothing_changes(shared_text: Path, own: Prepared) -> None:
    corpora = Corpora(corpus_of(shared_text), own)
    mixture, shards = corpora.mixture(3), own.parts()[0].shards
    epoch = mixture.epoch(4)
    lengths = shards.source_lengths, shards.target_lengths
    plans = [plan_epoch(*each, TRAINING, 4) for each in (lengths, (epoch.source_lengths, epoch.target_lengths))]
    for steps in zip(*plans, strict=True):
        assert all(map(np.array_equal, *steps))
    assert (mixture.num_pairs, mixture.notes) == (len(shards), [])
    record = corpora.record()
    assert "mixture" not in record
    assert {name: record[name] for name in record.keys() & own.manifest.keys()} == {
        name: own.manifest[name] for name in record.keys() & own.manifest.keys()
    }


def test_another_vocabulary_is_refused(shared_text: Path, own: Prepared) -> None:
    corpus = corpus_of(shared_text, name="other", max_pairs=40)
    other = prepare(corpus, lambda _: None)
    with pytest.raises(
        DataError, match=r"corpus\.mixture: .* has another vocabulary than .*subwords\.vocabulary="
    ) as caught:
        Corpora(corpus_of(shared_text, mixture={str(other.path): 1.0}), own)
    assert str(other.path) in str(caught.value)
    assert str(own.path) in str(caught.value)


@pytest.mark.parametrize(
    ("ours", "theirs", "common"),
    [
        (Symbols(("de", "fr")), Symbols(("de",), ("bt",)), Symbols(("de", "fr"), ("bt",))),
        (Symbols(tags=("bt",)), Symbols(), Symbols(tags=("bt",))),
        (Symbols(("de", "fr")), Symbols(("fr", "de")), None),
        (Symbols(("de",)), Symbols(), None),
        (Symbols(tags=("news",)), Symbols(tags=("bt", "news")), None),
    ],
)
def test_meanings_of_symbols_must_agree(
    shared_text: Path,
    own: Prepared,
    short: Prepared,
    ours: Symbols,
    theirs: Symbols,
    common: Symbols | None,
    tmp_path: Path,
) -> None:
    copy = relabelled(short, tmp_path / "copy", "en", "de").path
    (copy / "manifest.json").write_text(json.dumps(short.manifest | theirs.to_dict()))
    mine = Prepared(own.path, own.manifest | ours.to_dict())
    corpus = corpus_of(shared_text, mixture={str(copy): 1.0})
    if common is None:
        with pytest.raises(DataError, match=r"corpus\.mixture: .* has the (languages|tags) \[.*\] where .* has \["):
            Corpora(corpus, mine)
    else:
        assert Corpora(corpus, mine).symbols == common


def test_a_corpus_is_mixed_in_once_with_the_same_punctuation(
    shared_text: Path, own: Prepared, short: Prepared, tmp_path: Path
) -> None:
    twice = corpus_of(shared_text, mixture={str(short.path): 1.0, f"{short.path}/": 2.0})
    with pytest.raises(DataError, match=r"is there twice"):
        Corpora(twice, own)
    with pytest.raises(DataError, match=r"is the corpus of the run itself"):
        Corpora(corpus_of(shared_text, mixture={str(own.path): 1.0}), own)
    other = tmp_path / "moses"
    shutil.copytree(short.path, other)
    corpus = short.manifest["corpus"] | {"punctuation": "moses"}
    (other / "manifest.json").write_text(json.dumps(short.manifest | {"corpus": corpus}))
    with pytest.raises(DataError, match=r"has corpus\.punctuation=moses, but .* has keep"):
        Corpora(corpus_of(shared_text, mixture={str(other): 1.0}), own)


def relabelled(prepared: Prepared, path: Path, source: str, target: str) -> Prepared:
    """A copy of a prepared corpus, said to be in other languages."""
    shutil.copytree(prepared.path, path)
    corpus = prepared.manifest["corpus"] | {"source_language": source, "target_language": target}
    (path / "manifest.json").write_text(json.dumps(prepared.manifest | {"corpus": corpus}))
    return Prepared.open(path)


def test_the_run_has_the_directions_of_all_corpora(
    shared_text: Path, own: Prepared, short: Prepared, tmp_path: Path
) -> None:
    french = relabelled(short, tmp_path / "french", "fr", "de")
    config = toy_config(shared_text, f"corpus.mixture={{{french.path}: 1}}")
    record = Corpora(config.corpus, own).record()
    assert Directions.of(config, record, "x", "corpus.json").trained == (Direction("en", "de"), Direction("fr", "de"))
    assert "mixed_directions" not in Corpora(corpus_of(shared_text), own).record()
    for damaged in ("en-de", [3], ["en"]):
        with pytest.raises(DataError, match=r"corpus\.json is damaged: "):
            Directions.of(config, record | {"mixed_directions": damaged}, "x", "corpus.json")


def test_the_own_text_of_a_run_keeps_its_direction(corpus: Path, short: Prepared, tmp_path: Path, cli: Cli) -> None:
    french = relabelled(short, tmp_path / "french", "fr", "de")
    run = train(corpus, "with_french", 1, f"corpus.mixture={{{french.path}: 1}}", "training.validate_every=1")
    own = RunDirectory(run)
    assert {*own.directions("dev"), *own.directions("test")} == {Direction("en", "de")}
    assert len(own.directions("test")) == len(own.text("test")[0])
    # Which of the run's directions its own text has is known without --from and --to.
    assert cli("evaluate", str(run)) == 0
    assert "BLEU" in cli.out
    cli.refuses(2, "translate", str(run), str(corpus / "test.en"), says=("give --from and --to",))


@pytest.mark.parametrize(("source", "target"), [("pt-BR", "de"), ("", "de")])
def test_codes_of_languages_that_a_run_could_not_read_again(
    shared_text: Path, own: Prepared, short: Prepared, tmp_path: Path, source: str, target: str
) -> None:
    other = relabelled(short, tmp_path / "other", source, target)
    corpus = corpus_of(shared_text, mixture={str(other.path): 1.0})
    with pytest.raises(DataError, match=rf"corpus\.mixture: a corpus from '{source}' to 'de' cannot be mixed into"):
        Corpora(corpus, own)
    if source:
        # A run's own codes are in its settings.
        assert Corpora(replace(corpus, source_language=source), own).record()["mixed_directions"] == []


@pytest.mark.parametrize(
    "damage", [{"symbols": 5}, {"symbols": [["slot"]]}, {"longest_source_pieces": "9"}, {"longest_source_pieces": None}]
)
def test_damage_of_what_a_run_takes_from_manifests(short: Prepared, tmp_path: Path, damage: dict[str, Any]) -> None:
    folder = relabelled(short, tmp_path / "copy", "en", "de").path
    (folder / "manifest.json").write_text(json.dumps(short.manifest | damage))
    with pytest.raises(DataError, match=rf"manifest\.json is damaged \({next(iter(damage))}.*: run nmt prepare again$"):
        Prepared.open(folder)


@pytest.mark.parametrize("name", ["../secret", "train./../../secret", "/secret"])
def test_arrays_are_read_from_the_folder_only(short: Prepared, tmp_path: Path, name: str) -> None:
    folder = relabelled(short, tmp_path / "copy", "en", "de").path
    train = short.manifest["shards"]["train"]
    files = train["files"] | {name: {"bytes": 1, "sha256": "0"}}
    (folder / "manifest.json").write_text(json.dumps(short.manifest | {"shards": {"train": train | {"files": files}}}))
    with pytest.raises(DataError, match=rf"is damaged \(shards: {name} is not the name of one of its files\)"):
        Prepared.open(folder)


def test_the_folder_where_a_command_runs_can_be_verified(
    short: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = relabelled(short, tmp_path / "copy", "en", "de").path
    monkeypatch.chdir(folder)
    monkeypatch.setattr("nmt.data.prepared._UNSURE_SECONDS", -1.0)
    here = Prepared.open(Path())
    here.verify()
    assert here.is_verified
    assert Prepared.open(folder).is_verified
    assert (tmp_path / ".copy.verified").exists()


def test_another_target_language_needs_symbols(
    shared_text: Path, own: Prepared, short: Prepared, tmp_path: Path
) -> None:
    back = relabelled(short, tmp_path / "back", "de", "en")
    corpus = corpus_of(shared_text, mixture={str(back.path): 1.0})
    with pytest.raises(DataError, match=r"back has the target language en, but .* de, and neither has symbols"):
        Corpora(corpus, own)


def test_weights_are_checked() -> None:
    for corpus, says in (
        ({"mixture": {"runs/a": 0}}, r"corpus.mixture.runs/a=0.0 must be greater than 0.0"),
        ({"mixture": {"a": "x"}}, r"corpus.mixture.a=x is not a number"),
        ({"mixture": ["a"]}, r"corpus.mixture=\[a\] is not a dictionary"),
        ({"mixture": {"a": 1}, "weight": -1}, r"corpus.weight=-1.0 must be greater than 0.0"),
        ({"weight": 2}, r"corpus.weight=2 is the weight .* corpus.mixture, which is empty"),
        ({"temperature": 0.5}, r"corpus.temperature=0.5 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=says):
            Config.from_dict({"corpus": corpus})


# ----------------------------------------------------------------------------------------------------------- runs


@pytest.mark.slow
def test_a_run_on_a_mixture_resumes_bit_for_bit(
    corpus: Path, short: Prepared, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = (*HARD, f"corpus.mixture={{{short.path}: 1}}")
    whole = train(corpus, "whole", 6, *changes)
    told = capsys.readouterr().err
    assert "pairs, and their share of an epoch: toy 80 (50 %), short-" in told
    assert list_checkpoints(whole / "checkpoints")[-1].state()["data"]["epoch"] >= 1
    for steps in (1, 4, 6):
        stopped = train(corpus, "stopped", steps, *changes)
    assert saved(stopped) == saved(whole)
    assert saved(train(corpus, "plain", 6, *HARD)) != saved(whole)
    assert RunDirectory(whole).corpus_info()["mixture"] == [short.fingerprint]


def test_a_run_refuses_changed_text_of_another_corpus(
    corpus: Path, shared_text: Path, short: Prepared, cli: Cli
) -> None:
    run = train(corpus, "mixed", 1, f"corpus.mixture={{{short.path}: 1}}")
    record = json.loads((run / "corpus.json").read_text())
    (run / "corpus.json").write_text(json.dumps(record | {"mixture": ["0" * 64]}))
    cli.refuses(3, "train", str(run), "training.max_steps=2", says=("corpora of corpus.mixture",), progress=True)


@pytest.mark.slow
def test_a_corpus_may_get_another_name(
    corpus: Path, own: Prepared, short: Prepared, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that named a corpus may be renamed or deleted. Another text or weight under a new name is refused."""
    monkeypatch.chdir(tmp_path)
    renamed = shutil.copytree(short.path, tmp_path / "moved_text")
    same, other = f"corpus.mixture={{{renamed}: 1}}", f"corpus.mixture={{{own.path}: 1}}"
    whole = train(corpus, "never_renamed", 4, f"corpus.mixture={{{short.path}: 1}}")
    run = train(corpus, "renamed", 2, f"corpus.mixture={{{short.path}: 1}}")
    for wrong in (other, same.replace("1}", "2}"), "corpus.mixture={nowhere: 1}", "corpus.mixture={}"):
        cli.refuses(4, "train", str(run), wrong, says=("started with other settings", "corpus.mixture."), progress=True)
    assert cli("train", str(run), "training.max_steps=4", same) == 0, cli.err
    assert RunDirectory(run).config().corpus.mixture == {str(renamed): 1.0}
    assert saved(run) == saved(whole)


def test_what_is_missing_is_told_before_anything_is_prepared(corpus: Path) -> None:
    config = toy_config(corpus, "run.name=x", "corpus.name=new", "corpus.mixture={nowhere: 1}")
    with pytest.raises(DataError, match=r"corpus\.mixture\.nowhere: nowhere is neither a prepared corpus nor a run"):
        train(corpus, "x", 1, "corpus.name=new", "corpus.mixture={nowhere: 1}")
    assert not prepared_path(config.corpus).exists()


def test_prepare_says_that_another_corpus_is_missing(corpus: Path, own: Prepared, cli: Cli) -> None:
    assert cli("prepare", *words(corpus, "corpus.mixture={nowhere: 1}")) == 0
    assert cli.out == f"{own.path}\n"
    assert "only toy was prepared, and training would be refused: corpus.mixture.nowhere: " in cli.err
