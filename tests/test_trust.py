"""A run or an exported model from a stranger: nothing outside of it is touched, and nothing it says is trusted."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nmt.checkpoint import Checkpoint, list_checkpoints, prune_checkpoints
from nmt.cli import main
from nmt.config import DecodingConfig
from nmt.files import foreign_entry, is_plain_name
from nmt.run import RunDirectory
from tests.toy import settings


@pytest.fixture
def received(run: Path, tmp_path: Path) -> Path:
    """A copy of a trained run, which a test may change."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "report").mkdir(exist_ok=True)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def original_export(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert main(["export", str(run), str(folder)]) == 0
    return folder


@pytest.fixture
def exported(original_export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original_export, tmp_path / "model"))


def refusal(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that ends with status 4."""
    capfd.readouterr()
    assert main(list(arguments)) == 4
    out, errors = capfd.readouterr()
    assert out == ""
    [line] = [line for line in errors.splitlines() if line.startswith("nmt: ")]
    assert "Traceback" not in errors
    return line


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and make it vouch for itself again, as anybody can."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("sha256", None)
    change(manifest)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest | {"sha256": digest}))


# -------------------------------------------------------------------------------------- nothing outside of the folder

FOLDERS = ("report", "checkpoints", "text", "tensorboard")
FILES = ("metrics.jsonl", "RUN_STATUS.json", "subwords.model", "corpus.json", "config.yaml", ".lock", ".shared")
BELOW = ("report/.test.hypotheses.tmp", "report/test.json", "text/test.source", "checkpoints/.step-00000009.tmp")


@pytest.mark.parametrize("name", [*FOLDERS, *FILES, *BELOW])
def test_a_link_out_of_a_run_is_refused_and_not_written_through(
    received: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    """By a command that reads the run, and by one that goes on training it."""
    place = received / name
    victim = tmp_path / "home" / place.name
    victim.parent.mkdir()
    if name in FOLDERS or place.exists():
        place.rename(victim)
    else:
        victim.write_text("mine")
    place.unlink(missing_ok=True)
    place.symlink_to(os.path.relpath(victim, place.parent))
    before = {path: path.read_bytes() if path.is_file() else None for path in victim.parent.rglob("*")}
    for command in (
        ("evaluate", str(received)),
        ("train", *settings(received.parent, "run.name=run", f"corpus.root={trained_corpus(received)}")),
    ):
        line = refusal(capfd, *command)
        assert f"{place} is a link that leads out of" in line
    after = {path: path.read_bytes() if path.is_file() else None for path in victim.parent.rglob("*")}
    assert after == before


def trained_corpus(received: Path) -> Path:
    """The text of the run that was copied, beside which it is prepared already."""
    lines = (received / "config.yaml").read_text().splitlines()
    [root] = [line.removeprefix("  root: ") for line in lines if line.startswith("  root: ")]
    return Path(root)


def test_a_link_within_a_run_is_no_harm(received: Path) -> None:
    (received / "checkpoints" / "latest").symlink_to("step-00000008")
    (received / "notes").symlink_to("/etc")  # no name that any command uses
    assert RunDirectory.existing(str(received)).path == received


def test_what_is_neither_a_file_nor_a_folder_is_seen(tmp_path: Path) -> None:
    (tmp_path / "run" / "text").mkdir(parents=True)
    os.mkfifo(tmp_path / "run" / "text" / "test.source")
    assert "is neither a file nor a folder" in foreign_entry(tmp_path / "run", ["none", "text"])
    assert foreign_entry(tmp_path / "run", ["none"]) == ""
    (tmp_path / "file").write_text("x")
    assert foreign_entry(tmp_path / "file" / "run", ["none"]) == ""


@pytest.mark.parametrize("name", ["config.yaml", "subwords.model", "corpus.json", "text/dev.source"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(
    received: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    (received / name).unlink()
    os.mkfifo(received / name)
    assert f"{received / name} is neither a file nor a folder" in refusal(capfd, "translate", str(received))


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        *((name, True) for name in ("a", "model/a.b", "...", "a b")),
        *((name, False) for name in ("..", "../a", "a/../../b", "/etc/passwd", "", ".", "./a", "a//b", "a/")),
    ],
)
def test_names_of_a_manifest_stay_below_it(name: str, plain: bool) -> None:
    assert is_plain_name(name) == plain


# ------------------------------------------------------------------------------------------- files of another shape


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["files"].update({"../secret": {"size": 1, "sha256": ""}}),
        lambda manifest: manifest["files"].update({"/etc/passwd": {"size": 1, "sha256": ""}}),
        lambda manifest: manifest["files"].update({"config.yaml": {"size": "1", "sha256": ""}}),
        lambda manifest: manifest.update(files=[]),
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest.pop("vocabulary"),
        lambda manifest: manifest.update(vocabulary=3),
        lambda manifest: manifest.update(step="8"),
        lambda manifest: manifest.update(score={}),
        lambda manifest: manifest.update(steps=None),
        lambda manifest: manifest.update(steps=[]),
    ],
)
def test_a_manifest_of_another_shape_is_one_line(
    exported: Path, capfd: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], None]
) -> None:
    reseal(exported, change)
    assert str(exported) in refusal(capfd, "translate", str(exported))


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", "[" * 100_000, '{"a":' * 100_000, "\xff", ""])
@pytest.mark.parametrize("name", ["manifest.json", "corpus.json"])
def test_json_of_any_kind_is_one_line(
    exported: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    if name == "manifest.json":
        (exported / name).write_text(text, encoding="latin-1")
        assert "is a damaged export" in refusal(capfd, "translate", str(exported))
        return
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).write_text(text, encoding="latin-1")
    assert f"{name} is missing or damaged" in refusal(capfd, "export", str(tmp_path / "run"), str(tmp_path / "new"))


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"progress": {}, "data": {}},
        {"progress": {"step": "8"}, "data": {"epoch": 0, "step": 1}},
        {"progress": {"step": 8}, "data": {"epoch": 0, "step": None}},
        {"progress": {"step": 8, "best_score": "low"}, "data": {"epoch": 0, "step": 1}},
        {"progress": {"step": 8, "of_a_newer_version": 1}, "data": {"epoch": 0, "step": 1}},
    ],
)
def test_a_state_of_another_shape_is_one_line(
    received: Path, capfd: pytest.CaptureFixture[str], state: dict[str, Any]
) -> None:
    newest = list_checkpoints(received / "checkpoints")[-1].path
    content = json.dumps(state).encode()
    (newest / "state.json").write_bytes(content)
    written = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    reseal(newest, lambda manifest: manifest["files"].update({"state.json": written}))
    root = trained_corpus(received)
    command = settings(received.parent, "run.name=run", f"corpus.root={root}", "training.max_steps=9")
    checkpoint = ("training.checkpoint_every=2", "training.validate_every=2", "training.keep_checkpoints=9")
    problem = "was written by another version" if "of_a_newer_version" in state.get("progress", {}) else "is not what"
    assert f"{newest / 'state.json'} {problem}" in refusal(capfd, "train", *command, *checkpoint)


def test_a_status_of_another_shape_is_none(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for text in ("", "[]", "{}", '{"state": 3}', "[" * 100_000):
        run.status_path.write_text(text)
        assert run.status() == {}
    run.write_status("running", None, "", 0, None)
    assert run.status()["pid"] == os.getpid()


# ------------------------------------------------------------------------------------------ checkpoints that go away


def test_a_checkpoint_that_is_pruned_is_gone_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    """Whoever lists them never sees one of which a part is missing already."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(run / "checkpoints", folder)
    listed: list[list[int]] = []
    rmtree = shutil.rmtree

    def slowly(path: Path, *arguments: Any, **settings: Any) -> None:
        assert path.name.startswith(".")
        listed.append([each.step for each in list_checkpoints(folder) if each.verify() is None])
        rmtree(path, *arguments, **settings)

    monkeypatch.setattr("nmt.files.shutil.rmtree", slowly)
    best = min(list_checkpoints(folder), key=lambda each: (each.score, each.step)).step
    prune_checkpoints(folder, 1, 8)
    kept = sorted({best, 8})
    assert listed
    assert all(each == kept for each in listed)
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}" for step in kept]


@pytest.mark.parametrize("which", ["last", "average"])
def test_a_checkpoint_that_is_pruned_while_it_is_read_gives_way_to_a_newer_one(
    received: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """As training does it: the new one is there before the old ones go."""
    newest = list_checkpoints(received / "checkpoints")[-1].path
    elsewhere = newest.rename(received / newest.name)
    choose = RunDirectory.chosen

    def then_trained_on(run: RunDirectory, decoding: DecodingConfig) -> list[Checkpoint]:
        chosen = choose(run, decoding)
        if elsewhere.exists():
            elsewhere.rename(newest)
            prune_checkpoints(run.checkpoints, 1, 8)
        return chosen

    monkeypatch.setattr(RunDirectory, "chosen", then_trained_on)
    # No best one, which would be kept.
    monkeypatch.setattr("nmt.checkpoint.best_of", lambda _checkpoints: None)
    text = received / "two.txt"
    text.write_text("the dog\n")
    assert main(["translate", str(received), str(text), f"decoding.checkpoint={which}"]) == 0
    assert [each.name for each in (received / "checkpoints").iterdir()] == ["step-00000008"]


def test_a_checkpoint_that_is_damaged_is_told_once_listed_again(
    received: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    newest = list_checkpoints(received / "checkpoints")[-1].path
    [part, *_] = (newest / "model").iterdir()
    part.unlink()
    assert f"{newest} is damaged" in refusal(capfd, "translate", str(received), "decoding.checkpoint=last")
