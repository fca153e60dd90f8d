"""Checkpoints and run folders: complete or not there, damage found, the right one chosen, others' settings refused."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

import nmt.parallel.saving
from nmt.checkpoint import (
    Checkpoint,
    best_of,
    choose,
    damaged_manifests,
    list_checkpoints,
    newest_verified,
    prune_checkpoints,
)
from nmt.cli import main
from nmt.config import Config, CorpusConfig
from nmt.device import pick_device
from nmt.errors import CheckpointError, DataError, StorageError
from nmt.parallel.mesh import World
from nmt.parallel.saving import Saver, save_checkpoint
from nmt.parameters import read_parameters, read_tensors
from nmt.run import RunDirectory
from tests.toy import saved, settings, train

# Patterns: PyTorch chooses the names of the first two.
MODEL = "model/*.safetensors"
FILES = (MODEL, "training/*.safetensors", "state.json", "manifest.json")


def file_of(checkpoint: Path, pattern: str) -> Path:
    [path] = checkpoint.glob(pattern)
    return path


def model_of(value: float = 0.0) -> nn.Linear:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def load_parameters(model: nn.Module, checkpoints: list[Checkpoint], vocabulary: str) -> None:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    read = read_parameters(checkpoints, shapes, vocabulary)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read[name])


def save(folder: Path, step: int, score: float | None = None, value: float | None = None) -> Path:
    model = model_of(float(step) if value is None else value)
    parts = {"model": parameters_of(model), "training": {"exp_avg.x": torch.arange(9)}}
    return save_checkpoint(folder, step, parts, state_at(step), score, "words")


def state_at(step: int) -> dict[str, Any]:
    return {"progress": {"step": step}, "data": {"epoch": 0, "step": step}}


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(folder)]


# -------------------------------------------------------------------------------------------- writing, reading


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "deep" / "er", 7, 1.5)
    (found,) = list_checkpoints(tmp_path / "deep" / "er")
    assert (found.path, found.step, found.score, found.verify()) == (path, 7, 1.5, None)
    assert found.state() == state_at(7)
    assert torch.equal(read_tensors(path / "training")["exp_avg.x"], torch.arange(9))
    model = model_of()
    load_parameters(model, [found], "words")
    assert all(torch.equal(p, torch.full_like(p, 7.0)) for p in model.parameters())


def test_a_tied_parameter_is_saved_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert set(parameters_of(model)) == {"0.weight", "0.bias", "1.bias"}
    save_checkpoint(tmp_path, 1, {"model": parameters_of(model)}, {}, None, "words")
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    other[1].weight = other[0].weight
    load_parameters(other, list_checkpoints(tmp_path), "words")
    assert torch.equal(other[1].weight, model[0].weight)


def test_a_step_saved_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    save(tmp_path, 1, value=1.0)
    save(tmp_path, 1, value=5.0)
    model = model_of()
    load_parameters(model, choose(tmp_path, "last", 1), "words")
    assert model.weight[0, 0] == 5.0


# ------------------------------------------------------------------------------------------------------ damage


def is_intact(folder: Path) -> bool:
    newest, warnings = newest_verified(list_checkpoints(folder))
    assert newest is not None
    assert (newest.step == 2) == (not warnings and not damaged_manifests(folder))
    assert newest.step in (1, 2)
    return newest.step == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found_and_the_step_before_is_used(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1, 3.0)
    path = file_of(save(tmp_path, 2, 2.0), name)
    content = path.read_bytes()
    assert is_intact(tmp_path)
    generator = np.random.default_rng(1)
    for place in generator.integers(0, len(content) * 8, 40):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        # A blank between two words of JSON may become another blank, which changes nothing.
        unchanged = name == "manifest.json" and same_json(bytes(damaged), content)
        assert is_intact(tmp_path) == unchanged, place
    path.write_bytes(content)
    assert is_intact(tmp_path)


def same_json(one: bytes, two: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(two)
    except ValueError:
        return False


@pytest.mark.parametrize("name", FILES)
def test_truncation_a_zeroed_stretch_and_a_missing_file_are_found(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    path = file_of(save(tmp_path, 2), name)
    content = path.read_bytes()
    for length in {0, 1, len(content) // 3, len(content) // 2, len(content) - 1}:
        path.write_bytes(content[:length])
        assert not is_intact(tmp_path)
    path.write_bytes(content + b"\n")
    assert is_intact(tmp_path) == (name == "manifest.json")
    path.write_bytes(b"\0" * len(content))
    assert not is_intact(tmp_path)
    path.unlink()
    assert not is_intact(tmp_path)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"x"', '{"sha256": 1}', '{"step": 2}', "{}"])
def test_a_manifest_that_is_something_else_is_no_manifest(tmp_path: Path, content: str) -> None:
    (save(tmp_path, 2) / "manifest.json").write_text(content)
    assert list_checkpoints(tmp_path) == []
    (warning,) = damaged_manifests(tmp_path)
    assert "step-00000002" in warning


def test_half_written_and_foreign_folders_are_never_chosen(tmp_path: Path) -> None:
    good = save(tmp_path, 3)
    half = tmp_path / ".step-00000009.tmp"
    shutil.copytree(good, half)
    (tmp_path / "step-00000999").mkdir()
    shutil.copytree(good, tmp_path / "step-00000004")
    shutil.copytree(good, tmp_path / "step-3")
    (tmp_path / "step-00000005").write_text("a file")
    assert steps(tmp_path) == [3]
    prune_checkpoints(tmp_path, 1, newest=3)
    assert not half.exists()
    assert steps(tmp_path) == [3]


@pytest.mark.slow
def test_training_goes_on_from_the_step_before_a_damaged_one(corpus: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changes = ("training.checkpoint_every=1", "training.keep_checkpoints=1", "training.validate_every=100")
    whole = saved(train(corpus, "whole", 5, *changes))
    run = train(corpus, "hurt", 4, *changes, "training.keep_checkpoints=9")
    for step, name in ((3, MODEL), (4, "manifest.json")):
        path = file_of(run / "checkpoints" / f"step-{step:08d}", name)
        path.write_bytes(path.read_bytes()[:-3] + b"   ")
    capfd.readouterr()
    # Kill it in thought after one more update: only what is now on disk is left.
    train(corpus, "hurt", 3, *changes)
    errors = capfd.readouterr().err
    assert "step-00000004 is damaged (manifest.json" in errors
    assert re.search(r"step-00000003 is damaged \(model/\S+ is not what was written", errors)
    assert newest_verified(list_checkpoints(run / "checkpoints"))[0].step == 3
    assert saved(train(corpus, "hurt", 5, *changes)) == whole


def test_damaged_later_steps_do_not_crowd_out_good_ones(tmp_path: Path) -> None:
    for step in (1, 2, 6, 7):
        save(tmp_path, step)
    for step in (6, 7):
        file_of(tmp_path / f"step-{step:08d}", MODEL).write_bytes(b"")
    save(tmp_path, 3)
    prune_checkpoints(tmp_path, 1, newest=3)
    assert steps(tmp_path) == [3]


@pytest.mark.parametrize("name", FILES)
def test_nothing_but_damage_is_refused_instead_of_starting_again(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "a"))
    for each in (copy / "checkpoints").iterdir():
        file_of(each, name).write_text("nothing")
    capfd.readouterr()
    assert main(["train", str(copy), "training.max_steps=9"]) == 4
    assert "is damaged" in capfd.readouterr().err.splitlines()[-1]


# --------------------------------------------------------------------------------------------- keeping, choosing


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_and_the_best_are_kept(tmp_path: Path, keep: int) -> None:
    scores = {1: 9.0, 2: 4.0, 3: None, 4: 5.0, 5: 4.0, 6: None}
    for step, score in scores.items():
        save(tmp_path, step, score)
    prune_checkpoints(tmp_path, keep, newest=6)
    assert steps(tmp_path) == sorted({2} | set(range(7 - keep, 7)))


def test_each_name_chooses_its_checkpoint(tmp_path: Path) -> None:
    for step, score in ((1, 9.0), (2, 4.0), (3, 4.0), (12, None)):
        save(tmp_path, step, score)

    def chosen(which: str, average: int = 3) -> list[int]:
        return [checkpoint.step for checkpoint in choose(tmp_path, which, average)]

    assert chosen("best") == [2]
    assert chosen("last") == [12]
    assert chosen("3") == [3]
    assert chosen("0012") == [12]
    assert chosen("average") == [2, 3, 12]
    assert chosen("average", 99) == [1, 2, 3, 12]
    with pytest.raises(CheckpointError, match="no checkpoint of step 7: choose one of 1, 2, 3, 12"):
        chosen("7")
    with pytest.raises(CheckpointError, match="train the run first"):
        choose(tmp_path / "none", "best", 1)


def test_nothing_stands_in_for_a_checkpoint_that_is_damaged(tmp_path: Path) -> None:
    for step, score in ((1, 9.0), (2, 4.0)):
        save(tmp_path, step, score)
    (tmp_path / "step-00000002" / "manifest.json").write_text("{}")
    for which in ("best", "last", "average"):
        with pytest.raises(CheckpointError, match=r"step-00000002 is damaged \(manifest\.json"):
            choose(tmp_path, which, 3)
    assert [each.step for each in choose(tmp_path, "1", 1)] == [1]


def test_best_without_any_validation_is_the_last(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert best_of(list_checkpoints(tmp_path)) is None
    assert choose(tmp_path, "best", 1)[0].step == 2


def test_average_is_the_mean(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(3, 2, 3, generator=generator)
    for step in range(3):
        model = model_of()
        model.weight.data.copy_(weights[step])
        save_checkpoint(tmp_path, step + 1, {"model": parameters_of(model)}, {}, None, "words")
    model = model_of()
    load_parameters(model, choose(tmp_path, "average", 3), "words")
    torch.testing.assert_close(model.weight.data, weights.mean(0))


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="another vocabulary"):
        load_parameters(model_of(), list_checkpoints(tmp_path), "other words")


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Linear(3, 2, bias=False), nn.Sequential(nn.Linear(3, 2))])
def test_parameters_that_do_not_fit_are_refused(tmp_path: Path, model: nn.Module) -> None:
    save(tmp_path, 1)
    before = parameters_of(model)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_parameters(model, list_checkpoints(tmp_path), "words")
    assert all(torch.equal(before[name], value) for name, value in parameters_of(model).items())


def test_averaged_checkpoints_must_be_of_one_shape(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save_checkpoint(tmp_path, 2, {"model": parameters_of(nn.Linear(4, 2))}, {}, None, "words")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_parameters(model_of(), choose(tmp_path, "average", 2), "words")


# ------------------------------------------------------------------------------------------------- a full disk


class FullDisk:
    """Lets the first `allowed` writing calls through; all later ones find no space."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
        self.left = allowed
        self.failed = False
        for owner, name in (
            (nmt.parallel.saving, "save_file"),
            (Path, "write_text"),
            (Path, "mkdir"),
            (Path, "rename"),
            (os, "fsync"),
        ):
            monkeypatch.setattr(owner, name, self.limited(getattr(owner, name)))

    def limited(self, function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if self.left == 0:
                self.failed = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.left -= 1
            return function(*arguments, **keywords)

        return call


def calls_until_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    for allowed in range(40):
        with monkeypatch.context() as patch:
            disk = FullDisk(patch, allowed)
            try:
                save(tmp_path, 2, 1.0)
            except StorageError as error:
                assert "No space left" in str(error)  # noqa: PT017
            if not disk.failed:
                return
        yield allowed


def test_a_disk_that_fills_up_at_any_call_leaves_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    failures = 0
    for _ in calls_until_success(tmp_path, monkeypatch):
        failures += 1
        newest, _ = newest_verified(list_checkpoints(tmp_path))
        assert newest is not None
        assert not list(tmp_path.glob(".step-*"))
    assert failures >= 10
    assert steps(tmp_path) == [1, 2]


@pytest.mark.slow
def test_a_full_disk_while_training_is_status_6_and_the_run_goes_on_later(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = train(corpus, "a", 1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(nmt.parallel.saving, "save_file", full)
        capfd.readouterr()
        assert main(["train", *settings(corpus, "run.name=a", "training.max_steps=2")]) == 6
    assert "No space left on device" in capfd.readouterr().err.splitlines()[-1]
    assert steps(run / "checkpoints") == [1]
    assert saved(train(corpus, "a", 2))["data"] == saved(train(corpus, "b", 2))["data"]


def test_a_gpu_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, torch.cuda.set_device refuses it in the thread that saves."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [pick_device(name, "key") for name in ("auto", "cuda")] == [torch.device("cuda", 0)] * 2


def test_whatever_ends_the_thread_is_told_by_the_next_call(tmp_path: Path) -> None:
    """Nothing of a save happens where its error would go unseen: a run must not finish without its checkpoint."""
    gone = World(torch.device("cuda"))  # set_device takes no device without a number, and here there is none at all
    saver = Saver(tmp_path, "words", keep=1, world=gone)
    saver.save(1, {"model": parameters_of(model_of())}, {}, None)
    with pytest.raises(StorageError, match=r"cannot write checkpoint .*step-00000001"):
        saver.wait()


@pytest.mark.parametrize(("free", "enough"), [(499, False), (500, True)])
def test_space_for_all_that_is_kept_is_wanted_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, enough: bool
) -> None:
    save(tmp_path / "a", 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - free, free))
    saver = Saver(tmp_path / "a", "words", keep=4, world=World(torch.device("cpu")))
    # Four, the best and the one that is being written, of which one is there; less only if fewer will be saved.
    if enough:
        saver.check_space(100, saves_left=1000)
        saver.check_space(250, saves_left=2)
        saver.check_space(10**6, saves_left=0)
    else:
        with pytest.raises(StorageError, match=r"will hold 5 more checkpoints of .* lower training.keep_checkpoints=4"):
            saver.check_space(100, saves_left=1000)


def test_a_disk_too_small_is_told_before_the_first_update(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**4, 10**4))
    assert main(["train", *settings(corpus, "run.name=a", "training.max_steps=3")]) == 6
    assert "make room" in capfd.readouterr().err.splitlines()[-1]
    assert not (corpus / "a" / "metrics.jsonl").read_text()


# --------------------------------------------------------------------------------------------------- run folder

CORPUS: dict[str, Any] = {"name": "toy", "fingerprint": "0123456789abcdef", "dropped": {}}
CORPUS |= dict.fromkeys(("pairs_read", "pairs_kept", "source_pieces", "target_pieces", "vocabulary_size"), 9)


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    path = tmp_path / "vocabulary"
    path.write_bytes(b"pieces")
    return path


def test_unsafe_changes_are_refused_by_key_and_both_values(tmp_path: Path, vocabulary: Path) -> None:
    run = RunDirectory(tmp_path / "a")
    assert run.start_or_continue(Config(), vocabulary, CORPUS) == []
    assert run.start_or_continue(Config(), vocabulary, CORPUS) == []
    config = Config()
    config.training.learning_rate = 0.25
    config.model.moe.k = 3
    config.training.max_steps = 5
    with pytest.raises(CheckpointError) as caught:
        run.start_or_continue(config, vocabulary, CORPUS)
    assert "model.moe.k was 4, now 3; training.learning_rate was 0.002, now 0.25" in str(caught.value)
    assert "max_steps" not in str(caught.value)
    assert yaml.safe_load(run.config_path.read_text())["model"]["moe"]["k"] == 4


def test_a_setting_that_is_newer_than_the_run_has_its_default_there(tmp_path: Path, vocabulary: Path) -> None:
    run = RunDirectory(tmp_path / "a")
    run.start_or_continue(Config(), vocabulary, CORPUS)
    old = yaml.safe_load(run.config_path.read_text())
    del old["training"]["expert_optimizer"]
    run.config_path.write_text(yaml.safe_dump(old))
    config = Config()
    config.training.expert_optimizer = "factored"
    with pytest.raises(CheckpointError, match=r"training\.expert_optimizer was adam, now factored"):
        run.start_or_continue(config, vocabulary, CORPUS)
    assert run.start_or_continue(Config(), vocabulary, CORPUS) == []


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("training", "max_steps", 3),
        ("training", "patience", 3),
        ("training", "device", "cpu"),
        ("decoding", "beam_size", 9),
        ("corpus", "directory", "elsewhere"),
        ("corpus", "root", "elsewhere"),
    ],
)
def test_safe_changes_are_allowed_and_told(
    tmp_path: Path, vocabulary: Path, section: str, key: str, value: object
) -> None:
    run = RunDirectory(tmp_path / "a")
    run.start_or_continue(Config(), vocabulary, CORPUS)
    config = Config()
    before = getattr(getattr(config, section), key)
    setattr(getattr(config, section), key, value)
    assert run.start_or_continue(config, vocabulary, CORPUS) == [f"{section}.{key}: {before} -> {value}"]
    assert run.start_or_continue(config, vocabulary, CORPUS) == []


def test_other_text_is_refused(tmp_path: Path, vocabulary: Path) -> None:
    run = RunDirectory(tmp_path / "a")
    run.start_or_continue(Config(), vocabulary, CORPUS)
    with pytest.raises(DataError, match="0123456789ab then, ffff now"):
        run.start_or_continue(Config(), vocabulary, CORPUS | {"fingerprint": "ffff"})


def test_a_start_that_failed_leaves_no_vocabulary_for_the_next_one(tmp_path: Path, vocabulary: Path) -> None:
    run = RunDirectory(tmp_path / "a")
    run.path.mkdir()
    run.subwords_path.write_bytes(b"half of an")
    run.start_or_continue(Config(), vocabulary, CORPUS)
    assert run.subwords_path.read_bytes() == b"pieces"
    run.subwords_path.write_bytes(b"the run's own")
    with pytest.raises(CheckpointError, match=r"subwords\.model is not the vocabulary"):
        run.start_or_continue(Config(), vocabulary, CORPUS)
    assert run.subwords_path.read_bytes() == b"the run's own"


@pytest.mark.parametrize("content", ["", "[", "- 1\n", "3", "\x00", "run:\n  name: a\ntraining:\n  seed: 2\n"])
def test_a_damaged_config_is_refused(tmp_path: Path, vocabulary: Path, content: str) -> None:
    run = RunDirectory(tmp_path / "a")
    run.start_or_continue(Config(), vocabulary, CORPUS)
    run.config_path.write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.yaml is damaged"):
        run.start_or_continue(Config(), vocabulary, CORPUS)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"name": 1}'])
def test_a_damaged_corpus_record_is_refused(tmp_path: Path, vocabulary: Path, content: str) -> None:
    run = RunDirectory(tmp_path / "a")
    run.start_or_continue(Config(), vocabulary, CORPUS)
    run.corpus_path.write_text(content)
    with pytest.raises(CheckpointError, match=r"corpus\.json is missing or damaged"):
        run.start_or_continue(Config(), vocabulary, CORPUS)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path, vocabulary: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        RunDirectory(tmp_path / "file" / "a").start_or_continue(Config(), vocabulary, CORPUS)


def test_text_of_a_split_survives_any_line(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    lines = ["", "a\rb", "\u2028", "x\x0c\x85", "\ufeff"]
    run.write_text("test", lines, lines[::-1], [])
    assert run.text("test") == (lines, lines[::-1], [])
    assert run.text("dev") == ([], [], [])


def test_a_run_is_found_by_path_or_name(
    tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there are no runs yet"):
        RunDirectory.existing("demo")
    config = Config(corpus=CorpusConfig(name="näme"))
    RunDirectory(tmp_path / "runs" / "demo").start_or_continue(config, vocabulary, CORPUS)
    assert RunDirectory.existing("demo").path == Path("runs/demo")
    with pytest.raises(CheckpointError, match="runs/ has demo"):
        RunDirectory.existing("dema")
    assert RunDirectory.existing(str(run)).path.name == "run"
