"""Count a model's parameters and operations per timestep, part by part, from its configuration alone.

ops/timestep is the paper's measure (S17 sections 5.1 and 5.3): multiply-adds of one forward pass for one source and
one target position. The softmax counts; biases and element-wise work do not. Training FLOPs count a multiply-add as
two, and the backward pass as twice the forward pass. `budget.py` computes bytes and seconds from these counts.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from nmt.config import LayerName, ModelConfig, MoEConfig


class LayerCount(NamedTuple):
    """Parameters of a layer, and its operations per position."""

    parameters: int
    ops: int
    """Multiply-adds of one forward pass."""


class MoELayerCount(NamedTuple):
    """The two parts of one mixture-of-experts layer."""

    experts: LayerCount
    gates: LayerCount


@dataclass(frozen=True)
class Cost:
    """Counts by part. A part's name starts with `encoder` or `decoder`, or names what both share."""

    parameters: dict[str, int]
    encoder_ops: dict[str, int]
    """Multiply-adds per source position."""
    decoder_ops: dict[str, int]
    """Multiply-adds per target position, without those that grow with the source length."""
    attention_ops_per_pair: int = field(default=0)
    """Multiply-adds per pair of a target and a source position: score and weighted sum."""

    @property
    def num_parameters(self) -> int:
        """Number of all parameters."""
        return sum(self.parameters.values())

    @property
    def num_expert_parameters(self) -> int:
        """Number of the experts' parameters, which expert parallelism divides among the GPUs."""
        return sum(count for part, count in self.parameters.items() if part.endswith("experts"))

    @property
    def num_vocabulary_parameters(self) -> int:
        """Number of parameters of embeddings and softmax, which the paper's "params" excludes (S17 Tables 7 and 8)."""
        return self.parameters["embeddings"] + self.parameters["softmax"]

    @property
    def ops(self) -> dict[str, int]:
        """Multiply-adds of one source and one target position, named as in `parameters`."""
        ops = self.encoder_ops | self.decoder_ops
        ops["attention"] = ops.pop("attention keys") + ops.pop("attention query")
        return ops

    @property
    def ops_per_timestep(self) -> int:
        """The paper's ops/timestep."""
        return sum(self.ops.values())

    def training_flops(self, source_tokens: float, target_tokens: float, sentences: float) -> float:
        """Return FLOPs of forward and backward pass for real (not padding) tokens in sentences of equal length."""
        pairs = source_tokens * target_tokens / max(sentences, 1.0)
        forward = source_tokens * sum(self.encoder_ops.values())
        forward += target_tokens * sum(self.decoder_ops.values())
        forward += pairs * self.attention_ops_per_pair
        return 6.0 * forward


def lstm_cost(input_size: int, cell_size: int, output_size: int, biases: bool = True) -> LayerCount:
    """Count one direction of an LSTM with I inputs, C cells and P outputs, projected if P < C (`nmt.model.lstm.LSTM`).

    It has 4 C (I + P) weights, and C P more for a projection, with one multiply-add each. The 8 C biases are not in the
    paper.
    """
    projection = cell_size * output_size if output_size < cell_size else 0
    weights = 4 * cell_size * (input_size + output_size) + projection
    return LayerCount(weights + 8 * cell_size * biases, weights)


def moe_cost(width: int, moe: MoEConfig, num_experts: int) -> MoELayerCount:
    """Count one MoE layer D -> D of n experts. Every weight of a selected expert is one multiply-add.

    A noisy gate has two D x n matrices, W_g and W_noise, and both count (S17 section 2.1). The hierarchical gate has
    both for its a groups and for the n/a experts of each group. Of the latter, operations are counted for the selected
    groups only (appendix B). Gates without noise have only W_g; strictly balanced gates also have n thresholds
    (appendix F).
    """
    expert = sum(inputs * outputs for inputs, outputs in pairwise([width, *moe.hidden_sizes, width]))
    column = (2 if moe.is_noisy else 1) * width
    groups, compared = 0, num_experts
    if moe.is_hierarchical:
        groups, compared = moe.branching, moe.primary_k * num_experts // moe.branching
    thresholds = num_experts if moe.k_is_average else 0
    biases = groups + num_experts if moe.bias_rate else 0
    gates = LayerCount(column * (groups + num_experts) + thresholds + biases, column * (groups + compared))
    return MoELayerCount(LayerCount(num_experts * expert, moe.experts_per_token * expert), gates)


def lstm_sizes(config: ModelConfig) -> dict[str, list[tuple[int, int, int]]]:
    """Return (input, cells, output) of every LSTM of the `encoder` and the `decoder`, one per direction."""
    width, cells = config.hidden_size, config.cell_size
    directions = 1 if config.bottom_layer == "forward" else 2
    second = 2 * width if config.bottom_layer == "bidirectional_full" else width
    encoder = [(width, *config.bottom_direction())] * directions
    for layer in range(2, config.num_encoder_layers + 1):
        if layer <= config.bidirectional_layers:
            encoder += [(width, *config.bottom_direction())] * 2
        else:
            encoder.append((second if layer == 2 else width, cells, width))
    first = 2 * width if config.attention.feeds_back else width
    above = 2 * width if config.attention.context_above else width
    decoder = [(first, cells, width)] + [(above, cells, width)] * (config.num_decoder_layers - 1)
    return {"encoder": encoder, "decoder": decoder}


def model_cost(config: ModelConfig, vocab_size: int) -> Cost:
    """Return the cost of `Seq2Seq(config, vocab_size)`."""
    width, attention, moe = config.hidden_size, config.attention, config.moe
    table = vocab_size * width
    parameters = {"embeddings": table if config.tie_embeddings else 2 * table}
    ops: dict[str, dict[str, int]] = {"encoder": {}, "decoder": {}}
    for side, sizes in lstm_sizes(config).items():
        lstms = [lstm_cost(*size) for size in sizes]
        parameters[f"{side} LSTMs"] = sum(lstm.parameters for lstm in lstms)
        ops[side][f"{side} LSTMs"] = sum(lstm.ops for lstm in lstms)
        layers = [layer for layer in config.moe_layer_names() if LayerName.of(layer).side == side]
        counts = [moe_cost(width, moe, moe.experts_at(layer)) for layer in layers]
        for part in MoELayerCount._fields if counts else ():
            parameters[f"{side} {part}"] = sum(getattr(count, part).parameters for count in counts)
            ops[side][f"{side} {part}"] = sum(getattr(count, part).ops for count in counts)
    ops["encoder"]["attention keys"] = width * attention.size
    ops["decoder"]["attention query"] = width * attention.size
    parameters["attention"] = 2 * width * attention.size + attention.size
    if attention.heads > 1:
        ops["encoder"]["attention keys"] += width * width  # and values
        parameters["attention"] += width * width
    if attention.function == "normalised":
        parameters["attention"] += attention.size + 1
    if attention.projects_context:
        ops["decoder"]["context projection"] = parameters["context projection"] = width * width
    ops["decoder"]["softmax"] = table
    parameters["softmax"] = (0 if config.tie_embeddings else table) + vocab_size * config.output_bias
    return Cost(parameters, ops["encoder"], ops["decoder"], attention.size + width)
