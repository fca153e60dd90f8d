"""Read a trained network from its checkpoint, and write it to a new run after its experts were changed.

nmt/experts/grow.py and shrink.py make the changes. Optimiser moments are copied, left out or averaged like the weights
they belong to. The step and the position in the data stay the same, so that training resumes with the same text. The
learning rate is the same too, but after growth it is warmed up once more.

Letters: D width, E experts.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nmt.checkpoint import Checkpoint, choose
from nmt.config import Config, ModelConfig
from nmt.errors import StorageError, UserError
from nmt.files import folder_atomically
from nmt.model.assemble import assemble
from nmt.model.names import expert_dim, layer_prefix
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.saving import save_checkpoint
from nmt.parameters import read_model, read_tensors
from nmt.run import RunDirectory
from nmt.training.optim import has_moments, state_shapes
from nmt.training.progress import Progress


class TrainedWeight(NamedTuple):
    """A parameter and its optimiser state (`nmt.training.optim.state_shapes`)."""

    value: Tensor
    moments: dict[str, Tensor]
    """Moments by name; empty for a parameter that was never trained."""
    step: Tensor  # float32 scalar

    @classmethod
    def new(cls, value: Tensor) -> "TrainedWeight":
        """Return a parameter that was never trained."""
        return cls(value, {}, torch.zeros(()))

    def changed(self, change: Callable[[Tensor], Tensor]) -> "TrainedWeight":
        """Return this parameter with `change` applied to its value and all moments."""
        return TrainedWeight(
            change(self.value), {name: change(moment) for name, moment in self.moments.items()}, self.step
        )


Weights = dict[str, TrainedWeight]
"""Weights by name: of the whole network, or of one MoE layer without the layer's prefix."""


@dataclass(frozen=True)
class NetworkWeights:
    """A network as saved in its checkpoint, on the CPU."""

    config: ModelConfig
    vocab_size: int
    weights: Weights

    def layer(self, layer: str) -> Weights:
        """Return the weights of one MoE layer, such as "encoder.2": gate.w_gate_DE, experts.weights.0, ..."""
        prefix = layer_prefix(layer)
        return {name.removeprefix(prefix): weight for name, weight in self.weights.items() if name.startswith(prefix)}

    def with_layers(self, config: ModelConfig, layers: Mapping[str, Weights]) -> "NetworkWeights":
        """Return this network with other MoE layers, which `config` describes."""
        prefixes = tuple(map(layer_prefix, layers))
        weights = {name: weight for name, weight in self.weights.items() if not name.startswith(prefixes)}
        for layer, own in layers.items():
            weights |= {f"{layer_prefix(layer)}{name}": weight for name, weight in own.items()}
        return NetworkWeights(config, self.vocab_size, weights)

    def build(self) -> Seq2Seq:
        """Return the model with these weights, in evaluation mode."""
        return assemble(self.config, self.vocab_size, {name: each.value for name, each in self.weights.items()})


def select_experts(weights: Weights, index_E: Tensor) -> Weights:
    """Return an MoE layer whose expert e has the matrices and gate columns of the old expert index[e]."""
    selected = {}
    for name, weight in weights.items():
        dim = expert_dim(name)
        selected[name] = weight if dim is None else weight.changed(partial(torch.index_select, dim=dim, index=index_E))
    return selected


def with_counts(config: ModelConfig, counts: Mapping[str, int]) -> ModelConfig:
    """Return `config` with `counts` experts by layer.

    num_experts is the most frequent count (on a tie, the larger one), and num_experts_at has the layers that differ.
    copies is 1, since the numbers of experts no longer show which were copied.
    """
    frequency = Counter(counts.values())
    usual = max(frequency, key=lambda count: (frequency[count], count))
    others = {layer: count for layer, count in counts.items() if count != usual}
    return replace(config, moe=replace(config.moe, num_experts=usual, num_experts_at=others, copies=1))


# ------------------------------------------------------------------------------------------- reading and writing


def read_network(
    run: RunDirectory, config: Config, vocabulary: str, vocab_size: int
) -> tuple[NetworkWeights, Checkpoint]:
    """Return a run's network at the checkpoint that `config.decoding` names, which must not be an average."""
    if config.decoding.checkpoint == "average":
        raise UserError("decoding.checkpoint=average has no optimiser state to resume from: use best, last or a step")
    (checkpoint,) = choose(run.checkpoints, config.decoding.checkpoint, 1)
    model = read_model([checkpoint], config.model, vocab_size, vocabulary)
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = read_tensors(checkpoint.path / "training")
    kind = config.training.expert_optimizer
    shapes = {name: state_shapes(name, value.shape, kind) for name, value in values.items()}
    weights = {name: TrainedWeight.new(value) for name, value in values.items()}
    for name in has_moments(checkpoint, tensors, shapes):
        state = {moment: tensors[f"{moment}.{name}"] for moment in shapes[name]}
        step = state.pop("step")
        weights[name] = TrainedWeight(values[name], state, step)
    return NetworkWeights(config.model, vocab_size, weights), checkpoint


def write_run(
    path: Path, source: RunDirectory, config: Config, network: NetworkWeights, checkpoint: Checkpoint, grown: bool
) -> None:
    """Write a run to `path` that resumes from `checkpoint` of the run `source` with another network.

    Writes the whole folder or nothing; StorageError if it cannot. Counters are copied, except those that compare
    validations: the new run has its own scores and patience starts again. The checkpoint has no score. If the network
    has `grown`, the learning rate is warmed up from here, since copies must move apart before they take large steps.
    """
    state = checkpoint.state()
    progress = replace(
        Progress.of(checkpoint),
        best_score=math.inf,
        score_before=math.inf,
        validations_since_best=0,
        bad_intervals=0,
    )
    if grown:
        progress = replace(progress, warm_from=checkpoint.step, next_rate=None)
    model = network.build()
    moments = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        weight = network.weights[name]
        held = {"step": weight.step} | weight.moments
        for moment, shape in state_shapes(name, parameter.shape, config.training.expert_optimizer).items():
            moments[f"{moment}.{name}"] = held[moment].contiguous() if moment in held else torch.zeros(shape)
    try:
        with folder_atomically(path) as folder:
            new = RunDirectory(folder)
            save_checkpoint(
                new.checkpoints,
                checkpoint.step,
                {"model": dict(model.named_parameters()), "training": moments},
                state | {"progress": asdict(progress)},
                None,
                checkpoint.manifest["vocabulary"],
            )
            for split in ("dev", "test"):
                new.write_text(split, *source.text(split), source.directions(split))
            new.start_or_continue(config, source.subwords_path, source.corpus_info())
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
