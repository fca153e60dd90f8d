"""scripts/bench/scaling.py: what it refuses and counts; and, slow, a whole run of two processes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import mean
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from nmt.batch import fit
from nmt.cost.budget import SentenceLengths, TokenCounts, training_budget
from nmt.cost.cards import CARDS, card_called, link_of
from nmt.cost.step import MicroBatch, mean_batch, predict_step
from nmt.model.gating import GateSums
from tests.scripts import load_script

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script("scripts/bench/scaling.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--processes 0 --small", "'0' is no whole number of at least 1"),
        ("--processes 1,x --small", "'x' is no whole number"),
        ("--processes 3 --small training.device=cpu --global-tokens 999 --experts 8", "8 experts and 3 processes"),
        ("--processes 3 --small training.device=cpu", "--global-tokens 1024 cannot be divided among 3 processes"),
        ("--processes 2 --small training.device=cpu parallel.expert_group_size=4", "an expert group's 4 processes"),
        ("--processes 2 --small model.nope=1", "unknown setting model.nope"),
        ("--processes 2 --small --experts 8 model.moe.k=9", "model.moe.k=9 must lie in 1..num_experts=8"),
        ("--processes 2 --small --output /no/such/folder/x.json", "there is no such folder"),
        ("--nope", "unrecognized arguments: --nope"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: str, message: str, bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(arguments.split()) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert message in error


def test_processes_share_the_updates_that_are_planned(bench: ModuleType) -> None:
    steps, shape = bench.plan(True, 512, 256, 4, 3)
    assert [len(step) for step in steps] == [4, 4, 4]
    again, _ = bench.plan.__wrapped__(True, 512, 256, 4, 3)
    for one, other in zip(steps, again, strict=True):
        for batch, copy in zip(one, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch.tensors(), copy.tensors(), strict=True))
            assert 0.6 * 256 <= batch.num_source_tokens <= 256
            assert int(batch.source_N.max()) < 512
            assert len({*batch.source.length_B.tolist()}) > 1  # a mixture of lengths, as in training
            assert fit(batch, shape).num_source_tokens == batch.num_source_tokens
    assert not torch.equal(steps[0][0].source_N, steps[0][1].source_N)


@pytest.mark.parametrize(("experts", "processes"), [(0, 1), (0, 2), (32, 1), (32, 2), (32, 16)])
def test_what_cost_predicts_for_a_measurement(bench: ModuleType, experts: int, processes: int) -> None:
    """As `nmt cost` predicts a step of these mean micro-batches."""
    options = bench.read_options(["--processes", "1", "training.device=cpu"])
    config, card = bench.compose(options, experts), CARDS["h100"]
    own = MicroBatch(16000.0, 15500.0, 560.0, 90.0, 85.0)
    record = {"processes": processes, "experts": experts, **own._asdict()}
    ms = bench.predicted_ms(record, config, 32000, card)
    config = replace(config, training=replace(config.training, micro_batches=processes, batch_tokens=16000))
    budget = training_budget(config, 32000, SentenceLengths(), processes, on_gpu=True)
    budget = replace(budget, tokens=TokenCounts(*own[:3]))
    longest = mean_batch(config, budget.tokens)
    other = bench.predicted_ms({**record, **longest._asdict()}, config, 32000, card)
    assert other == pytest.approx(predict_step(config, 32000, budget, card, link_of(card, processes)).seconds * 1e3)
    assert 0.5 * other < ms < other


def test_a_figure_is_put_beside_what_cost_predicts(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """On a GPU that has half the predicted speed."""
    options = bench.read_options(["--processes", "1", "training.device=cpu"])
    row = {"kind": "speed", "scaling": "weak", "experts": 0, "processes": 1, "overlap": "-", "halves": "-"}
    row |= MicroBatch(16000.0, 15500.0, 560.0, 90.0, 85.0)._asdict()
    row |= dict.fromkeys(("tokens_per_second", "exchange", "dense", "other", "load", "memory_gb"), 1.0)
    row["ms"] = 2 * bench.predicted_ms(row, bench.compose(options, 0), 32000, CARDS["h100"])
    bench.report([{"kind": "device", "name": "NVIDIA H100 80GB HBM3", "torch": "2.11"}, row], options)
    assert row["predicted"] == pytest.approx(0.5)
    assert "0.50" in capsys.readouterr().out


def test_load_is_the_busiest_process_over_the_mean(bench: ModuleType) -> None:
    count_E = torch.tensor([1.0, 2.0, 4.0, 5.0])
    sums = {"encoder.2": GateSums(count_E, count_E, count_E), "decoder.1": GateSums(*[torch.ones(4)] * 3)}
    assert bench.load_of(sums, 2) == pytest.approx(9 / 6)
    assert bench.load_of(sums, 4) == pytest.approx(5 / 3)
    assert bench.load_of({}, 4) == 1.0


def test_what_is_left_out_comes_back(bench: ModuleType) -> None:
    updater, before = SimpleNamespace(summed=[1], forward=SimpleNamespace(), recording=1), dist.all_to_all_single
    received = torch.zeros(4)
    with bench.without("exchange", updater):
        dist.all_to_all_single(received, torch.ones(4), [4], [4], async_op=True).wait()
        assert updater.summed == [1]
    assert received.sum() == 4
    with bench.without("dense", updater):
        assert (updater.summed, updater.recording) == ([], None)
        assert not updater.forward.require_backward_grad_sync
        assert dist.all_to_all_single is before
    assert updater.forward.require_backward_grad_sync
    assert (updater.summed, dist.all_to_all_single) == ([1], before)


@pytest.mark.slow
def test_one_and_two_processes(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    what = "--small training.device=cpu --processes 1,2 --experts 0,8"
    brief = "--updates 2 --rounds 1 --steps-equal 5"
    assert bench.main([*what.split(), *brief.split(), "--output", str(tmp_path / "out.json")]) == 0
    records = json.loads((tmp_path / "out.json").read_text())
    out = capsys.readouterr().out
    speed = [record for record in records if record["kind"] == "speed"]
    assert len(speed) == 2 * 2 * 2
    for row in speed:
        alone = row["processes"] == 1
        assert row["tokens_per_second"] > 0
        tokens = 512 if row["scaling"] == "weak" else 1024 // row["processes"]
        steps, _ = bench.plan(True, 512, tokens, row["processes"], 2)
        assert row["source"] == pytest.approx(mean(batch.num_source_tokens for step in steps for batch in step))
        assert row["load"] >= 1
        assert (row["exchange"] != 0) == (row["experts"] > 0 and not alone)
        assert (row["dense"] != 0) == (not alone)
    (equality,) = (record for record in records if record["kind"] == "equality" and record["processes"] == 2)
    assert equality["difference"] < 1e-5
    assert len({loss for loss in equality["losses"] if math.isfinite(loss)}) == 5
    assert not any("predicted" in row for row in speed)  # only for GPUs
    assert "weak scaling" in out
    assert "strong scaling" in out


def test_cards_by_their_names() -> None:
    assert card_called("NVIDIA H100 80GB HBM3") is CARDS["h100"]
    assert card_called("NVIDIA GeForce RTX 4090") is None
    assert [link_of(CARDS["h100"], gpus) for gpus in (2, 8, 9)] == [248.0, 248.0, 50.0]
