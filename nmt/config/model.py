"""Settings of the network."""

from dataclasses import dataclass, field

from nmt.config.checks import at_least, fraction, one_of

ATTENTION_FUNCTIONS = ("product", "additive", "normalised")
WIRINGS = ("parallel", "feedback", "gnmt_v2", "gnmt")
BOTTOM_LAYERS = ("forward", "bidirectional_half", "bidirectional_full")
GATINGS = ("noisy_top_k", "softmax_top_k", "hierarchical", "strictly_balanced")
OUTPUT_ACTIVATIONS = ("none", "sigmoid")
_MOST_EXPERT_LAYERS = 100


@dataclass
class AttentionConfig:
    """The decoder's attention to the source."""

    function: str = "product"
    """Attention function. product: two matrix products (S17 eq. 22). additive: GNMT's (S17 eq. 21). normalised:
    Bahdanau's with a learnt gain and bias (GNMT v2). additive and normalised need memory for batch x target x source x
    size numbers."""
    size: int = 512
    """n, the hidden size of the attention function."""
    wiring: str = "parallel"
    """Where the query comes from and where the context goes.
    parallel: the query is the current output of decoder layer 1. The context is projected and added before the
    decoder's MoE. Every layer processes a whole sequence in one call. feedback: the context for the previous position's
    output enters decoder layer 1, one position at a time (S17 appendix E). gnmt_v2: like parallel, but the context is
    concatenated to the input of every layer above the first. gnmt: like feedback, but the context enters all layers."""

    def __post_init__(self) -> None:
        one_of("model.attention.function", self.function, ATTENTION_FUNCTIONS)
        one_of("model.attention.wiring", self.wiring, WIRINGS)
        at_least("model.attention.size", self.size, 1)


@dataclass
class MoEConfig:
    """The sparsely-gated mixture-of-experts layers (S17 section 2). `num_experts: 0` builds the model without them."""

    num_experts: int = 32
    """n, the number of experts in each MoE layer; 0: no MoE layers."""
    num_experts_at: dict[str, int] = field(default_factory=dict)
    """Number of experts in layers that differ from `num_experts`, as `nmt experts --prune` sets it: {encoder.2: 30}."""
    k: int = 4
    """Active experts per token; with gating=hierarchical, per token and selected group. The gate learns from the task
    only with k >= 2 (S17 section 2.1)."""
    hidden_sizes: list[int] = field(default_factory=lambda: [2048])
    """Sizes of the hidden layers of an expert (ReLU, no biases). The paper's experts have [2048], those of its
    MoE-1-Deep [1024, 1024, 1024, 1024]."""
    gating: str = "noisy_top_k"
    """Kind of gate. noisy_top_k: S17 eq. 3-5. softmax_top_k: the same without noise. hierarchical: two levels of noisy
    top-k gates (S17 appendix B). strictly_balanced: every expert gets equally many tokens in training (S17
    appendix F)."""
    branching: int = 0
    """a, the number of groups of experts, for gating=hierarchical. Each group has num_experts / branching experts."""
    primary_k: int = 2
    """Groups selected per token, for gating=hierarchical."""
    output: str = "none"
    """Function on the layer's output before dropout and residual: none, or sigmoid as in S17 appendix E."""
    w_importance: float = 0.01
    """Weight of CV(Importance)^2 in the loss (S17 eq. 7)."""
    w_load: float = 0.01
    """Weight of CV(Load)^2 in the loss (S17 eq. 11)."""
    w_importance_decoder: float | None = None
    """w_importance for the decoder's MoE layers; null: the same as for the encoder's."""
    w_load_decoder: float | None = None
    """w_load for the decoder's MoE layers; null: the same as for the encoder's."""

    def __post_init__(self) -> None:
        at_least("model.moe.num_experts", self.num_experts, 0)
        one_of("model.moe.gating", self.gating, GATINGS)
        one_of("model.moe.output", self.output, OUTPUT_ACTIVATIONS)
        if not self.hidden_sizes:
            raise ValueError("model.moe.hidden_sizes is empty: name at least one hidden layer, such as [2048]")
        if len(self.hidden_sizes) > _MOST_EXPERT_LAYERS:
            raise ValueError(
                f"model.moe.hidden_sizes has {len(self.hidden_sizes)} layers: at most {_MOST_EXPERT_LAYERS} are allowed"
            )
        for layer, count in self.num_experts_at.items():
            at_least(f"model.moe.num_experts_at.{layer}", count, 1)
        for size in self.hidden_sizes:
            at_least("model.moe.hidden_sizes", size, 1)
        for name in ("w_importance", "w_load", "w_importance_decoder", "w_load_decoder"):
            at_least(f"model.moe.{name}", getattr(self, name) or 0.0, 0)
        counts = {"num_experts": self.num_experts}
        counts |= {f"num_experts_at.{layer}": count for layer, count in self.num_experts_at.items()}
        for name, count in counts.items() if self.num_experts else ():
            self._check_choice(name, count)

    def _check_choice(self, name: str, count: int) -> None:
        if self.gating != "hierarchical":
            if self.branching:
                raise ValueError(
                    f"model.moe.branching={self.branching} is for gating=hierarchical, not {self.gating}: leave it out"
                )
            if not 1 <= self.k <= count:
                raise ValueError(f"model.moe.k={self.k} must lie in 1..{name}={count}")
            return
        if self.branching < 1 or count % self.branching:
            raise ValueError(
                f"model.moe.branching={self.branching} must divide model.moe.{name}={count} into equal groups"
            )
        if not 1 <= self.primary_k <= self.branching:
            raise ValueError(f"model.moe.primary_k={self.primary_k} must lie in 1..branching={self.branching}")
        if not 1 <= self.k <= count // self.branching:
            raise ValueError(f"model.moe.k={self.k} must lie in 1..{count // self.branching}, the experts of a group")

    def experts_at(self, layer: str) -> int:
        """Return the number of experts of a layer, named as in the metrics: "encoder.2"."""
        return self.num_experts_at.get(layer, self.num_experts)

    @property
    def experts_per_token(self) -> int:
        """Active experts per token in one layer (the average for strictly balanced gates)."""
        return self.primary_k * self.k if self.gating == "hierarchical" else self.k

    def balance_weights(self, layer: str) -> tuple[float, float]:
        """Return (w_importance, w_load) of a layer."""
        own = (self.w_importance_decoder, self.w_load_decoder) if layer.startswith("decoder") else (None, None)
        w_importance = self.w_importance if own[0] is None else own[0]
        return w_importance, self.w_load if own[1] is None else own[1]


@dataclass
class ModelConfig:
    """The network (S17 appendix E, GNMT section 3)."""

    hidden_size: int = 512
    """D, the width of embeddings and of layer inputs and outputs."""
    cell_size: int = 2048
    """Cells per LSTM. If larger than hidden_size, the output is projected to hidden_size (S17: 2048 -> 512)."""
    num_encoder_layers: int = 3
    """Number of LSTMs in the encoder."""
    num_decoder_layers: int = 2
    """Number of LSTMs in the decoder. The first one computes the query of the attention."""
    bottom_layer: str = "bidirectional_half"
    """The encoder's first LSTM. forward: one direction. bidirectional_half: two directions of hidden_size/2 outputs
    each (and as many cells, unless cells are projected). bidirectional_full: two directions of hidden_size outputs
    each, so that layer 2 reads 2 x hidden_size (GNMT)."""
    residual_from: int = 1
    """First LSTM with a residual connection, in encoder and decoder (S17: 1; GNMT: 3). MoE layers always have one."""
    encoder_moe_after: list[int] = field(default_factory=lambda: [2])
    """Encoder LSTMs, counted from 1, that are followed by a MoE layer."""
    decoder_moe_after: list[int] = field(default_factory=lambda: [1])
    """Decoder LSTMs, counted from 1, that are followed by a MoE layer."""
    dropout: float = 0.1
    """Dropout on the output of every embedding, LSTM and MoE layer, before its residual (S17: 0.4 on WMT14)."""
    tie_embeddings: bool = True
    """Use one matrix for source embedding, target embedding and softmax. GNMT has three."""
    output_bias: bool = False
    """Add a bias to the softmax layer (GNMT v2)."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        for name in ("hidden_size", "cell_size", "num_encoder_layers", "num_decoder_layers", "residual_from"):
            at_least(f"model.{name}", getattr(self, name), 1)
        if self.cell_size < self.hidden_size:
            raise ValueError(f"model.cell_size={self.cell_size} must be at least hidden_size={self.hidden_size}")
        one_of("model.bottom_layer", self.bottom_layer, BOTTOM_LAYERS)
        if self.bottom_layer == "bidirectional_half" and self.hidden_size % 2:
            raise ValueError(f"model.hidden_size={self.hidden_size} must be even for bottom_layer=bidirectional_half")
        if self.bottom_layer == "bidirectional_full" and self.num_encoder_layers < 2:
            raise ValueError(
                "model.bottom_layer=bidirectional_full needs a layer above it: "
                f"model.num_encoder_layers={self.num_encoder_layers} must be at least 2"
            )
        fraction("model.dropout", self.dropout)
        for side, layers in (("encoder", self.num_encoder_layers), ("decoder", self.num_decoder_layers)):
            places = getattr(self, f"{side}_moe_after")
            if len(set(places)) != len(places) or not all(1 <= place <= layers for place in places):
                raise ValueError(f"model.{side}_moe_after={places} must be different layers in 1..{layers}")
        unknown = self.moe.num_experts_at.keys() - set(self.moe_layers())
        if unknown:
            raise ValueError(
                f"model.moe.num_experts_at names {min(unknown)}; the MoE layers are {', '.join(self.moe_layers())}"
            )
        if self.bottom_layer == "bidirectional_full" and 1 in self.encoder_moe_after and self.moe.num_experts:
            raise ValueError(
                "model.encoder_moe_after=1 cannot be combined with bottom_layer=bidirectional_full, whose output "
                "is twice as wide as an expert's"
            )

    def moe_layers(self) -> list[str]:
        """Return the names of the MoE layers in the order of computation: "encoder.2" follows encoder LSTM 2."""
        places = {"encoder": sorted(self.encoder_moe_after), "decoder": sorted(self.decoder_moe_after)}
        return [f"{side}.{place}" for side in places for place in places[side]] if self.moe.num_experts else []

    def bottom_direction(self) -> tuple[int, int]:
        """Return (cells, outputs) of each direction of the bottom layer."""
        if self.bottom_layer != "bidirectional_half":
            return self.cell_size, self.hidden_size
        half = self.hidden_size // 2
        return (self.cell_size if self.cell_size > self.hidden_size else half), half
