"""Parameters on disk: safetensors files, read without a copy and checked before memory is allocated.

A folder has one file, or one per process that wrote it. In the second case, each file has parts of the experts'
tensors, split along the first dimension, with the offset of each part. A tensor that is whole in one file is mapped
into memory instead of copied. Writing to it changes the process's own copy of a page, never the file.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nmt.checkpoint import BF16_FORMAT, Checkpoint
from nmt.config import ModelConfig
from nmt.errors import CheckpointError, StorageError
from nmt.model.assemble import assemble, skeleton
from nmt.model.experts import Experts
from nmt.model.names import expert_matrix, is_expert, layer_prefix
from nmt.model.seq2seq import Seq2Seq
from nmt.model.working import precise_names

Tensors = dict[str, Tensor]
Shape = tuple[int, ...]

OFFSETS = "DCP_SHARDING_INFO"
"""Key in a file's header whose value has, as JSON, the offset of each of its tensors in the whole tensor."""


class _Part(NamedTuple):
    """A tensor, or a part of it, in one file."""

    path: Path
    offset: Shape
    shape: Shape


class Stored(NamedTuple):
    """A tensor that is stored in a folder, as described by the headers of its files."""

    dtype: str  # in the notation of safetensors: F32
    shape: Shape  # of the whole tensor
    parts: list[_Part]  # in order


def stored(folder: Path) -> dict[str, Stored]:
    """Return the tensors of all safetensors files of a folder, by name. CheckpointError if they are incomplete."""
    parts: dict[str, list[_Part]] = {}
    dtypes: dict[str, set[str]] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                offsets = json.loads((file.metadata() or {}).get(OFFSETS, "{}"))
                for name in file.keys():  # noqa: SIM118 - no dictionary
                    shape = tuple(file.get_slice(name).get_shape())
                    offset = tuple(map(int, offsets[name]["saved_offsets"])) if offsets else (0,) * len(shape)
                    parts.setdefault(name, []).append(_Part(path, offset, shape))
                    dtypes.setdefault(name, set()).add(file.get_slice(name).get_dtype())
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder} has no valid safetensors ({' '.join(str(error).split())})") from error
    if not parts:
        raise CheckpointError(f"{folder} has no safetensors")
    return {name: _whole(folder, name, parts[name], dtypes[name]) for name in parts}


def _whole(folder: Path, name: str, parts: list[_Part], dtypes: set[str]) -> Stored:
    """Return the tensor that consists of `parts`. CheckpointError unless they follow each other without a gap."""
    first, *others = parts = sorted(parts, key=lambda part: part.offset)
    whole = not any(first.offset) and len(dtypes) == 1
    end = first.shape[0] if first.shape else 0
    for part in others:
        whole = whole and bool(part.shape) and part.offset == (end, *first.offset[1:])
        whole = whole and part.shape[1:] == first.shape[1:]
        end += part.shape[0] if part.shape else 0
    if not whole:
        raise CheckpointError(f"{folder} has tensors that this program did not write (the parts of {name} do not fit)")
    return Stored(dtypes.pop(), (end, *first.shape[1:]) if first.shape else (), parts)


def read_tensors(folder: Path) -> Tensors:
    """Return all tensors of a folder on the CPU; those in one file are memory-mapped. CheckpointError if damaged."""
    return {name: read_stored(each, name) for name, each in stored(folder).items()}


def read_stored(each: Stored, name: str, rows: range | None = None) -> Tensor:
    """Return a stored tensor, or only these consecutive rows of it, on the CPU."""
    found = []
    for part in each.parts:
        with safe_open(part.path, framework="pt") as file:
            if rows is None:
                found.append(file.get_tensor(name))
                continue
            first, size = part.offset[0], part.shape[0]
            if (begin := max(rows.start - first, 0)) < (end := min(rows.stop - first, size)):
                found.append(file.get_slice(name)[begin:end])
    return found[0] if len(found) == 1 else torch.cat(found)


def check_parameters(
    checkpoint: Checkpoint,
    found: Mapping[str, Stored],
    shapes: Mapping[str, Sequence[int]],
    in_bf16: Collection[str] = (),
) -> None:
    """Raise CheckpointError unless the stored tensors have exactly these names and shapes, and the right types.

    The type is bf16 for the names `in_bf16`, and float32 for all others.
    """
    for name in sorted(shapes.keys() | found.keys()):
        there, here = found.get(name), shapes.get(name)
        if there is None or here is None or there.shape != tuple(here):
            raise CheckpointError(
                f"{checkpoint.path} does not fit the run's config.yaml (parameter {name}: {_shape(there)} there, "
                f"{'none' if here is None else list(here)} by config.yaml): one of them was changed"
            )
        dtype = "BF16" if name in in_bf16 else "F32"
        if there.dtype != dtype:
            raise CheckpointError(
                f"{checkpoint.path} is damaged (parameter {name} is {there.dtype}, not {dtype}): choose or copy another"
            )


def _shape(there: Stored | None) -> str:
    return "none" if there is None else str(list(there.shape))


def check_finite(checkpoint: Checkpoint, name: str, parameter: Tensor) -> None:
    """Raise CheckpointError if a number is NaN or infinite: such a model is not the one that was trained."""
    # Minimum and maximum are NaN if any number is. Unlike isfinite, they need no second tensor of this size.
    if parameter.numel() and not all(math.isfinite(extreme) for extreme in parameter.aminmax()):
        raise CheckpointError(
            f"{checkpoint.path} is damaged (parameter {name} has NaN or infinite numbers): choose or copy another"
        )


def check_vocabulary(checkpoint: Checkpoint, vocabulary: str) -> None:
    """Raise CheckpointError unless a checkpoint was trained with this vocabulary."""
    if checkpoint.manifest["vocabulary"] != vocabulary:
        raise CheckpointError(
            f"{checkpoint.path} was trained with another vocabulary than the run's subwords.model "
            f"({checkpoint.manifest['vocabulary'][:12]} there, {vocabulary[:12]} here): restore the right file"
        )


def _check_hashes(checkpoint: Checkpoint, tensors: Collection[str] | None = None) -> None:
    """Raise CheckpointError unless the parameter files, or only these tensors in them, are as they were written."""
    problem = checkpoint.verify("model", tensors)
    if problem:
        raise CheckpointError(_damage(checkpoint, problem))


def _damage(checkpoint: Checkpoint, problem: str) -> str:
    again, other = "copy it again from its source", "choose another with decoding.checkpoint=STEP"
    return f"{checkpoint.path} is damaged ({problem}): {again if checkpoint.exported else other}"


class _Waking:
    """Verifies each expert of an exported model before its first product."""

    def __init__(self, checkpoint: Checkpoint, layer: str, experts: Experts) -> None:
        self._checkpoint, self._experts = checkpoint, experts
        self._names = [layer_prefix(layer) + expert_matrix(place) for place in range(len(experts.weights))]
        self._verified: set[int] = set()

    def __call__(self, woken: Collection[int]) -> None:
        """Raise CheckpointError if one of the experts `woken` is damaged."""
        new = [expert for expert in woken if expert not in self._verified]
        for name, w_EIO in zip(self._names, self._experts.weights, strict=True) if new else ():
            problem = self._checkpoint.verify_experts(name, new)
            if problem:
                raise CheckpointError(_damage(self._checkpoint, problem))
            for expert in new:
                check_finite(self._checkpoint, name, w_EIO[expert].detach())
        self._verified.update(new)


def read_parameters(
    checkpoints: Sequence[Checkpoint],
    shapes: Mapping[str, Sequence[int]],
    vocabulary: str,
    in_bf16: Collection[str] = (),
    asleep: Collection[str] = (),
) -> Tensors:
    """Return the mean of the parameters of checkpoints, verified against their hashes, `shapes` and `vocabulary`.

    `in_bf16` is as for `check_parameters`. Tensors `asleep` are mapped, but neither verified nor read. CheckpointError
    if a checkpoint is damaged or does not fit. Shapes are compared before any number is read.
    """
    stores = []
    for checkpoint in checkpoints:
        check_vocabulary(checkpoint, vocabulary)
        try:
            stores.append(stored(checkpoint.parameters))
            check_parameters(checkpoint, stores[-1], shapes, in_bf16)
        except CheckpointError:
            _check_hashes(checkpoint)  # damage is the better explanation
            raise
    awake = shapes.keys() - set(asleep)
    for checkpoint in checkpoints:
        _check_hashes(checkpoint, awake if asleep else None)
    tensors = {name: _mean(checkpoints, [store[name] for store in stores], name) for name in awake}
    return tensors | {name: read_stored(stores[0][name], name) for name in asleep}


def _mean(checkpoints: Sequence[Checkpoint], stores: Sequence[Stored], name: str) -> Tensor:
    mean: Tensor | None = None
    for checkpoint, each in zip(checkpoints, stores, strict=True):
        parameter = read_stored(each, name)
        check_finite(checkpoint, name, parameter)
        share = parameter if len(checkpoints) == 1 else parameter / len(checkpoints)
        mean = share if mean is None else mean.add_(share)
    assert mean is not None
    return mean


def read_model(
    checkpoints: Sequence[Checkpoint],
    config: ModelConfig,
    vocab_size: int,
    vocabulary: str,
    in_place: Collection[str] = (),
) -> Seq2Seq:
    """Return the network with the mean of the parameters of checkpoints, on the CPU, in evaluation mode.

    The caller uses experts that are stored in a type `in_place` (F32, BF16) where they are, so that not all of them
    need to be read. If the checkpoint is an exported model with a hash for each expert, these are verified when they
    are first used, which may then raise CheckpointError.

    Draws no random numbers and copies no files. CheckpointError if one is damaged or does not fit. Shapes are compared
    before any number is read.
    """
    first = checkpoints[0]
    network = _skeleton_within(first, config, vocab_size)
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    narrow = first.manifest.get("format") == BF16_FORMAT
    in_bf16 = shapes.keys() - precise_names(network) if narrow else set()
    lazily = len(checkpoints) == 1 and first.verifies_experts and ("BF16" if narrow else "F32") in in_place
    asleep = [name for name in shapes if lazily and is_expert(name)]
    tensors = read_parameters(checkpoints, shapes, vocabulary, in_bf16, asleep)
    model = assemble(config, vocab_size, tensors)
    if asleep:
        for layer, moe in model.moe_layers().items():
            moe.experts.when_woken = _Waking(first, layer, moe.experts)
    return model


def _skeleton_within(checkpoint: Checkpoint, config: ModelConfig, vocab_size: int) -> Seq2Seq:
    """Return the network without memory for its parameters.

    CheckpointError if it has more layers than the checkpoint has tensors: an untrusted configuration could have too
    many layers even for a network without parameters.
    """
    layers = config.num_encoder_layers + config.num_decoder_layers
    layers += len(config.moe_layer_names()) * len(config.moe.hidden_sizes)
    try:
        if layers <= len(stored(checkpoint.parameters)):
            return skeleton(config, vocab_size)
    except CheckpointError:
        _check_hashes(checkpoint)
        raise
    except (RuntimeError, OverflowError):
        pass  # the size of a parameter overflows
    raise CheckpointError(
        f"{checkpoint.path} does not fit the run's config.yaml, whose network is far larger: one of them was changed"
    )


def write_parameters(model: nn.Module, path: Path) -> None:
    """Write all parameters of a model on the CPU into one safetensors file, tied ones once; or StorageError."""
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    try:
        save_file(tensors, path)
    except (SafetensorError, OSError) as error:
        raise StorageError(f"cannot write {path}: {' '.join(str(error).split())}") from error
