"""nmt train RUN: a run resumes with its own settings, wherever its folder is now."""

import shutil
from pathlib import Path

import pytest

import nmt.commands.launch
import nmt.commands.train
from nmt.checkpoint import list_checkpoints
from nmt.config import Config
from nmt.config.reading import known_settings, put_setting
from nmt.errors import CheckpointError, UserError
from nmt.parameters import read_tensors
from nmt.run import RunDirectory
from tests.toy import Cli, settings, train


@pytest.fixture
def tiny(corpus: Path) -> Path:
    """A run of two steps, with settings that no default has."""
    return train(corpus, "tiny", 2, "training.learning_rate=0.003", "model.moe.num_experts=6")


def parameters(run: Path) -> dict[str, bytes]:
    newest = list_checkpoints(run / "checkpoints")[-1]
    return {name: tensor.numpy().tobytes() for name, tensor in read_tensors(newest.path / "model").items()}


def test_it_resumes_as_the_command_that_started_it_would(cli: Cli, tiny: Path) -> None:
    changes = ["training.learning_rate=0.003", "model.moe.num_experts=6"]
    moved = tiny.parent / "else where" / "moved"
    shutil.copytree(tiny, moved)
    train(tiny.parent, "tiny", 4, *changes)
    assert cli("train", str(moved), "training.max_steps=4") == 0, cli.err
    assert cli.out == f"{moved}\n"
    assert "changed since the run was started: training.max_steps: 2 -> 4" in cli.err
    assert parameters(moved) == parameters(tiny)
    assert list_checkpoints(moved / "checkpoints")[-1].step == 4


def test_the_folder_names_the_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was not moved keeps the path that it was started with; another has the path given."""
    stored = RunDirectory(run).config()
    assert RunDirectory(run).training_config() == stored
    copy = shutil.copytree(run, tmp_path / "runs" / "copy")
    monkeypatch.chdir(tmp_path)
    found = RunDirectory.existing("copy").training_config()
    assert (found.run.directory, found.run.name) == ("runs", "copy")
    monkeypatch.chdir(copy)
    found = RunDirectory.existing(".").training_config()
    assert (found.run.directory, found.run.name) == (str(tmp_path / "runs"), "copy")
    assert found.training == stored.training


def test_settings_are_changed_one_by_one(run: Path) -> None:
    before = RunDirectory(run).config()
    changed = RunDirectory(run).training_config(["training.max_steps=99", "model.moe={k: 1}", "corpus.root=a=b"])
    assert (changed.training.max_steps, changed.model.moe.k, changed.corpus.root) == (99, 1, "a=b")
    changed.training.max_steps, changed.model.moe.k = before.training.max_steps, before.model.moe.k
    changed.corpus.root = before.corpus.root
    assert changed == before


@pytest.mark.parametrize("key", [each for each in known_settings(Config) if each.count(".") > 1][:3])
def test_a_section_sets_what_it_names(key: str) -> None:
    tree = Config().to_dict()
    section, _, name = key.rpartition(".")
    put_setting(Config, tree, section, {name: "new"})
    expected = Config().to_dict()
    inner = expected
    for each in section.split("."):
        inner = inner[each]
    inner[name] = "new"
    assert tree == expected


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["training.max_step=5"], 2, ("did you mean training.max_steps?",)),
        (["training.max_steps=no"], 2, ("training.max_steps=no is not a whole number",)),
        (["training.max_steps"], 2, ("training.max_steps: a run has its own settings; change one with KEY=VALUE",)),
        (["model=small"], 2, ("model=small: a run has its own settings",)),
        (["+training.max_steps=5"], 2, ("+training.max_steps=5: a run has its own settings",)),
        (["run.name=other"], 2, ("run.name=other: the run is", "leave run.name out")),
        (["--cfg", "job"], 2, ("--cfg job are for settings",)),
        (["--multirun", "training.max_steps=5,6"], 2, ("are for settings",)),
        (["--resume"], 2, ("unknown option --resume; nmt train takes --processes",)),
        (["training.learning_rate=0.5"], 4, ("started with other settings", "training.learning_rate was 0.002")),
        (["training.max_steps=3"], 2, ("training.max_steps=3 is below step 8",)),
    ],
    ids=str,
)
def test_mistakes(cli: Cli, run: Path, words: list[str], status: int, says: tuple[str, ...]) -> None:
    cli.refuses(status, "train", str(run), *words, says=says, progress=True)


def test_a_run_without_a_checkpoint_may_be_deleted(cli: Cli, corpus: Path, run: Path) -> None:
    """A start that failed leaves settings; whoever corrects the others is told that nothing was trained there."""
    words = settings(corpus, "run.name=failed", "training.max_steps=1")
    says = ("training.freeze", "no MoE layer has experts")
    cli.refuses(2, "train", *words, 'training.freeze=["experts[99:]"]', says=says, progress=True)
    deletable = "or delete this folder, which has no checkpoint"
    cli.refuses(4, "train", *words, "model.moe.k=1", says=("started with other settings", deletable), progress=True)
    cli.refuses(4, "train", str(run), "model.moe.k=1", says=("started with other settings",), progress=True)
    assert deletable not in cli.err


@pytest.mark.parametrize("change", ["corpus.name=other", "model.hidden_size=6", "training.max_steps=3"])
def test_no_corpus_is_prepared_for_settings_that_are_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    def prepare(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(nmt.commands.train, "prepare_corpus", prepare)
    with pytest.raises(UserError, match=change.partition("=")[0]):
        nmt.commands.train.train(RunDirectory(run).training_config([change]))


def test_what_is_not_a_run(cli: Cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli.refuses(4, "train", "nothing", says=("nothing is not a run", "there are no runs yet"))
    for command in ("train", "cost"):
        cli.refuses(2, command, "demo", says=("demo is not KEY=VALUE; did you mean experiment=demo?",))
    assert cli("export", str(run), "exported") == 0
    cli.refuses(4, "train", "exported", says=("exported is an exported model, which cannot be trained",))
    shutil.copytree(run, tmp_path / "runs" / "k=4")
    (tmp_path / "runs" / "k=4" / "config.yaml").write_text("run: [")
    cli.refuses(4, "train", "runs/k=4", says=("runs/k=4/config.yaml is damaged",))


def test_several_processes_are_given_the_same_words(
    cli: Cli,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched: list[tuple[Config, list[str], int]] = []
    monkeypatch.setattr(nmt.commands.launch, "launch", lambda *arguments: launched.append(arguments))
    assert cli("train", "--processes", "2", str(run), "training.max_steps=9") == 0, cli.err
    ((config, words, processes),) = launched
    assert words == [str(run), "training.max_steps=9"]
    assert processes == 2
    assert config == RunDirectory(run).training_config(words[1:])


def test_a_run_whose_checkpoints_are_gone_does_not_start_again(corpus: Path, cli: Cli) -> None:
    path = train(corpus, "a", 2)
    (path / "checkpoints").rename(corpus / "elsewhere")
    says = (f"{path / 'checkpoints'} has no checkpoint, but RUN_STATUS.json names {path / 'checkpoints'}", "restore it")
    cli.refuses(CheckpointError.status, "train", str(path), "training.max_steps=4", says=says)
    (corpus / "elsewhere").rename(path / "checkpoints")
    assert cli("train", str(path), "training.max_steps=4") == 0
