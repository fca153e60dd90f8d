"""What training writes of its gates and losses: figures against hand-computed ones (warnings: test_gate_watch.py)."""

import fcntl
import json
import math
import os
import pty
import select
import struct
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nmt.batch import Batch
from nmt.config import Config, ModelConfig, MoEConfig, TrainingConfig
from nmt.metrics.writer import MetricsWriter
from nmt.model.gate_statistics import GateFigures, relative_load
from nmt.model.gating import (
    MIN_NOISE_STD,
    GateOutput,
    GateSums,
    HierarchicalGate,
    StrictlyBalancedGate,
    balance_loss,
    count_tokens,
)
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.mesh import World
from nmt.terminal import summary
from nmt.training.interval import Interval
from nmt.training.optim import make_optimizer
from nmt.training.update import Updater

CPU = torch.device("cpu")
ALONE = World(CPU)
UNIQUE_WEIGHTS = {"w_importance": 0.3, "w_load": 0.7, "w_importance_decoder": 0.11, "w_load_decoder": 0.13}


def gate_of(expert_TK: list[list[int]], gates_TK: list[list[float]], load_E: list[float] | None = None) -> GateOutput:
    """A gate's decision by hand, among as many experts as `load_E` or four."""
    experts, gates = torch.tensor(expert_TK), torch.tensor(gates_TK)
    num_experts = len(load_E) if load_E else 4
    importance_E = torch.zeros(num_experts + 1).scatter_add(0, experts.flatten(), gates.flatten())[:num_experts]
    count_E = count_tokens(experts, num_experts)
    sums = GateSums(importance_E, torch.tensor(load_E) if load_E else count_E, count_E)
    num_routed = int((experts < num_experts).sum())
    return GateOutput(experts, gates, num_routed, sums, torch.tensor(0.6), torch.tensor(0.25))


def read_one(moe: MoEConfig, *gates: GateOutput, layer: str = "encoder.1") -> GateFigures:
    interval = Interval(CPU, moe)
    for gate in gates:
        interval.watch({layer: gate.sums}, {layer: gate})
    return interval.read(ALONE)[1][layer]


def cv(values: list[float]) -> float:
    return float(np.std(values) / np.mean(values))


def test_figures_are_those_of_the_definitions() -> None:
    first = gate_of([[0, 1], [0, 2]], [[0.9, 0.1], [0.8, 0.2]], [2.0, 1.0, 1.0, 0.0])
    newest = gate_of([[0, 1], [1, 0], [0, 2]], [[0.5, 0.5], [0.7, 0.3], [1.0, 0.0]], [2.5, 2.0, 1.0, 0.5])
    figures = read_one(MoEConfig(**UNIQUE_WEIGHTS), first, newest)
    importance, load = [1.8, 1.2, 0.0, 0.0], [2.5, 2.0, 1.0, 0.5]
    assert figures.cv_importance == pytest.approx(cv(importance))
    assert figures.cv_load == pytest.approx(cv(load))
    assert figures.importance_loss == pytest.approx(0.3 * cv(importance) ** 2)
    assert figures.load_loss == pytest.approx(0.7 * cv(load) ** 2)
    decoder = read_one(MoEConfig(**UNIQUE_WEIGHTS), first, newest, layer="decoder.1")
    assert decoder.importance_loss == pytest.approx(0.11 * cv(importance) ** 2)
    assert decoder.load_loss == pytest.approx(0.13 * cv(load) ** 2)
    assert figures.count_E.tolist() == [5, 3, 2, 0]
    np.testing.assert_allclose(figures.importance_E, [3.5, 1.3, 0.2, 0.0], rtol=1e-6)
    assert figures.max_over_mean_load == pytest.approx(5 / 2.5)
    assert relative_load(figures.count_E).tolist() == [2.0, 1.2, 0.8, 0.0]
    assert figures.idle_experts == 1
    half_half, seven_three = math.log(2), -0.7 * math.log(0.7) - 0.3 * math.log(0.3)
    assert figures.gate_entropy == pytest.approx((half_half + seven_three + 0.0) / 3)
    assert figures.noise_std == pytest.approx(0.6)
    assert figures.tokens_without_experts == 0.0


def test_empty_slots_and_tokens_without_experts() -> None:
    """Of five tokens one has two experts, two have one, two have none."""
    gate = gate_of(
        [[1, 3], [2, 4], [4, 4], [1, 4], [4, 4]], [[0.25, 0.75], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    )
    figures = read_one(MoEConfig(), gate)
    assert figures.tokens_without_experts == pytest.approx(2 / 5)
    two = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert figures.gate_entropy == pytest.approx(two / 3)
    assert figures.count_E.tolist() == [0, 2, 1, 1]
    assert figures.idle_experts == 1
    assert figures.max_over_mean_load == pytest.approx(2.0)
    nothing = read_one(MoEConfig(), gate_of([[4], [4]], [[0.0], [0.0]]))
    assert (nothing.tokens_without_experts, nothing.idle_experts) == (1.0, 4)
    assert all(np.isfinite(value).all() for value in (*nothing, relative_load(nothing.count_E)))


def test_a_strictly_balanced_gate_is_read() -> None:
    gate = StrictlyBalancedGate(6, 4, 1).train()
    torch.nn.init.normal_(gate.w_gate_DE)
    out = gate(torch.randn(50, 6)).detach()
    figures = read_one(MoEConfig(num_experts=4, k=1, gating="strictly_balanced"), out)
    rows = [[g for g in row if g > 0] for row in out.gates_TK.tolist()]
    assert any(len(row) == 0 for row in rows)
    assert any(len(row) > 1 for row in rows)
    entropies = [-sum(g * math.log(g) for g in row) for row in rows if row]
    assert figures.gate_entropy == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert figures.tokens_without_experts == pytest.approx(sum(not row for row in rows) / 50)
    assert figures.batchwise_loss == pytest.approx(float(out.own_loss))
    assert (figures.max_over_mean_load, figures.cv_load) == (1.0, 0.0)


def test_load_of_a_hierarchical_gate_is_that_of_both_levels() -> None:
    gate = HierarchicalGate(6, 8, 4, 2, 1).train()
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    out = gate(torch.randn(40, 6)).detach()
    figures = read_one(MoEConfig(num_experts=8, k=1, gating="hierarchical", branching=4), out)
    assert figures.cv_load == pytest.approx(cv(out.sums.load().tolist()), rel=1e-5)
    assert figures.cv_load != pytest.approx(cv(out.sums.load_E.tolist()), rel=1e-3)


def test_the_load_of_processes_is_that_of_the_experts_that_they_hold() -> None:
    """Eight experts of five tokens: the busiest of four processes has 3 of them, that of two has 4."""
    gate = gate_of([[0], [1], [1], [3], [6]], [[1.0]] * 5, [1.0] * 8)
    interval = Interval(CPU, MoEConfig(num_experts=8))
    interval.watch({"encoder.1": gate.sums}, {"encoder.1": gate})
    _, gates = interval.read(ALONE)
    alone = gates["encoder.1"]
    assert "max_over_mean_process" not in alone.to_dict(MoEConfig())
    for processes, expected in ((2, 4 / 2.5), (4, 3 / 1.25), (8, alone.max_over_mean_load)):
        world = World(CPU)
        world.group_size = processes
        figures = interval.read(world)[1]["encoder.1"].to_dict(MoEConfig())
        assert figures["max_over_mean_process"] == pytest.approx(expected)
    nothing = alone._replace(processes=2, count_E=torch.zeros(8, dtype=torch.float64))
    assert nothing.max_over_mean_process == 0.0


def test_each_kind_of_gate_has_its_figures() -> None:
    common = {"cv_importance", "cv_load", "max_over_mean_load", "gate_entropy", "idle_experts"}
    common |= {"importance_loss", "load_loss"}
    figures = read_one(MoEConfig(), gate_of([[0]], [[1.0]]))
    assert figures.to_dict(MoEConfig()).keys() == common | {"noise_std"}
    assert figures.to_dict(MoEConfig(gating="hierarchical", branching=4)).keys() == common | {"noise_std"}
    assert figures.to_dict(MoEConfig(gating="softmax_top_k")).keys() == common
    balanced = figures.to_dict(MoEConfig(gating="strictly_balanced")).keys()
    assert balanced == common | {"tokens_without_experts", "batchwise_loss"}


def test_an_interval_gives_means_over_tokens_and_updates_and_its_layers() -> None:
    interval = Interval(CPU, MoEConfig())
    for loss, norm, skipped in ((6.0, 2.0, 0.0), (2.0, math.nan, 1.0), (4.0, 4.0, 0.0)):
        interval.add(*(torch.tensor(value) for value in (loss, loss / 2, norm, skipped)))
        interval.count(5, 4, 1e6)
    gate = gate_of([[0], [1]], [[1.0], [1.0]])
    for layer in ("encoder.1", "decoder.1"):
        interval.watch({layer: gate.sums}, {layer: gate})
    means, gates = interval.read(ALONE)
    assert (means.loss, means.nll) == (1.0, 0.5)
    assert (means.gradient_norm, means.skipped_updates) == (3.0, 1.0)
    assert means.perplexity == pytest.approx(math.exp(0.5))
    assert list(gates) == ["encoder.1", "decoder.1"]
    assert gates["decoder.1"].max_over_mean_load == 2.0
    json.dumps(means, allow_nan=False)


def test_figures_of_an_update_are_over_all_its_micro_batches(
    tiny_config: Callable[..., ModelConfig], tiny_batch: Callable[..., Batch]
) -> None:
    config = Config(model=tiny_config(), training=TrainingConfig(precision="fp32"))
    config.model.moe.w_importance, config.model.moe.w_load = 0.4, 0.9
    model = Seq2Seq(config.model, 13).train()
    batches = [tiny_batch((3, 4), (5, 2)), tiny_batch((2, 2))]
    done = Updater(model, make_optimizer(model, config.training), config, ALONE).update(batches, 1, 0.01)
    interval = Interval(CPU, config.model.moe)
    interval.watch(done.sums, done.gates)
    _, gates = interval.read(ALONE)
    assert gates["encoder.2"].count_E.sum() == config.model.moe.k * (4 + 6 + 3)  # with the ends of sentences
    assert gates["decoder.1"].count_E.sum() == config.model.moe.k * (5 + 3 + 3)
    for layer, figures in gates.items():
        total = figures.importance_loss + figures.load_loss
        assert total == pytest.approx(float(balance_loss(done.sums[layer], 0.4, 0.9)), rel=1e-5)


@pytest.mark.parametrize("num_experts", [2, 8, 512])
def test_histograms_hold_one_value_per_expert(tmp_path: Path, num_experts: int) -> None:
    rng = np.random.default_rng(num_experts)
    values = rng.gamma(2.0, size=num_experts)
    values *= num_experts / values.sum()
    with MetricsWriter((tmp_path / "metrics.jsonl", tmp_path), 0, 9) as out:
        out.write_histograms(3, "train", {"uneven": torch.from_numpy(values), "even": torch.ones(num_experts)})
    events = EventAccumulator(str(tmp_path)).Reload()
    [event] = events.Histograms("train/uneven")
    found = event.histogram_value
    assert (event.step, found.num, found.sum) == (3, num_experts, pytest.approx(num_experts))
    assert (found.min, found.max) == pytest.approx((values.min(), values.max()))
    assert sum(found.bucket) == num_experts
    expected, _ = np.histogram(values, found.bucket_limit)
    np.testing.assert_array_equal(found.bucket[1:], expected)
    assert events.Histograms("train/even")[0].histogram_value.sum_squares == num_experts


def test_a_run_writes_figures_and_histograms_of_every_layer(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    for layer in ("encoder.1", "decoder.1"):
        histograms = events.Histograms(f"train/{layer}.load_per_expert")
        assert [event.step for event in histograms] == [line["step"] for line in lines]
        for event, line in zip(histograms, lines, strict=True):
            assert (event.histogram_value.num, event.histogram_value.sum) == (4, pytest.approx(4))
            assert event.histogram_value.max == pytest.approx(line[f"{layer}.max_over_mean_load"])
        for name in ("cv_importance", "cv_load", "gate_entropy", "noise_std", "importance_loss", "load_loss"):
            values = [line[f"{layer}.{name}"] for line in lines]
            assert [event.value for event in events.Scalars(f"train/{layer}.{name}")] == pytest.approx(values)
    # The gates start at zero: even, and with noise of softplus(0) and the floor.
    assert lines[0]["encoder.1.noise_std"] == pytest.approx(math.log(2) + MIN_NOISE_STD)
    assert lines[0]["encoder.1.load_loss"] == pytest.approx(0.01 * lines[0]["encoder.1.cv_load"] ** 2)


# ------------------------------------------------------------------------------------------------------ the terminal


@contextmanager
def terminal(rows: int, columns: int, patch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """A terminal of that size as standard error; all that was written to it, once the last of it has come through."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    shown = b""

    def written(last: str) -> str:
        nonlocal shown
        sys.stderr.flush()
        while not shown.rstrip().endswith(last.encode()) and select.select([main], [], [], 10.0)[0]:
            shown += os.read(main, 1 << 16)
        return shown.decode()

    with open(side, "w", encoding="utf-8") as stream, patch.context() as inner:
        inner.setattr(sys, "stderr", stream)
        yield written
    os.close(main)


def gate_figures(name: str, gating: str) -> dict[str, dict[str, float]]:
    gate = gate_of([[0], [1]], [[1.0], [1.0]])
    figures = read_one(MoEConfig(), gate)._replace(cv_load=1.23, tokens_without_experts=0.123)
    return {name: figures.to_dict(MoEConfig(gating=gating))}


@pytest.mark.parametrize("gating", ["noisy_top_k", "strictly_balanced"])
def test_the_bar_leaves_room_for_all_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gating: str) -> None:
    """At 110 columns, late in a long run."""
    text = f"123.4 minutes left, ppl 22.70, 123,456 tokens/s{summary(gate_figures('decoder.1', gating))}"
    with terminal(40, 110, monkeypatch) as written:
        with MetricsWriter((tmp_path / "metrics.jsonl", tmp_path), 11_999, 20_000) as out:
            out.show(text, "step 12,000/20,000\n  encoder.1", keep=False)
            out.advance(12_000)
            out.bar.refresh()
            bar = written(text).split("\r")[-1].rstrip()
            assert bar.startswith("12000/20000 |")
            assert bar.endswith(text)
            assert bar.count("█") >= 3
            out.show(text, "step 12,050/20,000\n  encoder.1", keep=True)
            out.say("step 12,050: dev perplexity 9.00")
        sys.stderr.write("the end")
        shown = written("the end")
    assert "step 12,050/20,000\r\n  encoder.1\r\n" in shown
    assert "step 12,050: dev perplexity 9.00\r\n" in shown
    assert "step 12,000/20,000" not in shown


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 110), (40, 0), (40, 30)])
def test_a_terminal_without_room_for_a_bar_gets_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, columns: int
) -> None:
    with terminal(rows, columns, monkeypatch) as written:
        with MetricsWriter((tmp_path / "metrics.jsonl", tmp_path), 0, 9) as out:
            out.advance(1)
            out.show("beside the bar", "step 1/9  loss 3", keep=False)
        assert written("loss 3") == "step 1/9  loss 3\r\n"


def test_no_standard_error_gets_no_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with MetricsWriter((tmp_path / "metrics.jsonl", tmp_path), 0, 9) as out:
        assert out.bar.disable
