"""Bytes that one micro-batch keeps between its forward and its backward pass, from the configuration alone.

A list of what the network's operations save, part by part, in the words of the code that saves it; a test compares it
with what PyTorch really keeps. Small things (initial states, scalars) are left out.

Letters: S source and T target positions of each sentence, B sentences, D width, C cells, P outputs and I inputs of an
LSTM, N attention size, V vocabulary, K slots for experts of a token, E experts, A groups of them.
"""

from collections import Counter
from typing import NamedTuple

from nmt.config import ModelConfig, MoEConfig
from nmt.evaluation.compute import lstm_sizes

FLOAT, INDEX = 4, 8
"""Bytes of a float32 number and of an index; a truth value has one."""


class Shape(NamedTuple):
    """One micro-batch: its sentences, and how many positions each of them has, EOS and padding included."""

    sentences: int
    source: int
    target: int


class Numbers(NamedTuple):
    """What the matrix products compute with, and where."""

    on_gpu: bool
    """cuDNN's LSTM and masks of one byte; on a CPU, oneDNN's LSTM (or PyTorch's, with a projection) and wide masks."""
    size: int
    """Bytes of a number in matrix products: 2 (bf16) or 4 (float32). Gates and softmaxes are float32 in any case."""


def saved_bytes(config: ModelConfig, vocab_size: int, shape: Shape, numbers: Numbers) -> dict[str, int]:
    """Bytes by part. No padding is assumed: experts, gates and softmax see every position."""
    saved: Counter[str] = Counter()
    width, places = config.hidden_size, {"encoder": shape.source, "decoder": shape.target}
    saved["softmax"] = _softmax(config, vocab_size, shape.sentences * shape.target, numbers)
    saved["attention"] = _attention(config, shape, numbers)
    for side, lstms in lstm_sizes(config).items():
        positions = places[side] * shape.sentences
        # Token numbers; where the backward direction reads; the mask of the embedding's dropout.
        turned = INDEX if side == "encoder" and config.bottom_layer != "forward" else 0
        saved["embeddings"] += positions * (2 * INDEX + turned + width * _mask(config, numbers))
        for index, sizes in enumerate(lstms):
            stepwise = side == "decoder" and index == 0 and config.attention.wiring in ("feedback", "gnmt")
            calls = places[side] if stepwise else 1
            saved[f"{side} LSTMs"] += _lstm(*sizes, shape.sentences, places[side], calls, numbers)
            saved[f"{side} LSTMs"] += positions * sizes[2] * _mask(config, numbers)
    for layer in config.moe_layers():
        side, experts = layer.partition(".")[0], config.moe.experts_at(layer)
        positions = places[side] * shape.sentences
        saved[f"{side} gates"] += positions * (_gate(config.moe, experts) + width * FLOAT)
        saved[f"{side} experts"] += positions * (_experts(config, numbers) + width * _mask(config, numbers))
    return dict(saved)


def cast_bytes(config: ModelConfig, numbers: Numbers, num_experts: float) -> tuple[int, int]:
    """(dense, experts): copies of float32 weights that a bf16 forward pass makes and the backward pass reads.

    `num_experts`: how many a GPU holds of all MoE layers together. LSTM weights are copied twice: to bf16, and by cuDNN
    into one piece; with feedback wirings, once again at every position (not counted here: see `saved_bytes`).
    """
    if numbers.size == FLOAT:
        return 0, 0
    raise NotImplementedError


def _mask(config: ModelConfig, numbers: Numbers) -> int:
    """Bytes a number that dropout keeps."""
    if config.dropout == 0.0:
        return 0
    return 1 if numbers.on_gpu else numbers.size


def _lstm(
    inputs: int, cells: int, outputs: int, sentences: int, positions: int, calls: int, numbers: Numbers
) -> int:
    """One direction, run in `calls` calls over its positions."""
    rows = sentences * positions
    kept = inputs + outputs
    if numbers.on_gpu:
        kept += _CUDNN_CELLS * cells + _CUDNN_OUTPUTS * outputs
    elif outputs < cells:
        # PyTorch's own: four gates, cell before, tanh of the cell after, output before projection.
        kept += 7 * cells
    else:
        # oneDNN's workspace, which has one position more than the sequence (fitted to within 3 %).
        rows_of_workspace = sentences * (positions + calls)
        return numbers.size * (rows * kept + rows_of_workspace * (8 * cells + 7 * max(inputs, cells)))
    return numbers.size * rows * kept
