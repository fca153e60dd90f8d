"""Recorded steps compute what steps launched one kernel at a time compute: to the bit, with dropout and noise."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import nmt.training.update
from nmt.batch import Batch, Shape, covering, fit, make_batch
from nmt.config import AttentionConfig, Config, ModelConfig, MoEConfig, TrainingConfig
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.expert_parallel import fixed_sizes, make_model
from nmt.parallel.fixed_exchange import FixedSizes
from nmt.parallel.mesh import World
from nmt.tokens import NUM_SPECIAL
from nmt.training.freezing import Frozen
from nmt.training.optim import make_optimizer
from nmt.training.update import UpdateOutput, Updater
from tests.lessons import with_teacher
from tests.processes import run_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")

VOCAB = 512
MOE = MoEConfig(num_experts=8, k=2, hidden_sizes=[256])
GROWN = replace(MOE, gating="hierarchical", branching=4, k=1, straight_through=True, bias_rate=0.01)
CONFIGS = {
    "moe": ModelConfig(256, 512, attention=AttentionConfig(size=256), moe=MOE),
    "dense": ModelConfig(256, 256, moe=MoEConfig(0)),
    "gnmt_v2": ModelConfig(256, 256, moe=MoEConfig(0), attention=AttentionConfig("normalised", 256, "gnmt_v2")),
    "every dropout": ModelConfig(
        256,
        256,
        word_dropout=0.1,
        moe=MoEConfig(num_experts=8, k=2, hidden_sizes=[256], output_masking=0.1, expert_dropout=0.2),
    ),
    "grown": ModelConfig(256, 256, moe=GROWN),
    "taught": ModelConfig(256, 256, moe=MOE),
    "feedback": ModelConfig(256, 256, moe=MOE, attention=AttentionConfig(wiring="feedback")),
    "norms": ModelConfig(
        256, 256, moe=MOE, norm="layers", bidirectional_layers=3, attention=AttentionConfig(size=256, heads=4)
    ),
}


def batches(count: int, seed: int) -> list[Batch]:
    """Random batches of different sizes."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        number = int(rng.integers(20, 30))
        sides = [[rng.integers(NUM_SPECIAL, VOCAB, size=n) for n in rng.integers(1, 24, number)] for _ in range(2)]
        found.append(make_batch(np.arange(number), *sides))
    return found


def shape_for(data: list[Batch], more: int) -> Shape:
    """A shape that holds these batches, with room for `more` sentences."""
    return covering(*(batch.shape for batch in data)).with_room(more)


def trained(config: ModelConfig, steps: list[list[Batch]], shape: Shape, **training: Any) -> tuple[list[Any], Updater]:
    """Figures of all steps and the parameters after them."""
    torch.manual_seed(1)
    settings = Config(model=config, training=TrainingConfig(**training))
    model = Seq2Seq(config, VOCAB).cuda().train()
    frozen, optimizer = Frozen(model, settings.training.freeze), make_optimizer(model, settings.training)
    updater = Updater(model, optimizer, settings, World(torch.device("cuda", 0)), frozen)
    figures: list[Any] = []
    for step, micro_batches in enumerate(steps, start=1):
        done = updater.update([fit(batch, shape).pin_memory() for batch in micro_batches], step, 1e-3 * step)
        figures.append(figures_of(done))
    return [*figures, {name: each.detach() for name, each in model.named_parameters()}], updater


def figures_of(done: UpdateOutput) -> dict[str, Tensor]:
    sums = {f"{layer}.{place}": part for layer, each in done.sums.items() for place, part in enumerate(each.parts())}
    return {"loss": done.loss, "nll": done.nll, "norm": done.gradient_norm, "skipped": done.skipped, **sums}


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_recorded_steps_are_the_same_to_the_bit(name: str, micro_batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    r_drop = 2.0 if name == "every dropout" else 0.0
    # All of the encoder, so that no gradient passes its LSTMs, or some experts.
    freeze = {"moe": ["embeddings", "encoder"], "every dropout": ["experts[::2]", "attention"]}.get(name, [])
    data = batches(4 * micro_batches, 3)
    if name == "taught":
        data = [with_teacher(batch, VOCAB) for batch in data]
    shape = shape_for(data, 2)
    steps = [data[first : first + micro_batches] for first in range(0, len(data), micro_batches)]
    recorded, updater = trained(CONFIGS[name], steps, shape, r_drop=r_drop, freeze=freeze)
    assert updater.recording is not None
    monkeypatch.setattr(nmt.training.update, "can_record", lambda *_: False)
    plain, updater = trained(CONFIGS[name], steps, shape, r_drop=r_drop, freeze=freeze)
    assert updater.recording is None
    for one, other in zip(recorded, plain, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("name", ["moe", "grown"])
def test_a_recorded_step_does_not_wait_for_the_device(name: str) -> None:
    data = batches(3, 4)
    shape = shape_for(data, 0)
    _, updater = trained(CONFIGS[name], [data[:1]], shape, freeze=["experts[::2]"])
    fitted = [fit(batch, shape).pin_memory() for batch in data[1:]]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, batch in enumerate(fitted, start=2):
            updater.update([batch], step, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_gradient_that_is_not_finite_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches(2, 5)
    shape = shape_for(data, 0)
    (*_, before), updater = trained(CONFIGS["moe"], [data[:1]], shape)
    kept = {name: value.clone() for name, value in before.items()}
    parameter = updater.model.output.weight
    with torch.no_grad():
        saved = parameter[5].clone()
        parameter[5] = torch.nan
    done = updater.update([fit(data[1], shape)], 2, 1e-3)
    assert done.skipped == 1
    with torch.no_grad():
        parameter[5] = saved
    assert all(torch.equal(value, kept[name]) for name, value in updater.model.named_parameters())


TWO = ("moe", "dense", "every dropout", "grown")
HOW = ("recorded", "live")


def _by_two_gpus() -> dict[str, dict[str, Tensor]]:
    found = {f"{name}, {how}": _trained_by_two(CONFIGS[name], how == "recorded") for name in TWO for how in HOW}
    dist.destroy_process_group()
    return found


def _trained_by_two(model_config: ModelConfig, recorded: bool) -> dict[str, Tensor]:
    """Figures of four steps of two micro-batches per process, and this process's parameters after them."""
    config = Config(model=model_config, training=TrainingConfig(micro_batches=4))
    world = World.start("cuda", config.parallel)
    torch.manual_seed(1)
    model = make_model(config, VOCAB, world).to(world.device).train()
    data = batches(16, 3)
    shape, found = shape_for(data, 2), {}
    # Live steps have exchanges of the same sizes: how the GPU tiles products depends on the number of rows.
    sizes = None if recorded else FixedSizes(model_config.moe, world.device)
    live = patch.object(nmt.training.update, "can_record", lambda *_: False)
    with nullcontext() if recorded else live, nullcontext() if recorded else fixed_sizes(model, sizes):
        updater = Updater(model, make_optimizer(model, config.training), config, world)
        for step in range(4):
            own = [fit(batch, shape).pin_memory() for batch in data[4 * step : 4 * step + 4][world.rank :: 2]]
            done = updater.update(own, step + 1, 1e-3)
            found |= {f"{step} {name}": value.cpu() for name, value in figures_of(done).items()}
    assert (updater.recording is not None) == recorded
    updater.release()
    return found | {name: each.detach().cpu() for name, each in model.named_parameters()}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_recorded_steps_of_two_gpus_are_the_same_to_the_bit(tmp_path: Path) -> None:
    """With exchanges of fixed sizes, and gradients summed after the backward pass."""
    for rank, result in enumerate(run_ranks(2, tmp_path, _by_two_gpus)):
        for name in TWO:
            recorded, live = (result[f"{name}, {how}"] for how in HOW)
            assert recorded.keys() == live.keys()
            for key, value in recorded.items():
                assert torch.equal(value, live[key]), (rank, name, key)
