"""Every setting of the program, once: its type, its default and its documentation.

These dataclasses are the schema of the Hydra configuration in conf/. The YAML files choose values; a misspelt key, a
wrong type or a value that contradicts another is refused with the full key before anything runs. Below the command
line nothing knows Hydra: the program is handed these plain objects.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

ATTENTION_FUNCTIONS = ("product", "additive", "normalised")
WIRINGS = ("parallel", "feedback", "gnmt_v2", "gnmt")
BOTTOM_LAYERS = ("forward", "bidirectional_half", "bidirectional_full")
GATINGS = ("noisy_top_k",)
OUTPUT_ACTIVATIONS = ("none", "sigmoid")
SUBWORD_KINDS = ("unigram", "bpe")
NORMALISATIONS = ("nmt_nfkc", "nfkc", "identity")
SCHEDULES = ("inverse_sqrt", "linear")
PRECISIONS = ("auto", "fp32", "bf16")
DEVICES = ("auto", "cpu", "cuda")
BEST_BY = ("perplexity", "bleu")


def _one_of(key: str, value: Any, allowed: Collection[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"{key}={value} is not one of {', '.join(map(str, allowed))}")


def _at_least(key: str, value: float, minimum: float) -> None:
    # Written so that NaN is refused too.
    if not value >= minimum:
        raise ValueError(f"{key}={value} must be at least {minimum}")


def _above(key: str, value: float, bound: float) -> None:
    if not value > bound:
        raise ValueError(f"{key}={value} must be greater than {bound}")


def _fraction(key: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{key}={value} must lie in 0 <= value < 1")


@dataclass
class FilesConfig:
    """Parallel text of one split, for `corpus.source: files`. Line n of `source` pairs with line n of `target`.

    Compression is told by the ending: .gz, .xz, .zst or none.
    """

    source: list[str] = field(default_factory=list)
    """Text files of the source language, one sentence per line; several are read one after the other."""
    target: list[str] = field(default_factory=list)
    """Text files of the target language, in the same order."""
    pairs: list[str] = field(default_factory=list)
    """Files that hold both sides: .tsv (source TAB target), .jsonl or .parquet with a column `translation`
    (language -> text) or one column per language."""


@dataclass
class FilterConfig:
    """What a training pair must satisfy; dev and test are never filtered. 0 or false switches a filter off."""

    blank: bool = True
    """Drop pairs of which one side is blank."""
    identical: bool = False
    """Drop pairs whose two sides are the same text (untranslated lines of web corpora)."""
    duplicates: bool = False
    """Drop pairs seen before. Costs about 100 bytes of memory a pair."""
    max_words: int = 150
    """Drop pairs with more blank-separated words on either side."""
    max_length_ratio: float = 0.0
    """Drop pairs whose longer side has more than this many times the words of the shorter one."""
    max_pieces: int = 200
    """Drop pairs with more subword pieces on either side."""

    def __post_init__(self) -> None:
        for name in ("max_words", "max_length_ratio", "max_pieces"):
            _at_least(f"corpus.filters.{name}", getattr(self, name), 0)


@dataclass
class SubwordConfig:
    """One SentencePiece vocabulary for both languages (GNMT section 4: a shared vocabulary makes copying trivial)."""

    kind: str = "unigram"
    """unigram or bpe."""
    vocab_size: int = 32000
    """Pieces, the four special ones included. A multiple of 8 keeps the softmax on the fast matrix path."""
    character_coverage: float = 0.9999
    """Share of the characters that get a piece of their own; the rest are unknown."""
    normalisation: str = "nmt_nfkc"
    """nmt_nfkc, nfkc, or identity (keeps typographic spaces and ligatures)."""
    training_sentences: int = 400000
    """Sentences, of both languages together, drawn evenly from the corpus to learn the pieces from."""

    def __post_init__(self) -> None:
        _one_of("corpus.subwords.kind", self.kind, SUBWORD_KINDS)
        _one_of("corpus.subwords.normalisation", self.normalisation, NORMALISATIONS)
        _at_least("corpus.subwords.vocab_size", self.vocab_size, 16)
        _at_least("corpus.subwords.training_sentences", self.training_sentences, 1)
        if not 0.9 <= self.character_coverage <= 1.0:
            raise ValueError(f"corpus.subwords.character_coverage={self.character_coverage} must lie in 0.9 .. 1.0")


@dataclass
class CorpusConfig:
    """Where sentence pairs come from and how they become numbers (`nmt prepare`)."""

    name: str = "corpus"
    """Names the prepared corpus; it lies in `directory`/`name`-<fingerprint of this whole section>."""
    directory: str = "data/prepared"
    """Folder of all prepared corpora."""
    source: str = "phrasebook"
    """phrasebook (embedded), files (train/dev/test below), or a dataset of the Hugging Face hub such as wmt/wmt14,
    or a local folder laid out like one."""
    subset: str = ""
    """Hub datasets: the configuration, e.g. de-en."""
    source_language: str = "en"
    """Language code; with hub datasets the key in the column `translation`."""
    target_language: str = "de"
    """Language code; with hub datasets the key in the column `translation`."""
    root: str = ""
    """Folder that the file names below are relative to; empty: the working directory."""
    train: FilesConfig = field(default_factory=FilesConfig)
    """Training text, for `source: files`."""
    dev: FilesConfig = field(default_factory=FilesConfig)
    """Validation text, for `source: files`."""
    test: FilesConfig = field(default_factory=FilesConfig)
    """Test text, for `source: files`. May be empty: then `nmt evaluate` wants --source and --reference."""
    max_pairs: int = 0
    """Read only this many training pairs (0: all; for the phrasebook 0 means 30,000)."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """What is dropped from the training text."""
    subwords: SubwordConfig = field(default_factory=SubwordConfig)
    """The vocabulary."""

    def __post_init__(self) -> None:
        _at_least("corpus.max_pairs", self.max_pairs, 0)
        if not self.name or "/" in self.name:
            raise ValueError(f"corpus.name={self.name!r} must be a plain name: it becomes a folder")
        if self.source_language == self.target_language:
            raise ValueError(f"corpus.source_language and corpus.target_language are both {self.source_language!r}")


@dataclass
class AttentionConfig:
    """How the decoder reads the source."""

    function: str = "product"
    """product: S17 eq. 22, two matrix products; additive: GNMT's, S17 eq. 21; normalised: Bahdanau's with a learnt
    gain and bias (GNMT v2). The last two hold batch x target x source x size numbers at once."""
    size: int = 512
    """n, the hidden size of the attention function."""
    wiring: str = "parallel"
    """Where the query comes from and where the context goes.
    parallel: query is decoder layer 1's current output, the context is projected and added to the stream before the
    decoder's MoE; every layer runs as one whole-sequence call. feedback: S17 appendix E, the context of the previous
    position's output enters decoder layer 1, one position at a time. gnmt_v2: like parallel, but the context is
    concatenated to the input of every layer above the first. gnmt: like feedback, and the context enters all layers."""

    def __post_init__(self) -> None:
        _one_of("model.attention.function", self.function, ATTENTION_FUNCTIONS)
        _one_of("model.attention.wiring", self.wiring, WIRINGS)
        _at_least("model.attention.size", self.size, 1)


@dataclass
class MoEConfig:
    """The sparsely-gated mixture-of-experts layers (S17 section 2). `num_experts: 0` builds the model without them."""

    num_experts: int = 32
    """n, experts in each MoE layer; 0 for none."""
    k: int = 4
    """Experts that each token wakes. The gate learns from the task only with k >= 2 (S17 section 2.1)."""
    hidden_size: int = 2048
    """Hidden units of an expert (ReLU, no biases)."""
    gating: str = "noisy_top_k"
    """noisy_top_k: S17 eq. 3-5."""
    output: str = "none"
    """Function on the layer's output before dropout and residual: none, or sigmoid as S17 appendix E has it (see the
    README's last section on the code)."""
    w_importance: float = 0.01
    """Weight of CV(Importance)^2 in the loss (S17 eq. 7)."""
    w_load: float = 0.01
    """Weight of CV(Load)^2 in the loss (S17 eq. 11)."""

    def __post_init__(self) -> None:
        _at_least("model.moe.num_experts", self.num_experts, 0)
        if self.num_experts and not 1 <= self.k <= self.num_experts:
            raise ValueError(f"model.moe.k={self.k} must lie in 1..num_experts={self.num_experts}")
        _at_least("model.moe.hidden_size", self.hidden_size, 1)
        _one_of("model.moe.gating", self.gating, GATINGS)
        _one_of("model.moe.output", self.output, OUTPUT_ACTIVATIONS)
        _at_least("model.moe.w_importance", self.w_importance, 0)
        _at_least("model.moe.w_load", self.w_load, 0)


@dataclass
class ModelConfig:
    """The network (S17 appendix E, GNMT section 3). paper.md's letters: D = hidden_size."""

    hidden_size: int = 512
    """D, width of embeddings, layer inputs and outputs."""
    cell_size: int = 2048
    """LSTM cells; projected to hidden_size when larger (S17: 2048 -> 512). Equal sizes mean no projection."""
    num_encoder_layers: int = 3
    """Encoder LSTMs."""
    num_decoder_layers: int = 2
    """Decoder LSTMs; the first one asks the attention."""
    bottom_layer: str = "bidirectional_half"
    """The encoder's first LSTM. forward: one direction; bidirectional_half: two directions of hidden_size/2 outputs
    each (and as many cells, unless cells are projected); bidirectional_full: two of hidden_size outputs each, so that
    layer 2 reads 2 x hidden_size (GNMT)."""
    residual_from: int = 1
    """Residual connections from this LSTM on, in encoder and decoder (S17: 1; GNMT: 3). MoE layers always have one."""
    encoder_moe_after: list[int] = field(default_factory=lambda: [2])
    """MoE layers stand after these encoder LSTMs, counted from 1."""
    decoder_moe_after: list[int] = field(default_factory=lambda: [1])
    """MoE layers stand after these decoder LSTMs, counted from 1."""
    dropout: float = 0.1
    """On the output of every embedding, LSTM and MoE layer, before its residual (S17: 0.4 on WMT14)."""
    tie_embeddings: bool = True
    """One matrix for source embedding, target embedding and softmax. GNMT has three."""
    output_bias: bool = False
    """A bias on the softmax layer (GNMT v2)."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """The attention."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """The mixtures of experts."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_encoder_layers", "num_decoder_layers", "residual_from"):
            _at_least(f"model.{name}", getattr(self, name), 1)
        if self.cell_size < self.hidden_size:
            raise ValueError(f"model.cell_size={self.cell_size} must be at least hidden_size={self.hidden_size}")
        _one_of("model.bottom_layer", self.bottom_layer, BOTTOM_LAYERS)
        if self.bottom_layer == "bidirectional_half" and self.hidden_size % 2:
            raise ValueError(f"model.hidden_size={self.hidden_size} must be even for bottom_layer=bidirectional_half")
        if self.bottom_layer == "bidirectional_full" and self.num_encoder_layers < 2:
            raise ValueError(
                "model.bottom_layer=bidirectional_full is twice as wide as the layers above it: "
                f"model.num_encoder_layers={self.num_encoder_layers} must be at least 2"
            )
        _fraction("model.dropout", self.dropout)
        for side, layers in (("encoder", self.num_encoder_layers), ("decoder", self.num_decoder_layers)):
            places = getattr(self, f"{side}_moe_after")
            if len(set(places)) != len(places) or not all(1 <= place <= layers for place in places):
                raise ValueError(f"model.{side}_moe_after={places} must be different layers in 1..{layers}")
        if self.bottom_layer == "bidirectional_full" and 1 in self.encoder_moe_after and self.moe.num_experts:
            raise ValueError(
                "model.encoder_moe_after=1 does not go with bottom_layer=bidirectional_full, whose output "
                "is twice as wide as an expert's"
            )

    def bottom_direction(self) -> tuple[int, int]:
        """(cells, outputs) of each direction of the bottom layer."""
        if self.bottom_layer != "bidirectional_half":
            return self.cell_size, self.hidden_size
        half = self.hidden_size // 2
        return (self.cell_size if self.cell_size > self.hidden_size else half), half


@dataclass
class TrainingConfig:
    """How the network learns."""

    seed: int = 1
    """Initial weights, order of the data, dropout and gate noise all follow from it."""
    max_steps: int = 20000
    """Optimiser updates."""
    batch_tokens: int = 16384
    """Padded tokens of one micro-batch, on its larger side: what must fit in the memory of one GPU."""
    micro_batches: int = 1
    """Micro-batches summed into one update, over all GPUs together. Fixes what an update sees, whatever the number
    of GPUs: it must be a multiple of that number."""
    learning_rate: float = 2.0e-3
    """Peak learning rate."""
    schedule: str = "inverse_sqrt"
    """inverse_sqrt: linear warm-up, hold, then step^-0.5 (S17 appendix E); linear: warm-up, then to 0 at max_steps."""
    warmup_steps: int = 2000
    """Updates of linear warm-up."""
    hold_steps: int = 8000
    """Updates at the peak, for inverse_sqrt."""
    adam_beta1: float = 0.9
    """Adam's decay of the first moment."""
    adam_beta2: float = 0.98
    """Adam's decay of the second moment."""
    adam_epsilon: float = 1.0e-9
    """Adam's epsilon."""
    label_smoothing: float = 0.1
    """Share of the target probability spread evenly over the vocabulary."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0 for no clipping."""
    precision: str = "auto"
    """bf16 (matrix products; weights, gates, losses and optimiser stay float32), fp32, or auto: bf16 on a GPU."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    log_every: int = 50
    """Updates between lines of metrics."""
    validate_every: int = 1000
    """Updates between validations."""
    validation_sentences: int = 500
    """Sentences of the dev set translated (greedily) for validation BLEU; 0 for perplexity alone."""
    checkpoint_every: int = 1000
    """Updates between checkpoints. The last update is always saved."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept, besides the best one."""
    best_by: str = "perplexity"
    """What makes a checkpoint the best: perplexity, or bleu of the validation."""
    patience: int = 0
    """Stop after this many validations without a new best; 0: never."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_tokens", "micro_batches", "log_every", "validate_every"):
            _at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("checkpoint_every", "keep_checkpoints"):
            _at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("warmup_steps", "hold_steps", "clip_norm", "validation_sentences", "patience", "seed"):
            _at_least(f"training.{name}", getattr(self, name), 0)
        _above("training.learning_rate", self.learning_rate, 0.0)
        _above("training.adam_epsilon", self.adam_epsilon, 0.0)
        for name in ("adam_beta1", "adam_beta2", "label_smoothing"):
            _fraction(f"training.{name}", getattr(self, name))
        _one_of("training.schedule", self.schedule, SCHEDULES)
        _one_of("training.precision", self.precision, PRECISIONS)
        _one_of("training.device", self.device, DEVICES)
        _one_of("training.best_by", self.best_by, BEST_BY)
        if self.best_by == "bleu" and self.validation_sentences == 0:
            raise ValueError("training.best_by=bleu needs training.validation_sentences of at least 1")


@dataclass
class DecodingConfig:
    """How a trained model translates. May be overridden for every command that takes a run."""

    checkpoint: str = "best"
    """best, last, average (the mean of the newest `average_checkpoints`), or a step such as 12000."""
    average_checkpoints: int = 3
    """Checkpoints in the mean, for checkpoint=average."""
    beam_size: int = 4
    """Hypotheses kept for each sentence; 1 is greedy search."""
    alpha: float = 0.2
    """Length normalisation lp(Y) = ((5+|Y|)/6)^alpha (GNMT eq. 14)."""
    beta: float = 0.2
    """Weight of the coverage penalty (GNMT eq. 14)."""
    max_length_ratio: float = 2.0
    """A translation has at most this many times the pieces of its source (GNMT section 7), and 10 more."""
    max_source_pieces: int = 250
    """Longer lines are translated in parts of this many pieces, joined again; a warning counts them."""
    batch_sentences: int = 64
    """Sentences searched together."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    precision: str = "auto"
    """bf16, fp32, or auto: bf16 on a GPU."""

    def __post_init__(self) -> None:
        for name in ("average_checkpoints", "beam_size", "max_source_pieces", "batch_sentences"):
            _at_least(f"decoding.{name}", getattr(self, name), 1)
        for name in ("alpha", "beta"):
            _at_least(f"decoding.{name}", getattr(self, name), 0)
        _above("decoding.max_length_ratio", self.max_length_ratio, 0.0)
        _one_of("decoding.device", self.device, DEVICES)
        _one_of("decoding.precision", self.precision, PRECISIONS)
        if self.checkpoint not in ("best", "last", "average") and not self.checkpoint.isdigit():
            raise ValueError(
                f"decoding.checkpoint={self.checkpoint} is not best, last, average or the number of a step"
            )


@dataclass
class RunConfig:
    """Where a run lives."""

    name: str = ""
    """Folder of the run below `directory`. The same name continues the run."""
    directory: str = "runs"
    """Folder of all runs."""

    def __post_init__(self) -> None:
        if "/" in self.name or self.name in (".", ".."):
            raise ValueError(f"run.name={self.name!r} must be a plain name: it becomes a folder in run.directory")


@dataclass
class Config:
    """The whole program."""

    run: RunConfig = field(default_factory=RunConfig)
    """The run."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """The text."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The learning."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    """The translating."""

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, for YAML and JSON."""
        return asdict(self)
