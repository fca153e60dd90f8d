"""Runs of several processes: going on changes no bit, and any number of processes goes on with a checkpoint of any."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch

from nmt.checkpoint import list_checkpoints
from nmt.cli import main
from nmt.errors import ProcessError
from nmt.metrics.record import TrainLine, read_lines
from nmt.parallel.mesh import World
from nmt.training.trainer import Trainer
from tests.processes import run_ranks
from tests.toy import saved, train, write_corpus

# test_parallel.py compares outputs, gradients and a step of two processes with those of one, within seconds.
pytestmark = pytest.mark.slow
STEPS = 10
# Four micro-batches an update, so that two processes accumulate; noise and dropout of all kinds that belong to
# micro-batches; more than an epoch; validations.
HARD = (
    "training.micro_batches=4",
    "training.batch_tokens=400",
    "training.validation_sentences=2",
    "training.patience=9",
    "model.word_dropout=0.1",
    "model.moe.output_masking=0.1",
    "training.r_drop=1",
)
HALF = 5
# Ended by the clock, after a few updates or dozens.
TIMED = ("training.schedule=linear", "training.max_minutes=0.01", "training.max_steps=1000000")
TIMED += ("training.validate_every=1000000", "training.validation_sentences=0")
FACTORED = ("training.expert_optimizer=factored",)
# The units of an expert are drawn by the process that has it.
EXPERT_DROPOUT = ("model.moe.expert_dropout=0.2",)


class Job(NamedTuple):
    """One `nmt train`: told to stop after update `stop`, as by SIGTERM, or let go on to the end.

    `drift`: the parameter whose last bit changes in the last process before update 3.
    """

    name: str
    stop: int | None = None
    changes: tuple[str, ...] = ()
    drift: str | None = None


@contextmanager
def _disturbed(job: Job) -> Iterator[None]:
    before: Callable[..., Any] = Trainer._update

    def update(trainer: Trainer, *arguments: Any) -> None:
        last = trainer.world.rank == trainer.world.size - 1
        if last and job.drift and trainer.progress.step == 2:
            trainer.model.get_parameter(job.drift).detach().view(torch.int32).flatten()[3] ^= 1
        before(trainer, *arguments)
        # One process is told; all must stop.
        if last and trainer.progress.step == job.stop:
            trainer.asked.signal = signal.SIGTERM

    Trainer._update = update
    try:
        yield
    finally:
        Trainer._update = before


def work(folder: Path, jobs: list[Job]) -> None:
    """These trainings, one after the other, by the processes there are."""
    # They stay connected from one to the next.
    World.stop = lambda self: None
    for job in jobs:
        status = 0
        with _disturbed(job):
            try:
                train(folder, job.name, STEPS, *HARD, *job.changes)
            except SystemExit as stopped:
                status = int(str(stopped.code))
            except ProcessError as error:
                status = error.status
        expected = ProcessError.status if job.drift else 0 if job.stop is None else 128 + signal.SIGTERM
        assert status == expected, (job, os.environ.get("RANK"))


def state(run: Path) -> dict[str, Any]:
    """Position in the data, counters of early stopping, best score."""
    return list_checkpoints(run / "checkpoints")[-1].state()


def _timeless(state: dict[str, Any]) -> dict[str, Any]:
    """Without how long it took."""
    return state | {"progress": state["progress"] | {"seconds": 0.0}}


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def assert_goes_on_alike(run: Path, whole: Path) -> None:
    """By another number of processes: the same order of sentences, and the losses up to rounding."""
    assert len(losses(whole)) == STEPS
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    assert state(run)["data"] == state(whole)["data"]
    for counter in ("step", "target_tokens", "validations_since_best"):
        assert state(run)["progress"][counter] == state(whole)["progress"][counter]
    assert state(run)["progress"]["best_score"] == pytest.approx(state(whole)["progress"]["best_score"], rel=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process did, then two processes, then one again."""
    folder = tmp_path_factory.mktemp("world")
    write_corpus(folder)
    by_one = [Job("one"), Job("one-two", HALF)]
    by_one += [Job("factored", None, FACTORED), Job("factored-one-two-one", 3, FACTORED)]
    work(folder, by_one)
    by_two = [Job("two")]
    by_two += [Job("two-stopped", last) for last in (7, None)]
    by_two += [Job("units", None, EXPERT_DROPOUT)]
    by_two += [Job("units-stopped", last, EXPERT_DROPOUT) for last in (3, None)]
    by_two += [Job("one-two"), Job("two-one", HALF)]
    by_two += [Job("dense-drift", drift="decoder.bottom.lstm.weight_hh_l0")]
    replicas = ("parallel.expert_group_size=1",)
    by_two += [Job("expert-drift", None, replicas, drift="encoder.moe_layers.moe.1.experts.weights.1")]
    by_two += [Job("regrouped", HALF), Job("regrouped", None, ("parallel.expert_group_size=1",))]
    by_two += [Job("factored-one-two-one", 6, FACTORED), Job("timed", None, TIMED)]
    run_ranks(2, folder / "ranks", work, folder, by_two)
    work(folder, [Job("two-one"), Job("factored-one-two-one", None, FACTORED)])
    return folder


def test_runs_cross_the_end_of_an_epoch_and_validate(folder: Path) -> None:
    assert state(folder / "two")["data"]["epoch"] >= 1
    assert 4 in [each.step for each in list_checkpoints(folder / "two" / "checkpoints")]


def test_two_processes_go_on_without_changing_a_bit(folder: Path) -> None:
    run = folder / "two-stopped"
    assert saved(run) == saved(folder / "two")
    assert _timeless(state(run)) == _timeless(state(folder / "two"))
    assert losses(run) == losses(folder / "two")


def test_units_that_two_processes_drop_are_the_same_after_going_on(folder: Path) -> None:
    assert saved(folder / "units-stopped") == saved(folder / "units")
    assert saved(folder / "units")["model"] != saved(folder / "two")["model"]


@pytest.mark.parametrize("run", ["two", "one-two", "two-one", "regrouped"])
def test_the_number_of_processes_may_change(folder: Path, run: str) -> None:
    assert_goes_on_alike(folder / run, folder / "one")


def test_the_number_of_processes_may_change_with_a_factored_moment(folder: Path) -> None:
    assert_goes_on_alike(folder / "factored-one-two-one", folder / "factored")


def test_two_processes_end_together_by_the_main_one_s_clock(folder: Path) -> None:
    """Their parameters, which every line of metrics compares, would differ if their rates did."""
    lines = read_lines(folder / "timed" / "metrics.jsonl", TrainLine)
    rates = [line.learning_rate for line in lines[2:]]
    assert all(after < before for before, after in pairwise(rates))
    seconds = state(folder / "timed")["progress"]["seconds"]
    assert seconds >= 0.01 * 60
    assert [each.step for each in list_checkpoints(folder / "timed" / "checkpoints")] == [lines[-1].step]


def test_cost_of_a_run_is_that_of_each_of_its_processes(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = read_lines(folder / "two" / "metrics.jsonl", TrainLine)
    assert {line.processes for line in lines} == {2}
    capfd.readouterr()
    assert main(["cost", str(folder / "two"), "--json"]) == 0
    reached = json.loads(capfd.readouterr().out)["tflops_per_gpu"]
    assert reached == pytest.approx(median(line.tflops for line in lines) / 2)


@pytest.mark.parametrize("run", ["dense-drift", "expert-drift"])
def test_one_bit_that_differs_between_processes_stops_training(folder: Path, run: str) -> None:
    """Said by all of them (see `work`), at the next line of metrics, which is update 3's."""
    assert list_checkpoints(folder / run / "checkpoints") == []
    assert losses(folder / run) == pytest.approx(losses(folder / "two")[:2], rel=1e-5)
    status = json.loads((folder / run / "RUN_STATUS.json").read_text())
    assert (status["state"], status["code"]) == ("failed", ProcessError.status)
    assert "step 3: the 2 processes no longer have the same parameters" in status["message"]


def test_four_processes_and_other_groups(corpus: Path) -> None:
    work(corpus, [Job("one")])
    pairs = ("parallel.expert_group_size=2",)
    run_ranks(
        4,
        corpus / "four",
        work,
        corpus,
        [Job("four"), Job("four-twice", 3), Job("four-twice"), Job("pairs", 3, pairs), Job("pairs"), Job("less", HALF)],
    )
    assert saved(corpus / "four-twice") == saved(corpus / "four")
    run_ranks(2, corpus / "two", work, corpus, [Job("less", 7)])
    work(corpus, [Job("less")])
    for run in ("four", "pairs", "less"):
        assert_goes_on_alike(corpus / run, corpus / "one")
