"""nmt runs: a line for every run, whatever became of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nmt.checkpoint import list_checkpoints
from nmt.cli import main
from nmt.process import host_name
from tests.toy import Cli


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    """runs/ with one good run in it."""
    shutil.copytree(run, tmp_path / "runs" / "good")
    return tmp_path / "runs"


def rows(cli: Cli, *arguments: str) -> dict[str, list[str]]:
    """The cells of each run, which are two blanks or more apart."""
    assert cli("runs", *arguments) == 0, cli.err
    head, *lines = cli.out.splitlines()
    assert head.split() == ["run", "state", "step", "best", "score", "checkpoint", "size"]
    return {name: cells for name, *cells in ([each for each in line.split("  ") if each] for line in lines)}


def changed_status(run: Path, **changes: object) -> None:
    path = run / "RUN_STATUS.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_run_and_its_best_checkpoint(
    cli: Cli,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    best = min(list_checkpoints(folder / "good" / "checkpoints"), key=lambda each: each.score)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shown = f"{size / 1e3:.1f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"
    expected = {"good": ["finished", "8", f"perplexity {best.score:.3f}", best.path.name, shown]}
    assert {name: [each.strip() for each in cells] for name, cells in rows(cli, str(folder)).items()} == expected
    monkeypatch.chdir(folder.parent)
    assert rows(cli).keys() == {"good"}


def test_bleu_is_shown_as_it_is_known(cli: Cli, folder: Path) -> None:
    config = folder / "good" / "config.yaml"
    config.write_text(config.read_text().replace("best_by: perplexity", "best_by: bleu"))
    score = min(each.score for each in list_checkpoints(folder / "good" / "checkpoints"))
    assert f"BLEU {-score:.2f}" in rows(cli, str(folder))["good"][2]


def test_a_run_whose_process_is_gone_has_died(cli: Cli, folder: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    states = [
        ("died", {"pid": gone.pid, "host": host_name()}),
        ("running", {"pid": os.getpid(), "host": host_name()}),
        ("running", {"pid": gone.pid, "host": "elsewhere"}),
        ("running", {"pid": "?", "host": host_name()}),
        ("died", {"pid": 10**30, "host": host_name()}),
    ]
    for state, changes in states:
        changed_status(folder / "good", state="running", **changes)
        assert rows(cli, str(folder))["good"][0].strip() == state, changes


def test_broken_folders_are_shown_and_do_no_harm(cli: Cli, folder: Path, run: Path) -> None:
    for name, file, content in (
        ("no config", "config.yaml", None),
        ("bad config", "config.yaml", b"training: ["),
        ("newer", "config.yaml", b"training: {warp: 9}"),
        ("bad status", "RUN_STATUS.json", b"\xff{"),
        ("no status", "RUN_STATUS.json", None),
    ):
        path = shutil.copytree(run, folder / name) / file
        path.unlink() if content is None else path.write_bytes(content)
    for manifest in shutil.copytree(run, folder / "bad checkpoints").glob("checkpoints/*/manifest.json"):
        manifest.write_text("{}")
    assert main(["export", str(run), str(folder / "exported")]) == 0
    shutil.copytree(folder / "exported", folder / "bad export")
    (folder / "bad export" / "manifest.json").write_text("{}")
    (folder / "only status").mkdir()
    (folder / "only status" / "RUN_STATUS.json").write_text("[]")
    (folder / "nothing").mkdir()
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "config.yaml").touch()
    (folder / "a file").touch()
    (folder / "a loop").symlink_to(folder / "a loop")
    (folder / "two\nlines" / "checkpoints").mkdir(parents=True)
    (folder / os.fsdecode(b"no \xff text") / "checkpoints").mkdir(parents=True)
    found = {name: [each.strip() for each in cells] for name, cells in rows(cli, str(folder)).items()}
    assert {name: cells[0] for name, cells in found.items()} == {
        "bad checkpoints": "finished",
        "bad config": "damaged",
        "bad export": "damaged",
        "bad status": "unknown",
        "exported": "exported",
        "good": "finished",
        "newer": "damaged",
        "no config": "damaged",
        "no \N{REPLACEMENT CHARACTER} text": "damaged",
        "no status": "unknown",
        "only status": "damaged",
        "two\N{REPLACEMENT CHARACTER}lines": "damaged",
    }
    assert found["bad config"][1] == found["exported"][1] == "8"
    assert found["bad checkpoints"][1:4] == ["0", "-", "-"]


def test_a_run_that_was_grown_is_not_trained_yet(cli: Cli, folder: Path) -> None:
    assert cli("experts", str(folder / "good"), "--grow", "8", "-o", str(folder / "grown")) == 0, cli.err
    (checkpoint,) = list_checkpoints(folder / "grown" / "checkpoints")
    found = [each.strip() for each in rows(cli, str(folder))["grown"]]
    assert found[:4] == ["not trained yet", str(checkpoint.step), "-", checkpoint.path.name]


def test_no_runs(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("runs") == 0
    assert (cli.out, cli.err) == ("", "there are no runs in runs: start one with nmt train\n")
    cli.refuses(4, "runs", "elsewhere", says=("elsewhere is not a folder",))
