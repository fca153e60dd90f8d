"""What training says of its time, its end and its memory: speeds, max_minutes, forecasts, shortage."""

import errno
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nmt.training.validation
from nmt.checkpoint import list_checkpoints
from nmt.cli import main
from nmt.commands.memory import check_memory
from nmt.compose import compose_config
from nmt.config import SCHEDULES, TrainingConfig
from nmt.device import memory_bytes, shortage_told
from nmt.errors import MemoryLimitError
from nmt.metrics.forecast import first_forecast, seconds_left
from nmt.metrics.record import TrainLine, read_lines
from nmt.parallel.mesh import World
from nmt.training import clock
from nmt.training.ending import ending
from nmt.training.interval import Interval
from nmt.training.optim import learning_rate
from nmt.training.progress import Progress
from nmt.training.reports import Reports
from nmt.training.stopping import StopRequest
from nmt.training.trainer import Trainer
from nmt.wording import duration
from tests.toy import saved, settings, train

CPU = torch.device("cpu")
UPDATE, VALIDATION = 2.0, 300.0


class FakeTime:
    """Time that passes where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def passes(self, owner: Any, name: str, seconds: float, patch: pytest.MonkeyPatch) -> None:
        """Let every call of owner.name take so long."""
        original: Callable[..., Any] = getattr(owner, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            self.now += seconds
            return original(*arguments, **keywords)

        patch.setattr(owner, name, call)


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    """Updates take 2 s, validations 300 s, nothing else takes any time."""
    fake = FakeTime()
    monkeypatch.setattr(clock, "time", fake)
    fake.passes(Trainer, "_update", UPDATE, monkeypatch)
    fake.passes(Trainer, "_validate", VALIDATION, monkeypatch)
    return fake


def lines(run: Path) -> list[TrainLine]:
    return read_lines(run / "metrics.jsonl", TrainLine)


# -------------------------------------------------------------------------------------------------------- speeds


def test_a_validation_inside_an_interval_does_not_change_the_speed(
    corpus: Path,
    fake_time: FakeTime,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Neither its time nor the updates before it are lost."""
    tokens: list[int] = []
    count = Interval.count

    def counted(interval: Interval, source: int, target: int, flops: float) -> None:
        tokens.append(source + target)
        count(interval, source, target, flops)

    monkeypatch.setattr(Interval, "count", counted)
    changes = ("training.log_every=4", "training.validate_every=3")
    run = train(corpus, "a", 12, *changes, "training.validation_sentences=0")
    expected = [sum(tokens[first : first + 4]) / (4 * UPDATE) for first in (0, 4, 8)]
    assert [line.tokens_per_second for line in lines(run)] == pytest.approx(expected)
    # The time left is that of the updates and of the validations to come.
    left = re.findall(r"tokens/s, (.*) left", capfd.readouterr().err)
    assert left == [duration(8 * UPDATE + 3 * VALIDATION), duration(4 * UPDATE + 2 * VALIDATION), duration(0)]


# --------------------------------------------------------------------------------------------------- max_minutes

# Validations take no time of their own here: 15 updates of 2 s are half a minute.
HALF_A_MINUTE = ("training.schedule=linear", "training.max_minutes=0.5", "training.validate_every=1000")


@pytest.fixture
def steady_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    """Updates take 2 s, nothing else takes any time."""
    fake = FakeTime()
    monkeypatch.setattr(clock, "time", fake)
    fake.passes(Trainer, "_update", UPDATE, monkeypatch)
    return fake


def test_max_minutes_end_training_with_a_rate_that_fell_to_nothing(
    corpus: Path,
    steady_time: FakeTime,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = train(corpus, "a", 1000, *HALF_A_MINUTE, "training.learning_rate=0.3")
    logged = lines(run)
    assert [line.step for line in logged] == list(range(1, 16))
    # Two updates of warm-up; then the rate is what the time left is of the whole.
    expected = [0.15, *(0.3 * (1 - UPDATE * done / 30) for done in range(1, 15))]
    assert [line.learning_rate for line in logged] == pytest.approx(expected)
    assert logged[-1].learning_rate == pytest.approx(0.3 / 15)
    assert [each.step for each in list_checkpoints(run / "checkpoints")] == [15]
    assert "training.max_minutes=0.5 is used up: stopped at step 15" in capfd.readouterr().err
    # The last update was validated; and there is nothing more to do.
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["kind"] == "dev"
    before = saved(run)
    assert saved(train(corpus, "a", 1000, *HALF_A_MINUTE, "training.learning_rate=0.3")) == before
    err = capfd.readouterr().err
    assert "training.max_minutes=0.5 is used up, at " in err
    assert f"; train longer: nmt train {run} training.max_minutes=1\n" in err
    assert "stopped at" not in err
    assert "curves in" not in err


@pytest.mark.parametrize(
    ("changes", "progress", "reason", "longer"),
    [
        ({}, (499, 1e6, 9), None, None),
        ({}, (500, 0.0, 0), "training.max_steps=500 is reached", "training.max_steps=1000"),
        ({"patience": 3}, (10, 0.0, 2), None, None),
        ({"patience": 3}, (10, 0.0, 3), "none of the last 3 validations was better", "training.patience=6"),
        ({"max_minutes": 30.0}, (10, 1799.0, 0), None, None),
        ({"max_minutes": 10.0}, (10, 1790.0, 0), "training.max_minutes=10 is used up", "training.max_minutes=60"),
        ({"max_minutes": 30.0}, (10, 1800.0, 0), "training.max_minutes=30 is used up", "training.max_minutes=60"),
    ],
)
def test_an_end_names_the_setting_that_trains_longer(
    changes: dict[str, Any], progress: tuple[int, float, int], reason: str | None, longer: str | None
) -> None:
    training = TrainingConfig(max_steps=500, **changes)
    found = ending(training, *progress)
    if found is None:
        assert reason is None
        return
    assert reason is not None
    assert found.reason.startswith(reason)
    assert found.longer == longer
    key, _, value = found.longer.removeprefix("training.").partition("=")
    assert ending(replace(training, **{key: type(getattr(training, key))(value)}), *progress) is None


@pytest.mark.slow
def test_the_minutes_of_all_sittings_count(
    corpus: Path, steady_time: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in between, a run ends at the same update with the same bits, whatever time passed outside."""
    whole = train(corpus, "whole", 1000, *HALF_A_MINUTE)
    for stop in (4, 11):
        with monkeypatch.context() as patch:
            update = Trainer._update

            def told(trainer: Trainer, *arguments: Any, stop: int = stop, update: Any = update) -> None:
                update(trainer, *arguments)
                trainer.asked.signal = 15 if trainer.progress.step == stop else 0

            patch.setattr(Trainer, "_update", told)
            with pytest.raises(SystemExit):
                main(["train", *settings(corpus, "run.name=parts", "training.max_steps=1000", *HALF_A_MINUTE)])
        steady_time.now += 1e6
    parts = train(corpus, "parts", 1000, *HALF_A_MINUTE)
    assert saved(parts) == saved(whole)
    assert [line.learning_rate for line in lines(parts)] == [line.learning_rate for line in lines(whole)]


def test_the_main_process_s_time_is_everyone_s() -> None:
    """Whatever another process's clock says, its rates are the main one's, to the bit."""

    class Other(World):
        def __init__(self) -> None:
            super().__init__(CPU)
            self.rank, self.size = 1, 2

        def max(self, tensor: torch.Tensor) -> torch.Tensor:
            assert tensor.tolist() == [0, 0]
            return torch.tensor([15, 12_345_678])

    trainer = SimpleNamespace(world=Other(), asked=StopRequest(), clock=None, progress=SimpleNamespace(seconds=0.0))
    assert Trainer._meet(trainer) == 15
    assert trainer.progress.seconds == 12.345678


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_after_a_change_of_the_network_the_rate_is_warmed_up_once_more(schedule: str) -> None:
    training = TrainingConfig(schedule=schedule, learning_rate=1.0, warmup_steps=10, max_steps=100, hold_steps=5)
    for step in range(41, 101):
        rate = learning_rate(training, step)
        assert learning_rate(training, step, warm_from=40) == pytest.approx(rate * min(1.0, (step - 40) / 10))
    at_once = replace(training, warmup_steps=0)
    assert learning_rate(at_once, 41, warm_from=40) == learning_rate(at_once, 41) > 0.0
    assert Progress(step=44, warm_from=40).rate(training, 45) == learning_rate(training, 45, warm_from=40)


@pytest.mark.parametrize("warmup", [0, 10])
def test_with_both_limits_the_nearer_one_rules(warmup: int) -> None:
    training = TrainingConfig(
        schedule="linear", learning_rate=1.0, warmup_steps=warmup, max_steps=100, max_minutes=10.0
    )
    for step in range(1, 101):
        by_steps = learning_rate(TrainingConfig(**vars(training) | {"max_minutes": 0.0}), step)
        for seconds in (0.0, 60.0, 300.0, 599.0, 600.0, 900.0):
            assert learning_rate(training, step, seconds) == min(by_steps, max(1.0 - seconds / 600.0, 0.0))
    assert learning_rate(training, 50, 600.0) == 0.0
    late = replace(training, schedule="wsd", decay_share=0.2)
    for step in range(1, 101):
        by_steps = learning_rate(replace(late, max_minutes=0.0), step)
        for seconds, by_time in ((0.0, 1.0), (480.0, 1.0), (510.0, 0.75), (540.0, 0.5), (600.0, 0.0), (900.0, 0.0)):
            assert learning_rate(late, step, seconds) == pytest.approx(min(by_steps, by_time))
    constant = TrainingConfig(schedule="inverse_sqrt", max_minutes=10.0)
    assert learning_rate(constant, 5000, 599.0) == constant.learning_rate


@pytest.mark.parametrize("minutes", [-1.0, math.nan, math.inf])
def test_minutes_that_are_none_are_refused(minutes: float) -> None:
    with pytest.raises(ValueError, match=r"training\.max_minutes=.* must be a number of at least 0"):
        TrainingConfig(max_minutes=minutes)


# ------------------------------------------------------------------------------------------------ a moved end


LINEAR = ("training.schedule=linear", "training.learning_rate=0.01")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear", "wsd"])
def test_a_later_end_says_how_the_learning_rate_jumps(
    corpus: Path, capfd: pytest.CaptureFixture[str], schedule: str
) -> None:
    changes = (*LINEAR, f"training.schedule={schedule}")
    train(corpus, "a", 4, *changes)
    capfd.readouterr()
    run = train(corpus, "a", 9, *changes)
    [warning] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: the learning rate")]
    rate = lines(run)[4].learning_rate
    assert f"of step 5 is {rate:.3g}, not 0 as planned" in warning
    assert f"training.schedule={schedule} now ends at training.max_steps=9" in warning


def test_an_end_that_moves_before_the_decay_begins_says_nothing(
    corpus: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (*LINEAR, "training.schedule=wsd", "run.name=a", "training.validate_every=99")
    monkeypatch.setattr(Trainer, "_meet", lambda trainer: 15 if trainer.progress.step == 3 else 0)
    with pytest.raises(SystemExit):
        main(["train", *settings(corpus, *changes, "training.max_steps=50")])
    monkeypatch.undo()
    assert main(["train", *settings(corpus, *changes, "training.max_steps=10")]) == 0
    assert "warning" not in capfd.readouterr().err
    assert lines(corpus / "a")[-1].learning_rate == pytest.approx(0.005)  # the first of two steps of decay left


@pytest.mark.slow
@pytest.mark.parametrize("changes", [("training.schedule=inverse_sqrt",), (*LINEAR, "training.max_minutes=100")])
def test_an_end_that_moves_nothing_says_nothing(
    corpus: Path,
    changes: tuple[str, ...],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another end under inverse_sqrt; the same end, after a stop, under linear."""
    stop = {"training.max_steps": 4}
    if "linear" in changes[0]:
        monkeypatch.setattr(Trainer, "_meet", lambda trainer: 15 if trainer.progress.step == 3 else 0)
        with pytest.raises(SystemExit):
            main(["train", *settings(corpus, "run.name=a", "training.max_steps=6", *changes)])
        monkeypatch.undo()
    else:
        train(corpus, "a", stop["training.max_steps"], *changes)
    train(corpus, "a", 6, *changes)
    assert "warning" not in capfd.readouterr().err


# --------------------------------------------------------------------------------------------------- forecasts


def test_after_ten_updates_the_whole_is_told(
    corpus: Path,
    fake_time: FakeTime,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    fake_time.passes(Reports, "introduce", 1e5, monkeypatch)
    train(corpus, "a", 15, "training.validate_every=4", "training.validation_sentences=0")
    told = [line for line in capfd.readouterr().err.splitlines() if " steps left: " in line]
    assert told == ["step 11: 2 s per step, 4 steps left: about 8.0 seconds, without validations"]


def test_where_updates_are_slow_the_second_one_tells(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake = FakeTime()
    monkeypatch.setattr(clock, "time", fake)
    fake.passes(Trainer, "_update", 41.0, monkeypatch)
    train(corpus, "a", 4, "training.validate_every=100")
    told = [line for line in capfd.readouterr().err.splitlines() if " steps left: " in line]
    assert told == ["step 2: 41 s per step, 2 steps left: about 82.0 seconds, without validations"]


def test_a_forecast_names_what_is_shorter_where_it_is_long() -> None:
    training = TrainingConfig(max_steps=20_011)
    long = first_forecast(training, 11, 400.0, 41.0, on_cpu=True)
    assert long.startswith("41 s per step, 20,000 steps left: about 9.5 days")
    assert "training.max_minutes=30" in long
    assert "experiment=own_small" in long
    compose_config(["experiment=own_small", "model=small"])  # what it names is there
    assert "shorten" not in first_forecast(training, 11, 400.0, 41.0, on_cpu=False)
    assert "shorten" not in first_forecast(training, 11, 400.0, 0.1, on_cpu=True)
    bounded = first_forecast(TrainingConfig(max_steps=20_011, max_minutes=30.0), 11, 400.0, 41.0, on_cpu=True)
    assert bounded == (
        "41 s per step, training.max_minutes=30 leaves time for about 34 of the 20,000 steps left to "
        "training.max_steps=20011: fewer than training.warmup_steps=2000, so the model will hardly learn"
    )
    enough = TrainingConfig(max_steps=20_011, max_minutes=30.0, warmup_steps=40)
    assert "hardly learn" not in first_forecast(enough, 11, 400.0, 41.0, on_cpu=True)


def test_time_left_ends_with_whatever_comes_first() -> None:
    training = TrainingConfig(max_steps=100, validate_every=30)
    # After 60 updates: validations at 90 and 100.
    assert seconds_left(training, 60, 1e9, 2.0, 5.0) == 40 * 2.0 + 2 * 5.0
    training.max_minutes = 1.0
    assert seconds_left(training, 60, 20.0, 2.0, 5.0) == 40.0
    assert seconds_left(training, 60, 70.0, 2.0, 5.0) == 0.0
    assert seconds_left(training, 100, 20.0, 2.0, 5.0) == 0.0


# ------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), r"\(2\.50 GiB more were"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 209062930756 bytes."),
            "209 GB",
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 5 bytes."), "5e-09 GB"),
        (MemoryError(), r"in here: buy some"),
    ],
    ids=["gpu", "host", "windows", "python"],
)
def test_a_shortage_of_memory_is_one_line(error: Exception, says: str) -> None:
    with pytest.raises(MemoryLimitError, match=says) as caught, shortage_told(lambda: "here", "buy some"):
        raise error
    assert caught.value.status == 6
    assert "\n" not in str(caught.value)


def test_what_pytorch_really_says_is_understood_and_other_errors_pass() -> None:
    with pytest.raises(MemoryLimitError, match="out of memory in here"), shortage_told(lambda: "here", ""):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shapes"), shortage_told(lambda: "here", ""):
        torch.ones(2, 3) @ torch.ones(2, 3)


def no_memory(*_: Any, **__: Any) -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def test_an_update_without_memory_names_its_step_and_what_to_lower(
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    update = Trainer._update

    def fails(trainer: Trainer, *arguments: Any) -> None:
        update(trainer, *arguments)
        if trainer.progress.step == 3:
            no_memory()

    monkeypatch.setattr(Trainer, "_update", fails)
    assert main(["train", *settings(corpus, "run.name=a", "training.checkpoint_every=2")]) == 6
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("nmt: out of memory in step 3 (")
    assert "training.batch_tokens" in line
    assert list_checkpoints(corpus / "a" / "checkpoints")[-1].step == 2
    status = json.loads((corpus / "a" / "RUN_STATUS.json").read_text())
    assert (status["state"], status["code"], status["step"]) == ("failed", 6, 2)


def no_space(*_: Any, **_named: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
@pytest.mark.parametrize("failure", [no_memory, no_space])
def test_a_validation_that_fails_loses_no_update(
    corpus: Path,
    failure: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What was trained before it is saved, so the same command gets past it."""
    with monkeypatch.context() as patch:
        patch.setattr(nmt.training.validation, "perplexity", failure)
        assert main(["train", *settings(corpus, "run.name=a", "training.max_steps=6")]) == 6
    assert "Traceback" not in capfd.readouterr().err
    [checkpoint] = list_checkpoints(corpus / "a" / "checkpoints")
    assert (checkpoint.step, checkpoint.score) == (4, None)
    assert saved(train(corpus, "a", 6)) == saved(train(corpus, "b", 6))


def test_a_network_that_cannot_fit_is_refused_before_it_is_made() -> None:
    corpus_counts = {"vocabulary_size": 32000, "pairs_kept": 10, "source_pieces": 200, "target_pieces": 200}
    config = compose_config(["experiment=wmt14_en_de_moe_32"])
    config.model.moe.num_experts = 100_000
    with pytest.raises(MemoryLimitError, match=r"take [\d.e+]+ GB, and this machine has [\d.]+ GB") as caught:
        check_memory(config, corpus_counts, World(CPU))
    assert caught.value.status == 6
    config = compose_config(["experiment=demo"])
    assert check_memory(config, corpus_counts, World(CPU)) is None
    config.training.batch_tokens = 10**9
    warning = check_memory(config, corpus_counts, World(CPU))
    assert warning is not None
    assert "training.batch_tokens (now 1,000,000,000)" in warning


def test_processes_of_one_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus_counts = {"vocabulary_size": 1000, "pairs_kept": 10, "source_pieces": 200, "target_pieces": 200}
    config = compose_config(["experiment=demo"])
    monkeypatch.setattr("nmt.commands.memory.memory_bytes", lambda _: 300_000_000)
    assert check_memory(config, corpus_counts, World(CPU)) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert check_memory(config, corpus_counts, World(CPU)) is not None


def test_a_control_group_limits_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory_bytes(CPU)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("nmt.device._GROUP_LIMITS", (limit, tmp_path / "none"))
    for text, expected in (("max\n", whole), ("1048576\n", 1048576), (f"{1 << 62}\n", whole)):
        limit.write_text(text)
        assert memory_bytes(CPU) <= expected
    limit.write_text("1048576\n")
    assert memory_bytes(CPU) == 1048576
