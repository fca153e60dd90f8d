"""Parameters on disk: used where they lie, checked before anything is allocated, written without another copy."""

import json
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter

import nmt.parameters
import nmt.training.trainer
from nmt.checkpoint import Checkpoint, list_checkpoints, seal
from nmt.config import Config, ModelConfig
from nmt.errors import CheckpointError
from nmt.experts.surgery import read_network
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.mesh import World
from nmt.parallel.saving import load_parameters, save_checkpoint
from nmt.parameters import OFFSETS, read_model, read_parameters, read_tensors
from nmt.run import RunDirectory
from tests.conftest import TINY_VOCAB
from tests.toy import saved, train

Configs = Callable[..., ModelConfig]


def write(folder: Path, model: Seq2Seq, step: int = 1) -> Checkpoint:
    parts = {"model": {name: parameter.detach() for name, parameter in model.named_parameters()}}
    save_checkpoint(folder, step, parts, {}, None, "words")
    return next(each for each in list_checkpoints(folder) if each.step == step)


def sealed(folder: Path, tensors: dict[str, Tensor], offsets: dict[str, list[int]] | None = None) -> Checkpoint:
    """A checkpoint of these tensors, as anybody could make one."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    about = {OFFSETS: json.dumps({name: {"saved_offsets": at} for name, at in offsets.items()})} if offsets else None
    save_file(tensors, folder / "model" / f"{len(list(folder.rglob('*.safetensors')))}.safetensors", about)
    seal(folder, {"step": 1, "score": None, "vocabulary": "words"})
    return Checkpoint(folder, 1, json.loads((folder / "manifest.json").read_text()))


def parameters(model: Seq2Seq) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_model_is_the_saved_one_and_nothing_is_drawn(tmp_path: Path, tiny_config: Configs, tied: bool) -> None:
    config = tiny_config(tie_embeddings=tied)
    model = Seq2Seq(config, TINY_VOCAB)
    checkpoint = write(tmp_path, model)
    before = torch.get_rng_state()
    read = read_model([checkpoint], config, TINY_VOCAB, "words")
    assert torch.equal(torch.get_rng_state(), before)
    assert [name for name, _ in read.named_parameters()] == [name for name, _ in model.named_parameters()]
    own = parameters(read)
    assert all(torch.equal(own[name], value) for name, value in parameters(model).items())
    assert (read.output.weight is read.source_embedding.weight) == tied
    assert not read.training
    # Pages of the file, of which a change makes a copy.
    with torch.no_grad():
        read.output.weight.fill_(7.0)
    assert checkpoint.verify() is None


def test_the_mean_of_several_is_read_without_changing_any(tmp_path: Path, tiny_config: Configs) -> None:
    models = [Seq2Seq(tiny_config(), TINY_VOCAB) for _ in range(3)]
    written = [write(tmp_path, model, step) for step, model in enumerate(models, start=1)]
    read = parameters(read_model(written, tiny_config(), TINY_VOCAB, "words"))
    for name, value in read.items():
        expected = sum(parameters(model)[name] / 3 for model in models)
        assert torch.equal(value, expected)
    assert [each.verify() for each in written] == [None] * 3


def test_experts_of_several_files_are_put_together_in_order(tmp_path: Path) -> None:
    whole = torch.randn(6, 2, 3)
    for first in (4, 0):
        share = {"w": whole[first : first + (4 if first == 0 else 2)].clone()} | ({"b": torch.ones(2)} if first else {})
        checkpoint = sealed(tmp_path, share, {"w": [first, 0, 0], "b": [0]})
    read = read_parameters([checkpoint], {"w": (6, 2, 3), "b": (2,)}, "words")
    assert torch.equal(read["w"], whole)


@pytest.mark.parametrize("offsets", [[0, 0], [1, 0], [3, 0], [2, 1]])
def test_parts_that_overlap_or_leave_a_gap_are_refused(tmp_path: Path, offsets: list[int]) -> None:
    sealed(tmp_path, {"w": torch.ones(2, 3)}, {"w": [0, 0]})
    checkpoint = sealed(tmp_path, {"w": torch.ones(2, 3)}, {"w": offsets})
    with pytest.raises(CheckpointError, match="the parts of w do not fit"):
        read_parameters([checkpoint], {"w": (4, 3)}, "words")


# ------------------------------------------------------------------------------------- files that a stranger made


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 20_000, "cell_size": 20_000},
        {"hidden_size": 10**9, "cell_size": 10**9},
        {"num_experts": 10**8},
        {"num_encoder_layers": 10**7},
        {"num_decoder_layers": 10**7},
        {"hidden_sizes": [7] * 10**5},
        {"hidden_sizes": [10**12]},
    ],
)
def test_a_config_that_asks_for_more_than_the_file_has_is_refused_before_anything_is_allocated(
    tmp_path: Path, tiny_config: Configs, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    checkpoint = write(tmp_path, Seq2Seq(tiny_config(), TINY_VOCAB))
    config = tiny_config()
    # Whatever bounds the settings have of their own.
    for name, value in changes.items():
        setattr(config if hasattr(config, name) else config.moe, name, value)
    monkeypatch.setattr(nmt.parameters, "read_stored", lambda *_: pytest.fail("read"))
    with pytest.raises(CheckpointError, match=r"does not fit the run's config\.yaml"):
        read_model([checkpoint], config, TINY_VOCAB, "words")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, tiny_config: Configs, number: float) -> None:
    model = Seq2Seq(tiny_config(), TINY_VOCAB)
    good = write(tmp_path, model, 1)
    with torch.no_grad():
        model.decoder.attention.query.weight[2, 1] = number
    bad = write(tmp_path, model, 2)
    says = r"decoder.attention.query.weight has NaN or infinite"
    for checkpoints in ([bad], [good, bad]):
        with pytest.raises(CheckpointError, match=says):
            read_model(checkpoints, tiny_config(), TINY_VOCAB, "words")
    with pytest.raises(CheckpointError, match=says):
        load_parameters(bad, Config(model=tiny_config()), TINY_VOCAB, "words", World(torch.device("cpu")))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.bfloat16])
def test_weights_of_another_type_are_refused(tmp_path: Path, tiny_config: Configs, dtype: torch.dtype) -> None:
    tensors = parameters(Seq2Seq(tiny_config(), TINY_VOCAB))
    name = "decoder.attention.v_N"
    checkpoint = sealed(tmp_path, tensors | {name: tensors[name].to(dtype)})
    with pytest.raises(CheckpointError, match=f"{name} is .*, not F32"):
        read_model([checkpoint], tiny_config(), TINY_VOCAB, "words")


def test_a_damaged_file_is_told_as_such_not_as_one_that_does_not_fit(tmp_path: Path, tiny_config: Configs) -> None:
    checkpoint = write(tmp_path, Seq2Seq(tiny_config(), TINY_VOCAB))
    (path,) = checkpoint.path.rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    place = content.index(b"[13,6]")
    content[place : place + 6] = b"[6,13]"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged .*sha256 differs"):
        read_model([checkpoint], tiny_config(), TINY_VOCAB, "words")


# ------------------------------------------------------------------------------------------------------- writing


def _kilobytes(what: str) -> int:
    found = re.search(rf"^{what}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found
    return int(found[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells a process its peak")
def test_saving_takes_one_copy_of_the_tensors(tmp_path: Path) -> None:
    tensors = {str(place): torch.full((4 * 2**20,), float(place)) for place in range(8)}
    save_checkpoint(tmp_path, 1, {"model": {"0": tensors["0"][:9].clone()}}, {}, None, "words")  # what comes once
    size = sum(tensor.nbytes for tensor in tensors.values()) // 1024
    before = _kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    save_checkpoint(tmp_path, 2, {"model": tensors}, {}, None, "words")
    assert _kilobytes("VmHWM") - before < 1.3 * size


def test_a_checkpoint_is_an_ordinary_file_that_others_read(tmp_path: Path, tiny_config: Configs) -> None:
    model = Seq2Seq(tiny_config(), TINY_VOCAB)
    (path,) = write(tmp_path, model).path.rglob("*.safetensors")
    other = tmp_path / "other"
    other.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    read = load_file(path)
    assert all(torch.equal(read[name], value) for name, value in parameters(model).items())
    # And the library's own reader, which versions before used.
    targets = {name: torch.empty_like(value) for name, value in parameters(model).items()}
    dcp.load(targets, storage_reader=dcp.HuggingFaceStorageReader(str(path.parent)), no_dist=True)
    assert all(torch.equal(targets[name], value) for name, value in read.items())


def test_checkpoints_of_earlier_versions_are_read(tmp_path: Path, tiny_config: Configs) -> None:
    tensors = parameters(Seq2Seq(tiny_config(), TINY_VOCAB)) | {"step": torch.tensor(3.0)}
    writer = HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
    dcp.save(tensors, storage_writer=writer, no_dist=True)
    read = read_tensors(tmp_path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) for name, value in tensors.items())


def test_training_that_resumes_draws_no_parameters(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(corpus, "resumed", 2)

    def drawn(tensor: Tensor, *_: float, **__: Any) -> Tensor:
        assert tensor.is_meta, "parameters were drawn at random"
        return tensor

    monkeypatch.setattr(torch.nn.init, "normal_", drawn)
    monkeypatch.setattr(torch.nn.init, "uniform_", drawn)
    with pytest.raises(AssertionError, match="were drawn at random"):
        train(corpus, "new", 2)
    train(corpus, "resumed", 3)


# ------------------------------------------------------------------------------------------------ hashes of tensors


def flip_a_bit(path: Path, name: str) -> None:
    """One bit of the last number of a tensor."""
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin + json.loads(data[8:begin])[name]["data_offsets"][1] - 1] ^= 1
    path.write_bytes(data)


def test_a_part_is_verified_by_the_hashes_of_that_part(tmp_path: Path, tiny_config: Configs) -> None:
    checkpoint = write(tmp_path, Seq2Seq(tiny_config(), TINY_VOCAB), 1)
    (path,) = checkpoint.parameters.glob("*.safetensors")
    hurt, other = "decoder.attention.query.weight", "decoder.attention.key.weight"
    flip_a_bit(path, hurt)
    assert checkpoint.verify("model", [other]) is None
    for tensors in (None, [hurt], [other, hurt]):
        assert "sha256 differs" in str(checkpoint.verify("model", tensors))
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"F32"', b'"I32"', 1))  # the header alone
    assert "sha256 differs" in str(checkpoint.verify("model", [other]))


def test_a_manifest_without_hashes_of_tensors_is_verified_by_files(tmp_path: Path, tiny_config: Configs) -> None:
    checkpoint = write(tmp_path, Seq2Seq(tiny_config(), TINY_VOCAB), 1)
    (name,) = (name for name, each in checkpoint.manifest["files"].items() if "tensors" in each)
    del checkpoint.manifest["files"][name]["tensors"]
    assert checkpoint.verify() is None
    flip_a_bit(checkpoint.path / name, "decoder.attention.query.weight")
    assert "sha256 differs" in str(checkpoint.verify("model", ["decoder.attention.key.weight"]))


def test_hashes_of_other_tensors_vouch_for_nothing(tmp_path: Path, tiny_config: Configs) -> None:
    checkpoint = write(tmp_path, Seq2Seq(tiny_config(), TINY_VOCAB), 1)
    (name,) = (name for name, each in checkpoint.manifest["files"].items() if "tensors" in each)
    del checkpoint.manifest["files"][name]["tensors"]["decoder.attention.query.weight"]
    assert "it has other tensors" in str(checkpoint.verify())


# ---------------------------------------------------------------------------------------------- frozen parameters


def test_a_run_with_frozen_parameters_goes_on_and_can_be_resized(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = nmt.training.trainer.make_model

    def frozen(*arguments: Any) -> Seq2Seq:
        model = original(*arguments)
        model.encoder.bottom.requires_grad_(False)
        return model

    monkeypatch.setattr(nmt.training.trainer, "make_model", frozen)
    whole = train(corpus, "whole", 6)
    for steps in (3, 6):
        stopped = train(corpus, "stopped", steps)
    assert saved(stopped) == saved(whole)
    moments = read_tensors(list_checkpoints(whole / "checkpoints")[-1].path / "training")
    assert not any("encoder.bottom" in name for name in moments)
    run = RunDirectory.existing(str(whole))
    config = run.config()
    last = replace(config, decoding=replace(config.decoding, checkpoint="last"))
    manifest = list_checkpoints(run.checkpoints)[-1].manifest
    vocab_size = run.corpus_info()["vocabulary_size"]
    network, _ = read_network(run, last, manifest["vocabulary"], vocab_size)
    held = {name: bool(weight.moments) for name, weight in network.weights.items()}
    assert all(kept != name.startswith("encoder.bottom") for name, kept in held.items())
