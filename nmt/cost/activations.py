"""Bytes that one micro-batch keeps between its forward and its backward pass, from the configuration alone.

A list of what the network's operations save, part by part; tests compare it with what PyTorch really keeps, on a CPU
and (recorded figures) on a GPU. Small things such as scalars are left out.

Letters: S source and T target positions of each sentence, B sentences, D width, C cells, P outputs and I inputs of an
LSTM, N attention size, V vocabulary, K slots for experts of a token, E experts, A groups of them.
"""

from collections import Counter
from itertools import pairwise
from typing import NamedTuple

from nmt.config import LayerName, ModelConfig, MoEConfig
from nmt.cost.operations import lstm_cost, lstm_sizes

# Bytes of a float32 number, of an index and of a truth value.
_FLOAT, _INDEX, _BOOL = 4, 8, 1
# Logits that exist at once, as in nmt/model/loss.py.
PIECE_ELEMENTS = 2**26
# Bytes of oneDNN's workspace by the size of a number: for each cell, and for each of the inputs or cells, whichever are
# more; it has one position more than the sequence. Fitted: within 5 % from 64 cells up.
_ONEDNN = {4: (32, 28), 2: (21, 21)}


class BatchSize(NamedTuple):
    """One micro-batch: its sentences, and how many positions each of them has, EOS and padding included."""

    sentences: int
    source: int
    target: int


class Precision(NamedTuple):
    """What the matrix products compute with, and where."""

    on_gpu: bool
    """cuDNN's LSTM, and dropout masks of one byte; else oneDNN's (PyTorch's own with a projection), and wide masks."""
    size: int
    """Bytes of a number in matrix products: 2 (bf16) or 4 (float32). Gates and softmaxes are float32 in any case."""


def saved_bytes(config: ModelConfig, vocab_size: int, shape: BatchSize, numbers: Precision) -> dict[str, int]:
    """Bytes by part, without copies of weights. Every position counts as real: padding saves nothing."""
    saved: Counter[str] = Counter()
    mask = _mask(config, numbers)
    for side, lstms in lstm_sizes(config).items():
        length = shape.source if side == "encoder" else shape.target
        rows = shape.sentences * length
        # Token numbers; places of the real ones, for experts and softmax; where the backward direction reads.
        sorted_out = side == "decoder" or any(LayerName.of(layer).side == side for layer in config.moe_layer_names())
        turned = side == "encoder" and config.bottom_layer != "forward"
        saved["embeddings"] += rows * ((1 + sorted_out + turned) * _INDEX + config.hidden_size * mask)
        for index, size in enumerate(lstms):
            calls = _calls(config, side, index, length)
            saved[f"{side} LSTMs"] += _lstm(size, shape.sentences, length, calls, numbers) + rows * size[2] * mask
    for layer in config.moe_layer_names():
        side = LayerName.of(layer).side
        rows = shape.sentences * (shape.source if side == "encoder" else shape.target)
        saved[f"{side} experts"] += rows * (_experts(config, numbers) + config.hidden_size * mask)
        saved[f"{side} gates"] += rows * (_gate(config.moe, config.moe.experts_at(layer)) + config.hidden_size * _FLOAT)
    saved["attention"] = _attention(config, shape, numbers)
    # The loss works out its gradients at once: by its input, and by the float32 weights and biases of the softmax.
    weights = vocab_size * (config.hidden_size + config.output_bias)
    saved["softmax"] = shape.sentences * shape.target * config.hidden_size * numbers.size + weights * _FLOAT
    return dict(saved)


def copied_bytes(config: ModelConfig, shape: BatchSize, numbers: Precision) -> int:
    """Bytes of the bf16 copies of float32 weights that are kept for the backward pass: none of the experts'.

    On a GPU those of an LSTM are copied again for every call (cuDNN wants them in one piece): with feedback wirings
    the decoder's first LSTM has a call for every position.
    """
    if numbers.size == _FLOAT:
        return 0
    count = 2 * config.hidden_size * config.attention.size
    count += config.hidden_size**2 if config.attention.projects_context else 0
    for side, lstms in lstm_sizes(config).items():
        length = shape.source if side == "encoder" else shape.target
        for index, size in enumerate(lstms):
            copies = 1 + numbers.on_gpu * _calls(config, side, index, length)
            count += copies * lstm_cost(*size).parameters
    return count * numbers.size


def working_bytes(
    config: ModelConfig, vocab_size: int, shape: BatchSize, numbers: Precision, expert_share: int, accumulating: bool
) -> tuple[int, int]:
    """(dense, experts): bytes of the largest thing that comes and goes while the activations are there; one is 0.

    The backward pass of an LSTM needs about what its forward pass reserved; the loss has a piece of the logits, the
    softmax weights in the type of the products and their gradient. A MoE layer has the gradient of one matrix of its
    experts (of which a GPU has 1/expert_share) in that type, and in float32 too before it is added to that of an
    earlier micro-batch (`accumulating`). Fitted to peaks measured on a GPU.
    """
    lstms, width = lstm_sizes(config), config.hidden_size
    rows = {"encoder": shape.sentences * shape.source, "decoder": shape.sentences * shape.target}
    reserved = [rows[side] * _reserved(cells, outputs) for side in lstms for _, cells, outputs in lstms[side]]
    # The plain form of the loss makes a few copies of its logits, the GPU's works in place.
    copies = 1 if numbers.on_gpu and numbers.size < _FLOAT else 4
    logits = copies * min(PIECE_ELEMENTS, rows["decoder"] * vocab_size) + 2 * vocab_size * width
    sizes = [width, *config.moe.hidden_sizes, width]
    matrix = max(inputs * outputs for inputs, outputs in pairwise(sizes))
    held = max((config.moe.experts_at(layer) // expert_share for layer in config.moe_layer_names()), default=0)
    times = (numbers.size if numbers.size < _FLOAT else 0) + _FLOAT * accumulating
    dense, of_experts = numbers.size * max(*reserved, logits), times * held * matrix
    return (dense, 0) if dense >= of_experts else (0, of_experts)


def _reserved(cells: int, outputs: int) -> int:
    """Numbers per position in cuDNN's reserve: gates and cell; with a projection also its input and its result."""
    return 5 * cells if outputs == cells else 6 * cells + outputs


def _calls(config: ModelConfig, side: str, index: int, length: int) -> int:
    """Calls in which LSTM `index` of a side runs over its positions."""
    stepwise = side == "decoder" and index == 0 and config.attention.feeds_back
    return length if stepwise else 1


def _mask(config: ModelConfig, numbers: Precision) -> int:
    """Bytes a number that dropout keeps."""
    if config.dropout == 0.0:
        return 0
    return _BOOL if numbers.on_gpu else numbers.size


def _lstm(size: tuple[int, int, int], sentences: int, length: int, calls: int, numbers: Precision) -> int:
    """One direction of an LSTM."""
    inputs, cells, outputs = size
    # Input, output, and what happens in between; the states between calls.
    kept = length * (inputs + outputs) + calls * (outputs + cells)
    if numbers.on_gpu:
        kept += length * _reserved(cells, outputs)
    elif outputs < cells:
        # Four gates; the cell before, the tanh of the cell after, the output before its projection.
        kept += length * 7 * cells
    else:
        per_cell, per_width = _ONEDNN[numbers.size]
        workspace = (length + calls) * (per_cell * cells + per_width * max(inputs, cells))
        return sentences * (kept * numbers.size + workspace)
    return sentences * kept * numbers.size


def _gate(moe: MoEConfig, num_experts: int) -> int:
    """Bytes a token, beside the gate's input (float32)."""
    slots = moe.experts_per_token * (_INDEX + _FLOAT)
    if moe.k_is_average:
        # Logarithm, softmax over the kept, difference of the masks; the mask, and what it leaves out. Experts and
        # gates stand in a table as wide as the busiest token needs, here twice the average; little beside the rest.
        return num_experts * (3 * _FLOAT + 2 * _BOOL) + 2 * slots
    if moe.is_hierarchical:
        group = num_experts // moe.branching
        primary = _noisy(moe.branching, moe.primary_k)
        # Logits of the noise of all groups, before the chosen ones are taken from what becomes of them.
        secondary = _FLOAT * num_experts + moe.primary_k * _noisy(group, moe.k, all_groups=True)
        return primary + secondary + slots
    return _noisy(num_experts, moe.k) if moe.is_noisy else slots


def _noisy(num_experts: int, k: int, all_groups: bool = False) -> int:
    """A noisy gate's bytes a token; without the logit of its noise if that is kept for `all_groups` at once."""
    # The noise and, unless it is kept for all groups, its logit.
    numbers = 1 if all_groups else 2
    # Distance to the threshold, standard deviation and their quotient, unless every expert is in.
    estimate = num_experts * (3 * _FLOAT + _BOOL) + (k + 1) * _INDEX if k < num_experts else 0
    return num_experts * numbers * _FLOAT + estimate + k * (_INDEX + _FLOAT)


def _experts(config: ModelConfig, numbers: Precision) -> int:
    """Bytes a token: the inputs of all layers of its experts and their outputs; the layer's output."""
    moe, width = config.moe, config.hidden_size
    # And where each row went and came from. Strictly balanced, that many rows are the average; empty slots have none.
    of_row = (width + sum(moe.hidden_sizes) + width) * numbers.size + 2 * _INDEX
    # Where the rows of a token begin.
    return moe.experts_per_token * of_row + _INDEX + width * numbers.size


def _attention(config: ModelConfig, shape: BatchSize, numbers: Precision) -> int:
    """Keys, queries, scores and contexts."""
    size, width = config.attention.size, config.hidden_size
    sources, targets = shape.sentences * shape.source, shape.sentences * shape.target
    pairs = sources * shape.target
    kept = sources * width + targets * width
    if config.attention.function == "product":
        # tanh of keys and of queries, the latter also times V.
        kept += sources * size + 2 * targets * size
    else:
        kept += pairs * size
    # The softmax is float32; where that is not the type of the values, it is cast for the second product.
    weights = pairs * (_FLOAT + (numbers.size if numbers.size < _FLOAT else 0)) + sources * _BOOL
    if config.attention.projects_context:
        # The projection's input, and the mask of its dropout.
        weights += targets * width * (numbers.size + _mask(config, numbers))
    return kept * numbers.size + weights
