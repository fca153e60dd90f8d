"""What training says of its gates: a line for each layer, and warnings that come only when they should."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from nmt.config import MoEConfig
from nmt.metrics.gate_watch import (
    LEAST_EXPECTED,
    LEAST_UPDATES,
    PATIENCE,
    GateWatch,
    collapse_bound,
)
from nmt.model.gate_statistics import GateFigures
from nmt.terminal import layer_lines, summary
from nmt.training.trainer import Trainer
from tests.toy import train

Loads = NDArray[np.float64] | list[float] | Tensor


def state(count_E: Loads, importance_E: Loads | None = None, *losses: float) -> GateFigures:
    """A layer at a line of metrics, as far as warnings look at it; `losses` are those of importance and load."""
    count_E = torch.tensor(np.array(count_E, dtype=float))
    importance_E = count_E / 2 if importance_E is None else torch.tensor(np.array(importance_E, dtype=float))
    idle = int((count_E == 0).sum())
    return GateFigures(0.1, 0.1, 1.0, 0.5, idle, *(losses or (0.0, 0.0)), 0.7, 0.0, 0.0, count_E, importance_E)


class Watched:
    """Feeds lines of metrics to a GateWatch, 50 updates each; a healthy layer is always there too."""

    def __init__(self, warmup_steps: int = 0, layer: str = "encoder.2", **moe: object) -> None:
        self.watch, self.layer, self.step = GateWatch(MoEConfig(**moe), warmup_steps), layer, 0
        self.other = state([FAIR] * self.watch.moe.num_experts)

    def see(self, figures: GateFigures, lines: int = 1, loss: float = 3.0, updates: int = 50) -> list[str]:
        said = []
        for _ in range(lines):
            self.step += updates
            said += self.watch.judge(self.step, updates, loss, {"encoder.9": self.other, self.layer: figures})
        return said


CHOICES = [(2, 1), (8, 1), (8, 2), (8, 4), (32, 4), (32, 1), (512, 4), (512, 1), (2048, 4)]
FAIR = 400.0


def healthy(num_experts: int, seed: int = 0) -> GateFigures:
    """CV(load) of about 0.3, the upper end of S17's balanced gates."""
    rng = np.random.default_rng(seed)
    loads = np.clip(rng.normal(1.0, 0.3, num_experts), 0.4, 1.6)
    return state(rng.poisson(FAIR * loads))


def collapsed(num_experts: int, k: int) -> GateFigures:
    """Nine tenths of the tokens have the same k experts."""
    fair = FAIR * num_experts
    favourites = np.arange(num_experts) < k
    return state(np.where(favourites, 0.9 * fair / k, 0.1 * fair / (num_experts - k)))


@pytest.mark.parametrize(("num_experts", "k"), CHOICES)
def test_healthy_gates_are_left_alone(num_experts: int, k: int) -> None:
    watched = Watched(num_experts=num_experts, k=k)
    assert [line for seed in range(20) for line in watched.see(healthy(num_experts, seed))] == []


@pytest.mark.parametrize(("num_experts", "k"), CHOICES)
def test_a_collapse_is_said_once_with_the_remedy(num_experts: int, k: int) -> None:
    watched = Watched(num_experts=num_experts, k=k, w_importance=0.02, w_load=0.03)
    assert watched.see(collapsed(num_experts, k), PATIENCE - 1) == []
    [line] = watched.see(collapsed(num_experts, k))
    assert line.startswith(f"step {50 * PATIENCE}: warning: encoder.2 has collapsed: its tokens go to ")
    assert f" of {num_experts} experts in effect (CV " in line
    assert line.endswith("start a new run with model.moe.w_importance=0.2 model.moe.w_load=0.3 (now 0.02, 0.03)")
    assert watched.see(collapsed(num_experts, k), 50) == []


def test_the_figures_of_a_collapse() -> None:
    """Loads 9, 1, 0, 0: 100 / 82 experts in effect, CV^2 = 4 * 82 / 100 - 1. An idle one of two is a collapse too."""
    [line] = Watched(num_experts=4, k=1).see(state([9000, 1000, 0, 0]), PATIENCE)
    assert "its tokens go to 1.2 of 4 experts in effect (CV 1.51, 2 idle)" in line
    [line] = Watched(num_experts=2, k=1).see(state([FAIR, 0]), 20)
    assert "has collapsed: its tokens go to 1.0 of 2 experts in effect (CV 1.00, 1 idle)" in line


def test_the_bound_lies_within_s17_table_6_and_can_be_reached_unless_most_experts_are_awake() -> None:
    assert 0.5**2 < collapse_bound(256, 4) == collapse_bound(2048, 4) < 2.0**2
    for num_experts in (2, 3, 4, 5, 8, 16, 32, 100, 512, 2048):
        for k in range(1, num_experts + 1):
            assert (collapse_bound(num_experts, k) < num_experts / k - 1) == (num_experts / k - 1 > 0.4)


def test_weight_may_collapse_where_loads_do_not() -> None:
    """With k = E every expert has every token, and only its gates tell."""
    watched = Watched(num_experts=4, k=4, w_importance=0.01)
    [line] = watched.see(state([FAIR] * 4, [390.0, 4.0, 3.0, 3.0]), PATIENCE)
    assert "gates' weight goes to 1.1 of 4 experts" in line
    assert line.endswith("start a new run with model.moe.w_importance=0.1 (now 0.01)")
    assert Watched(num_experts=4, k=4).see(state([FAIR] * 4, [230.0, 90.0, 50.0, 30.0]), 20) == []


@pytest.mark.parametrize("num_experts", [8, 32, 512])
def test_idle_experts_are_said_once_with_their_number(num_experts: int) -> None:
    loads = healthy(num_experts).count_E
    idle = 1 if num_experts < 32 else 3
    loads[:idle] = 0.0
    watched = Watched(num_experts=num_experts, k=4)
    assert watched.see(state(loads, loads + 1), PATIENCE - 1) == []
    [line] = watched.see(state(loads, loads + 1))
    assert f"has {idle} of {num_experts} experts that stay idle: no token where {3 * loads.mean():,.0f} would" in line
    assert line.endswith("or drop them with nmt experts RUN --prune")
    assert watched.see(state(loads, loads + 1), 50) == []


def test_different_experts_that_rest_for_one_line_are_not_idle() -> None:
    watched = Watched(num_experts=8, k=2)
    for place in range(24):
        loads = healthy(8, place).count_E
        loads[place % 8] = 0.0
        assert watched.see(state(loads)) == []
    # Two tokens each on average: at every line many have none.
    rng, watched = np.random.default_rng(0), Watched(num_experts=2048, k=4)
    assert [line for _ in range(200) for line in watched.see(state(rng.poisson(2.0, 2048)))] == []


def test_idle_experts_that_sometimes_wake_are_not_said_again() -> None:
    watched = Watched(num_experts=8, k=2)
    idle, awake = healthy(8).count_E, healthy(8).count_E
    idle[3] = 0.0
    assert len(watched.see(state(idle), PATIENCE)) == 1
    for _ in range(10):
        assert watched.see(state(awake)) + watched.see(state(idle), PATIENCE + 1) == []
    assert watched.see(state(awake), PATIENCE) == []
    assert len(watched.see(state(idle), PATIENCE)) == 1


def test_a_collapse_speaks_for_idle_experts_until_it_ends() -> None:
    watched = Watched(num_experts=8, k=1)
    loads = np.array([8 * FAIR, 1, 0, 0, 0, 0, 0, 0])
    [line] = watched.see(state(loads, None, 0.4, 0.4), 20)
    assert line.split("; ")[0].endswith(" 6 idle)")
    half = healthy(8).count_E
    half[5] = 0.0
    [line] = watched.see(state(half), PATIENCE)
    assert "1 of 8 experts that stay idle" in line


@pytest.mark.parametrize("num_experts", [2, 8, 32, 512])
def test_balance_losses_that_dominate_are_said_once(num_experts: int) -> None:
    watched = Watched(num_experts=num_experts, k=1, w_importance=5.0, w_load=0.02)
    figures = state(healthy(num_experts).count_E, None, 0.35, 0.01)
    assert watched.see(figures, PATIENCE - 1) == []
    [line] = watched.see(figures)
    assert "balance losses of 0.36 against a token loss of 3.00" in line
    assert line.endswith("start a new run with model.moe.w_importance=0.5 (now 5)")
    assert watched.see(figures, 50) == []


def test_balance_losses_that_do_not_dominate_are_left_alone() -> None:
    loads = healthy(8).count_E
    below = state(loads, None, 0.14, 0.14)
    assert Watched(num_experts=8, k=2).see(below, 20) == []
    # A text known by heart, whose loss is next to nothing.
    assert Watched(num_experts=8, k=2).see(state(loads, None, 0.02, 0.02), 20, loss=0.03) == []
    # One large value of a single update.
    watched = Watched(num_experts=8, k=2)
    for _ in range(10):
        assert watched.see(below, 2) + watched.see(state(loads, None, 0.8, 0.8)) == []
    # High because the gate leans: then high weights are what it needs.
    leaning = state([10 * FAIR, *[FAIR] * 7], None, 0.4, 0.4)
    assert not any("balances more" in line for line in Watched(num_experts=8, k=2).see(leaning, 20))
    # The load loss of a gate whose load has no gradient takes part in nothing.
    soft = Watched(num_experts=8, k=2, gating="softmax_top_k")
    assert soft.see(state(loads, None, 0.01, 0.9), 20) == []
    assert len(soft.see(state(loads, None, 0.9, 0.01), 20)) == 1


def test_a_warning_is_said_again_only_after_it_ended() -> None:
    watched = Watched(num_experts=8, k=2)
    bad, good = collapsed(8, 2), healthy(8)
    assert len(watched.see(bad, 10)) == 1
    assert watched.see(good, PATIENCE - 1) + watched.see(bad, 10) == []
    assert watched.see(good, PATIENCE) == []
    assert len(watched.see(bad, PATIENCE)) == 1
    watched = Watched(num_experts=8, k=2)
    for _ in range(10):
        assert watched.see(bad, PATIENCE - 1) + watched.see(good) == []


def test_nothing_is_said_of_the_warm_up_or_without_a_loss() -> None:
    watched = Watched(warmup_steps=1020, num_experts=8, k=2)
    # 21 lines begin before step 1020.
    assert watched.see(collapsed(8, 2), 21 + PATIENCE - 1) == []
    assert len(watched.see(collapsed(8, 2))) == 1
    # Nor of updates that went wrong.
    watched = Watched(num_experts=8, k=2)
    assert watched.see(collapsed(8, 2), 9, loss=math.nan) + watched.see(collapsed(8, 2), 9, loss=math.inf) == []


def test_too_few_tokens_say_nothing_until_enough_have_come() -> None:
    """Sixteen lines make one judgement; so do LEAST_UPDATES lines of one update."""
    num_experts, lines = 512, 16
    counts = np.zeros(num_experts)
    counts[0] = num_experts * LEAST_EXPECTED / lines
    watched = Watched(num_experts=num_experts, k=1)
    assert watched.see(state(counts), PATIENCE * lines - 1) == []
    assert len(watched.see(state(counts))) == 1
    watched = Watched(num_experts=8, k=2)
    assert watched.see(collapsed(8, 2), PATIENCE * LEAST_UPDATES - 1, updates=1) == []
    assert len(watched.see(collapsed(8, 2), updates=1)) == 1


REMEDIES = [
    ("encoder.1", {"w_importance": 0.0, "w_load": 0.0}, "w_importance=0.01 w_load=0.01 (now 0, 0)"),
    ("encoder.1", {"w_load_decoder": 0.5}, "w_importance=0.1 w_load=0.1 (now 0.01, 0.01)"),
    ("decoder.1", {}, "w_importance=0.1 w_load=0.1 (now 0.01, 0.01)"),
    ("decoder.1", {"w_load_decoder": 0.05}, "w_importance=0.1 w_load_decoder=0.5 (now 0.01, 0.05)"),
    ("encoder.1", {"w_importance": 2.0, "w_load": 0.2}, "w_load=1 (now 0.2)"),
    ("encoder.1", {"gating": "softmax_top_k"}, "w_importance=0.1 (now 0.01)"),
    ("encoder.1", {"w_importance": 1.0, "w_load": 3.0}, "a lower training.learning_rate or a smaller num_experts"),
]


@pytest.mark.parametrize(("layer", "moe", "expected"), REMEDIES)
def test_remedies_name_settings_and_their_present_values(layer: str, moe: dict[str, object], expected: str) -> None:
    [line] = Watched(num_experts=8, k=2, layer=layer, **moe).see(collapsed(8, 2), PATIENCE)
    assert line.split("; start a new run with ")[1].replace("model.moe.", "") == expected


def test_a_hierarchical_gate_counts_all_that_a_token_wakes() -> None:
    """2 groups of 4, 2 experts in each: 4 of 16 may not be taken for 2 of 16."""
    moe = {"num_experts": 16, "k": 2, "branching": 4, "primary_k": 2, "gating": "hierarchical"}
    assert collapse_bound(16, 4) == 1.0
    loads = np.array([3.0] * 4 + [1 / 3] * 12) * FAIR  # CV^2 = 4/3
    assert len(Watched(**moe).see(state(loads), 20)) == 1
    assert Watched(num_experts=16, k=2).see(state(loads), 20) == []


def as_written(gates: dict[str, GateFigures], gating: str) -> dict[str, dict[str, float]]:
    """The figures as a line of metrics has them."""
    return {layer: figures.to_dict(MoEConfig(gating=gating)) for layer, figures in gates.items()}


def test_the_summary_names_the_worst_layer_and_all_idle_experts() -> None:
    layer = state([FAIR] * 8)
    gates = {"encoder.2": layer._replace(idle_experts=2), "decoder.1": layer._replace(cv_load=0.314, idle_experts=1)}
    assert summary(as_written(gates, "noisy_top_k")) == "; worst CV(load) 0.31 decoder.1, idle 3"
    gates = {"encoder.2": layer._replace(tokens_without_experts=0.1234), "decoder.1": layer}
    assert summary(as_written(gates, "strictly_balanced")) == "; 12.3% without experts encoder.2, idle 0"
    assert summary({}) == ""


def test_every_layer_has_a_line_of_its_figures() -> None:
    gate = state([FAIR] * 8)._replace(cv_importance=0.512, cv_load=0.314, max_over_mean_load=1.5, gate_entropy=0.69)
    gates = {"encoder.2": gate, "decoder.1": gate._replace(idle_experts=2, tokens_without_experts=0.1234)}
    common = "CV(importance) 0.51, CV(load) 0.31, max/mean load 1.50, entropy 0.69, idle"
    encoder, decoder = layer_lines(as_written(gates, "noisy_top_k"))
    assert encoder == f"  encoder.2  {common} 0, noise 0.70"
    assert decoder == f"  decoder.1  {common} 2, noise 0.70"
    assert layer_lines(as_written(gates, "softmax_top_k"))[1] == f"  decoder.1  {common} 2"
    strict = as_written(gates, "strictly_balanced")
    assert layer_lines(strict)[1] == f"  decoder.1  {common} 2, tokens without experts 12.3%"
    shared = as_written(
        {"decoder.1": gate._replace(processes=2, count_E=torch.tensor([3.0, 2.0, 1.0, 0.0]))}, "noisy_top_k"
    )
    assert layer_lines(shared) == [f"  decoder.1  {common} 0, noise 0.70, max/mean process 1.67"]
    assert layer_lines({}) == []


def test_below_a_line_of_training_are_its_layers(
    corpus: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And warnings follow it."""
    monkeypatch.setattr("nmt.metrics.gate_watch.LEAST_UPDATES", 1)
    monkeypatch.setattr("nmt.metrics.gate_watch.LEAST_EXPECTED", 1)
    monkeypatch.setattr("nmt.metrics.gate_watch.collapse_bound", lambda num_experts, k: 1e-9)
    train(corpus, "a", 5, "training.warmup_steps=1")
    lines = capfd.readouterr().err.splitlines()
    logged = [place for place, line in enumerate(lines) if line.startswith("step") and "tokens/s" in line]
    assert len(logged) == 5
    for place in logged:
        assert lines[place + 1].startswith("  encoder.1  CV(importance) ")
        assert lines[place + 2].startswith("  decoder.1  CV(importance) ")
    [warning] = [place for place, line in enumerate(lines) if "warning: encoder.1" in line]
    assert lines[warning].startswith(f"step {1 + PATIENCE}: ")
    assert lines[warning - 3].startswith(f"step {1 + PATIENCE}/5 ")


@pytest.mark.parametrize("layer", ["encoder.1", "decoder.1"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gate_that_is_not_finite_is_named(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], layer: str, bad: float
) -> None:
    updates = 0
    original = Trainer._update

    def update(trainer: Trainer, *arguments: Any) -> None:
        nonlocal updates
        updates += 1
        gate = trainer.model.get_submodule(f"{layer.replace('.', '.moe_layers.moe.')}.gate")
        handle = gate.register_forward_pre_hook(lambda _, inputs: (inputs[0] * bad,)) if updates == 2 else None
        original(trainer, *arguments)
        if handle:
            handle.remove()

    monkeypatch.setattr(Trainer, "_update", update)
    train(corpus, "a", 3)
    told = [line for line in capfd.readouterr().err.splitlines() if "skipped" in line]
    assert told == [f"step 2: 1 step skipped: gradient not finite (first gate not finite: {layer})"]
