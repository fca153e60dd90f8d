"""Frozen parts: not a bit of them changes while everything else moves, in every kind of step and after a resumption."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nmt.checkpoint import list_checkpoints
from nmt.config import Config, ModelConfig
from nmt.config.model import ATTENTION_FUNCTIONS
from nmt.config.parts import PARTS, expert_slice
from nmt.errors import UserError
from nmt.metrics.record import TrainLine, read_lines
from nmt.model.experts import ExpertShard
from nmt.model.names import Part, is_expert
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.mesh import World
from nmt.parameters import read_tensors
from nmt.run import STARTED_FROM, RunDirectory
from nmt.training.freezing import Frozen
from tests.processes import run_ranks
from tests.toy import Cli, saved, settings, train

Configs = Callable[..., ModelConfig]
EVERY_STEP = ("training.checkpoint_every=1", "training.keep_checkpoints=9", "training.validation_sentences=0")
KINDS = {
    "float32": (),
    "several micro-batches": ("training.micro_batches=2",),
    "factored": ("training.expert_optimizer=factored",),
    "bfloat16": ("training.expert_weights=bfloat16", "training.precision=bf16"),
    "factored bfloat16": ("training.expert_weights=bfloat16", "training.expert_optimizer=factored"),
}


def freeze(*parts: str) -> str:
    return f"training.freeze={json.dumps(parts)}"


def parameters(run: Path, step: int, part: str = "model") -> dict[str, Tensor]:
    [checkpoint] = [each for each in list_checkpoints(run / "checkpoints") if each.step == step]
    return read_tensors(checkpoint.path / part)


def frozen_names(model: Seq2Seq) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


# ------------------------------------------------------------------------------------------------ which


@pytest.mark.parametrize("function", ATTENTION_FUNCTIONS)
def test_every_network_can_be_frozen_in_part(tiny_config: Configs, function: str) -> None:
    """Normalised attention has a gain, which is a parameter without dimensions."""
    model = Seq2Seq(tiny_config(function=function), 13)
    everything = sum(parameter.numel() for parameter in model.parameters())
    Frozen(model, [])
    assert frozen_names(model) == set()
    assert f" of {everything:,} parameters" in str(Frozen(model, ["attention"]))
    assert all(Part.of(name).belongs_to("attention") for name in frozen_names(model))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_the_tensors_of_its_name(tiny_config: Configs, part: str, tied: bool) -> None:
    model = Seq2Seq(tiny_config(tie_embeddings=tied, output_bias=True), 13)
    frozen = Frozen(model, [part])
    words = {
        "embeddings": ("target_embedding", "source_embedding"),
        "softmax": ("output", *(["target_embedding"] if tied else [])),
        "encoder": ("encoder.bottom", "encoder.upper"),
        "decoder": ("decoder.bottom", "decoder.upper", "decoder.attention", "decoder.context"),
        "attention": ("decoder.attention", "decoder.context"),
        "lstms": ("encoder.bottom", "encoder.upper", "decoder.bottom", "decoder.upper"),
        "gates": ("encoder.moe_layers.moe.2.gate", "decoder.moe_layers.moe.1.gate"),
        "experts": ("encoder.moe_layers.moe.2.experts", "decoder.moe_layers.moe.1.experts"),
    }
    assert frozen_names(model) == {name for name, _ in model.named_parameters() if name.startswith(words[part])}
    left = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert str(frozen).startswith(f"training {left:,} of {whole:,} parameters (")


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_freezes_its_own_of_the_chosen_experts(tiny_config: Configs, rank: int) -> None:
    config = tiny_config(num_experts=8)
    model = Seq2Seq(config, 13, ExpertShard(rank, 2))
    frozen = Frozen(model, ["experts[::4]", "experts[6:-1]"])
    own = {0: [0], 1: [0, 2]}[rank]  # of 0, 4 and 6
    for name, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
        moments = {"exp_avg": torch.ones_like(parameter), "step": torch.ones(())}
        frozen.clear_moments(name, moments)
        kept = [each for each in range(4) if not is_expert(name) or each not in own]
        assert moments["step"] == 1.0
        if is_expert(name):
            assert moments["exp_avg"][kept].eq(1.0).all()
            assert moments["exp_avg"][own].eq(0.0).all()
        else:
            assert moments["exp_avg"].eq(1.0).all()
    frozen.clear_gradients()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        frozen_rows = [row.eq(0.0).all().item() for row in parameter.grad]
        assert frozen_rows == [is_expert(name) and row in own for row in range(len(parameter))], name
    whole = Seq2Seq(config, 13)
    assert str(Frozen(whole, ["experts[::4]", "experts[6:-1]"])) == str(frozen)
    everyone = Frozen(whole, ["experts[::2]", "experts[1::2]"])
    assert frozen_names(whole) == {name for name, _ in whole.named_parameters() if is_expert(name)}
    assert str(everyone) == str(Frozen(Seq2Seq(config, 13), ["experts"]))


def test_what_cannot_be_frozen_is_refused(tiny_config: Configs, cli: Cli, corpus: Path) -> None:
    with pytest.raises(UserError, match="leaves nothing to train"):
        Frozen(Seq2Seq(tiny_config(), 13), ["embeddings", "encoder", "decoder", "gates", "experts[:]"])
    with pytest.raises(UserError, match="no MoE layer has experts with these numbers"):
        Frozen(Seq2Seq(tiny_config(), 13), ["experts[4:]"])
    for part in ("expert", "experts[1]", "experts[::0]", "experts[a:]", "experts[-:]", "experts[:"):
        with pytest.raises(UserError, match="is not a part of the network; name embeddings, softmax, encoder"):
            Config.from_dict({"training": {"freeze": [part]}})
    for part in ("gates", "experts", "experts[::2]"):
        with pytest.raises(UserError, match="the network has no MoE layer"):
            Config.from_dict({"training": {"freeze": [part]}, "model": {"moe": {"num_experts": 0}}})
    arguments = settings(corpus, "run.name=a", freeze(*PARTS), "training.max_steps=1")
    says = ("training.freeze=[embeddings, ", "leaves nothing to train")
    cli.refuses(2, "train", *arguments, says=says, progress=True)


@pytest.mark.parametrize(
    ("text", "chosen"), [("[:]", [0, 1, 2, 3]), ("[1:]", [1, 2, 3]), ("[::2]", [0, 2]), ("[-1::-2]", [3, 1])]
)
def test_a_slice_is_python_s(text: str, chosen: list[int]) -> None:
    assert [*range(4)[expert_slice(f"experts{text}")]] == chosen


# ------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("parts", [("embeddings", "experts[::2]"), ("experts", "attention"), ("encoder", "gates")])
@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_of_what_is_frozen_changes(corpus: Path, kind: str, parts: tuple[str, ...]) -> None:
    run = train(corpus, "a", 4, *EVERY_STEP, *KINDS[kind], freeze(*parts))
    before, after = parameters(run, 1), parameters(run, 4)
    for name, value in after.items():
        part = Part.of(name)
        if any(part.belongs_to(each) for each in parts):
            assert torch.equal(value, before[name]), name
        elif is_expert(name) and "experts[::2]" in parts:
            changed = [not torch.equal(*rows) for rows in zip(value, before[name], strict=True)]
            assert changed == [False, True, False, True], name
        else:
            assert not torch.equal(value, before[name]), name
    assert not any(
        Part.of(name.partition(".")[2]).belongs_to(part) for name in parameters(run, 4, "training") for part in parts
    )
    assert all(math.isfinite(line.loss) for line in read_lines(run / "metrics.jsonl", TrainLine))


def test_the_first_step_does_not_change_what_is_frozen_either(corpus: Path) -> None:
    origin = train(corpus, "origin", 1)
    changes = (f"run.start_from={origin}", freeze("lstms", "experts[1:3]"), *EVERY_STEP)
    run = train(corpus, "new", 1, *changes)
    before, after = parameters(origin, 1), parameters(run, 1)
    for name, value in after.items():
        same = torch.equal(value, before[name])
        assert same == (Part.of(name).kind == "lstms"), name
        if is_expert(name):
            assert torch.equal(value[1:3], before[name][1:3])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "factored bfloat16"])
def test_a_run_with_frozen_parts_resumes_exactly(corpus: Path, kind: str, cli: Cli) -> None:
    changes = (*KINDS[kind], freeze("lstms", "experts[::3]"), "training.max_steps=6")
    assert cli("train", *settings(corpus, "run.name=whole", *changes)) == 0, cli.err
    (line,) = [line for line in cli.err.splitlines() if line.startswith("training ")]
    assert line.endswith("%); the others are frozen")
    for steps in (2, 4, 6):
        stopped = train(corpus, "stopped", steps, *changes[:-1])
    assert saved(stopped) == saved(corpus / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "factored"])
def test_parts_can_be_frozen_and_freed_on_the_way(corpus: Path, kind: str, cli: Cli) -> None:
    stages = [(), ("embeddings", "experts[::2]"), ("attention",)]
    for number, parts in enumerate(stages, start=1):
        arguments = settings(corpus, "run.name=a", *EVERY_STEP, *KINDS[kind], f"training.max_steps={3 * number}")
        assert cli("train", *arguments, freeze(*parts)) == 0, cli.err
        assert ("training.freeze: " in cli.err) == (number > 1)
    run = corpus / "a"
    first, second, third = (parameters(run, step) for step in (3, 6, 9))
    moments = parameters(run, 6, "training")
    for name in first:
        part = Part.of(name)
        if part.kind == "embeddings":
            assert torch.equal(second[name], first[name])
            assert not any(each.endswith(f".{name}") for each in moments)
        elif is_expert(name):
            assert torch.equal(second[name][::2], first[name][::2])
            for each in (value for key, value in moments.items() if key.endswith(name) and not key.startswith("step")):
                assert each[::2].eq(0.0).all()
                assert each[1::2].ne(0.0).any()
        else:
            assert not torch.equal(second[name], first[name])
        assert torch.equal(third[name], second[name]) == (part.kind == "attention"), name
        assert third[name].isfinite().all()


def test_the_old_experts_of_a_grown_run_are_frozen(corpus: Path, tmp_path: Path, cli: Cli) -> None:
    run = train(corpus, "small", 2, freeze("lstms"))
    grown = corpus / "grown"
    assert cli("experts", str(run), "--grow", "8", "-o", str(grown)) == 0, cli.err
    (before,) = list_checkpoints(grown / "checkpoints")
    old = read_tensors(before.path / "model")
    changes = (freeze("lstms", "experts[::2]"), "training.max_steps=8", *EVERY_STEP)
    assert cli("train", str(grown), *changes) == 0, cli.err
    new = parameters(grown, 8)
    for name in filter(is_expert, old):
        assert torch.equal(new[name][::2], old[name][::2])
        assert not torch.equal(new[name][1::2], old[name][1::2])
    assert all(torch.equal(new[name], old[name]) for name in old if Part.of(name).kind == "lstms")


# ------------------------------------------------------------------------------------------------ processes


def train_shares(folder: Path, jobs: list[tuple[str, list[str]]]) -> None:
    World.stop = lambda self: None
    for name, changes in jobs:
        train(folder, name, 3, *changes)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [("lstms", "experts[::2]"), tuple(part for part in PARTS if part != "experts")])
def test_two_processes_train_what_one_does(corpus: Path, tmp_path: Path, parts: tuple[str, ...]) -> None:
    """Also where only experts are trained, of which no gradient is summed over processes. Both start from a run."""
    origin = train(corpus, "origin", 1)
    changes = [freeze(*parts), f"run.start_from={origin}", "training.micro_batches=2", *EVERY_STEP]
    one = train(corpus, "one", 3, *changes)
    run_ranks(2, tmp_path / "ranks", train_shares, corpus, [("two", changes)])
    before, after, other = parameters(origin, 1), parameters(one, 3), parameters(corpus / "two", 3)
    for name, value in after.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)
        kind = Part.of(name).kind
        assert torch.equal(value, before[name]) == (kind in parts), name
        assert torch.equal(other[name], before[name]) == (kind in parts), name
        if "experts[::2]" in parts and is_expert(name):
            assert torch.equal(other[name][::2], before[name][::2])
    for name in ("one", "two"):
        assert RunDirectory(corpus / name).corpus_info()[STARTED_FROM]["name"] == "origin"
