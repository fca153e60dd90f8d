"""The plan of an epoch and the stream of batches."""

import contextlib
import gc
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nmt.data.batching
from nmt.batch import Batch, Rows, fit, make_batch, source_batch
from nmt.config import TrainingConfig
from nmt.data.batching import QUEUE_STEPS, BatchStream, Step, _with_room, common_shape, plan_epoch
from nmt.data.held_out import eval_batches
from nmt.data.shards import ParallelShards, ShardWriter
from nmt.tokens import BOS, EOS

VOCABULARY = 50


def lengths_of(num_pairs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sentence lengths like those of real text: lognormal, the two sides correlated."""
    generator = np.random.default_rng(seed)
    source = generator.lognormal(3.1, 0.6, num_pairs)
    target = source * generator.lognormal(0.1, 0.25, num_pairs)
    return tuple(np.clip(side.astype(np.int32), 1, 200) for side in (source, target))


def sentences_of(lengths: np.ndarray, seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(4, VOCABULARY, length).astype(np.int32) for length in lengths]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ParallelShards:
    folder = tmp_path_factory.mktemp("shards")
    source, target = lengths_of(150)
    source[3] = 0
    with ShardWriter(folder, VOCABULARY) as writer:
        for first in range(0, 150, 40):
            part = slice(first, first + 40)
            writer.append(sentences_of(source, 1)[part], sentences_of(target, 2)[part])
    (folder / "manifest.json").write_text(json.dumps({"shards": {"train": writer.record()}}))
    return ParallelShards.open(folder)


def config_of(**settings: Any) -> TrainingConfig:
    return TrainingConfig(**({"batch_tokens": 400, "micro_batches": 2, "seed": 3} | settings))


def plan_of(
    source: np.ndarray, target: np.ndarray, budget: int, micro: int, seed: int = 1, epoch: int = 0, **settings: int
) -> list[Step]:
    training = config_of(batch_tokens=budget, micro_batches=micro, seed=seed, **settings)
    return plan_epoch(source, target, training, epoch)


def check_plan(plan: list[Step], source: np.ndarray, target: np.ndarray, budget: int, micro: int) -> None:
    """Every pair once, `micro` micro-batches a step, none above the budget unless it is one pair, or pairs are few."""
    assert all(len(step) == micro for step in plan)
    batches = [batch for step in plan for batch in step]
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(len(source)))
    few = len(batches) + micro > len(source)
    for batch in batches:
        assert len(batch)
        assert few or len(batch) == 1 or max((source[batch] + 1).sum(), (target[batch] + 1).sum()) <= budget


def equal(a: Batch, b: Batch) -> bool:
    """Whether two batches hold the same."""
    return a.shape == b.shape and all(map(torch.equal, a.tensors(), b.tensors()))


@pytest.mark.parametrize(("num_pairs", "budget", "micro"), [(5000, 2000, 1), (5000, 900, 8), (40, 5000, 16)])
def test_plan_keeps_its_promises(num_pairs: int, budget: int, micro: int) -> None:
    source, target = lengths_of(num_pairs)
    check_plan(plan_of(source, target, budget, micro), source, target, budget, micro)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=60),
    st.integers(1, 200),
    st.integers(1, 5),
)
def test_plan_of_any_lengths(pairs: list[tuple[int, int]], budget: int, micro: int) -> None:
    source, target = np.array(pairs, dtype=np.int32).T
    with contextlib.nullcontext() if len(pairs) >= micro else pytest.raises(ValueError, match="is more than"):
        check_plan(plan_of(source, target, budget, micro), source, target, budget, micro)


@pytest.mark.parametrize("longest", [800, 1599, 5000])
def test_a_long_pair_does_not_make_other_micro_batches_small(longest: int) -> None:
    source = np.random.default_rng(1).integers(5, 40, 5000).astype(np.int32)
    alone = len(plan_of(source, source, 1600, 1))
    longer = np.append(source, np.int32(longest))
    plan = plan_of(longer, longer, 1600, 1)
    check_plan(plan, longer, longer, 1600, 1)
    assert alone <= len(plan) <= alone + 4


@pytest.mark.parametrize("epoch", range(12))
def test_an_epoch_of_few_pairs_has_a_plan(epoch: int) -> None:
    source, target = lengths_of(37)
    budget = int(max(source.max(), target.max())) + 1
    check_plan(plan_of(source, target, budget, 4, epoch=epoch), source, target, budget, 4)


def test_plan_is_a_pure_function_and_epochs_differ() -> None:
    source, target = lengths_of(2000)

    def pairs(seed: int, epoch: int) -> list[list[int]]:
        return [batch.tolist() for step in plan_of(source, target, 1000, 2, seed, epoch) for batch in step]

    np.random.seed(1)
    first = pairs(1, 0)
    np.random.seed(2)
    assert pairs(1, 0) == first
    assert pairs(1, 1) != first
    assert pairs(2, 0) != first
    assert set(map(tuple, pairs(1, 1))) != set(map(tuple, first))


@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_are_full_and_each_is_a_sample_of_the_corpus(micro: int) -> None:
    """Their mean lengths differ less than those of as many pairs drawn at random."""
    source, target = lengths_of(100000)
    plan = plan_of(source, target, 8192, micro)
    batches = [batch for step in plan for batch in step]
    tokens = np.array([[(side[batch] + 1).sum() for side in (source, target)] for batch in batches])
    assert tokens.max(1).mean() > 0.97 * 8192
    generator = np.random.default_rng(0)
    drawn = [generator.choice(len(source), len(batches[0]), replace=False) for _ in batches]
    for side in (source, target):
        means, at_random = ([side[pairs].mean() for pairs in each] for each in (batches, drawn))
        assert np.std(means) < 0.5 * np.std(at_random)
        assert np.mean(means) == pytest.approx(side.mean(), rel=1e-3)


def test_one_shape_holds_all_micro_batches_with_little_padding() -> None:
    source, target = lengths_of(100000)
    steps = plan_of(source, target, 16384, 1)
    shape = _with_room(common_shape(steps, source, target), None)
    tokens = np.array([[(side[batch] + 1).sum() for side in (source, target)] for (batch,) in steps])
    rows = np.array([sum(shape.source), sum(shape.target)])
    assert (tokens <= rows).all()
    assert (tokens.mean(0) > 0.92 * rows).all()
    assert _with_room(common_shape(steps[:5], source, target), shape) is shape
    longer = plan_of(source + 5, target, 16384, 1)
    grown = _with_room(common_shape(longer, source + 5, target), shape)
    assert grown.holds(shape)
    assert grown.holds(common_shape(longer, source + 5, target))


def test_the_next_epoch_is_planned_before_this_one_ends(
    shards: ParallelShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: dict[int, threading.Event] = {epoch: threading.Event() for epoch in range(9)}

    def plan(source: np.ndarray, target: np.ndarray, training: TrainingConfig, epoch: int) -> list[Step]:
        planned[epoch].set()
        return plan_epoch(source, target, training, epoch)

    monkeypatch.setattr(nmt.data.batching, "plan_epoch", plan)
    config = config_of(batch_tokens=100, micro_batches=1)
    length = len(plan_epoch(shards.source_lengths, shards.target_lengths, config, 0))
    ahead = QUEUE_STEPS + 2  # made while another is used
    assert length > 4 * ahead
    with BatchStream(shards, config) as stream:
        stream.load_state_dict({"order": 3, "epoch": 0, "step": int(0.25 * length) - ahead})
        next(stream)
        assert not planned[1].is_set()
        for _ in range(ahead):
            next(stream)
        assert planned[1].wait(20)
        assert stream.state_dict()["epoch"] == 0


def test_too_few_pairs_name_the_key() -> None:
    with pytest.raises(ValueError, match=r"training.micro_batches=8 is more than the number of"):
        plan_of(np.ones(5), np.ones(5), 100, 8)


def sentences_in(ids_N: torch.Tensor, rows: Rows) -> list[list[int]]:
    """The ids of each sentence, read as the documentation of `Rows` says."""
    found = []
    for b, length in enumerate(rows.length_B.tolist()):
        row_T = [int(rows.begin_L[t] + rows.rank_B[b]) for t in range(length)]
        assert rows.previous_N[row_T].tolist() == [rows.num_rows, *row_T[:-1]]
        assert rows.turn_N[row_T].tolist() == row_T[::-1]
        assert rows.cell_N[row_T].tolist() == [t * rows.num_sentences + b for t in range(length)]
        found.append(ids_N[row_T].tolist())
    return found


@pytest.mark.parametrize("sizes", [[(3, 2)], [(0, 4), (5, 0)], [(7, 1), (2, 9), (4, 4)], [(0, 0)]])
def test_a_batch_holds_its_sentences(sizes: list[tuple[int, int]]) -> None:
    sources, targets = (sentences_of(np.array(lengths), seed) for seed, lengths in enumerate(zip(*sizes, strict=True)))
    batch = make_batch(np.arange(len(sizes)) + 5, sources, targets)
    assert batch.pairs_B.tolist() == list(range(5, 5 + len(sizes)))
    assert sentences_in(batch.source_N, batch.source) == [[*source, EOS] for source in sources]
    assert sentences_in(batch.target_in_N, batch.target) == [[BOS, *target] for target in targets]
    assert sentences_in(batch.target_out_N, batch.target) == [[*target, EOS] for target in targets]
    for rows, side in ((batch.source, sources), (batch.target, targets)):
        assert rows.begin_L[-1] == rows.num_rows == sum(len(each) + 1 for each in side)
        active_L = rows.begin_L.diff().tolist()
        assert active_L == sorted(active_L, reverse=True)
    source_N, rows = source_batch(sources)
    assert torch.equal(source_N, batch.source_N)
    assert rows.alive == batch.source.alive
    assert all(map(torch.equal, rows[1:7], batch.source[1:7]))


def test_stream_yields_the_plan(shards: ParallelShards) -> None:
    config = config_of()
    plan = [
        step for epoch in range(2) for step in plan_epoch(shards.source_lengths, shards.target_lengths, config, epoch)
    ]
    with BatchStream(shards, config) as stream:
        for step, micro_batches in zip(plan, stream, strict=False):
            for pairs, batch in zip(step, micro_batches, strict=True):
                sources = [shards.source(pair) for pair in pairs]
                targets = [shards.target(pair) for pair in pairs]
                assert equal(batch, make_batch(pairs, sources, targets))


def test_fitted_batches_have_one_shape(shards: ParallelShards) -> None:
    config = config_of()
    epoch = len(plan_epoch(shards.source_lengths, shards.target_lengths, config, 0))
    with BatchStream(shards, config) as plain, BatchStream(shards, config, fitted=True) as fitted:
        shapes = set()
        for _ in range(epoch):
            for one, other in zip(next(plain), next(fitted), strict=True):
                assert equal(fit(one, other.shape), other)
                shapes.add(other.shape)
        state = json.loads(json.dumps(fitted.state_dict()))
    assert len(shapes) == 1
    assert state["epoch"] == 1
    with BatchStream(shards, config, fitted=True) as resumed:
        resumed.load_state_dict(state)
        assert {batch.shape for batch in next(resumed)} == shapes


def pair_lists(stream: BatchStream, num_steps: int) -> list[list[list[int]]]:
    return [[batch.pairs_B.tolist() for batch in next(stream)] for _ in range(num_steps)]


def test_resume_equals_uninterrupted(shards: ParallelShards) -> None:
    config = config_of()
    epoch = len(plan_epoch(shards.source_lengths, shards.target_lengths, config, 0))
    with BatchStream(shards, config) as stream:
        uninterrupted = pair_lists(stream, 3 * epoch + 2)
    for num_steps in (0, 1, epoch - 1, epoch, epoch + 1, 2 * epoch):
        with BatchStream(shards, config) as stream:
            assert pair_lists(stream, num_steps) == uninterrupted[:num_steps]
            state = json.loads(json.dumps(stream.state_dict()))
        # What was made ahead does not count.
        assert state == {"order": 3, "epoch": num_steps // epoch, "step": num_steps % epoch}
        with BatchStream(shards, config) as stream:
            next(stream)
            stream.load_state_dict(state)
            assert stream.state_dict() == state
            assert pair_lists(stream, epoch + 2) == uninterrupted[num_steps : num_steps + epoch + 2]


def test_a_position_of_another_version_goes_on_with_the_next_epoch(shards: ParallelShards) -> None:
    with BatchStream(shards, config_of()) as stream:
        assert not stream.load_state_dict({"epoch": 4, "step": 3})
        assert stream.state_dict() == {"order": 3, "epoch": 5, "step": 0}
        assert not stream.load_state_dict({"order": 2, "epoch": 4, "step": 3})
        assert stream.load_state_dict({"order": 3, "epoch": 4, "step": 3})
        assert stream.state_dict() == {"order": 3, "epoch": 4, "step": 3}


def test_ranks_share_the_same_steps(shards: ParallelShards) -> None:
    config = config_of(micro_batches=4)
    with BatchStream(shards, config) as stream:
        whole = pair_lists(stream, 5)
    shares = []
    for rank in range(2):
        with BatchStream(shards, config, rank=rank, num_ranks=2) as stream:
            shares.append(pair_lists(stream, 5))
    assert [[a[0], b[0], a[1], b[1]] for a, b in zip(*shares, strict=True)] == whole
    with pytest.raises(ValueError, match=r"training.micro_batches=4 must be a multiple of 3"):
        BatchStream(shards, config, num_ranks=3)


def test_errors_of_the_thread_surface(shards: ParallelShards, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = BatchStream(shards, config_of())
    stream.load_state_dict({"order": 3, "epoch": 0, "step": 10**6})
    with pytest.raises(ValueError, match=r"no step 1000000 in epoch 0"):
        next(stream)
    with pytest.raises(ValueError, match=r"training.micro_batches=200"):
        next(BatchStream(shards, config_of(micro_batches=200)))
    stream = BatchStream(shards, config_of())
    first = pair_lists(stream, 1)
    stream.load_state_dict({"order": 3, "epoch": 0, "step": 0})
    with monkeypatch.context() as patch:
        patch.setattr(nmt.data.batching, "_batch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(stream)
    assert pair_lists(stream, 1) == first
    stream.close()


def stream_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "BatchStream"]


def test_the_thread_ends(shards: ParallelShards) -> None:
    stream = BatchStream(shards, config_of())
    assert not stream_threads()
    next(stream)
    assert len(stream_threads()) == 1
    stream.close()
    assert not stream_threads()
    next(stream)  # a closed stream goes on where it was
    assert stream.state_dict() == {"order": 3, "epoch": 0, "step": 2}
    del stream
    gc.collect()
    assert not stream_threads()


def test_eval_batches() -> None:
    lengths = lengths_of(300)
    sources, targets = sentences_of(lengths[0], 1), sentences_of(lengths[1], 2)
    sources[7] = np.empty(0, np.int32)
    batches = list(eval_batches(sources, targets, 500))
    pairs = np.concatenate([batch.pairs_B.numpy() for batch in batches])
    assert sorted(pairs) == list(range(300))
    for batch in batches:
        assert max(batch.source.num_rows, batch.target.num_rows) <= 500 or len(batch.pairs_B) == 1
        numbers = batch.pairs_B.tolist()
        assert equal(batch, make_batch(numbers, [sources[n] for n in numbers], [targets[n] for n in numbers]))
    assert list(eval_batches([], [], 500)) == []
    with pytest.raises(ValueError, match="2 source sentences but 1 target"):
        list(eval_batches(sources[:2], targets[:1], 500))


def test_wide_vocabularies(tmp_path: Path) -> None:
    for size, dtype in ((1 << 16, "<u2"), ((1 << 16) + 1, "<i4")):
        folder = tmp_path / str(size)
        folder.mkdir()
        with ShardWriter(folder, size) as writer:
            writer.append([np.array([size - 1, 5])], [np.empty(0, np.int32)])
        record = writer.record()
        assert record["dtype"] == dtype
        (folder / "manifest.json").write_text(json.dumps({"shards": {"train": record}}))
        shards = ParallelShards.open(folder)
        assert shards.source(0).tolist() == [size - 1, 5]
        assert shards.target(0).tolist() == []
        assert shards.gather("target", np.array([0, 0]))[1].tolist() == [0, 0]
