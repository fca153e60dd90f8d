"""Compute what training a configuration needs before it starts: memory per GPU, disk, and operations.

All functions are pure functions of the configuration and of the assumptions in `SentenceLengths`. They build and
measure nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from nmt.config import Config, uses_bf16
from nmt.cost.activations import BatchSize, Precision, copied_bytes, saved_bytes, working_bytes
from nmt.cost.operations import Cost, model_cost
from nmt.errors import UserError

_FLOAT, _BF16 = 4, 2
LONGEST = 250
"""Tokens of the longest sentence if the configuration has no limit (corpus.filters.max_pieces=0)."""


class SentenceLengths(NamedTuple):
    """Assumptions about sentences, EOS included."""

    source: float = 30.0
    """Mean tokens of a source sentence."""
    target: float = 30.0
    """Mean tokens of a target sentence."""
    unused: float = 0.02
    """Share of `training.batch_tokens` that a mean micro-batch leaves unused on its longer side."""

    @classmethod
    def of_corpus(cls, counts: Mapping[str, Any]) -> "SentenceLengths":
        """Return the mean lengths of a corpus with these counts (`corpus.json`, or a prepared corpus's manifest)."""
        pairs = max(counts["pairs_kept"], 1)
        # The counts exclude EOS.
        return cls(counts["source_pieces"] / pairs + 1, counts["target_pieces"] / pairs + 1)


class TokenCounts(NamedTuple):
    """Real (not padding) tokens of one micro-batch."""

    source: float
    target: float
    sentences: float


class MemoryRow(NamedTuple):
    """Bytes of one kind on one GPU: `dense` is replicated on every GPU, `experts` is this GPU's share."""

    kind: str
    dense: int
    experts: int

    @property
    def total(self) -> int:
        """Bytes of this kind on one GPU."""
        return self.dense + self.experts


@dataclass(frozen=True)
class Budget:
    """What `nmt cost` prints."""

    cost: Cost
    tokens: TokenCounts
    """Tokens of a mean micro-batch."""
    micro_batches: int
    """Number of micro-batches, over all steps and GPUs."""
    passes: int
    """Passes over each micro-batch."""
    gpus: int
    group: int
    """GPUs that share one copy of the experts."""
    numbers: Precision
    longest: BatchSize
    """The micro-batch for which activations are counted."""
    memory: list[MemoryRow]
    checkpoint_bytes: int
    """Bytes of one checkpoint: float32 parameters and optimiser state."""

    @property
    def memory_bytes(self) -> int:
        """Bytes on one GPU at its peak."""
        return sum(row.total for row in self.memory)

    @property
    def flops_per_target_token(self) -> float:
        """Training FLOPs per target token with its source: forward and backward, two per multiply-add."""
        return self.cost.training_flops(*self.tokens) * self.passes / self.tokens.target

    @property
    def target_tokens(self) -> float:
        """Real target tokens of the whole training."""
        return self.tokens.target * self.micro_batches

    @property
    def flops(self) -> float:
        """Training FLOPs of the whole training."""
        return self.cost.training_flops(*self.tokens) * self.passes * self.micro_batches

    def seconds(self, tflops: float) -> float:
        """Return seconds of the whole training at `tflops` 10^12 operations per second and GPU (S17 section 5.1)."""
        return self.flops / (tflops * 1e12 * self.gpus)


def training_budget(config: Config, vocab_size: int, lengths: SentenceLengths, gpus: int, on_gpu: bool) -> Budget:
    """Return the budget of `nmt train` on `gpus` GPUs (or CPU processes). UserError if the settings forbid that number.

    The GPUs of a group (`parallel.expert_group_size`) share the experts; everything else is on every GPU (S17 section
    3.1). Weights, gradients and optimiser state are float32, except where experts are bf16 (`expert_bytes`).
    """
    group = _group_size(config, gpus)
    training = config.training
    numbers = numbers_of(config, on_gpu)
    cost = model_cost(config.model, vocab_size)
    shape = largest_shape(config, vocab_size, lengths, numbers)
    return Budget(
        cost=cost,
        tokens=_mean_tokens(training.batch_tokens, lengths),
        micro_batches=training.max_steps * training.micro_batches,
        passes=training.passes,
        gpus=gpus,
        group=group,
        numbers=numbers,
        longest=shape,
        memory=memory_of(config, vocab_size, shape, numbers, gpus, group),
        checkpoint_bytes=checkpoint_bytes(config, cost),
    )


def numbers_of(config: Config, on_gpu: bool) -> Precision:
    """Return the number format of the matrix products in training."""
    return Precision(on_gpu, 2 if uses_bf16(config.training.precision, on_gpu) else _FLOAT)


def expert_bytes(config: Config, numbers: Precision) -> tuple[int, int]:
    """Return the bytes of an expert's parameter (as many as of its gradient) and of its master, as in training."""
    if not config.training.experts_in_bf16(numbers.on_gpu):
        return _FLOAT, 0
    return _BF16, _FLOAT if config.training.expert_weights == "float32" else 0


def checkpoint_bytes(config: Config, cost: Cost) -> int:
    """Return bytes of one checkpoint of a model with this `cost`: float32 parameters and optimiser state."""
    return _FLOAT * (cost.num_parameters + sum(_optimizer_numbers(config, cost)))


def _optimizer_numbers(config: Config, cost: Cost) -> tuple[int, int]:
    """Return the numbers in the optimiser's state for (dense parameters, all experts), without its few step counts.

    Adam has two moments per parameter. The factored optimiser has I + O numbers per I x O matrix of an expert (S17
    appendix D). Frozen experts have none. Other parts are counted as if they were trained: they are small beside them.
    """
    model, moe = config.model, config.model.moe
    experts = 2 * cost.num_expert_parameters
    if _has_frozen_experts(config):
        experts = 0
    elif config.training.expert_optimizer == "factored":
        sides = sum(map(sum, pairwise([model.hidden_size, *moe.hidden_sizes, model.hidden_size])))
        experts = sum(map(moe.experts_at, model.moe_layer_names())) * sides
    return 2 * (cost.num_parameters - cost.num_expert_parameters), experts


def _has_frozen_experts(config: Config) -> bool:
    """Return whether no expert is trained. With only some frozen, their tensors have gradients and moments of all."""
    return "experts" in config.training.freeze


def memory_of(
    config: Config, vocab_size: int, shape: BatchSize, numbers: Precision, gpus: int, share: int
) -> list[MemoryRow]:
    """Return the peak memory of a step by kind, on each of `gpus` GPUs with 1/share of the experts.

    With one micro-batch per GPU, activations are freed as gradients are allocated, so their overlap is subtracted once
    ("shared"). For experts, half is subtracted: their last gradients are allocated while the activations of earlier
    layers are still in memory. Nothing is subtracted where gradients persist: with several micro-batches per GPU, and
    for dense gradients that GPUs exchange.
    """
    cost = model_cost(config.model, vocab_size)
    experts = cost.num_expert_parameters // share
    dense = cost.num_parameters - cost.num_expert_parameters
    saved = saved_bytes(config.model, vocab_size, shape, numbers, config.training.passes)
    of_experts = sum(count for part, count in saved.items() if part.endswith("experts"))
    remembered = _optimizer_numbers(config, cost)
    size, master = expert_bytes(config, numbers)
    alone = config.training.micro_batches == gpus
    rows = [
        MemoryRow("weights", dense * _FLOAT, experts * size),
        MemoryRow("masters", 0, experts * master),
        MemoryRow("optimiser", remembered[0] * _FLOAT, remembered[1] // share * _FLOAT),
        MemoryRow("gradients", dense * _FLOAT, 0 if _has_frozen_experts(config) else experts * size),
        MemoryRow("copies", copied_bytes(config.model, shape, numbers), 0),
        MemoryRow("activations", sum(saved.values()) - of_experts, of_experts),
        MemoryRow("working", *working_bytes(config.model, vocab_size, shape, numbers, share, size, not alone)),
    ]
    if alone:
        gradients, copies, activations = rows[3:6]
        freed = copies.total + activations.total
        shared_dense = min(gradients.dense, freed) if gpus == 1 else 0
        rows.append(MemoryRow("shared", -shared_dense, -min(gradients.experts, max(freed // 2 - shared_dense, 0))))
    return rows


def _group_size(config: Config, gpus: int) -> int:
    """Return the number of GPUs that share the experts. Raises UserError for the same settings as training."""
    if gpus < 1:
        raise UserError(f"--gpus {gpus} must be at least 1")
    group = config.parallel.expert_group_size or gpus if gpus > 1 else 1
    planned = config.training.micro_batches
    if planned % gpus:
        raise UserError(
            f"--gpus {gpus} must divide training.micro_batches={planned}: every GPU gets the same number of "
            f"micro-batches per step (for example, training.micro_batches={-(-planned // gpus) * gpus})"
        )
    if gpus % group:
        raise UserError(f"parallel.expert_group_size={group} must divide --gpus {gpus}: use a divisor, or 0 for all")
    for layer in config.model.moe_layer_names():
        count = config.model.moe.experts_at(layer)
        if count % group:
            raise UserError(
                f"the {count} experts of {layer} cannot be spread over {group} GPUs: their number must be a multiple "
                "(or set parallel.expert_group_size to a divisor of both)"
            )
    return group


def _mean_tokens(batch_tokens: int, lengths: SentenceLengths) -> TokenCounts:
    longer = max(lengths.source, lengths.target)
    sentences = batch_tokens * (1.0 - lengths.unused) / longer
    return TokenCounts(sentences * lengths.source, sentences * lengths.target, sentences)


def largest_shape(config: Config, vocab_size: int, lengths: SentenceLengths, numbers: Precision) -> BatchSize:
    """Return the full micro-batch that saves most bytes: of sentences of maximum length, or of mean length."""
    tokens = config.training.batch_tokens
    lengths_tried = {(config.corpus.filters.max_pieces or LONGEST) + 1, round(max(lengths.source, lengths.target))}
    shapes = [BatchSize(max(tokens // length, 1), length, length) for length in lengths_tried]

    def size(shape: BatchSize) -> int:
        saved = saved_bytes(config.model, vocab_size, shape, numbers)
        return sum(saved.values()) + copied_bytes(config.model, shape, numbers)

    return max(shapes, key=size)
