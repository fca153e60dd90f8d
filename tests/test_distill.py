"""nmt distill: the text, the student, and how both resume."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nmt.cli import main
from nmt.commands.launch import run_together
from nmt.data.prepared import Prepared, prepared_path
from nmt.decoding.translator import Translator
from nmt.errors import ProcessError
from nmt.evaluation.scores import corpus_scores
from nmt.run import RunDirectory
from nmt.students.teacher import Taught, Teacher
from tests.scripts import load_script
from tests.toy import Cli, saved, settings, toy_config

STUDENT = ("run.name=student", "training.max_steps=4", "model.moe.num_experts=0")


@pytest.fixture
def own(shared_text: Path, tmp_path: Path) -> Path:
    """A folder for runs and prepared text, with text that other tests do not see."""
    for path in shared_text.glob("*.??"):
        shutil.copy(path, tmp_path)
    return tmp_path


def arguments(run: Path, folder: Path, *changes: str) -> list[str]:
    return ["distill", str(run), *settings(folder, *STUDENT), "decoding.beam_size=2", *changes]


def taught_in(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "p").glob("toy-taught-*") if path.suffix != ".parts")


@pytest.mark.slow
def test_it_trains_the_student_that_nmt_train_trains_with_the_mixture(cli: Cli, run: Path, own: Path) -> None:
    assert cli(*arguments(run, own)) == 0, cli.err
    assert cli.out == f"{own / 'student'}\n"
    [taught] = taught_in(own)
    config = RunDirectory(own / "student").config()
    assert config.corpus.mixture == {str(taught): 1.0}
    assert config.decoding.beam_size == 4
    assert f"corpus.mixture={{{taught}: 1}}" in cli.err
    shutil.copytree(own / "student", own / "first")
    shutil.rmtree(own / "student")
    assert cli("train", *settings(own, *STUDENT, f"corpus.mixture={{{taught}: 1}}")) == 0, cli.err
    assert saved(own / "student") == saved(own / "first")


@pytest.mark.slow
def test_the_same_command_resumes_the_text_and_the_student(
    cli: Cli, run: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teach, calls = Teacher.teach, []

    def killed(*arguments: Any) -> Taught:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return teach(*arguments)

    monkeypatch.setattr(Teacher, "teach", killed)
    command = arguments(run, own)
    assert cli(*command) == 130
    assert taught_in(own) == []
    assert not (own / "student").exists()
    assert cli(*command) == 0, cli.err
    assert len(calls) == 6
    longer = [word.replace("max_steps=4", "max_steps=6") for word in command]
    assert cli(*longer) == 0, cli.err
    assert "has the teacher's text" in cli.err
    assert "resuming from" in cli.err
    assert len(calls) == 6


@pytest.mark.slow
def test_only_text(cli: Cli, run: Path, own: Path) -> None:
    assert cli(*arguments(run, own, "--only-text", "--choose", "chrf")) == 0, cli.err
    [taught] = taught_in(own)
    assert cli.out == f"{taught}\n"
    assert Prepared.open(taught).manifest["taught"]["choose"] == "chrf"
    assert Prepared.open(taught).manifest["taught"]["decoding"]["beam_size"] == 2
    assert not (own / "student").exists()


@pytest.mark.slow
def test_the_student_starts_from_the_teacher(cli: Cli, run: Path, own: Path) -> None:
    """It has the teacher's vocabulary then, and so has its text."""
    assert cli(*arguments(run, own, f"run.start_from={run}", "corpus.name=other")) == 0, cli.err
    assert f"starting from {run}, step 8" in cli.err
    assert (own / "student" / "subwords.model").read_bytes() == (run / "subwords.model").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("level", [(), ("--word-level",)])
def test_two_processes_make_the_text_of_one(cli: Cli, run: Path, own: Path, level: tuple[str, ...]) -> None:
    command = arguments(run, own, "--only-text", *level)
    assert cli(*command) == 0, cli.err
    [taught] = taught_in(own)
    alone = {path.name: path.read_bytes() for path in taught.iterdir()}
    shutil.rmtree(taught)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "nmt.cli", *command, "--processes", "2"]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300, check=True)
    assert done.stdout == f"{taught}\n"
    assert {path.name: path.read_bytes() for path in taught.iterdir()} == alone


def test_mistakes(cli: Cli, run: Path, own: Path) -> None:
    words = settings(own, *STUDENT)
    cli.refuses(2, "distill", says=("TEACHER", "nmt distill --help"))
    cli.refuses(2, "distill", *words, says=("corpus=files: the teacher comes first",))
    cli.refuses(4, "distill", str(own / "none"), *words, says=("none is not a run",))
    unnamed = settings(own, "corpus.name=unseen")
    cli.refuses(2, "distill", str(run), *unnamed, says=("run.name is empty",))
    assert not prepared_path(toy_config(own, "corpus.name=unseen").corpus).exists()
    cli.refuses(2, "distill", str(run), *words, "decoding.beam_sice=2", says=("did you mean decoding.beam_size",))
    cli.refuses(2, "distill", str(run), *words, "--choose", "ter", says=("invalid choice: 'ter'",))
    cli.refuses(2, "distill", str(run), *words, "corpus.mixture={a: 1}", says=("corpus.mixture is made by",))
    cli.refuses(2, "distill", str(run), *words, "--processes", "0", says=("--processes 0",))
    changed = ("corpus.source_language=de", "corpus.target_language=en")
    cli.refuses(2, "distill", str(run), *words, *changed, says=("does not translate de-en", "en-de"), progress=True)


def test_a_student_with_other_settings_is_refused_before_the_text_is_made(cli: Cli, run: Path, own: Path) -> None:
    assert cli("train", *settings(own, *STUDENT)) == 0, cli.err
    cli.refuses(4, *arguments(run, own), says=("was started with other settings", "corpus.mixture"), progress=True)
    assert taught_in(own) == []


def test_processes_that_could_not_train_are_refused_before_the_text_is_made(cli: Cli, run: Path, own: Path) -> None:
    says = ("training.micro_batches=1 cannot be split evenly over 2 processes",)
    cli.refuses(2, *arguments(run, own, "--processes", "2"), says=says, progress=True)
    assert taught_in(own) == []


# ---------------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize(("code", "ends"), [("import sys; sys.exit(4)", 4), ("import os; os.kill(os.getpid(), 9)", 7)])
def test_if_one_process_fails_the_others_are_stopped(
    code: str, ends: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # In place of the command line of nmt: process 1 fails, and process 0 would wait for long.
    (tmp_path / "program").write_text(
        f'#!{sys.executable}\nimport os, time\nif os.environ["NMT_WORKER"] == "1":\n    {code}\ntime.sleep(100)\n'
    )
    (tmp_path / "program").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "program"))
    with pytest.raises((SystemExit, ProcessError)) as ended:
        run_together(["distill"], 2)
    error = ended.value
    assert isinstance(error, SystemExit | ProcessError)
    assert (error.code if isinstance(error, SystemExit) else error.status) == ends
    assert isinstance(error, SystemExit) or "process 1 of 2 was ended by signal 9" in str(error)


# ------------------------------------------------------------------------------------------------ the table of results


@pytest.mark.slow
def test_the_table_of_results(run: Path, tmp_path: Path) -> None:
    students = load_script("scripts/results/students.py")
    systems = ["--teacher", f"{run},{run}", "--student", str(run), "--plain", str(run)]
    small = ["--sentences", "3", "--turns", "1", "--json", str(tmp_path / "out.json")]
    assert students.main([*systems, *small]) == 0
    table = json.loads((tmp_path / "out.json").read_text())
    rows = table["systems"]
    directory = RunDirectory(run)
    translator = Translator.load(directory, directory.config(["decoding.beam_size=1"]))
    sources, targets, _ = directory.text("test")
    bleu, chrf = corpus_scores([each.text for each in translator.translate(sources)], [targets], "13a")
    assert rows["student"]["beam_1"] == {"BLEU": round(bleu.value, 2), "chrF2": round(chrf.value, 2)}
    assert rows["student"]["parameters"] == sum(each.numel() for each in translator.model.parameters())
    assert main(["export", str(run), str(tmp_path / "export")]) == 0
    exported = sum(path.stat().st_size for path in (tmp_path / "export").iterdir()) / 1e6
    assert rows["student"]["export_mb"] == pytest.approx(exported, abs=0.002)
    assert rows["student"]["export_bf16_mb"] < rows["student"]["export_mb"]
    assert set(rows["plain"]["sentences_per_second"]) == {
        f"{form}_beam_{beam}" for form in ("fp32", "int8") for beam in (4, 1)
    }
    # The same model twice is an ensemble of the same quality, and of twice the size.
    assert rows["teacher"]["perplexity"] == pytest.approx(rows["plain"]["perplexity"], rel=1e-4)
    assert rows["teacher"]["parameters"] == 2 * rows["plain"]["parameters"]


@pytest.mark.parametrize(("teacher", "student", "share"), [(30.0, 25.0, 0.5), (30.0, 20.0, 0.0), (20.0, 25.0, None)])
def test_the_share_of_the_gap(teacher: float, student: float, share: float | None) -> None:
    students = load_script("scripts/results/students.py")
    scores = {"teacher": teacher, "student": student, "plain": 20.0}
    rows = {name: {"beam_4": {"BLEU": score}} for name, score in scores.items()}
    assert students.kept_share(rows, 4, "BLEU") == share
