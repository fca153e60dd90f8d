"""The logic of recorded steps on a CPU: a stand-in for a CUDA graph does the work again, into the same tensors."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nmt.training.recording
import nmt.training.update
from nmt.batch import Batch, Shape, covering, fit, make_batch
from nmt.config import Config, ModelConfig, MoEConfig, TrainingConfig
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.mesh import World
from nmt.tokens import NUM_SPECIAL
from nmt.training.freezing import Frozen
from nmt.training.optim import make_optimizer, tensors_to_save
from nmt.training.update import Updater
from tests.lessons import with_teacher

VOCAB = 50


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


class Replayed:
    """As a graph does: making it computes nothing, but fixes the results' and the gradients' tensors."""

    state: Callable[[], list[Tensor]]
    """All that a step changes: parameters and the optimiser's state."""
    parameters: list[Tensor]

    def __init__(self, work: Callable[[], Any], _pool: Any) -> None:
        self.work, self.before = work, [parameter.grad for parameter in self.parameters]
        changed = [*self.state(), *(grad for grad in self.before if grad is not None)]
        values, noise = [tensor.clone() for tensor in changed], torch.get_rng_state()
        self.results = work()
        self.after = [parameter.grad for parameter in self.parameters]
        for tensor, value in zip(changed, values, strict=True):
            tensor.copy_(value)
        torch.set_rng_state(noise)

    def replay(self) -> Any:
        for parameter, grad in zip(self.parameters, self.before, strict=True):
            parameter.grad = grad
        for old, new in zip(tensors_in(self.results), tensors_in(self.work()), strict=True):
            old.detach().copy_(new.detach())
        for parameter, grad in zip(self.parameters, self.after, strict=True):
            if grad is not None and parameter.grad is not grad:
                grad.copy_(parameter.grad)
            parameter.grad = None
        return self.results


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(each)


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
    monkeypatch: pytest.MonkeyPatch,
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
    Replayed.parameters = list(model.parameters())
    Replayed.state = staticmethod(
        lambda: [
            *(parameter.data for parameter in model.parameters()),
            *(value for each in optimizer.state.values() for value in each.values()),
        ]
    )
    monkeypatch.setattr(nmt.training.update, "can_record", lambda *_: recorded)
    frozen = Frozen(model, config.training.freeze)
    updater = Updater(model, optimizer, config, World(torch.device("cpu")), frozen)
    data, figures = batches(6 * micro_batches), []
    if taught:
        data = [with_teacher(batch, VOCAB) for batch in data]
    for step in range(6):
        shape = shape_for(data, 2 if step < 3 else 4)
        own = [fit(batch, shape) for batch in data[step * micro_batches : (step + 1) * micro_batches]]
        done = updater.update(own, step + 1, 1e-3 * (step + 1))
        figures.append((float(done.loss), float(done.gradient_norm), float(done.skipped), done.target_tokens))
    assert (updater.recording is not None) == recorded
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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(nmt.training.recording, "Graph", Replayed)
    # A batch that is recorded must not share its memory with the one that it was copied from.
    monkeypatch.setattr(Batch, "to", lambda batch, _: batch.map(torch.clone))
    settings = {"expert_optimizer": expert_optimizer, "expert_weights": expert_weights}
    both = (
        trained(monkeypatch, recorded, micro_batches, more, taught, **settings, r_drop=r_drop, freeze=freeze)
        for recorded in (True, False)
    )
    (figures, tensors), (expected, wanted) = both
    assert figures == expected
    assert tensors.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(tensors[name], value), name
