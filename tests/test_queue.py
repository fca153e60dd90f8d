"""scripts/results/run_queue.py: what the queue has can run, and a run leaves a record, at once or in two pieces."""

import dataclasses
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from nmt.cli import main
from nmt.compose import compose_config
from nmt.errors import UserError
from tests.scripts import load_script

ROOT = Path(__file__).parents[1]


script = load_script("scripts/results/run_queue.py")
significance = load_script("scripts/results/significance.py")

TINY = """
corpus.max_pairs=400 corpus.subwords.vocab_size=600 model.hidden_size=16 model.cell_size=16 model.attention.size=16
model.moe.hidden_sizes=[16] training.batch_tokens=200 training.log_every=1 training.validate_every=2
training.validation_sentences=0 training.max_steps=4 training.device=cpu
"""
STUDY = {
    "question": "Does it run?",
    "settings": ["experiment=demo", *TINY.split()],
    "variants": {"few": ["model.moe.num_experts=2"], "many": ["model.moe.num_experts=4"]},
    "changes": [
        {"name": "base", "change": "none", "purpose": "a start", "variants": {"few": [], "many": ["model.moe.k=3"]}},
        {"name": "new", "change": "another", "purpose": "more", "needs": "code"},
    ],
}


def write_queue(folder: Path, study: dict[str, Any] = STUDY) -> Path:
    path = folder / "queue.yaml"
    path.write_text(yaml.safe_dump({"tiny": study}))
    return path


def site(folder: Path) -> Any:
    return script.Site(folder / "runs", folder / "records", "abc1234", "a machine", 1, [f"corpus.directory={folder}"])


@pytest.mark.slow
def test_every_run_of_the_queue_can_be_composed_and_no_record_is_of_other_settings():
    entries = script.read_queue()
    assert entries
    here = script.Site(Path("nowhere"), script.RECORDS, "", "", 1)
    for entry in entries:
        assert here.state(entry)
        if not entry.needs:
            compose_config(entry.settings)


def test_no_record_has_overridden_settings():
    assert not [path for path in script.RECORDS.glob("*") if "overridden" in json.loads(path.read_text())]


def test_every_record_belongs_to_the_queue():
    assert {path.stem for path in script.RECORDS.glob("*")} <= {entry.name for entry in script.read_queue()}


def test_a_run_has_the_settings_of_its_variant_study_and_change(tmp_path: Path):
    few, many, new = script.read_queue(write_queue(tmp_path))
    assert (few.name, many.name, new.name) == ("tiny.base.few", "tiny.base.many", "tiny.new")
    assert few.settings == ["model.moe.num_experts=2", *STUDY["settings"]]
    assert many.settings == ["model.moe.num_experts=4", *STUDY["settings"], "model.moe.k=3"]
    assert [site(tmp_path).state(entry) for entry in (few, many, new)] == ["waiting", "waiting", "needs code"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: {question: q, settings: [], variants: {}, changes: [], sets: test}", "sets"),
        ("a: [", "cannot read"),
        ("", "None is not a mapping"),
        ("a: 5", "a: 5 is not a mapping"),
        ("a: {question: x, settings: [], changes: []}", "a: variants is missing"),
        ("a: {question: x, settings: x, variants: {}, changes: []}", "a.settings: "),
    ],
)
def test_a_queue_of_another_shape_is_one_line(tmp_path: Path, text: str, says: str):
    (tmp_path / "queue.yaml").write_text(text)
    with pytest.raises(UserError, match=says) as found:
        script.read_queue(tmp_path / "queue.yaml")
    assert "\n" not in str(found.value)


def test_records_that_are_damaged_or_of_overridden_settings_are_told(tmp_path: Path):
    few, _, _ = script.read_queue(write_queue(tmp_path))
    where = site(tmp_path)
    where.records.mkdir()
    record = where.records / f"{few.name}.json"
    record.write_text(json.dumps({"settings": few.settings, "overridden": ["training.max_steps=4"]}))
    assert where.state(few) == "done with training.max_steps=4"
    # A setting that is gone does not make a record another one.
    record.write_text(json.dumps({"settings": [*few.settings, "training.bands=2"]}))
    assert where.state(few) == "done"
    for text, says in (("{", "no record"), ("{}", "settings is missing")):
        record.write_text(text)
        with pytest.raises(UserError, match=says):
            where.state(few)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "base", "change": "x", "purpose": "x", "needs": "x", "variants": {}}, "either the variants"),
        ({"name": "base", "change": "x", "purpose": "x"}, "either the variants"),
        ({"name": "base", "change": "x", "variants": {"few": []}}, "without purpose"),
        ({"name": "base", "change": "x", "purpose": "x", "variants": {"none": []}}, "variants of tiny are few, many"),
        ({"name": "base", "change": "x", "purpose": "x", "setting": [], "needs": "x"}, "has setting"),
        ({"name": "base", "change": "x", "purpose": "x", "variants": ["few"]}, "variants: .* is not a mapping"),
        ({"name": "base", "change": "x", "purpose": "x", "variants": {"few": None}}, "variants.few: "),
    ],
)
def test_what_is_wrong_in_the_queue_is_named(tmp_path: Path, change: dict[str, Any], says: str):
    with pytest.raises(UserError, match=says):
        script.read_queue(write_queue(tmp_path, STUDY | {"changes": [change]}))


def test_runs_of_one_name_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"tiny\.base\.\w+ is there twice"):
        script.read_queue(write_queue(tmp_path, STUDY | {"changes": [STUDY["changes"][0]] * 2}))


@pytest.mark.slow
def test_a_run_resumes_where_it_stopped_and_leaves_a_record(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    few, _, _ = script.read_queue(write_queue(tmp_path))
    where = site(tmp_path)
    words = [
        *few.settings,
        *where.places,
        "training.max_steps=2",
        f"run.name={few.name}",
        f"run.directory={where.runs}",
    ]
    assert main(["train", *words]) == 0
    assert where.state(few) == "finished at step 2"
    assert script.run_queue([few], where, minutes=5.0, discard=True)
    assert f"{few.name}: dev perplexity" in capfd.readouterr().out
    assert where.state(few) == "done"
    record = json.loads((where.records / f"{few.name}.json").read_text())
    assert record["settings"] == few.settings
    assert (record["steps"], list(record["dev_perplexities"])) == (4, ["2", "4"])
    assert record["dev_perplexity"] == record["dev_perplexities"]["4"]
    assert list(record["train_perplexities"]) == ["1", "2", "3", "4"]
    assert record["best_dev_perplexity"] == min(record["dev_perplexities"].values())
    assert record["config"]["model.moe.num_experts"] == 2
    assert "overridden" not in record  # the folder of the prepared text is a place
    assert record["gates"]["encoder.1"]["cv_load"] >= 0
    assert [each | {"seconds": 0} for each in record["sittings"]] == [
        {"commit": "abc1234", "hardware": "a machine", "jobs": 1, "seconds": 0}
    ]
    assert not list((where.runs / few.name).glob("checkpoints/*"))
    changed = script.Entry(few.name, few.purpose, [*few.settings, "training.seed=2"])
    with pytest.raises(UserError, match="made with other settings"):
        where.state(changed)


@pytest.mark.slow
def test_a_run_is_scored_on_the_sets_of_its_study_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    few, _, _ = script.read_queue(write_queue(tmp_path, STUDY | {"sets": ["test", "more"]}))
    assert few.sets == ["test", "more"]
    for language, lines in (("en", "How much is it?\nThank you.\n"), ("de", "Was kostet das?\nDanke.\n")):
        with gzip.open(tmp_path / f"more.{language}.gz", "wt", encoding="utf-8") as stream:
            stream.write(lines)
    where = site(tmp_path)
    unscored = script.sit(few, where, time.monotonic() + 300)  # in a folder without the set
    assert unscored.startswith("failed to score it")
    assert "more.en.gz" in unscored
    assert not where.records.exists()
    where = dataclasses.replace(where, texts=tmp_path)
    assert script.sit(few, where, time.monotonic() + 300).startswith("dev perplexity")
    scores = json.loads((where.records / f"{few.name}.json").read_text())["scores"]
    assert scores.keys() == {"test", "more", "signatures"}
    assert scores["test"].keys() == scores["more"].keys() == {"BLEU", "chrF2", "perplexity"}
    assert scores["signatures"].keys() == {"BLEU", "chrF2"}
    report = where.runs / few.name / "report"
    (translated,) = report.glob("set-more*.hypotheses")
    other = where.runs / "other"
    shutil.copytree(where.runs / few.name, other)
    (other / "report" / translated.name).write_text("Was kostet das?\nDanke.\n")
    output = tmp_path / "found" / "pairs.json"
    for pairs in ([f"{few.name}:{few.name}"], [f"{few.name}:other"]):
        words = [*pairs, "--runs", str(where.runs), "--texts", str(tmp_path), "--sets", "test", "more"]
        monkeypatch.setattr(sys, "argv", ["significance.py", *words, "-o", str(output)])
        significance.main()
    same, better = json.loads(output.read_text())["pairs"].values()
    assert [each["set"] for each in same] == [each["set"] for each in better] == ["test", "more"]
    for each in (*same, better[0]):
        assert each["BLEU"]["difference"] == 0
        assert each["BLEU"]["p"] > 0.5
    chrf = better[1]["chrF2"]
    assert chrf["system"] == 100
    assert chrf["baseline"] == scores["more"]["chrF2"]
    assert chrf["difference"] == pytest.approx(100 - scores["more"]["chrF2"], abs=0.002)
    assert chrf["interval"][0] <= chrf["difference"] <= chrf["interval"][1]


def test_figures_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "corpus.json").write_text('{"vocabulary_size": 100}')
    config = compose_config(["experiment=demo"])
    run: Any = SimpleNamespace(metrics_path=tmp_path, corpus_path=tmp_path / "corpus.json", config=lambda: config)
    speeds = (1.0, 50.0, 9.0, 7.0, 8.0)
    training = [
        SimpleNamespace(step=step, perplexity=9.0, tokens_per_second=speed, gates={"encoder.1": {"cv_load": step}})
        for step, speed in zip(range(10, 60, 10), speeds, strict=True)
    ]
    training[-1].gpu_memory_gb = 3.0
    dev = [SimpleNamespace(step=step, perplexity=of, word_perplexity=2 * of) for step, of in ((20, 4.0), (50, 5.0))]
    monkeypatch.setattr(script, "read_lines", lambda _, kind: training if kind is script.TrainLine else dev)
    found = script.figures(run)
    assert (found["steps"], found["dev_perplexity"], found["best_dev_perplexity"]) == (50, 5.0, 4.0)
    assert (found["dev_word_perplexity"], found["dev_perplexities"]) == (10.0, {20: 4.0, 50: 5.0})
    assert found["tokens_per_second"] == 8.0
    assert found["gates"] == {"encoder.1": {"cv_load": 35.0}}


@pytest.mark.parametrize("discard", [False, True])
def test_checkpoints_stay_unless_they_are_to_be_discarded(
    discard: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    where, entry = site(tmp_path), script.Entry("tiny.base.few", "a start", [])
    checkpoints = where.runs / entry.name / "checkpoints"
    checkpoints.mkdir(parents=True)
    where.records.mkdir()
    (where.records / f"{entry.name}.json").touch()
    monkeypatch.setattr(script, "sit", lambda *_: "dev perplexity 2")
    assert script.run_queue([entry], where, 1.0, discard)
    assert checkpoints.exists() != discard


def test_a_comparison_is_of_the_second_system_over_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    references = [f"der kleine Hund läuft heute {number} mal über die Wiese" for number in range(40)]
    systems = {"bad": [f"die Katze {number}" for number in range(40)], "good": references}

    def translations(run: Any, name: str, texts: Path) -> tuple[list[str], list[str]]:
        return systems[run.path.name], systems["other"] if run.path.name == "other" else references

    monkeypatch.setattr(significance, "translations", translations)
    monkeypatch.setattr(significance.RunDirectory, "existing", lambda name: significance.RunDirectory(Path(name)))
    config = compose_config(["experiment=demo"])
    monkeypatch.setattr(significance.RunDirectory, "config", lambda run: config)
    output = tmp_path / "pairs.json"

    def run(*pairs: str) -> Any:
        words = [*pairs, "--runs", "x", "--sets", "test", "-o", str(output), "--records", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["significance.py", *words])
        significance.main()
        return json.loads(output.read_text())["pairs"]

    (found,) = run("bad:good")["bad:good"]
    assert found["BLEU"]["system"] == pytest.approx(100)
    assert found["BLEU"]["baseline"] < 20
    assert found["BLEU"]["difference"] > 80
    assert found["BLEU"]["interval"][0] > 80
    assert found["BLEU"]["p"] < 0.01
    # Those of other pairs stay.
    assert list(run("good:bad")) == ["bad:good", "good:bad"]
    systems["other"] = [*references[1:], "ein Satz"]
    before = output.read_text()
    for pair in ("good:other", "good", "a:b:c"):
        with pytest.raises(SystemExit):
            run(pair)
    assert output.read_text() == before
    # A record made of the same translations, and of others.
    (tmp_path / "good.json").write_text(json.dumps({"scores": {"test": {"BLEU": 100.0}}}))
    run("bad:good")
    (tmp_path / "good.json").write_text(json.dumps({"scores": {"test": {"BLEU": 99.0}}}))
    with pytest.raises(SystemExit):
        run("bad:good")
    assert output.read_text() == before
    (tmp_path / "good.json").unlink()
    for text in ("{", "[]", '{"records": 1}'):
        output.write_text(text)
        with pytest.raises(SystemExit):
            run("bad:good")
        assert output.read_text() == text


FAKE = """
import json, os, pathlib, signal, sys, time
settings = dict(word.split("=", 1) for word in sys.argv[4:])
if settings["training.seed"] == "13":
    sys.exit("a mistake")
if settings["training.seed"] == "15":
    time.sleep(600)  # before it handles signals
if settings["training.seed"] == "14":
    time.sleep(0.2)
    sys.exit("GPU " + os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
if settings["training.seed"] == "16":
    signal.raise_signal(signal.SIGTERM)  # before it can catch one
run = pathlib.Path(settings["run.directory"], settings["run.name"])
run.mkdir(parents=True, exist_ok=True)
def stop(*_):
    status = {"state": "stopped", "code": 143, "message": "", "step": 7, "checkpoint": None}
    (run / "RUN_STATUS.json").write_text(json.dumps(status))
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
(run / "begun").touch()
time.sleep(600)
"""


@pytest.fixture
def fake_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A program in the place of `nmt train` that runs until it is told to stop, or fails with a seed of 13 or 14.

    With a seed of 15, it does not handle signals yet."""
    (tmp_path / "fake").write_text(f"#!{sys.executable}\n{FAKE}")
    (tmp_path / "fake").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "fake"))


def test_a_run_is_stopped_and_saved_when_the_time_has_come(
    fake_training: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    entry, where = script.Entry("tiny.base.few", "a start", ["training.seed=1"]), site(tmp_path)
    assert script.sit(entry, where, time.monotonic() - 1) == "not started: no time is left"
    assert not where.runs.exists()
    begun, wait = where.runs / entry.name / "begun", subprocess.Popen.wait

    def wait_until_it_has_begun(process: Any, timeout: float | None = None) -> int:
        if timeout is None:
            return wait(process)
        while not begun.exists():
            time.sleep(0.01)
        begun.unlink()
        raise subprocess.TimeoutExpired("train", timeout)

    early = script.Entry("tiny.base.many", "a start", ["training.seed=15"])
    assert script.sit(early, where, time.monotonic() + 0.5) == "stopped before its first step"
    monkeypatch.setattr(subprocess.Popen, "wait", wait_until_it_has_begun)
    for sittings in (1, 2):
        assert script.sit(entry, where, time.monotonic() + 600) == "stopped at step 7: run it again to resume it"
        assert len(json.loads((where.runs / entry.name / "sittings.json").read_text())) == sittings
    assert where.state(entry) == "stopped at step 7"
    assert not where.records.exists()


def test_a_run_that_fails_is_reported_with_its_last_line_and_the_next_begins(
    fake_training: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    entries = [script.Entry(f"tiny.base.{name}", "a start", ["training.seed=13"]) for name in ("few", "many")]
    assert not script.run_queue(entries, site(tmp_path), minutes=10.0, discard=True)
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["tiny.base.few", "tiny.base.many"]
    assert all("failed with status 1: " in line and line.endswith(".log ends with 'a mistake'") for line in lines)
    assert not site(tmp_path).records.exists()


def test_a_set_that_is_missing_is_found_before_training(
    fake_training: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    queue = write_queue(tmp_path, STUDY | {"settings": ["training.seed=13"], "sets": ["test", "news"]})
    words = ["run", "tiny.base.few", "--queue", str(queue), "--records", str(tmp_path), "--commit", "abc1234"]
    monkeypatch.setattr(sys, "argv", ["run_queue.py", *words, "--runs", str(tmp_path), "--texts", str(tmp_path)])
    (tmp_path / "news.en.gz").touch()
    for status, says in ((3, "lacks news.LANGUAGE.gz"), (1, "")):
        with pytest.raises(SystemExit) as end:
            script.main()
        assert end.value.code == status
        assert says in capsys.readouterr().err
        (tmp_path / "news.de.gz").touch()


def test_a_run_that_is_stopped_before_it_began_has_not_failed(fake_training: None, tmp_path: Path):
    entry = script.Entry("tiny.base.few", "a start", ["training.seed=16"])
    assert script.sit(entry, site(tmp_path), time.monotonic() + 600) == "stopped before its first step"
    assert script.run_queue([entry], site(tmp_path), minutes=10.0, discard=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_stops_and_saves_all_runs_and_starts_no_other(tmp_path: Path, number: int):
    names = [f"tiny.base.{name}" for name in ("few", "many")]
    (tmp_path / "fake").write_text(f"#!{sys.executable}\n{FAKE}")
    (tmp_path / "fake").chmod(0o755)
    queue = write_queue(tmp_path, STUDY | {"settings": ["training.seed=1"]})
    start = "import sys; sys.executable, script = sys.argv[1:3]; sys.argv = sys.argv[2:]; import runpy, signal; "
    start += "signal.signal(signal.SIGINT, signal.default_int_handler); runpy.run_path(script, run_name='__main__')"
    words = [str(tmp_path / "fake"), str(ROOT / "scripts/results/run_queue.py"), "run", *names, "--commit", "abc1234"]
    words += ["--queue", str(queue), "--runs", str(tmp_path / "runs"), "--records", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", start, *words], env=environment, stderr=-1, stdout=-1) as queued:
        begun = tmp_path / "runs" / names[0] / "begun"
        while not begun.exists() and queued.poll() is None:
            time.sleep(0.01)
        queued.send_signal(number)
        out, error = (text.decode() for text in queued.communicate(timeout=60))
    assert queued.returncode == 128 + number, error
    assert out == f"{names[0]}: stopped at step 7: run it again to resume it\n"
    assert error.startswith("run_queue: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "runs" / names[1]).exists()


def test_runs_are_spread_over_the_gpus(
    fake_training: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert script.gpus_here() == ["3", "5"]
    entries = [script.Entry(f"tiny.base.{name}", "a start", ["training.seed=14"]) for name in "abcdef"]
    for gpus, jobs, used in ((["3", "5"], 1, {"3", "5"}), (["3", "5", "7"], 2, {"3", "5", "7"}), (["6"], 3, {"6"})):
        script.run_queue(entries, dataclasses.replace(site(tmp_path), gpus=gpus, jobs=jobs), 10.0, discard=False)
        lines = capfd.readouterr().out.splitlines()
        assert len(lines) == len(entries)
        assert {line.rsplit("GPU ", 1)[1][0] for line in lines} == used
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(script.torch.cuda, "device_count", lambda: 0)
    assert script.gpus_here() == [""]
    monkeypatch.setattr(script.torch.cuda, "device_count", lambda: 2)
    assert script.gpus_here() == ["0", "1"]


def test_runs_that_are_named_go_in_that_order(
    fake_training: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    study = STUDY | {"settings": ["training.seed=13"]}
    places = [
        "--queue",
        str(write_queue(tmp_path, study)),
        "--runs",
        str(tmp_path),
        "--records",
        str(tmp_path / "none"),
    ]
    for names in (["tiny.base.many", "tiny.base.few"], ["tiny.base.few", "tiny.base.many"]):
        monkeypatch.setattr(sys, "argv", ["run_queue.py", "run", *names, *places, "--commit", "abc1234"])
        with pytest.raises(SystemExit):
            script.main()
        assert [line.split(":")[0] for line in capfd.readouterr().out.splitlines()] == names


def test_one_run_that_is_broken_keeps_no_other_from_running(
    fake_training: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    study = STUDY | {"settings": ["training.seed=13"]}
    records = tmp_path / "records"
    records.mkdir()
    (records / "tiny.base.few.json").write_text("{")
    words = ["run", "--queue", str(write_queue(tmp_path, study)), "--runs", str(tmp_path), "--records", str(records)]
    monkeypatch.setattr(sys, "argv", ["run_queue.py", *words, "--commit", "abc1234"])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 1
    output = capfd.readouterr()
    assert "tiny.base.many: failed with status 1" in output.out
    assert output.err.count("\n") == 1
    assert "tiny.base.few.json is no record of a run" in output.err

    def full(*_: Any) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(script, "sit", full)
    entries = [script.Entry(f"tiny.base.{name}", "a start", []) for name in ("few", "many")]
    assert not script.run_queue(entries, site(tmp_path), minutes=1.0, discard=False)
    assert capfd.readouterr().out.count("failed: no space left") == 2


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> int:
        places = ["--queue", str(write_queue(tmp_path)), "--runs", str(tmp_path), "--records", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["run_queue.py", *arguments, *places, "--commit", "abc1234"])
        with pytest.raises(SystemExit) as end:
            script.main()
        return end.value.code

    assert run("list") == 0
    assert [line.split()[:2] for line in capfd.readouterr().out.splitlines()] == [
        ["tiny.base.few", "waiting"],
        ["tiny.base.many", "waiting"],
        ["tiny.new", "needs"],
    ]
    assert run("run", "tiny.other") == 2
    error = capfd.readouterr().err
    assert "tiny.other is not in" in error
    assert error.count("\n") == 1
    run("run", "tiny.base.few", "--minutes", "0")
    assert "tiny.base.few: not started" in capfd.readouterr().out
    # In the order of the names.
    run("run", "tiny.base.many", "tiny.base.few", "--minutes", "0")
    assert [line.split(":")[0] for line in capfd.readouterr().out.splitlines()] == ["tiny.base.many", "tiny.base.few"]
    # A study, or one of its changes, is all its runs.
    for name in ("tiny", "tiny.base"):
        run("run", name, "--minutes", "0")
        out = capfd.readouterr().out
        assert [line.split()[0].rstrip(":") for line in out.splitlines() if "needs" not in line] == [
            "tiny.base.few",
            "tiny.base.many",
        ]
    assert run("run", "tiny.bas") == 2
    assert "tiny.bas is not in" in capfd.readouterr().err
    # A run that has its record is only listed.
    few = script.read_queue(tmp_path / "queue.yaml")[0]
    (tmp_path / f"{few.name}.json").write_text(json.dumps({"settings": few.settings}))
    run("run", "tiny.base.few", "tiny.new", "--minutes", "0")
    assert [line.split()[:2] for line in capfd.readouterr().out.splitlines()] == [
        ["tiny.base.few", "done"],
        ["tiny.new", "needs"],
    ]
    # One without a name is not run again either.
    run("run", "--minutes", "0")
    assert capfd.readouterr().out.startswith("tiny.base.many: not started")
    assert run("run", "--jobs", "0") == 2
    assert "--jobs 0" in capfd.readouterr().err
