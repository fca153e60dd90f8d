"""metrics.jsonl is a contract: what training writes is what nmt cost, the studies and the plots read."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from nmt.errors import CheckpointError
from nmt.metrics.record import DevLine, TrainLine, read_lines, step_of
from tests.scripts import load_script

TRAIN = TrainLine(7, 3.0, 2.5, 12.2, 1.5, 0.0, 1e-3, 5000.0, 8.0, 4, 12.5, {"encoder.1": {"cv_load": 0.5}})
DEV = DevLine(7, 9.0, 30.0, 12.5)


def write(path: Path, *lines: Any, end: str = "\n") -> Path:
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines) + end)
    return path


def test_lines_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", TRAIN.to_dict(), DEV.to_dict())
    assert read_lines(path, TrainLine) == [TRAIN]
    assert read_lines(path, DevLine) == [DEV]
    flat = json.loads(path.read_text().splitlines()[0])
    assert (flat["kind"], flat["processes"], flat["encoder.1.cv_load"]) == ("train", 4, 0.5)
    assert TRAIN.tflops_per_process == 2.0
    assert read_lines(tmp_path / "none", TrainLine) == []


def test_the_lines_that_a_trainer_wrote_are_read(run: Path) -> None:
    training = read_lines(run / "metrics.jsonl", TrainLine)
    assert [line.step for line in training] == list(range(1, 9))
    assert {line.processes for line in training} == {1}
    assert {line.gpu_memory_gb for line in training} == {None}
    assert set(training[0].gates) == {"encoder.1", "decoder.1"}
    assert training[0].gates["encoder.1"]["noise_std"] == pytest.approx(math.log(2) + 0.01)
    dev = read_lines(run / "metrics.jsonl", DevLine)
    assert [line.step for line in dev] == [2, 4, 6, 8]
    assert all(line.bleu is not None and line.word_perplexity > line.perplexity for line in dev)
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [each.to_dict() for each in training] == [line for line in written if line["kind"] == "train"]


def test_a_line_of_another_version_is_read(tmp_path: Path) -> None:
    older = TRAIN.to_dict()
    del older["processes"]
    newer = TRAIN.to_dict() | {"energy": "a word", "encoder.1.colour": "blue"}
    first, second = read_lines(write(tmp_path / "m", older, newer), TrainLine)
    assert (first.processes, second) == (1, TRAIN)


FIRST_FORM = """\
{"step": 50, "kind": "train", "loss": 7.25, "nll": 7.0, "gradient_norm": 1.5, "skipped_updates": 0.0, \
"encoder.1.cv_importance": 0.25, "encoder.1.cv_load": 0.5, "encoder.1.max_over_mean_load": 1.125, \
"encoder.1.gate_entropy": 0.625, "encoder.1.idle_experts": 0.0, "perplexity": 1096.5, "learning_rate": 0.001, \
"tokens_per_second": 2000.0, "tflops": 0.0625}
{"step": 50, "kind": "dev", "perplexity": 900.5, "word_perplexity": 4000.0}
"""
"""What the first version wrote: one process, no BLEU, no memory, fewer figures of gates, in another order."""


def test_a_file_in_the_first_form_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", FIRST_FORM, end="")
    [line] = read_lines(path, TrainLine)
    assert (line.step, line.loss, line.perplexity, line.tflops) == (50, 7.25, 1096.5, 0.0625)
    assert (line.processes, line.gpu_memory_gb) == (1, None)
    assert line.gates["encoder.1"]["max_over_mean_load"] == 1.125
    assert len(line.gates["encoder.1"]) == 5
    assert read_lines(path, DevLine) == [DevLine(50, 900.5, 4000.0)]


@pytest.mark.parametrize("cut", ['{"step": 8, "kind": "tr', ""])
def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path, cut: str) -> None:
    assert read_lines(write(tmp_path / "m", TRAIN.to_dict(), cut, end=""), TrainLine) == [TRAIN]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"processes": 0}, "processes is 0"),
        ({"processes": None}, "processes is None"),
        ({"tflops": "fast"}, "tflops is 'fast'"),
        ({"loss": True}, "loss is True"),
        ("[1, 2]", "it is no object"),
        ("[" * 100_000, "recursion"),
        ("nothing", "Expecting value"),
    ],
)
def test_a_line_of_the_wrong_shape_is_named(tmp_path: Path, change: Any, says: str) -> None:
    bad = TRAIN.to_dict() | change if isinstance(change, dict) else change
    path = write(tmp_path / "m", TRAIN.to_dict(), bad)
    with pytest.raises(CheckpointError, match="line 2, is not what training writes") as caught:
        read_lines(path, TrainLine)
    assert says in str(caught.value)


def test_a_figure_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it has no loss"):
        read_lines(write(tmp_path / "m", {"step": 1, "kind": "train"}), TrainLine)


@pytest.mark.parametrize(
    ("text", "step"),
    [('{"step": 3}', 3), ('{"step": "3"}', math.inf), ('{"ste', math.inf), ("[" * 100_000, math.inf), ("3", math.inf)],
)
def test_the_step_of_a_line(text: str, step: float) -> None:
    assert step_of(text) == step


def test_the_studies_read_what_a_trainer_wrote(tmp_path: Path, run: Path) -> None:
    studies = load_script("scripts/results/studies.py")
    shutil.copy(run / "metrics.jsonl", tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "test.json").write_text('{"scores": {"BLEU": {"score": 12.5}}}')
    row = studies.figures(tmp_path)
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in written if line["kind"] == "train"]
    assert row["encoder cv_load"] == pytest.approx(sum(line["encoder.1.cv_load"] for line in training[-4:]) / 4)
    assert row["dev perplexity"] == written[-1]["perplexity"]
    assert row["BLEU"] == 12.5
