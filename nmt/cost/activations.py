"""Compute the bytes that one micro-batch keeps between its forward and backward pass, from the configuration alone.

The functions list what the network's operations save, part by part. Tests compare the result with what PyTorch keeps,
measured on a CPU and recorded from a GPU. Small items such as scalars are left out.

Letters: S source and T target positions per sentence, B sentences, D width, C cells, P outputs and I inputs of an
LSTM, N attention size, V vocabulary, K experts per token, E experts, A groups of experts.
"""

from collections import Counter
from itertools import pairwise
from typing import NamedTuple

from nmt.config import LayerName, ModelConfig, MoEConfig
from nmt.cost.operations import lstm_cost, lstm_sizes

# Bytes of a float32 number, an index and a truth value.
_FLOAT, _INDEX, _BOOL = 4, 8, 1
# Logits in memory at once, as in nmt/model/loss.py.
PIECE_ELEMENTS = 2**26
# The attention kernel's weights have source positions in whole blocks.
_BLOCK = 32
# oneDNN's workspace, by the size of a number: (bytes per cell, bytes per input or cell, whichever are more). It has one
# position more than the sequence. Fitted to measurements: within 5 % from 64 cells up.
_ONEDNN = {4: (32, 28), 2: (21, 21)}


class BatchSize(NamedTuple):
    """Size of one micro-batch: its sentences, and the positions per sentence with EOS and padding."""

    sentences: int
    source: int
    target: int


class Precision(NamedTuple):
    """Device and number format of the matrix products."""

    on_gpu: bool
    """True: the LSTM's own loop (cuDNN's for single positions), and dropout masks of one byte. False: oneDNN's LSTM
    (PyTorch's own with a projection), and masks in the number format of the products."""
    size: int
    """Bytes of a number in matrix products: 2 (bf16) or 4 (float32). Gates and softmaxes are always float32."""


def saved_bytes(
    config: ModelConfig, vocab_size: int, shape: BatchSize, numbers: Precision, passes: int = 1
) -> dict[str, int]:
    """Return bytes by part, without copies of weights, of this many passes over the micro-batch (R-Drop has two).

    Padding counts like real positions.
    """
    saved: Counter[str] = Counter()
    mask = _mask(config, numbers)
    for side, lstms in lstm_sizes(config).items():
        length = shape.source if side == "encoder" else shape.target
        rows = shape.sentences * length
        # Token ids; of the target, also the ones to predict.
        saved["embeddings"] += rows * ((1 + (side == "decoder")) * _INDEX + config.hidden_size * mask)
        for index, size in enumerate(lstms):
            stepwise = _is_stepwise(config, side, index)
            saved[f"{side} LSTMs"] += _lstm(size, shape.sentences, length, stepwise, numbers) + rows * size[2] * mask
        if config.norm == "layers":
            num_layers = config.num_encoder_layers if side == "encoder" else config.num_decoder_layers
            saved[f"{side} LSTMs"] += (num_layers - 1) * rows * _norm(config, numbers)
    for layer in config.moe_layer_names():
        side = LayerName.of(layer).side
        rows = shape.sentences * (shape.source if side == "encoder" else shape.target)
        saved[f"{side} experts"] += rows * (_experts(config, numbers) + config.hidden_size * mask)
        if config.norm != "none":
            saved[f"{side} experts"] += rows * _norm(config, numbers)
        # The gate's float32 copy of its input, if that has another type.
        copy = config.hidden_size * _FLOAT if numbers.size < _FLOAT else 0
        gate = _gate(config.moe, config.moe.experts_at(layer), numbers.on_gpu)
        saved[f"{side} gates"] += rows * (gate + copy) + _joint_weights(config, config.moe.experts_at(layer))
    saved["attention"] = _attention(config, shape, numbers)
    # The loss computes its gradients in the forward pass: for its input, and in float32 for the softmax's parameters.
    weights = vocab_size * (config.hidden_size + config.output_bias)
    saved["softmax"] = shape.sentences * shape.target * config.hidden_size * numbers.size
    each = {part: passes * count for part, count in saved.items()}
    return each | {"softmax": each["softmax"] + weights * _FLOAT}


def copied_bytes(config: ModelConfig, shape: BatchSize, numbers: Precision) -> int:
    """Return bytes of the bf16 copies of float32 weights that are kept for the backward pass; experts keep none.

    cuDNN needs the weights in contiguous memory, and copies them again for every call. With feedback wirings, the
    decoder's first LSTM has one call per position.
    """
    if numbers.size == _FLOAT:
        return 0
    count = 2 * config.hidden_size * config.attention.size
    count += config.hidden_size**2 * (config.attention.projects_context + (config.attention.heads > 1))
    for side, lstms in lstm_sizes(config).items():
        length = shape.source if side == "encoder" else shape.target
        for index, size in enumerate(lstms):
            calls = length if numbers.on_gpu and _is_stepwise(config, side, index) else 0
            count += (1 + calls) * lstm_cost(*size).parameters
    return count * numbers.size


def working_bytes(
    config: ModelConfig,
    vocab_size: int,
    shape: BatchSize,
    numbers: Precision,
    expert_share: int,
    expert_size: int,
    accumulating: bool,
) -> tuple[int, int]:
    """Return (dense, experts): bytes of the largest temporary memory while activations are kept; one of the two is 0.

    - The backward pass of an LSTM needs the gradients of its gates, and on a CPU about what its forward pass reserved.
    - The loss needs a piece of the logits, and the softmax weights and their gradient in the type of the products.
    - A MoE layer needs the gradient of one matrix of its experts, of which a GPU has 1/expert_share, in that type, if
      the parameter has another type, whose numbers have `expert_size` bytes. If `accumulating`, it also needs a copy in
      the parameter's type, to add to the gradient of an earlier micro-batch.

    Fitted to peaks measured on a GPU.
    """
    lstms, width = lstm_sizes(config), config.hidden_size
    rows = {"encoder": shape.sentences * shape.source, "decoder": shape.sentences * shape.target}
    # On a GPU: the gradients of gates, of outputs, and of outputs as recurrent inputs.
    reserved = [
        rows[side] * (4 * cells + 2 * outputs if numbers.on_gpu else _reserved(cells, outputs))
        for side in lstms
        for _, cells, outputs in lstms[side]
    ]
    # The plain loss makes a few copies of its logits; the GPU's kernel works in place.
    copies = 1 if numbers.on_gpu and numbers.size < _FLOAT else 4
    logits = copies * min(PIECE_ELEMENTS, rows["decoder"] * vocab_size) + 2 * vocab_size * width
    sizes = [width, *config.moe.hidden_sizes, width]
    matrix = max(inputs * outputs for inputs, outputs in pairwise(sizes))
    held = max((config.moe.experts_at(layer) // expert_share for layer in config.moe_layer_names()), default=0)
    times = (numbers.size if numbers.size != expert_size else 0) + expert_size * accumulating
    dense, of_experts = numbers.size * max(*reserved, logits), times * held * matrix
    return (dense, 0) if dense >= of_experts else (0, of_experts)


def _reserved(cells: int, outputs: int) -> int:
    """Return numbers per position in cuDNN's reserve: gates and cell; with a projection also its input and output."""
    return 5 * cells if outputs == cells else 6 * cells + outputs


def _is_stepwise(config: ModelConfig, side: str, index: int) -> bool:
    """Return whether LSTM `index` of a side runs one position at a time."""
    return side == "decoder" and index == 0 and config.attention.feeds_back


def _mask(config: ModelConfig, numbers: Precision) -> int:
    """Return bytes of the dropout mask per number."""
    if config.dropout == 0.0:
        return 0
    return _BOOL if numbers.on_gpu else numbers.size


def _lstm(size: tuple[int, int, int], sentences: int, length: int, stepwise: bool, numbers: Precision) -> int:
    """Return bytes that one direction of an LSTM keeps."""
    inputs, cells, outputs = size
    calls = length if stepwise else 1
    if numbers.on_gpu and not stepwise:
        # Inputs and outputs, gates and cells; the projection's inputs.
        of_row = inputs + outputs + 5 * cells + (cells if outputs < cells else 0)
        return sentences * length * of_row * numbers.size
    # Inputs and outputs of all positions; states between calls.
    kept = length * (inputs + outputs) + calls * (outputs + cells)
    if numbers.on_gpu:
        kept += length * _reserved(cells, outputs)
    elif outputs < cells:
        # Four gates; previous cell, tanh of the new cell, output before its projection.
        kept += length * 7 * cells
    else:
        per_cell, per_width = _ONEDNN[numbers.size]
        workspace = (length + calls) * (per_cell * cells + per_width * max(inputs, cells))
        return sentences * (kept * numbers.size + workspace)
    return sentences * kept * numbers.size


def _norm(config: ModelConfig, numbers: Precision) -> int:
    """Return the bytes that layer norm keeps per position: its input, which nothing else keeps, mean and deviation."""
    return config.hidden_size * numbers.size + 2 * _FLOAT


def _gate(moe: MoEConfig, num_experts: int, on_gpu: bool) -> int:
    """Return bytes per token, without the gate's float32 input."""
    slots = moe.experts_per_token * (_INDEX + _FLOAT)
    if moe.k_is_average:
        # Per expert: logarithm, softmax over the selected, difference of the masks; the mask and its complement.
        # The table of experts and gates is as wide as the busiest token needs, taken as twice the average.
        return num_experts * (3 * _FLOAT + 2 * _BOOL) + 2 * slots
    # Gates with biases, or with a straight-through gradient, are plain, and each keeps one more number per expert.
    more = (moe.bias_rate > 0) + moe.straight_through
    if moe.is_hierarchical:
        # A secondary gate is plain everywhere. Its rows have three indices and a group each, and tokens an index.
        of_group = _noisy(num_experts // moe.branching, moe.k, False, more) + 4 * _INDEX
        secondary = moe.primary_k * of_group + _INDEX
        more -= moe.straight_through and moe.primary_k > 1
        primary = _noisy(moe.branching, moe.primary_k, on_gpu and not more, more)
        return primary + secondary + moe.experts_per_token * _FLOAT
    if moe.is_noisy:
        return _noisy(num_experts, moe.k, on_gpu and not more, more)
    return slots + more * num_experts * _FLOAT


def _joint_weights(config: ModelConfig, num_experts: int) -> int:
    """Return the bytes of the matrices that make both logits of each expert, and of each group."""
    columns = num_experts + config.moe.branching * config.moe.is_hierarchical
    return 2 * config.hidden_size * columns * _FLOAT if config.moe.is_noisy else 0


def _noisy(num_experts: int, k: int, fused: bool, more: int) -> int:
    """Return the bytes per token of a noisy top-k gate, which has two logits and keeps `more` numbers per expert."""
    if fused:
        # Also the gates, and the values, noise and numbers of the largest k + 1.
        return (2 * num_experts + k + 3 * min(k + 1, num_experts)) * _FLOAT
    # Noise and its logit; distance to the threshold, standard deviation and their quotient, unless all are selected.
    numbers = more + (5 if k < num_experts else 2)
    return (numbers * num_experts + k) * _FLOAT + min(k + 1, num_experts) * _INDEX


def _experts(config: ModelConfig, numbers: Precision) -> int:
    """Return bytes per token: the input of its experts, and their hidden values and outputs."""
    moe, width = config.moe, config.hidden_size
    # Three indices per row: its token, slot and place. For strictly balanced gates, rows are counted on average.
    of_row = (sum(moe.hidden_sizes) + width) * numbers.size + 3 * _INDEX
    # One index per token: the start of its rows.
    return moe.experts_per_token * of_row + _INDEX + width * numbers.size


def _attention(config: ModelConfig, shape: BatchSize, numbers: Precision) -> int:
    """Return bytes of keys, queries, scores and contexts."""
    size, width = config.attention.size, config.hidden_size
    sources, targets = shape.sentences * shape.source, shape.sentences * shape.target
    pairs = sources * shape.target
    # The kernel of nmt/model/kernels/attention_triton.py, which computes tanh again in the backward pass.
    fused = numbers.on_gpu and not config.attention.feeds_back
    kept = sources * width + targets * width
    if config.attention.function == "product":
        # tanh of keys; tanh of queries, and their product with V.
        kept += sources * size + 2 * targets * size
    else:
        kept += sources * size + targets * size if fused else pairs * size
    heads = config.attention.heads
    if heads > 1:
        # Projected values, and copies of the heads' parts of them, of keys and queries, one head after the other.
        kept += sources * width + (sources * (size + width) + targets * size if fused else 0)
    # The softmax is float32.
    weights = targets * -(-shape.source // _BLOCK) * _BLOCK * _FLOAT if fused else pairs * _FLOAT
    if not fused:
        # A cast copy for the second product if its type differs; a mask.
        weights += pairs * (numbers.size if numbers.size < _FLOAT else 0) + sources * _BOOL
    weights *= heads
    if config.attention.projects_context:
        # The projection's input, and the mask of its dropout.
        weights += targets * width * (numbers.size + _mask(config, numbers))
    return kept * numbers.size + weights
