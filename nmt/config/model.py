"""Settings of the network."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from nmt.config.checks import at_least, fraction, one_of
from nmt.wording import counted

ATTENTION_FUNCTIONS = ("product", "additive", "normalised")
WIRINGS = ("parallel", "feedback", "gnmt_v2", "gnmt")
BOTTOM_LAYERS = ("forward", "bidirectional_half", "bidirectional_full")
NORMS = ("none", "moe", "layers")
GATINGS = ("noisy_top_k", "softmax_top_k", "hierarchical", "strictly_balanced")
OUTPUT_ACTIVATIONS = ("none", "sigmoid")
_MOST_EXPERT_LAYERS = 100


class LayerName(NamedTuple):
    """Position of an MoE layer: after LSTM `place` of a side, counted from 1. As text, "encoder.2"."""

    side: str
    """encoder or decoder."""
    place: int

    @classmethod
    def of(cls, name: str) -> "LayerName":
        """Return the parts of a name such as "encoder.2"."""
        side, _, place = name.partition(".")
        return cls(side, int(place))

    def __str__(self) -> str:
        return f"{self.side}.{self.place}"


@dataclass
class AttentionConfig:
    """The decoder's attention to the source."""

    function: str = "product"
    """Attention function. product: two matrix products (S17 eq. 22). additive: GNMT's (S17 eq. 21). normalised:
    Bahdanau's with a learnt gain and bias (GNMT v2). additive and normalised need memory for batch x target x source x
    size numbers."""
    size: int = 512
    """n, the hidden size of the attention function, over all heads together."""
    wiring: str = "parallel"
    """Where the query comes from and where the context goes.
    parallel: the query is the current output of decoder layer 1. The context is projected and added before the
    decoder's MoE. Every layer processes a whole sequence in one call. feedback: the context for the previous position's
    output enters decoder layer 1, one position at a time (S17 appendix E). gnmt_v2: like parallel, but the context is
    concatenated to the input of every layer above the first. gnmt: like feedback, but the context enters all layers."""
    heads: int = 1
    """Heads, each with its own softmax over an equal part of queries, keys and values (Vaswani et al. 2017; Chen et al.
    2018 for LSTMs). With more than one, which function=product can have, values are projected first."""

    def __post_init__(self) -> None:
        one_of("model.attention.function", self.function, ATTENTION_FUNCTIONS)
        one_of("model.attention.wiring", self.wiring, WIRINGS)
        at_least("model.attention.size", self.size, 1)
        at_least("model.attention.heads", self.heads, 1)
        if self.heads > 1 and self.function != "product":
            raise ValueError(
                f"model.attention.heads={self.heads} is for function=product, not {self.function}: leave it out"
            )
        if self.size % self.heads:
            raise ValueError(f"model.attention.heads={self.heads} must divide model.attention.size={self.size}")

    @property
    def feeds_back(self) -> bool:
        """Whether the context enters decoder layer 1, which then runs one position at a time."""
        return self.wiring in ("feedback", "gnmt")

    @property
    def context_above(self) -> bool:
        """Whether the context is concatenated to the input of every decoder layer above the first."""
        return self.wiring in ("gnmt", "gnmt_v2")

    @property
    def projects_context(self) -> bool:
        """Whether the context is projected and added to the stream after decoder layer 1."""
        return self.wiring == "parallel"


@dataclass
class MoEConfig:
    """The sparsely-gated mixture-of-experts layers (S17 section 2). `num_experts: 0` builds the model without them."""

    num_experts: int = 32
    """n, the number of experts in each MoE layer; 0: no MoE layers."""
    num_experts_at: dict[str, int] = field(default_factory=dict)
    """Number of experts in layers that differ from `num_experts`, as `nmt experts --prune` sets it: {encoder.2: 30}."""
    k: int = 4
    """Active experts per token; with gating=hierarchical, per token and selected group. The gate learns from the task
    only with k >= 2 (S17 section 2.1), or with straight_through."""
    hidden_sizes: list[int] = field(default_factory=lambda: [2048])
    """Sizes of the hidden layers of an expert (ReLU, no biases). The paper's experts have [2048], those of its
    MoE-1-Deep [1024, 1024, 1024, 1024]."""
    gating: str = "noisy_top_k"
    """Kind of gate. noisy_top_k: S17 eq. 3-5. softmax_top_k: the same without noise. hierarchical: two levels of noisy
    top-k gates (S17 appendix B). strictly_balanced: every expert gets the same number of tokens in training (S17
    appendix F)."""
    branching: int = 0
    """a, the number of groups of experts, for gating=hierarchical. Each group has num_experts / branching experts."""
    primary_k: int = 2
    """Groups selected per token, for gating=hierarchical."""
    straight_through: bool = False
    """Let the gate learn from the task with k=1 too. The softmax over one logit is always 1, so it has no gradient (S17
    section 2.1). With this setting, the value is still 1, but it has the gradient of log p. Here, p is the probability
    of the chosen expert among all (of its group). It is no part of the paper. `nmt experts --grow` sets it."""
    bias_rate: float = 0.0
    """Balance by biases instead of losses: gamma of DeepSeek-V3, which has 0.001; 0: no biases. A bias per expert is
    added to the logits when experts are chosen, but not in the gate values. After each step, it rises by gamma if the
    expert had fewer tokens than the mean, and falls by gamma if it had more (Wang et al. 2024). For gates that choose
    the top k; w_importance=0 and w_load=0 leave balancing to the biases alone."""
    copies: int = 1
    """How many experts `nmt experts --grow` made of each earlier one: it sets this, and nothing is computed from it.
    Experts with numbers that are multiples of `copies` are the earlier ones, the others are new. 1: nothing was
    copied, or experts were pruned or merged since."""
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
    output_masking: float = 0.0
    """Probability that the output of an expert is left out for a token in training (EOM: NLLB Team 2022; Elbayad et al.
    2023), for small corpora: 0.1 or 0.2. What the gate decides and its balance losses stay the same."""
    expert_dropout: float = 0.0
    """Dropout on the hidden units of experts (Fedus et al. 2021; Zoph et al. 2022), for small corpora. 0.4 is usual in
    fine-tuning."""

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
        for name in ("output_masking", "expert_dropout"):
            fraction(f"model.moe.{name}", getattr(self, name))
        at_least("model.moe.bias_rate", self.bias_rate, 0)
        at_least("model.moe.copies", self.copies, 1)
        if self.bias_rate and self.k_is_average:
            raise ValueError(
                f"model.moe.bias_rate={self.bias_rate:g} is for gates that choose the top k, not for "
                f"gating={self.gating}, whose experts get equally many tokens in training: leave it out"
            )
        if self.straight_through and (self.k != 1 or self.k_is_average) and self.num_experts:
            raise ValueError(
                f"model.moe.straight_through is for k=1 and gates that choose the top k, not for k={self.k} with "
                f"gating={self.gating}: leave it out"
            )
        counts = {"num_experts": self.num_experts}
        counts |= {f"num_experts_at.{layer}": count for layer, count in self.num_experts_at.items()}
        for name, count in counts.items() if self.num_experts else ():
            self._check_choice(name, count)

    def _check_choice(self, name: str, count: int) -> None:
        if count % self.copies:
            raise ValueError(f"model.moe.copies={self.copies} must divide model.moe.{name}={count}: leave it out")
        if not self.is_hierarchical:
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

    # Properties of each kind of gate. No other file compares `gating` with a name.

    @property
    def is_noisy(self) -> bool:
        """Whether logits get noise in training: the gate has w_noise, and its load a gradient (S17 eq. 8-10)."""
        return self.gating in ("noisy_top_k", "hierarchical")

    @property
    def is_hierarchical(self) -> bool:
        """Whether a primary gate chooses among `branching` groups of experts (S17 appendix B)."""
        return self.gating == "hierarchical"

    @property
    def k_is_average(self) -> bool:
        """Whether tokens have different numbers of experts in training, k on average, some none (S17 appendix F)."""
        return self.gating == "strictly_balanced"

    def describe_gate(self) -> str:
        """Return the gate in words, with its section of the paper."""
        match self.gating:
            case "noisy_top_k":
                return f"noisy top-k, k = {self.k} (section 2.1 of the paper)"
            case "softmax_top_k":
                return f"top-k without noise, k = {self.k}"
            case "hierarchical":
                return (
                    f"two levels of noisy top-k (appendix B of the paper): {self.primary_k} of {self.branching} "
                    f"groups, {counted(self.k, 'expert')} in each"
                )
        return f"strictly balanced, k = {self.k} on average (appendix F of the paper)"

    def experts_at(self, layer: str) -> int:
        """Return the number of experts of a layer, named as in the metrics: "encoder.2"."""
        return self.num_experts_at.get(layer, self.num_experts)

    def groups_at(self, layer: str) -> list[range]:
        """Return the experts of each group of a layer; a flat gate has one group of all experts."""
        count = self.experts_at(layer)
        size = count // self.branching if self.is_hierarchical else count
        return [range(first, first + size) for first in range(0, count, size)]

    @property
    def experts_per_token(self) -> int:
        """Active experts per token in one layer (the average where `k_is_average`)."""
        return self.primary_k * self.k if self.is_hierarchical else self.k

    def with_experts_per_token(self, count: int) -> "MoEConfig":
        """Return these settings with `count` active experts per token, shared out as `HierarchicalGate` does."""
        if not self.is_hierarchical:
            return replace(self, k=count)
        groups = min(count, self.primary_k)
        return replace(self, primary_k=groups, k=count // groups)

    def balance_weights(self, layer: str) -> tuple[float, float]:
        """Return (w_importance, w_load) of a layer."""
        w_importance, w_load = self.balance_settings(layer).values()
        return w_importance, w_load

    def balance_settings(self, layer: str) -> dict[str, float]:
        """Return `balance_weights` by the full key of the setting that each comes from."""
        weights = {}
        for name in ("w_importance", "w_load"):
            own = getattr(self, f"{name}_decoder") if LayerName.of(layer).side == "decoder" else None
            key = f"model.moe.{name}" if own is None else f"model.moe.{name}_decoder"
            weights[key] = getattr(self, name) if own is None else own
        return weights


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
    bidirectional_layers: int = 1
    """Encoder LSTMs, from the first up, that read in both directions (Chen et al. 2018). More than 1 is for
    bottom_layer=bidirectional_half."""
    residual_from: int = 1
    """First LSTM with a residual connection, in encoder and decoder (S17: 1; GNMT: 3). MoE layers always have one."""
    encoder_moe_after: list[int] = field(default_factory=lambda: [2])
    """Encoder LSTMs, counted from 1, that are followed by a MoE layer."""
    decoder_moe_after: list[int] = field(default_factory=lambda: [1])
    """Decoder LSTMs, counted from 1, that are followed by a MoE layer."""
    norm: str = "none"
    """Layer norm (Ba et al. 2016) without gain and bias, on the input of a layer and not on its residual connection.
    none: nowhere. moe: before MoE layers. layers: before MoE layers and all LSTMs above the first of a side."""
    dropout: float = 0.1
    """Dropout on the output of every embedding, LSTM and MoE layer, before its residual (S17: 0.4 on WMT14)."""
    word_dropout: float = 0.0
    """Probability that the whole embedding of a source or target token is 0 in training (Gal & Ghahramani 2016;
    Sennrich & Zhang 2019), for small corpora: 0.1 or 0.2."""
    tie_embeddings: bool = True
    """Use one matrix for source embedding, target embedding and softmax. GNMT has three."""
    output_bias: bool = False
    """Add a bias to the softmax layer (GNMT v2)."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "cell_size", "num_encoder_layers", "num_decoder_layers")
        for name in (*sizes, "bidirectional_layers", "residual_from"):
            at_least(f"model.{name}", getattr(self, name), 1)
        if self.cell_size < self.hidden_size:
            raise ValueError(f"model.cell_size={self.cell_size} must be at least hidden_size={self.hidden_size}")
        one_of("model.bottom_layer", self.bottom_layer, BOTTOM_LAYERS)
        one_of("model.norm", self.norm, NORMS)
        if self.hidden_size % self.attention.heads:
            raise ValueError(
                f"model.attention.heads={self.attention.heads} must divide model.hidden_size={self.hidden_size}"
            )
        if self.bottom_layer == "bidirectional_half" and self.hidden_size % 2:
            raise ValueError(f"model.hidden_size={self.hidden_size} must be even for bottom_layer=bidirectional_half")
        if self.bottom_layer == "bidirectional_full" and self.num_encoder_layers < 2:
            raise ValueError(
                "model.bottom_layer=bidirectional_full needs a layer above it: "
                f"model.num_encoder_layers={self.num_encoder_layers} must be at least 2"
            )
        if self.bidirectional_layers > 1 and self.bottom_layer != "bidirectional_half":
            raise ValueError(
                f"model.bidirectional_layers={self.bidirectional_layers} is for bottom_layer=bidirectional_half, not "
                f"{self.bottom_layer}: leave it out"
            )
        if self.bidirectional_layers > self.num_encoder_layers:
            raise ValueError(
                f"model.bidirectional_layers={self.bidirectional_layers} must be at most "
                f"num_encoder_layers={self.num_encoder_layers}"
            )
        fraction("model.dropout", self.dropout)
        fraction("model.word_dropout", self.word_dropout)
        for side, layers in (("encoder", self.num_encoder_layers), ("decoder", self.num_decoder_layers)):
            places = getattr(self, f"{side}_moe_after")
            if len(set(places)) != len(places) or not all(1 <= place <= layers for place in places):
                raise ValueError(f"model.{side}_moe_after={places} must be different layers in 1..{layers}")
        unknown = self.moe.num_experts_at.keys() - set(self.moe_layer_names())
        if unknown:
            raise ValueError(
                f"model.moe.num_experts_at names {min(unknown)}; the MoE layers are {', '.join(self.moe_layer_names())}"
            )
        if self.bottom_layer == "bidirectional_full" and 1 in self.encoder_moe_after and self.moe.num_experts:
            raise ValueError(
                "model.encoder_moe_after=1 cannot be combined with bottom_layer=bidirectional_full, whose output "
                "is twice as wide as an expert's"
            )

    def moe_layer_names(self) -> list[str]:
        """Return the names of the MoE layers in the order of computation: "encoder.2" follows encoder LSTM 2."""
        if not self.moe.num_experts:
            return []
        places = {"encoder": sorted(self.encoder_moe_after), "decoder": sorted(self.decoder_moe_after)}
        return [str(LayerName(side, place)) for side in places for place in places[side]]

    def bottom_direction(self) -> tuple[int, int]:
        """Return (cells, outputs) of each direction of the bottom layer, and of other layers with two directions."""
        if self.bottom_layer != "bidirectional_half":
            return self.cell_size, self.hidden_size
        half = self.hidden_size // 2
        return (self.cell_size if self.cell_size > self.hidden_size else half), half
