"""What a model costs, from its configuration alone: parameters and operations per timestep, part by part.

ops/timestep is the paper's measure (S17 sections 5.1 and 5.3): multiply-adds of one forward pass for one source and
one target position, softmax included, biases and element-wise work not. Training FLOPs count a multiply-add as two,
and the backward pass as twice the forward pass.
"""

from dataclasses import dataclass, field

from nmt.config import ModelConfig


@dataclass(frozen=True)
class Cost:
    """Counts by part; a part's name starts with `encoder`, `decoder` or names what both share."""

    parameters: dict[str, int]
    encoder_ops: dict[str, int]
    """Multiply-adds for one source position."""
    decoder_ops: dict[str, int]
    """Multiply-adds for one target position, without those that grow with the source length."""
    attention_ops_per_pair: int = field(default=0)
    """Multiply-adds for one target position and one source position: score and weighted sum."""

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    @property
    def ops_per_timestep(self) -> int:
        """The paper's figure."""
        return sum(self.encoder_ops.values()) + sum(self.decoder_ops.values())

    def training_flops(self, source_tokens: float, target_tokens: float, sentences: float) -> float:
        """FLOPs of forward and backward for real (not padding) tokens, sentences taken as equally long."""
        pairs = source_tokens * target_tokens / max(sentences, 1.0)
        forward = source_tokens * sum(self.encoder_ops.values())
        forward += target_tokens * sum(self.decoder_ops.values())
        forward += pairs * self.attention_ops_per_pair
        return 6.0 * forward


def _lstm(input_size: int, cell_size: int, output_size: int) -> tuple[int, int]:
    """(weights = multiply-adds, biases) of `nmt.model.lstm.LSTM`."""
    projection = cell_size * output_size if output_size < cell_size else 0
    return 4 * cell_size * (input_size + output_size) + projection, 8 * cell_size


def _lstm_sizes(config: ModelConfig) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """(input, cells, output) of every LSTM of the encoder and of the decoder, each direction counted."""
    width, cells = config.hidden_size, config.cell_size
    directions = 1 if config.bottom_layer == "forward" else 2
    second = 2 * width if config.bottom_layer == "bidirectional_full" else width
    encoder = [(width, *config.bottom_direction())] * directions
    for layer in range(2, config.num_encoder_layers + 1):
        encoder.append((second if layer == 2 else width, cells, width))
    first = 2 * width if config.attention.wiring in ("feedback", "gnmt") else width
    above = 2 * width if config.attention.wiring in ("gnmt", "gnmt_v2") else width
    decoder = [(first, cells, width)] + [(above, cells, width)] * (config.num_decoder_layers - 1)
    return encoder, decoder


def model_cost(config: ModelConfig, vocab_size: int) -> Cost:
    """The cost of `Seq2Seq(config, vocab_size)`."""
    width, attention, moe = config.hidden_size, config.attention, config.moe
    table = vocab_size * width
    parameters = {"embeddings": table if config.tie_embeddings else 2 * table}
    encoder_ops: dict[str, int] = {}
    decoder_ops: dict[str, int] = {}
    for side, ops, sizes in zip(("encoder", "decoder"), (encoder_ops, decoder_ops), _lstm_sizes(config), strict=True):
        counts = [_lstm(*size) for size in sizes]
        ops[f"{side} LSTMs"] = sum(weights for weights, _ in counts)
        parameters[f"{side} LSTMs"] = sum(weights + biases for weights, biases in counts)
        places = len(getattr(config, f"{side}_moe_after")) if moe.num_experts else 0
        if places:
            expert, gate = 2 * width * moe.hidden_size, 2 * width * moe.num_experts
            ops[f"{side} experts"] = places * moe.k * expert
            ops[f"{side} gates"] = places * gate
            parameters[f"{side} experts"] = places * moe.num_experts * expert
            parameters[f"{side} gates"] = places * gate
    encoder_ops["attention keys"] = width * attention.size
    decoder_ops["attention query"] = width * attention.size
    parameters["attention"] = 2 * width * attention.size + attention.size
    if attention.function == "normalised":
        parameters["attention"] += attention.size + 1
    if attention.wiring == "parallel":
        decoder_ops["context projection"] = parameters["context projection"] = width * width
    decoder_ops["softmax"] = table
    parameters["softmax"] = (0 if config.tie_embeddings else table) + vocab_size * config.output_bias
    return Cost(parameters, encoder_ops, decoder_ops, attention.size + width)
