"""Every command of every help text is taken by the program as it stands there."""

import argparse
import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import nmt.commands.compare
import nmt.commands.distill
import nmt.commands.launch
import nmt.commands.prepare
import nmt.commands.train
import nmt.data.mixture
from nmt.cli import main
from nmt.commands import is_setting
from nmt.config import Config
from nmt.run import RunDirectory
from tests.toy import Cli

ON_SETTINGS = ("prepare", "train", "cost")
ON_RUNS = ("translate", "score", "evaluate", "experts", "export")


def commands(cli: Cli, command: str) -> list[list[str]]:
    """Arguments of the examples, which are indented; the line of usage has words in capitals that stand for others."""
    assert cli(command, "--help") == 0
    text = re.sub(r" \\\n +", " ", cli.out)
    found = re.findall(r"^  (?:.*\| )?nmt (.+)$", text, re.M)
    assert len(found) >= 2
    return [shlex.split(re.split(r" {4,}", each)[0]) for each in found]


@pytest.fixture
def folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory where the examples' runs and exports are."""
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "demo-32", "many"):
        shutil.copytree(run, tmp_path / "runs" / name)
    assert main(["export", "runs/demo", "exports/demo"]) == 0
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("command", ON_SETTINGS)
def test_examples_on_settings(
    cli: Cli,
    command: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are read and composed; cost is done, what would take long is noted."""
    configs: list[Config] = []

    def prepare(corpus: Any, *_: Any) -> Any:
        configs.append(Config(corpus=corpus))
        return RunDirectory(folder)

    def launch(config: Config, arguments: list[str], *_: Any) -> None:
        assert nmt.compose.asked(arguments).words == arguments
        configs.append(config)

    monkeypatch.setattr(nmt.commands.prepare, "prepare_corpus", prepare)
    monkeypatch.setattr(nmt.commands.prepare, "_write_scores", lambda corpus, *_: prepare(corpus))
    monkeypatch.setattr(nmt.data.mixture, "Corpora", lambda *_: None)

    def train(config: Config) -> RunDirectory:
        configs.append(config)
        return RunDirectory(folder)

    monkeypatch.setattr(nmt.commands.train, "train", train)
    monkeypatch.setattr(nmt.commands.launch, "launch", launch)
    for arguments in commands(cli, command):
        configs.clear()
        assert cli(*arguments) == 0, cli.err
        if command == "cost":
            assert "parameters" in cli.out
        else:
            assert len(configs) == (3 if "--multirun" in arguments else 1)
        if "--multirun" in arguments:
            assert [each.run.name for each in configs] == ["demo-4", "demo-8", "demo-16"]


@pytest.mark.parametrize("command", ON_RUNS)
def test_examples_on_runs(cli: Cli, command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read, the run is found, and its settings are changed as they say."""
    done = []
    for each in ON_RUNS:
        monkeypatch.setattr(import_module(f"nmt.commands.{each}"), "run", lambda *arguments: done.append(arguments))
    examples = commands(cli, command)
    for arguments in examples:
        assert cli(*arguments) == 0, cli.err
        _, found, config = done[-1]
        assert found is None if "--hypothesis" in arguments else found.path.is_dir()
        for key, value in (word.split("=") for word in arguments if word.startswith("decoding.")):
            assert str(getattr(config.decoding, key.removeprefix("decoding."))) == value
    assert len(done) == len(examples)


@pytest.mark.slow
def test_examples_of_distill(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read, the teacher is a run, and the settings of both are taken."""
    done: list[tuple[Any, ...]] = []
    monkeypatch.setattr(nmt.commands.distill, "distill", lambda *arguments: done.append(arguments))
    for arguments in commands(cli, "distill"):
        assert cli(*arguments) == 0, cli.err
        options, changes, config, words = done.pop()
        own = RunDirectory.existing(options.teacher).config(changes)
        assert all(RunDirectory.existing(other) for other in own.decoding.ensemble)
        assert nmt.compose.compose_config(words) == config
        assert config.run.name


def test_examples_of_compare(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read, and each system is a run or a file."""
    done: list[argparse.Namespace] = []
    monkeypatch.setattr(nmt.commands.compare, "run", done.append)
    for name in ("first.de", "second.de", "other.de"):
        (folder / name).touch()
    examples = commands(cli, "compare")
    for arguments in examples:
        assert cli(*arguments) == 0, cli.err
        systems = [word.split(",") for word in done[-1].systems if not is_setting(word)]
        assert len(systems) >= 2
        for name, *settings in systems:
            assert (folder / name).is_file() or RunDirectory.existing(name).config(settings)
    assert len(done) == len(examples)
