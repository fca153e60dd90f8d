"""Training: updates, clipping, rates, and going on bit for bit after any stop."""

import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nmt.batch import Batch, Rows, make_batch
from nmt.checkpoint import list_checkpoints
from nmt.cli import main
from nmt.compose import compose_config
from nmt.config import SCHEDULES, Config, ModelConfig, TrainingConfig
from nmt.metrics.record import DevLine
from nmt.metrics.writer import MetricsWriter
from nmt.model.gating import balance_loss
from nmt.model.rows import unpack
from nmt.model.seq2seq import Gates, Seq2Seq
from nmt.parallel.mesh import World
from nmt.tokens import NUM_SPECIAL
from nmt.training.optim import clipped_step, learning_rate, make_optimizer
from nmt.training.update import Updater, seed_device
from nmt.training.validation import Validated, Validation
from tests.processes import Command
from tests.toy import HARD, SHARED_TEXT, saved, settings, steps_logged, train

Configs = Callable[..., ModelConfig]

# ------------------------------------------------------------------------------------------------- going on


@pytest.fixture(scope="module")
def uninterrupted(shared_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / SHARED_TEXT).symlink_to(shared_text)
    return train(folder, "whole", 8, *HARD)


def test_eight_updates_cross_the_end_of_an_epoch(uninterrupted: Path) -> None:
    assert list_checkpoints(uninterrupted / "checkpoints")[-1].state()["data"]["epoch"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("stops", [[4], [2, 5, 6]], ids=str)
def test_going_on_changes_no_bit(uninterrupted: Path, stops: list[int]) -> None:
    folder, name = uninterrupted.parent, "stopped" + "_".join(map(str, stops))
    for steps in [*stops, 8]:
        run = train(folder, name, steps, *HARD)
    assert saved(run) == saved(uninterrupted)
    assert steps_logged(run, "train") == list(range(1, 9))
    assert steps_logged(run, "dev") == sorted({*stops, 4, 8})


@pytest.mark.slow
def test_a_run_twice_is_the_same_run_and_another_seed_another(uninterrupted: Path) -> None:
    folder = uninterrupted.parent
    assert saved(train(folder, "again", 8, *HARD)) == saved(uninterrupted)
    assert saved(train(folder, "other", 8, *HARD, "training.seed=2"))["model"] != saved(uninterrupted)["model"]


def test_a_finished_run_stays_as_it_is(corpus: Path) -> None:
    before = saved(train(corpus, "a", 3))
    assert saved(train(corpus, "a", 3)) == before


def test_an_end_that_is_past_is_refused_and_not_written_down(corpus: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = train(corpus, "a", 3)
    before, config = saved(run), (run / "config.yaml").read_bytes()
    capfd.readouterr()
    assert main(["train", *settings(corpus, "run.name=a", "training.max_steps=2")]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"nmt: training.max_steps=2 is below step 3, which {run} has reached: give at least 3")
    assert (saved(run), (run / "config.yaml").read_bytes()) == (before, config)


def test_sigterm_saves_and_the_same_command_goes_on(corpus: Path) -> None:
    # So many steps that the signal comes long before the last one.
    rest = ("training.validate_every=100000",)
    command = Command(corpus, "train", *settings(corpus, "run.name=a", "training.max_steps=100000", *rest))
    metrics = corpus / "a" / "metrics.jsonl"
    command.wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2)
    command.signal(signal.SIGTERM)
    assert command.status() == 143
    errors = command.errors.read_text()
    assert "Traceback" not in errors
    assert "stopped by SIGTERM" in errors.splitlines()[-1]
    step = list_checkpoints(corpus / "a" / "checkpoints")[-1].step
    assert step == steps_logged(corpus / "a", "train")[-1]
    run = train(corpus, "a", step + 2, *rest)
    assert saved(run) == saved(train(corpus, "b", step + 2, *rest))
    assert steps_logged(run, "train") == list(range(1, step + 3))


def test_lines_of_metrics_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 3, "ki')
    with MetricsWriter((path, tmp_path / "tensorboard"), 2, 9) as out:
        out.write(DevLine(3, 2.0, 3.0))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def script_perplexity(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    measured, coming = Validation.run, iter(scores)

    def scripted(validation: Validation, model: Seq2Seq) -> tuple[Validated, dict[str, Validated]]:
        own, watched = measured(validation, model)
        return replace(own, perplexity=next(coming)), watched

    monkeypatch.setattr(Validation, "run", scripted)


def test_patience_stops_early_and_saves(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script_perplexity(monkeypatch, 3.0, 4.0, math.nan, 5.0)
    run = train(corpus, "a", 50, "training.validate_every=1", "training.patience=2", "training.keep_checkpoints=9")
    assert [(each.step, each.score) for each in list_checkpoints(run / "checkpoints")] == [(1, 3.0), (3, None)]


def test_a_validation_that_is_not_a_number_is_never_the_best(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script_perplexity(monkeypatch, math.nan, 4.0, math.nan)
    changes = ("training.validate_every=1", "training.checkpoint_every=1")
    found = list_checkpoints(train(corpus, "a", 3, *changes) / "checkpoints")
    assert [each.score for each in found] == [None, 4.0, None]
    assert found[-1].state()["progress"]["best_score"] == 4.0


# --------------------------------------------------------------------------------------------------- updates


class Keep(torch.optim.SGD):
    """Takes no step, keeps the gradient."""

    def step(self, closure: None = None) -> None:
        self.kept = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def gradient_of(model: Seq2Seq, config: Config, batches: list[Batch], step: int = 1) -> tuple[list[Tensor], Any]:
    """The gradient of one update (zeros for parameters without one), and what the update returned."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = Keep(model.parameters(), lr=torch.tensor(1.0))
    done = Updater(model, optimizer, config, World(torch.device("cpu"))).update(batches, step, 0.1)
    assert all(parameter.grad is None for parameter in model.parameters())
    return optimizer.kept, done


def joined(batches: list[Batch]) -> Batch:
    """One batch of all sentences."""
    sides = [
        [ids for batch in batches for ids in sentences_of(getattr(batch, name), getattr(batch, side))]
        for name, side in (("source_N", "source"), ("target_out_N", "target"))
    ]
    return make_batch(np.arange(len(sides[0])), *sides)


def sentences_of(ids_N: Tensor, rows: Rows) -> list[np.ndarray]:
    """The pieces of each sentence, without EOS."""
    ids_LB = unpack(ids_N[:, None], rows).squeeze(2).numpy()
    return [ids_LB[: length - 1, b] for b, length in enumerate(rows.length_B.tolist())]


def fp64_model(model_config: ModelConfig) -> tuple[Seq2Seq, Config]:
    model = Seq2Seq(model_config, 13).double()
    for parameter in (p for name, p in model.named_parameters() if ".gate." in name):
        nn.init.normal_(parameter)
    return model, Config(model=model_config, training=TrainingConfig(clip_norm=0.0, precision="fp32"))


def micro_batches(*bounds: int) -> list[Batch]:
    generator = np.random.default_rng(5)
    lengths = [(3, 4), (1, 2), (5, 1), (2, 7), (6, 6)]
    sides = [[generator.integers(NUM_SPECIAL, 13, size=n) for n in side] for side in zip(*lengths, strict=True)]
    return [make_batch(np.arange(b - a), *(side[a:b] for side in sides)) for a, b in pairwise([0, *bounds, 5])]


BALANCE: dict[str, Any] = {"w_importance": 10.0, "w_load": 7.0, "w_importance_decoder": 3.0}
NO_EXPERTS, FLAT = {"num_experts": 0}, {"num_experts": 6, "k": 2} | BALANCE
GROUPS = {"num_experts": 9, "gating": "hierarchical", "branching": 3, "k": 2} | BALANCE
SOFTMAX, STRICT = FLAT | {"gating": "softmax_top_k"}, FLAT | {"gating": "strictly_balanced"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("moe", [NO_EXPERTS, FLAT, GROUPS, SOFTMAX, STRICT])
def test_accumulation_is_one_larger_batch(
    tiny_config: Configs, moe: dict[str, Any], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Balance losses included: those of the joined batch. Gates draw zeros as noise, which parts cannot share."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    model, config = fp64_model(tiny_config(**moe))
    output = model.train(training)(micro_batches()[0], label_smoothing=0.1)
    total = output.loss / 25
    for layer, gate in output.gates.items():
        w_importance = {"encoder.2": 10.0, "decoder.1": 3.0}[layer]
        total = total + balance_loss(gate.sums, w_importance, 7.0) + gate.own_loss
    whole = torch.autograd.grad(total, list(model.parameters()), allow_unused=True, materialize_grads=True)
    one = gradient_of(model, config, micro_batches())[1]
    # A strictly balanced gate cuts each micro-batch on its own in training.
    for bounds in ((),) if training and moe is STRICT else ((), (2,), (1, 3)):
        parts, several = gradient_of(model, config, micro_batches(*bounds))
        for expected, actual in zip(whole, parts, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(several.nll, one.nll)
        torch.testing.assert_close(several.gradient_norm, one.gradient_norm)
        for layer, sums in one.sums.items():
            for expected, actual in zip(sums.parts(), several.sums[layer].parts(), strict=True):
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("moe", [FLAT, GROUPS, SOFTMAX, STRICT])
def test_both_passes_over_a_micro_batch_draw_the_same(tiny_config: Configs, moe: dict) -> None:
    """The statistics of an update are the sums of the gates that its losses were taken through."""
    model, config = fp64_model(tiny_config(dropout=0.3, **moe))
    seen: list[Gates] = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.gates))
    _, done = gradient_of(model, config, micro_batches(2, 3))
    assert len(seen) == 3
    for layer, sums in done.sums.items():
        expected = seen[0][layer].sums.plus(seen[1][layer].sums).plus(seen[2][layer].sums)
        assert not any(part.requires_grad for part in sums.parts())
        for actual, wanted in zip(sums.parts(), expected.parts(), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)
        assert torch.equal(done.gates[layer].gates_TK, seen[2][layer].gates_TK)


def test_the_own_losses_of_gates_are_a_mean_over_micro_batches(tiny_config: Configs) -> None:
    """Two equal micro-batches of a strictly balanced gate are one of them."""
    model, config = fp64_model(tiny_config(**STRICT))
    (batch,) = micro_batches()
    (once, _), (twice, _) = (gradient_of(model.train(), config, [batch] * count) for count in (1, 2))
    names = [name for name, _ in model.named_parameters()]
    found = 0
    for name, one, two in zip(names, once, twice, strict=True):
        if "threshold" in name:
            torch.testing.assert_close(two, one, rtol=0, atol=1e-12)
            found += bool(one.any())
    assert found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("moe", [NO_EXPERTS, FLAT, GROUPS, SOFTMAX, STRICT])
def test_the_order_of_sentences_in_a_batch_does_not_matter(
    tiny_config: Configs, moe: dict[str, Any], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates, experts and balance losses see the tokens of a batch together, a strictly balanced gate's cut too."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    model, config = fp64_model(tiny_config(**moe))
    model.train(training)
    (batch,) = micro_batches()
    whole, one = gradient_of(model, config, [batch])
    moved, done = gradient_of(model, config, [joined(micro_batches(2)[::-1])])
    for expected, actual in zip(whole, moved, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(done.nll, one.nll)
    for layer, sums in one.sums.items():
        torch.testing.assert_close(done.sums[layer].count_E, sums.count_E)


@pytest.mark.parametrize(("weights", "passes"), [((0.0, 0.0), 0), ((0.1, 0.0), 2), ((0.0, 0.1), 2)])
def test_the_pass_for_joint_sums_is_run_where_it_changes_something(
    tiny_config: Configs, weights: tuple[float, float], passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    importance, load = weights
    model, config = fp64_model(tiny_config(num_experts=6, k=2, w_importance=importance, w_load=load))
    calls: list[int] = []
    gates = Seq2Seq.gates
    monkeypatch.setattr(Seq2Seq, "gates", lambda *given, **named: calls.append(1) or gates(*given, **named))
    # As it is in either case: the sums of all micro-batches, which metrics read.
    _, done = gradient_of(model, config, micro_batches(2))
    assert len(calls) == passes
    assert {layer: sums.count_E.sum().item() for layer, sums in done.sums.items()} == {"encoder.2": 44, "decoder.1": 50}
    calls.clear()
    gradient_of(model, config, micro_batches())
    assert not calls


def test_seeding_leaves_other_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "manual_seed", lambda *_: pytest.fail("it seeds every device"))
    device = torch.device("cpu")
    drawn = []
    for micro_batch in (0, 0, 1):
        seed_device(device, 1, 2, micro_batch)
        drawn.append(torch.rand(3))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_dropout_and_noise_follow_from_seed_step_and_place_alone(tiny_config: Configs) -> None:
    model, config = fp64_model(tiny_config(dropout=0.3, **FLAT))
    seen: list[Gates] = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.gates))
    batches = micro_batches(2) + micro_batches(2)
    first, _ = gradient_of(model, config, batches, step=3)
    assert not torch.equal(seen[0]["encoder.2"].gates_TK, seen[2]["encoder.2"].gates_TK)
    torch.manual_seed(99)
    assert all(map(torch.equal, gradient_of(model, config, batches, step=3)[0], first))
    assert not all(map(torch.equal, gradient_of(model, config, batches, step=4)[0], first))
    config.training.seed += 1
    assert not all(map(torch.equal, gradient_of(model, config, batches, step=3)[0], first))


def clones(model: nn.Module, optimizer: torch.optim.Adam) -> list[Tensor]:
    moments = [value for parameter in model.parameters() for value in optimizer.state[parameter].values()]
    return [tensor.detach().clone() for tensor in [*model.parameters(), *moments]]


def set_gradients(model: nn.Module, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * size


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e6])
def test_clipped_step_is_clipping_then_adam(clip_norm: float) -> None:
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    training = TrainingConfig()
    adam = make_optimizer(ours, training)
    reference = torch.optim.Adam(
        theirs.parameters(), betas=(training.adam_beta1, training.adam_beta2), eps=training.adam_epsilon
    )
    for step, size in enumerate((0.01, 3.0, 100.0, 1e-6)):
        for model in (ours, theirs):
            set_gradients(model, step, size)
        reference.param_groups[0]["lr"] = rate = 0.1 / (step + 1)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm or math.inf)
        reference.step()
        done = clipped_step(adam, clip_norm, rate)
        torch.testing.assert_close(done.gradient_norm, norm)
        assert done.skipped == 0
        for expected, actual in zip(theirs.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("good_steps", [0, 2])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float, clip_norm: float, good_steps: int) -> None:
    model = nn.Linear(5, 3)
    adam = make_optimizer(model, TrainingConfig())
    for step in range(good_steps):
        set_gradients(model, step, 1.0)
        clipped_step(adam, clip_norm, 0.1)
    before = clones(model, adam)
    set_gradients(model, 9, 1.0)
    model.bias.grad[1] = bad
    done = clipped_step(adam, clip_norm, 0.1)
    assert done.skipped == 1
    after = clones(model, adam)
    # Without an earlier step Adam has no moments yet; what it makes now must be zeros.
    before += [torch.zeros_like(tensor) for tensor in after[len(before) :]]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    set_gradients(model, 10, 1.0)
    assert clipped_step(adam, clip_norm, 0.1).skipped == 0
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def break_gradients(monkeypatch: pytest.MonkeyPatch, bad_updates: Callable[[int], bool]) -> None:
    """Put a NaN into the gradient of each update whose number `bad_updates` says yes to."""
    calls = 0

    def broken(optimizer: torch.optim.Adam, *arguments: Any) -> object:
        nonlocal calls
        calls += 1
        if bad_updates(calls):
            optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = math.nan
        return clipped_step(optimizer, *arguments)

    monkeypatch.setattr("nmt.training.update.clipped_step", broken)


def test_one_bad_update_is_skipped_and_counted(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_gradients(monkeypatch, lambda number: number == 2)
    run = train(corpus, "a", 4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_updates"] for line in lines if line["kind"] == "train"] == [0, 1, 0, 0]


def test_nothing_but_bad_updates_ends_with_status_5(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = saved(train(corpus, "a", 2))
    break_gradients(monkeypatch, lambda number: True)
    capfd.readouterr()
    assert main(["train", *settings(corpus, "run.name=a", "training.max_steps=1000")]) == 5
    errors = capfd.readouterr().err
    assert errors.splitlines()[-1].startswith("nmt: no finite gradient")
    assert "Traceback" not in errors
    assert saved(corpus / "a")["model"] == before["model"]


# ------------------------------------------------------------------------------------------------------ rates


def test_inverse_sqrt_rises_holds_and_decays() -> None:
    training = TrainingConfig(learning_rate=0.8, schedule="inverse_sqrt", warmup_steps=4, hold_steps=6, max_steps=99)
    rates = [learning_rate(training, step) for step in range(1, 41)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:10] == pytest.approx([0.8] * 6)
    assert rates[10:] == pytest.approx([0.8 * math.sqrt(10 / step) for step in range(11, 41)])
    assert rates[39] == pytest.approx(0.4)


def test_linear_falls_to_zero_just_after_the_last_step() -> None:
    training = TrainingConfig(learning_rate=0.8, schedule="linear", warmup_steps=4, max_steps=11)
    rates = [learning_rate(training, step) for step in range(1, 13)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    assert learning_rate(training, 500) == 0.0


def test_wsd_rises_holds_and_falls_to_zero_just_after_the_last_step() -> None:
    training = TrainingConfig(learning_rate=0.8, schedule="wsd", warmup_steps=4, max_steps=20, decay_share=0.2)
    rates = [learning_rate(training, step) for step in range(1, 22)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, *[0.8] * 14, 0.6, 0.4, 0.2, 0.0])
    assert learning_rate(training, 500) == 0.0
    # A decay that begins within the warm-up bounds it.
    throughout = replace(training, decay_share=1.0, warmup_steps=16)
    assert [learning_rate(throughout, step) for step in (4, 10, 16, 20)] == pytest.approx([0.2, 0.44, 0.2, 0.04])


@pytest.mark.parametrize("share", [0.0, 1.01, math.nan])
def test_a_share_of_decay_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"training\.decay_share="):
        TrainingConfig(decay_share=share)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("warmup", "hold"), [(0, 0), (0, 5), (5, 0), (300, 50), (1000, 0), (5000, 9)])
def test_rates_are_positive_bounded_and_without_a_jump(schedule: str, warmup: int, hold: int) -> None:
    training = TrainingConfig(
        learning_rate=1.0, schedule=schedule, warmup_steps=warmup, hold_steps=hold, max_steps=1000
    )
    rates = [learning_rate(training, step) for step in range(1, 1001)]
    assert all(0 < rate <= 1 for rate in rates)
    # The steepest places: the warm-up, the first steps of the square root, the whole fall of `linear`, that of `wsd`.
    steepest = max(1 / warmup if warmup else 0.0, 1 / (1001 - warmup) if warmup <= 1000 else 0.0)
    if schedule == "wsd":
        steepest = max(steepest, 1 / (training.decay_share * 1000))
    for step in range(1, 1000):
        allowed = max(steepest, 1 - math.sqrt(step / (step + 1)))
        assert abs(rates[step] - rates[step - 1]) <= allowed + 1e-12


def test_compose_config_reads_the_same_settings(tmp_path: Path) -> None:
    assert compose_config(settings(tmp_path, "training.max_steps=7")).training.max_steps == 7
