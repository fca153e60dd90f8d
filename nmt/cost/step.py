"""Predict the time of a training step, part by part, from the configuration and the constants of `cards.py`.

The time of a part is the longer of its operations at a share of the card's product rate and its bytes at a share of the
card's bandwidth. Positions of an LSTM, which follow one another, cost a fixed time more each. The parts add up.

Letters: N real tokens of a side and micro-batch, T its positions, D width, C cells, P outputs and I inputs of an LSTM,
E experts, K experts per token, H hidden sizes of an expert, G GPUs.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from nmt.config import Config, LayerName, ModelConfig, MoEConfig
from nmt.cost.activations import BatchSize, Precision, saved_bytes
from nmt.cost.budget import LONGEST, Budget, TokenCounts
from nmt.cost.cards import RATES, Card, Rates
from nmt.cost.operations import lstm_sizes, model_cost, moe_cost

SPENT_ON = {
    "products": "matrix products",
    "memory": "memory traffic",
    "optimiser": "the optimiser",
    "launch": "launching and latency",
    "network": "the network",
}
"""What the time of a part can be spent on, and its words. "launch" is waiting: for the host, and for one position after
another."""

# Bytes per parameter that a step of Adam reads and writes: weight, gradient and two moments, a cast to bf16, and the
# norm of the gradient.
_ADAM_BYTES = 36
# The same for an expert's, by `expert_optimizer` and `expert_weights` (nmt/model/kernels/expert_step.py).
_EXPERT_BYTES = {
    ("adam", "float32"): 30,
    ("adam", "bfloat16"): 24,
    ("factored", "float32"): 14,
    ("factored", "bfloat16"): 8,
}
# float32 matrix products run as TF32, at half the rate of bf16.
_FLOAT_PRODUCTS = 0.5
# Operations of a product in the time of one tanh of additive attention, forward and backward: an H100 does 0.7 10^12
# per second.
_TANH = 1100
# Numbers that an LSTM reads and writes per cell, forward and backward (nmt/model/kernels/lstm_cell.py).
_CELL_VALUES = 33
# The gates of the selected groups are plain operations, of which a choice of the largest takes longest. These are bytes
# that could be moved in the time of one expert, passes over a token's row, and passes over the weights of both logits.
_GROUP_BYTES, _GROUP_PASSES, _WEIGHT_PASSES = 1200, 20, 10
# Kernels per position of an attention that feeds back, forward and backward, and passes over keys and values: they are
# read, and their gradients are read and written.
_STEP_KERNELS, _STEP_PASSES = 40, 10
_TILE_ROWS = 64
"""Rows that a tile of the experts' products computes at once. On average, half of an expert's last tile is empty."""


ROOM = 1.25
"""Room in exchanges of rows, over what even loads need."""


class MicroBatch(NamedTuple):
    """Real tokens and positions of one micro-batch. Positions are the tokens of its longest sentence."""

    source: float
    target: float
    sentences: float
    source_positions: float
    target_positions: float


class Part(NamedTuple):
    """Milliseconds of one part of a step on every GPU, and which of `SPENT_ON` they are spent on."""

    name: str
    ms: float
    bound: str


class Prediction(NamedTuple):
    """A step as `predict_step` predicts it."""

    card: Card
    link_gbs: float
    parts: list[Part]
    tokens: float
    """Source and target tokens of a step, on all GPUs."""

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return sum(part.ms for part in self.parts) / 1e3

    @property
    def tokens_per_second(self) -> float:
        """Source and target tokens per second, on all GPUs."""
        return self.tokens / self.seconds


class Machines(NamedTuple):
    """What trains: `gpus` equal cards, each of which sends `link_gbs` 10^9 bytes per second while it receives as many.

    `group` of them share one copy of the experts.
    """

    card: Card
    rates: Rates = RATES
    gpus: int = 1
    group: int = 1
    link_gbs: float = math.inf

    def part(
        self, name: str, *, flops: float = 0.0, share: float = 1.0, moved: float = 0.0, at: float = 0.0, us: float = 0.0
    ) -> Part:
        """Return a part of `flops` at `share` of the product rate, beside `moved` bytes at share `at`, after `us`."""
        products = flops / (self.card.tflops * 1e12 * share)
        memory = moved / (self.card.copy_tbs * 1e12 * (at or self.rates.memory))
        longest = max(products, memory)
        bound = "launch" if us * 1e-6 > longest else "products" if products > memory else "memory"
        return Part(name, longest * 1e3 + us * 1e-3, bound)


def step_parts(
    config: Config, vocab_size: int, batch: MicroBatch, numbers: Precision, machines: Machines
) -> list[Part]:
    """Return the parts of a step in which every GPU has the same number of micro-batches like `batch`."""
    model = config.model
    micro_batches = max(config.training.micro_batches // machines.gpus, 1)
    parts = list(_computed(model, vocab_size, batch, numbers, machines))
    if micro_batches > 1:
        parts += _first_pass(model, batch, numbers, machines)
    parts += [Part("launching", machines.rates.launch_ms, "launch"), *_exchanged(model, batch, machines)]
    parts = [part._replace(ms=part.ms * micro_batches * config.training.passes) for part in parts]
    return _added([*parts, *_once(config, vocab_size, machines)])


def _first_pass(model: ModelConfig, batch: MicroBatch, numbers: Precision, machines: Machines) -> Iterator[Part]:
    """Yield the extra forward pass to the last gate, for the balance losses of several micro-batches together.

    A forward pass takes about a third of forward and backward pass.
    """
    layers = model.moe_layer_names()
    if not any(weight for layer in layers for weight in model.moe.balance_weights(layer)):
        return
    last = LayerName.of(layers[-1])
    if last.side == "decoder":
        below = replace(model, num_decoder_layers=last.place)
    else:
        # Neither the layers above nor the decoder.
        below = replace(model, num_encoder_layers=last.place, decoder_moe_after=[], num_decoder_layers=1)
        batch = batch._replace(target=0.0, target_positions=0.0)
    for part in _computed(below, 0, batch, numbers, machines):
        yield Part("first pass to the gates", part.ms / 3, part.bound)
    tokens = batch.target if last.side == "decoder" else batch.source
    for part in moe_parts(model.hidden_size, model.moe, model.moe.experts_at(layers[-1]), tokens, machines):
        if not part.name.startswith("gates"):
            yield Part("first pass to the gates", -part.ms / 3, part.bound)


def predict_step(
    config: Config, vocab_size: int, budget: Budget, card: Card, link_gbs: float, rates: Rates = RATES
) -> Prediction:
    """Return a mean step of the training that `budget` describes."""
    machines = Machines(card, rates, budget.gpus, budget.group, link_gbs)
    parts = step_parts(config, vocab_size, mean_batch(config, budget.tokens), budget.numbers, machines)
    tokens = config.training.micro_batches * (budget.tokens.source + budget.tokens.target)
    return Prediction(card, link_gbs, parts, tokens)


def mean_batch(config: Config, tokens: TokenCounts) -> MicroBatch:
    """Return a mean micro-batch with the positions of its longest sentence.

    Every micro-batch has about the longest sentences of the corpus. Four times the mean length fits log-normal lengths
    whose logarithms have a spread of 0.5.
    """
    longest = (config.corpus.filters.max_pieces or LONGEST) + 1
    source, target = (min(side / tokens.sentences * 4.0, longest) for side in tokens[:2])
    return MicroBatch(*tokens, source, target)


def bound_of(parts: Iterable[Part]) -> str:
    """Return what most of the time is spent on."""
    spent = dict.fromkeys(SPENT_ON, 0.0)
    for part in parts:
        spent[part.bound] += part.ms
    return max(SPENT_ON, key=spent.__getitem__)


def _added(parts: Iterable[Part]) -> list[Part]:
    """Return one part for each name, bound by what most of it is spent on."""
    named: dict[str, list[Part]] = {}
    for part in parts:
        named.setdefault(part.name, []).append(part)
    sums = [Part(name, sum(part.ms for part in each), bound_of(each)) for name, each in named.items()]
    return [part for part in sums if part.ms]


def _computed(
    model: ModelConfig, vocab_size: int, batch: MicroBatch, numbers: Precision, machines: Machines
) -> Iterator[Part]:
    """Yield forward and backward pass of one micro-batch."""
    rates = machines.rates
    tokens = {"encoder": batch.source, "decoder": batch.target}
    positions = {"encoder": batch.source_positions, "decoder": batch.target_positions}
    together = _side_by_side(model)
    # Second directions of layers above the bottom run beside the first ones.
    beside = {("encoder", 2 * layer + 1) for layer in range(1, model.bidirectional_layers)}
    beside |= {*together[1:]}
    saved = _saved(model, vocab_size, batch, numbers)
    for side, lstms in lstm_sizes(model).items():
        for index, size in enumerate(lstms):
            if side == "decoder" and index == 0 and model.attention.feeds_back:
                yield from _stepwise(model, size, batch, numbers, machines)
                continue
            # The GPU waits only for the longest of those that go through their positions at the same time.
            waits = positions[side] if (side, index) not in beside else 0.0
            if (side, index) == together[0]:
                waits = max(positions[side] for side, _ in together)
            yield from _lstm(size, tokens[side], waits, numbers, machines)
    yield machines.part("embeddings", moved=rates.passes * saved["embeddings"])
    for layer in model.moe_layer_names():
        side = LayerName.of(layer).side
        yield from moe_parts(model.hidden_size, model.moe, model.moe.experts_at(layer), tokens[side], machines)
    cost = model_cost(model, vocab_size)
    pairs = batch.source * batch.target / batch.sentences
    ops = batch.source * cost.encoder_ops["attention keys"] + batch.target * cost.decoder_ops["attention query"]
    ops += batch.target * cost.decoder_ops.get("context projection", 0) + pairs * cost.attention_ops_per_pair
    tanhs = pairs * model.attention.size if model.attention.function != "product" else 0
    yield machines.part("attention", flops=6 * ops, share=_products(machines, numbers))
    yield machines.part("attention", flops=_TANH * tanhs)
    yield machines.part("attention", moved=rates.passes * saved["attention"])
    # Logits are written, read for the softmax, overwritten by their gradient and read twice.
    yield machines.part(
        "softmax",
        flops=6 * batch.target * cost.decoder_ops["softmax"],
        share=rates.softmax * (1.0 if numbers.size == 2 else _FLOAT_PRODUCTS),
        moved=5 * batch.target * vocab_size * numbers.size,
    )


def _side_by_side(model: ModelConfig) -> list[tuple[str, int]]:
    """Return the LSTMs that run at the same time: both directions of the bottom layer, and the decoder's first."""
    found = [("encoder", 0)]
    found += [("encoder", 1)] * (model.bottom_layer != "forward")
    found += [("decoder", 0)] * (not model.attention.feeds_back)
    return found


def _products(machines: Machines, numbers: Precision) -> float:
    """Return the share of the bf16 product rate that large products reach in the type of `numbers`."""
    return machines.rates.products * (1.0 if numbers.size == 2 else _FLOAT_PRODUCTS)


def _saved(model: ModelConfig, vocab_size: int, batch: MicroBatch, numbers: Precision) -> dict[str, float]:
    """Return the bytes that a micro-batch keeps, by part."""
    lengths = max(batch.source / batch.sentences, 1.0), max(batch.target / batch.sentences, 1.0)
    shape = BatchSize(1000, *(round(length) for length in lengths))
    scale = (batch.source + batch.target) / (shape.sentences * (shape.source + shape.target))
    return {part: count * scale for part, count in saved_bytes(model, vocab_size, shape, numbers).items()}


def _lstm(
    size: tuple[int, int, int], tokens: float, positions: float, numbers: Precision, machines: Machines
) -> Iterator[Part]:
    """Yield the products of one direction of an LSTM.

    The recurrent products, forward and backward, go through the positions in turn. Those of the inputs and of the
    weights' gradients are done for all positions at once.
    """
    inputs, cells, outputs = size
    projected = outputs < cells
    of_projection = cells * outputs * projected
    recurrent = 4 * cells * outputs + of_projection
    whole = 3 * 4 * cells * inputs + recurrent
    scale = 1.0 if numbers.size == 2 else _FLOAT_PRODUCTS
    rates = machines.rates
    yield machines.part(
        "LSTMs, recurrent",
        flops=4 * tokens * recurrent,
        share=rates.recurrent * scale,
        us=2 * positions * (1 + projected) * rates.position_us,
    )
    yield machines.part("LSTMs, other products", flops=2 * tokens * whole, share=rates.products * scale)
    # Cells; dropout and residual, which follow.
    moved = _CELL_VALUES * cells + rates.passes * (inputs + 2 * outputs)
    yield machines.part("LSTMs, element-wise", moved=tokens * moved * numbers.size)


def _stepwise(
    model: ModelConfig, size: tuple[int, int, int], batch: MicroBatch, numbers: Precision, machines: Machines
) -> Iterator[Part]:
    """Yield the decoder's first LSTM with the attention before each of its positions; padding counts as real."""
    inputs, cells, outputs = size
    weights = 4 * cells * (inputs + outputs) + (cells * outputs if outputs < cells else 0)
    rate = machines.rates.recurrent * (1.0 if numbers.size == 2 else _FLOAT_PRODUCTS)
    us = _STEP_KERNELS * machines.rates.position_us * batch.target_positions
    rows = batch.sentences * batch.target_positions
    yield machines.part("LSTMs, recurrent", flops=6 * rows * weights, share=rate, us=us)
    memory = batch.sentences * batch.source_positions * (model.attention.size + model.hidden_size) * numbers.size
    yield machines.part("attention", moved=_STEP_PASSES * batch.target_positions * memory)


def moe_parts(width: int, moe: MoEConfig, num_experts: int, tokens: float, machines: Machines) -> Iterator[Part]:
    """Yield the parts of one MoE layer whose gate sees `tokens` on each GPU, without the exchange of rows."""
    rates = machines.rates
    rows = tokens * moe.experts_per_token
    gate = moe_cost(width, moe, num_experts).gates
    # Logits, noise, standard deviations and probabilities in float32, and their gradients.
    columns = gate.ops / width
    moved = tokens * 4 * (rates.passes * 3 * columns + 4 * width)
    if moe.is_hierarchical:
        moved += tokens * moe.primary_k * (_GROUP_BYTES * (num_experts // moe.branching) + _GROUP_PASSES * 4 * width)
        moved += _WEIGHT_PASSES * 2 * 4 * width * num_experts
    yield machines.part(
        "gates, choosing",
        flops=6 * tokens * gate.ops,
        share=rates.products * _FLOAT_PRODUCTS,
        moved=moved,
    )
    yield machines.part("gates, moving rows", moved=rates.passes * 3 * rows * width * 2)
    weights = sum(inputs * outputs for inputs, outputs in pairwise([width, *moe.hidden_sizes, width]))
    # A GPU has its share of the group's experts, and as many rows as it sends if all experts are equally busy.
    used = touched(num_experts, rows * machines.group) / machines.group
    padded = rows + used * _TILE_ROWS / 2
    yield machines.part("experts, products", flops=6 * padded * weights, share=rates.experts)
    yield machines.part("experts, element-wise", moved=rates.passes * rows * sum(moe.hidden_sizes) * 2)
    # Read forward and backward, and a gradient written, each in bf16.
    yield machines.part("experts, weights", moved=6 * used * weights, at=rates.weights)


def touched(num_experts: int, rows: float) -> float:
    """Return the expected number of experts that get any of `rows` rows, if each expert is as likely as any other."""
    return -num_experts * math.expm1(rows * math.log1p(-1.0 / num_experts)) if num_experts > 1 else float(rows > 0)


def visits(moe: MoEConfig, num_experts: int, processes: int) -> float:
    """Return the expected number of processes that hold at least one expert of a token, if all are equally likely.

    For a flat gate, this is M (1 - C(E - E/M, K) / C(E, K)) with M processes. Processes hold whole groups of a
    hierarchical gate, or parts of groups (S17 3.1). Where they hold both, the result is an approximation.
    """

    def held(chosen: int, of: int, here: float) -> float:
        """Return the probability that any of `here` things is among the `chosen` ones of all."""
        return 1.0 - math.prod(max(of - here - i, 0.0) / (of - i) for i in range(chosen))

    groups, chosen = (moe.branching, moe.primary_k) if moe.is_hierarchical else (1, 1)
    here, size = num_experts / processes, num_experts // groups
    if here >= size:
        return processes * held(chosen, groups, here / size)
    return chosen * size / here * held(moe.k, size, here)


def places(moe: MoEConfig, num_experts: int, processes: int, tokens: float, room: float = ROOM) -> int:
    """Return the places for rows in what a process with this many tokens sends to each process of its group.

    A token has one row per process that it visits. An exchange of fixed size (`nmt.parallel.fixed_exchange`) has `room`
    times the places of even loads, and of six standard deviations more, as choices are random. No more than all tokens
    visit a process. The last place is never filled.
    """
    even = tokens * visits(moe, num_experts, processes) / processes
    return min(math.ceil(tokens), math.ceil(room * (even + 6.0 * math.sqrt(even)))) + 1


def _exchanged(model: ModelConfig, batch: MicroBatch, machines: Machines) -> Iterator[Part]:
    """Yield the exchanges of rows: to the experts and back, and their gradients likewise.

    Gates and numbers of all experts of a token, in float32, go with each row; their gradients return.
    """
    tokens, others = {"encoder": batch.source, "decoder": batch.target}, machines.group - 1
    for layer in model.moe_layer_names():
        own = tokens[LayerName.of(layer).side]
        rows = places(model.moe, model.moe.experts_at(layer), machines.group, own) * others
        sent = rows * (4 * 2 * model.hidden_size + 2 * 2 * model.moe.experts_per_token * 4)
        seconds = sent / (machines.link_gbs * 1e9) + 6 * others * machines.rates.message_us * 1e-6
        yield Part("exchange of rows", 1e3 * seconds, "network")


def _once(config: Config, vocab_size: int, machines: Machines) -> Iterator[Part]:
    """Yield what a step does once: the optimiser, and the sums of gradients over GPUs."""
    cost, gpus = model_cost(config.model, vocab_size), machines.gpus
    dense = cost.num_parameters - cost.num_expert_parameters
    experts = cost.num_expert_parameters / machines.group
    of_expert = _EXPERT_BYTES[config.training.expert_optimizer, config.training.expert_weights]
    moved = _ADAM_BYTES * dense + of_expert * experts
    yield machines.part("optimiser", moved=moved)._replace(bound="optimiser")
    # A ring sends every float32 gradient twice. Experts are summed over the groups that hold copies of them.
    for numbers, copies in ((dense, gpus), (experts, gpus // machines.group)):
        sent = 2 * 4 * numbers * (copies - 1) / copies
        latency = 2 * math.ceil(math.log2(copies)) * machines.rates.message_us * 1e-6 if numbers else 0.0
        yield Part("sum of gradients", 1e3 * (sent / (machines.link_gbs * 1e9) + latency), "network")
