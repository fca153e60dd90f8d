"""The logic of recorded steps on a CPU, see tests/replayed.py. Several processes: test_parallel.py."""

import weakref
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nmt.batch import Batch, Shape, covering, fit, make_batch
from nmt.config import Config, ModelConfig, MoEConfig, ParallelConfig, TrainingConfig
from nmt.cost.step import ROOM
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.fixed_exchange import FixedSizes
from nmt.parallel.mesh import World
from nmt.tokens import NUM_SPECIAL
from nmt.training import update
from nmt.training.freezing import Frozen
from nmt.training.optim import make_optimizer, tensors_to_save
from nmt.training.recording import can_record
from nmt.training.update import Updater
from tests.lessons import with_teacher
from tests.replayed import recordings

VOCAB = 50


def batches(count: int) -> list[Batch]:
    rng = np.random.default_rng(3)
    found = []
    for _ in range(count):
        number = int(rng.integers(6, 10))
        sides = [[rng.integers(NUM_SPECIAL, VOCAB, size=n) for n in rng.integers(1, 9, number)] for _ in range(2)]
        found.append(make_batch(np.arange(number), *sides))
    return found


def shape_for(data: list[Batch], more: int) -> Shape:
    """A shape that holds these batches, with room for `more` sentences."""
    return covering(*(batch.shape for batch in data)).with_room(more)


def trained(
    recorded: bool,
    micro_batches: int,
    more: dict[str, Any],
    taught: bool,
    **settings: Any,
) -> list[Any]:
    """Figures of six steps, the shape growing after three, and all that a checkpoint would have."""
    torch.manual_seed(1)
    small = {"num_experts": 4, "k": 2, "hidden_sizes": [16], "output_masking": 0.1, "expert_dropout": 0.1}
    network = ModelConfig(16, 16, dropout=0.1, word_dropout=0.1, moe=MoEConfig(**small | more))
    config = Config(model=network, training=TrainingConfig(**settings))
    model = Seq2Seq(config.model, VOCAB).train()
    optimizer = make_optimizer(model, config.training)
    frozen = Frozen(model, config.training.freeze)
    data, figures = batches(6 * micro_batches), []
    if taught:
        data = [with_teacher(batch, VOCAB) for batch in data]
    with recordings(model, optimizer) if recorded else nullcontext():
        updater = Updater(model, optimizer, config, World(torch.device("cpu")), frozen)
        for step in range(6):
            shape = shape_for(data, 2 if step < 3 else 4)
            own = [fit(batch, shape) for batch in data[step * micro_batches : (step + 1) * micro_batches]]
            done = updater.update(own, step + 1, 1e-3 * (step + 1))
            figures.append((float(done.loss), float(done.gradient_norm), float(done.skipped), done.target_tokens))
    assert (updater.recording is not None) == recorded
    if updater.recording is not None:
        kept = weakref.ref(updater.recording)
        updater.release()
        assert kept() is None
    saved = tensors_to_save(model, optimizer)
    return [figures, {f"{part}.{name}": each for part, named in saved.items() for name, each in named.items()}]


GROWN = {"gating": "hierarchical", "branching": 2, "k": 1, "straight_through": True, "bias_rate": 0.01}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("expert_optimizer", "expert_weights", "r_drop", "freeze", "more", "taught"),
    [
        ("adam", "float32", 0.0, [], {}, False),
        ("adam", "bfloat16", 0.0, ["embeddings", "experts[::2]"], {}, True),
        ("factored", "float32", 0.0, [], {}, True),
        ("factored", "bfloat16", 2.0, ["encoder", "experts[1:]"], {}, False),
        ("adam", "float32", 0.0, [], GROWN, False),
    ],
)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_replayed_steps_are_live_ones_to_the_bit(
    micro_batches: int,
    expert_optimizer: str,
    expert_weights: str,
    r_drop: float,
    freeze: list[str],
    more: dict[str, Any],
    taught: bool,
) -> None:
    settings = {"expert_optimizer": expert_optimizer, "expert_weights": expert_weights}
    both = (
        trained(recorded, micro_batches, more, taught, **settings, r_drop=r_drop, freeze=freeze)
        for recorded in (True, False)
    )
    (figures, tensors), (expected, wanted) = both
    assert figures == expected
    assert tensors.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(tensors[name], value), name


def test_gpus_record_unless_they_wait_for_the_host() -> None:
    config, world = Config(training=TrainingConfig(precision="bf16")), World(torch.device("cuda", 0))
    assert can_record(config, world)
    assert not can_record(config, World(torch.device("cpu")))
    assert not can_record(Config(training=TrainingConfig(precision="fp32")), world)
    halves = replace(config, parallel=ParallelConfig(overlap_exchange=True))
    assert can_record(halves, world)
    world.size = world.group_size = 2
    assert can_record(config, world)
    assert not can_record(halves, world)


def test_what_a_recording_computes_first_is_no_step_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = FixedSizes(MoEConfig(), torch.device("cpu"))
    sizes.suffices = False

    class Warmed:
        def __init__(self, updater: Any, *_: Any) -> None:
            updater.sizes.exceeded.fill_(True)

    monkeypatch.setattr(update, "Recording", Warmed)
    monkeypatch.setattr(update, "fixed_sizes", lambda *_: nullcontext())
    updater: Any = SimpleNamespace(
        model=torch.nn.Module(), sizes=sizes, recording=None, world=World(torch.device("cpu")), release=lambda: None
    )
    updater._update = lambda *_: "done"
    assert update.Updater._replay(updater, [], 1, 1) == "done"
    assert sizes.room == ROOM
