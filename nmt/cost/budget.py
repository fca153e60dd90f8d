"""What training a configuration takes, before it is started: memory of each GPU, disk, and operations.

Pure functions of the configuration and of the assumptions in `SentenceLengths`; nothing is built or measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from nmt.config import Config, uses_bf16
from nmt.cost.activations import BatchSize, Precision, copied_bytes, saved_bytes, working_bytes
from nmt.cost.operations import Cost, model_cost
from nmt.errors import UserError

_FLOAT = 4
# Tokens of a sentence where the configuration does not limit them (corpus.filters.max_pieces=0).
_LONGEST = 250


class SentenceLengths(NamedTuple):
    """What is assumed of the sentences, EOS included."""

    source: float = 30.0
    """Mean tokens of a source sentence."""
    target: float = 30.0
    """Mean tokens of a target sentence."""
    padding: float = 0.1
    """Share of padding among the positions of a micro-batch's longer side."""

    @classmethod
    def of_corpus(cls, counts: Mapping[str, Any]) -> "SentenceLengths":
        """Those of a corpus with these counts (`corpus.json`, or the manifest of the prepared corpus)."""
        pairs = max(counts["pairs_kept"], 1)
        # Pieces are counted without EOS.
        return cls(counts["source_pieces"] / pairs + 1, counts["target_pieces"] / pairs + 1)


class TokenCounts(NamedTuple):
    """Real (not padding) tokens of one micro-batch."""

    source: float
    target: float
    sentences: float


class MemoryRow(NamedTuple):
    """Bytes of one kind on one GPU: of what every GPU holds, and of its share of the experts."""

    kind: str
    dense: int
    experts: int

    @property
    def total(self) -> int:
        """Both."""
        return self.dense + self.experts


@dataclass(frozen=True)
class Budget:
    """What `nmt cost` prints."""

    cost: Cost
    tokens: TokenCounts
    """Of a mean micro-batch."""
    micro_batches: int
    """All that are planned, over all updates and GPUs."""
    gpus: int
    numbers: Precision
    longest: BatchSize
    """The micro-batch that the activations are counted for."""
    memory: list[MemoryRow]
    checkpoint_bytes: int
    """One checkpoint: parameters and what the optimiser remembers of them, float32."""

    @property
    def memory_bytes(self) -> int:
        """Of one GPU."""
        return sum(row.total for row in self.memory)

    @property
    def flops_per_target_token(self) -> float:
        """Training FLOPs (forward and backward, a multiply-add is two) for one target token and its source."""
        return self.cost.training_flops(*self.tokens) / self.tokens.target

    @property
    def target_tokens(self) -> float:
        """Real target tokens of the whole training."""
        return self.tokens.target * self.micro_batches

    @property
    def flops(self) -> float:
        """Training FLOPs of the whole training."""
        return self.cost.training_flops(*self.tokens) * self.micro_batches

    def seconds(self, tflops: float) -> float:
        """Time of the whole training if every GPU does `tflops` 10^12 operations a second (S17 section 5.1)."""
        return self.flops / (tflops * 1e12 * self.gpus)


def training_budget(config: Config, vocab_size: int, lengths: SentenceLengths, gpus: int, on_gpu: bool) -> Budget:
    """The budget of `nmt train` on `gpus` GPUs (or CPU processes). UserError if the settings do not allow that number.

    Experts are spread over the GPUs of a group (`parallel.expert_group_size`), all else is on every GPU (S17 section
    3.1). Weights, gradients and the optimiser's state are float32.
    """
    share = _expert_share(config, gpus)
    training = config.training
    numbers = numbers_of(config, on_gpu)
    cost = model_cost(config.model, vocab_size)
    shape = largest_shape(config, vocab_size, lengths, numbers)
    return Budget(
        cost=cost,
        tokens=_mean_tokens(training.batch_tokens, lengths),
        micro_batches=training.max_steps * training.micro_batches,
        gpus=gpus,
        numbers=numbers,
        longest=shape,
        memory=memory_of(config, vocab_size, shape, numbers, gpus, share),
        checkpoint_bytes=checkpoint_bytes(config, cost),
    )


def numbers_of(config: Config, on_gpu: bool) -> Precision:
    """The numbers that matrix products of training work on."""
    return Precision(on_gpu, 2 if uses_bf16(config.training.precision, on_gpu) else _FLOAT)


def checkpoint_bytes(config: Config, cost: Cost) -> int:
    """Of one checkpoint of a model with this `cost`: float32 parameters and what the optimiser remembers of them."""
    return _FLOAT * (cost.num_parameters + sum(_optimizer_numbers(config, cost)))


def _optimizer_numbers(config: Config, cost: Cost) -> tuple[int, int]:
    """What the optimiser remembers of the dense parameters and of all experts; not the few counts of updates.

    Two moments of each parameter; factored, I + O numbers of an expert's I x O matrix (S17 appendix D).
    """
    model, moe = config.model, config.model.moe
    experts = 2 * cost.num_expert_parameters
    if config.training.expert_optimizer == "factored":
        sides = sum(map(sum, pairwise([model.hidden_size, *moe.hidden_sizes, model.hidden_size])))
        experts = sum(map(moe.experts_at, model.moe_layer_names())) * sides
    return 2 * (cost.num_parameters - cost.num_expert_parameters), experts


def memory_of(
    config: Config, vocab_size: int, shape: BatchSize, numbers: Precision, gpus: int, share: int
) -> list[MemoryRow]:
    """The highest memory of an update by kind, on each of `gpus` GPUs with 1/share of the experts.

    With one micro-batch a GPU, gradients come while activations go, so what both have is taken off once ("shared"):
    of experts, whose last gradients come while what lies before their layer is there, half of it. It is not where
    gradients outlive the update: with several micro-batches, and those that GPUs exchange (the dense).
    """
    cost = model_cost(config.model, vocab_size)
    experts = cost.num_expert_parameters // share
    dense = cost.num_parameters - cost.num_expert_parameters
    saved = saved_bytes(config.model, vocab_size, shape, numbers)
    of_experts = sum(count for part, count in saved.items() if part.endswith("experts"))
    remembered = _optimizer_numbers(config, cost)
    alone = config.training.micro_batches == gpus
    rows = [
        MemoryRow("weights", dense * _FLOAT, experts * _FLOAT),
        MemoryRow("optimiser", remembered[0] * _FLOAT, remembered[1] // share * _FLOAT),
        MemoryRow("gradients", dense * _FLOAT, experts * _FLOAT),
        MemoryRow("copies", copied_bytes(config.model, shape, numbers), 0),
        MemoryRow("activations", sum(saved.values()) - of_experts, of_experts),
        MemoryRow("working", *working_bytes(config.model, vocab_size, shape, numbers, share, not alone)),
    ]
    if alone:
        freed = rows[3].total + rows[4].total
        shared_dense = min(rows[2].dense, freed) if gpus == 1 else 0
        rows.append(MemoryRow("shared", -shared_dense, -min(rows[2].experts, max(freed // 2 - shared_dense, 0))))
    return rows


def _expert_share(config: Config, gpus: int) -> int:
    """GPUs among which the experts are divided. UserError as training would say it."""
    if gpus < 1:
        raise UserError(f"--gpus {gpus} must be at least 1")
    group = config.parallel.expert_group_size or gpus if gpus > 1 else 1
    planned = config.training.micro_batches
    if planned % gpus:
        raise UserError(
            f"--gpus {gpus} must divide training.micro_batches={planned}: every GPU takes equally many micro-batches "
            f"of an update (training.micro_batches={-(-planned // gpus) * gpus} would do)"
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
    sentences = batch_tokens * (1.0 - lengths.padding) / longer
    return TokenCounts(sentences * lengths.source, sentences * lengths.target, sentences)


def largest_shape(config: Config, vocab_size: int, lengths: SentenceLengths, numbers: Precision) -> BatchSize:
    """The full micro-batch that saves most: of the longest sentences that are kept, or of mean ones."""
    tokens = config.training.batch_tokens
    lengths_tried = {(config.corpus.filters.max_pieces or _LONGEST) + 1, round(max(lengths.source, lengths.target))}
    shapes = [BatchSize(max(tokens // length, 1), length, length) for length in lengths_tried]

    def size(shape: BatchSize) -> int:
        saved = saved_bytes(config.model, vocab_size, shape, numbers)
        return sum(saved.values()) + copied_bytes(config.model, shape, numbers)

    return max(shapes, key=size)
