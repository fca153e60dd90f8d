"""Every setting of the program, defined once: its type, its default and its documentation.

The YAML files in conf/ and the command line choose the values. A misspelt key, a wrong type or a contradiction between
settings is rejected, with the full key, before anything runs (nmt/config/reading.py). Only nmt/compose.py uses Hydra,
which combines the files; the rest of the program receives these plain objects.
"""

import math
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nmt.config.checks import above, at_least, check_search, fraction, one_of, plain_name
from nmt.config.corpus import (
    NUM_ADDED_PIECES,
    CorpusConfig,
    Direction,
    ExamplesConfig,
    FilesConfig,
    FilterConfig,
    SubwordConfig,
)
from nmt.config.model import AttentionConfig, LayerName, ModelConfig, MoEConfig
from nmt.config.parts import PARTS, check_parts, expert_slice
from nmt.config.reading import read_settings
from nmt.errors import UserError

__all__ = [
    "NUM_ADDED_PIECES",
    "PARTS",
    "AttentionConfig",
    "Config",
    "CorpusConfig",
    "DecodingConfig",
    "Direction",
    "EvaluationConfig",
    "ExamplesConfig",
    "FilesConfig",
    "FilterConfig",
    "LayerName",
    "MoEConfig",
    "ModelConfig",
    "ParallelConfig",
    "RunConfig",
    "SubwordConfig",
    "TrainingConfig",
    "uses_bf16",
]

SCHEDULES = ("inverse_sqrt", "linear", "wsd")
PRECISIONS = ("auto", "fp32", "bf16")
QUANTIZATIONS = ("none", "int8")
DEVICES = ("auto", "cpu", "cuda")
BEST_BY = ("perplexity", "bleu")
EXPERT_OPTIMIZERS = ("adam", "factored")
EXPERT_WEIGHTS = ("float32", "bfloat16")
TOKENIZERS = ("auto", "13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "none")


def uses_bf16(precision: str, on_gpu: bool) -> bool:
    """Whether matrix products are bf16 under a setting of `PRECISIONS`; auto is bf16 on a GPU."""
    return precision == "bf16" or (precision == "auto" and on_gpu)


@dataclass
class TrainingConfig:
    """How the network is trained."""

    seed: int = 1
    """Seed of the initial weights, the order of the data, dropout and gate noise."""
    max_steps: int = 20000
    """Optimiser steps in all."""
    max_minutes: float = 0.0
    """Stop after this many minutes of training; 0: no limit. Validations and saves count, and so does the time before
    a run was resumed."""
    batch_tokens: int = 16384
    """Maximum tokens of one micro-batch on either side. A micro-batch must fit in the memory of one GPU. It mixes
    sentences of all lengths, in the same proportions as the whole corpus."""
    micro_batches: int = 1
    """Micro-batches per step, over all GPUs together; a multiple of the number of GPUs. The data of a step do not
    depend on that number."""
    learning_rate: float = 2.0e-3
    """Peak learning rate."""
    expert_rate: float = 1.0
    """Learning rate of the experts, as a multiple of that of all other parameters."""
    schedule: str = "inverse_sqrt"
    """Learning rate over time. inverse_sqrt: linear warm-up, constant rate, then decay as step^-0.5 (S17 appendix E).
    linear: linear warm-up, then linear decay to 0 at max_steps or max_minutes, whichever comes first. wsd: warm-up,
    stable, decay (Hu et al. 2024): linear warm-up, constant rate, then linear decay to 0 over `decay_share` of
    max_steps or max_minutes; for runs that will be trained further or have experts added."""
    warmup_steps: int = 2000
    """Steps of linear warm-up."""
    hold_steps: int = 8000
    """Steps at the peak learning rate, for schedule=inverse_sqrt."""
    decay_share: float = 0.2
    """Share of the whole training, its last part, in which the learning rate falls, for schedule=wsd."""
    adam_beta1: float = 0.9
    """Adam's decay rate of the first moment."""
    adam_beta2: float = 0.98
    """Adam's decay rate of the second moment."""
    adam_epsilon: float = 1.0e-9
    """Adam's epsilon."""
    expert_optimizer: str = "adam"
    """Optimiser of the experts. adam: the same as for all other parameters. factored: Adam without a first moment,
    with the row and column means of each expert's matrix as second moment (S17 appendix D). factored needs next to no
    memory."""
    expert_weights: str = "float32"
    """Type in which the optimiser keeps the weights of experts. float32: as all other weights; where products are bf16
    on a GPU, experts also have a bf16 copy for them, and bf16 gradients, in which micro-batches are added up. bfloat16:
    only that copy, rounded stochastically in every step, which saves two thirds of the memory. Checkpoints have float32
    numbers in either case."""
    label_smoothing: float = 0.1
    """Share of the target probability that is spread evenly over the vocabulary."""
    r_drop: float = 0.0
    """alpha of R-Drop (Liang et al. 2021), for small corpora: 1 to 5. Every batch is read twice with different dropout,
    and the loss has a term that makes the two predictions alike. A step takes twice as long. 0: no second pass."""
    teacher_weight: float = 0.5
    """Weight of a teacher's probabilities in the loss of a subword, against that of the target itself: 0 to 1. Only
    text that `nmt distill --word-level` made has such probabilities. 0: they are not used."""
    clip_norm: float = 1.0
    """Maximum norm of the whole gradient; 0: no clipping."""
    freeze: list[str] = field(default_factory=list)
    """Parts of the network that stay as they are: embeddings, softmax, encoder, decoder, attention, lstms, gates,
    experts. encoder and decoder are their LSTMs and attention; gates and experts in them are only frozen by their own
    names. A matrix that is tied is frozen with either of its parts. experts[START:STOP:STEP] are some experts of every
    MoE layer, numbered from 0 as in Python; write ["experts[::4]"]."""
    precision: str = "auto"
    """bf16, fp32, or auto: bf16 on a GPU, else fp32. bf16 is for matrix products; weights, gates, losses and optimiser
    stay in float32 (but see `expert_weights`)."""
    device: str = "auto"
    """cuda, cpu, or auto: cuda if there is a GPU."""
    log_every: int = 50
    """Steps between lines of metrics."""
    validate_every: int = 1000
    """Steps between validations."""
    validation_sentences: int = 500
    """Sentences of the dev set that are translated, greedily, for validation BLEU; 0: perplexity only."""
    checkpoint_every: int = 1000
    """Steps between checkpoints. The last step is always saved."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep, in addition to the best one."""
    best_by: str = "perplexity"
    """Score on the dev set that selects the best checkpoint: perplexity or bleu. BLEU below 1 is noise and never counts
    as best."""
    watch: list[str] = field(default_factory=list)
    """Other runs or prepared corpora whose dev text is scored, with this run's vocabulary, at every validation and
    before the first step. A warning shows what training forgets. Folders, or names of runs in runs/."""
    patience: int = 0
    """Stop after this many validations without a new best; 0: never stop early."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_tokens", "micro_batches", "log_every", "validate_every"):
            at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("checkpoint_every", "keep_checkpoints"):
            at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("warmup_steps", "hold_steps", "clip_norm", "validation_sentences", "patience", "seed", "r_drop"):
            at_least(f"training.{name}", getattr(self, name), 0)
        at_least("training.teacher_weight", self.teacher_weight, 0)
        if not 0.0 <= self.max_minutes < math.inf:
            raise ValueError(f"training.max_minutes={self.max_minutes} must be a number of at least 0 (0: no limit)")
        above("training.learning_rate", self.learning_rate, 0.0)
        above("training.expert_rate", self.expert_rate, 0.0)
        above("training.adam_epsilon", self.adam_epsilon, 0.0)
        above("training.decay_share", self.decay_share, 0.0)
        for name in ("adam_beta1", "adam_beta2", "label_smoothing"):
            fraction(f"training.{name}", getattr(self, name))
        check_parts("training.freeze", self.freeze)
        one_of("training.schedule", self.schedule, SCHEDULES)
        one_of("training.precision", self.precision, PRECISIONS)
        one_of("training.device", self.device, DEVICES)
        one_of("training.best_by", self.best_by, BEST_BY)
        one_of("training.expert_optimizer", self.expert_optimizer, EXPERT_OPTIMIZERS)
        one_of("training.expert_weights", self.expert_weights, EXPERT_WEIGHTS)
        if self.best_by == "bleu" and self.validation_sentences == 0:
            raise ValueError("training.best_by=bleu needs training.validation_sentences of at least 1")

    @property
    def passes(self) -> int:
        """Passes over each batch of a step: two with R-Drop."""
        return 2 if self.r_drop else 1

    def experts_in_bf16(self, on_gpu: bool) -> bool:
        """Whether the experts' parameters and gradients are bf16, with or without float32 masters."""
        return self.expert_weights == "bfloat16" or (on_gpu and uses_bf16(self.precision, on_gpu))


@dataclass
class ParallelConfig:
    """How several processes share the work. These settings do not change what a step computes."""

    expert_group_size: int = 0
    """Number of processes that share one copy of the experts, such as the GPUs of one host; a divisor of the number of
    processes. 0: all processes share one copy."""
    timeout_seconds: int = 600
    """If processes wait longer than this for another one, it has failed and all of them stop."""
    overlap: bool = True
    """Sum the gradients of dense parameters during the backward pass instead of after it. Steps that are recorded in
    CUDA graphs, as on GPUs in bf16, always sum them after it."""
    overlap_exchange: bool = False
    """Send tokens to their experts in two halves: experts compute one half while the other is sent. This pays if the
    exchange is slow and each expert has many rows (`scripts/bench/scaling.py` measures both). Such steps are not
    recorded."""

    def __post_init__(self) -> None:
        at_least("parallel.expert_group_size", self.expert_group_size, 0)
        at_least("parallel.timeout_seconds", self.timeout_seconds, 1)


@dataclass
class DecodingConfig:
    """How a trained model translates. Every command that takes a run can override these settings."""

    checkpoint: str = "best"
    """Checkpoint to load: best, last, average (the mean of the newest `average_checkpoints`), or a step such as
    12000."""
    average_checkpoints: int = 3
    """Number of checkpoints to average, for checkpoint=average."""
    ensemble: list[str] = field(default_factory=list)
    """Other runs or exported models, with the same vocabulary, that translate and score together with this one: the
    mean of their probabilities decides. Folders, or names in runs/; `checkpoint` holds for all."""
    beam_size: int = 4
    """Hypotheses kept per sentence; 1: greedy search."""
    experts_per_token: int = 0
    """Active experts per token while translating, in all groups together; 0: as many as in training. Fewer are faster;
    more may translate better (`nmt evaluate RUN --dial 1,2,4` compares them)."""
    alpha: float = 0.2
    """Exponent of the length normalisation lp(Y) = ((5+|Y|)/6)^alpha (GNMT eq. 14). `nmt evaluate RUN --tune` chooses
    alpha, beta and beam_size."""
    beta: float = 0.2
    """Weight of the coverage penalty (GNMT eq. 14)."""
    max_length_ratio: float = 2.0
    """Maximum length of a translation in subwords: this many times the subwords of its source, plus 10 (GNMT
    section 7)."""
    min_length: int = 0
    """Least subwords of a translation, with its end; 0: any. A line in parts has this many in each."""
    max_length: int = 0
    """Greatest subwords of a translation, with its end, beside `max_length_ratio`; 0: any."""
    no_repeat_ngram: int = 0
    """Length of runs of subwords that never occur twice in a translation; 0: any run may."""
    retry: bool = True
    """Search again for a translation that repeats itself or is empty, with twice the beam and without repeated runs of
    3 subwords. The second translation is used if it does neither. Not used when sampling."""
    markup: bool = True
    """Keep tags, placeholders, URLs and e-mail addresses as they are. false: translate them like other text."""
    prune_margin: float = 0.0
    """GNMT's pruning margin, in nats: hypotheses this far below the best one are dropped (GNMT section 7, with 3.0); 0:
    none is. Not used when sampling."""
    temperature: float = 0.0
    """0: search for the best translation. Above 0: draw it at random, from probabilities sharpened (below 1) or
    flattened (above 1) by this temperature; 1: those of the model."""
    top_k: int = 0
    """Draw each subword from this many most probable ones; 0: from all."""
    top_p: float = 1.0
    """Draw each subword from the fewest most probable ones that have this probability together, of 1,000 at most; 1:
    from all."""
    seed: int = 1
    """Seed of draws. The same line, seed and model give the same draw in any batch and at any place."""
    max_source_pieces: int = 250
    """Maximum subwords of a line that is translated whole. Longer lines, and lines longer than any in the training
    text, are translated in parts and joined again. They are split at ends of sentences, or of clauses or words if a
    sentence is too long. A note reports their number."""
    batch_tokens: int = 0
    """Source subwords per search batch, including padding; 0: 4096 on a CPU, 16384 on a GPU. A sentence counts as at
    least 16. Memory grows with this number times `beam_size`. A batch that does not fit in memory is halved."""
    device: str = "auto"
    """cuda, cpu, or auto: cuda if there is a GPU."""
    precision: str = "auto"
    """bf16, fp32, or auto: bf16 on a GPU and on processors with matrix units for it (Intel's AMX), else fp32. With
    fp32, a translation does not depend on the other lines."""
    quantize: str = "none"
    """int8: LSTMs and the softmax layer compute with 8-bit integers, on a CPU only. This is faster than fp32 and a
    little less exact (docs/decoding.md has figures). none: they compute in `precision`."""

    def __post_init__(self) -> None:
        at_least("decoding.average_checkpoints", self.average_checkpoints, 1)
        check_search(self, "decoding.")
        one_of("decoding.device", self.device, DEVICES)
        one_of("decoding.precision", self.precision, PRECISIONS)
        one_of("decoding.quantize", self.quantize, QUANTIZATIONS)
        if self.quantize == "int8" and self.precision == "bf16":
            raise ValueError("decoding.quantize=int8 replaces decoding.precision=bf16: leave one of them out")
        if self.checkpoint not in ("best", "last", "average") and not re.fullmatch("[0-9]{1,18}", self.checkpoint):
            raise ValueError(
                f"decoding.checkpoint={self.checkpoint} is not best, last, average or the number of a step"
            )


@dataclass
class EvaluationConfig:
    """How translations are scored: in validation, and by `nmt evaluate` unless it is given `--tokenize`."""

    tokenize: str = "auto"
    """Tokeniser of BLEU, by sacreBLEU's name: 13a, intl, zh, ja-mecab, ko-mecab, char or none. auto: the one for the
    target language, 13a for languages with blanks between words. Only scores with the same tokeniser can be
    compared."""

    def __post_init__(self) -> None:
        one_of("evaluation.tokenize", self.tokenize, TOKENIZERS)


@dataclass
class RunConfig:
    """Where a run is stored."""

    name: str = ""
    """Folder of the run inside `directory`. Training with the name of an existing run resumes it."""
    directory: str = "runs"
    """Folder that contains all runs."""
    start_from: str = ""
    """Run or exported model with whose parameters this run starts: a folder, or a name in runs/. Those of the same name
    and shape are taken, from the best checkpoint. Subwords that the new vocabulary shares with the old one keep their
    embeddings; others start with the mean of those into which the old one cuts them. Empty: all start with random
    values."""

    def __post_init__(self) -> None:
        plain_name("run.name", self.name)


@dataclass
class Config:
    """All settings. Each section is documented at its class."""

    run: RunConfig = field(default_factory=RunConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.run.start_from and self.corpus.subwords.vocabulary == "auto":
            # A copy, because other configurations may have the same section.
            subwords = replace(self.corpus.subwords, vocabulary=self.run.start_from)
            self.corpus = replace(self.corpus, subwords=subwords)
        for part in self.training.freeze:
            if (part in ("gates", "experts") or expert_slice(part)) and not self.model.moe_layer_names():
                raise ValueError(f"training.freeze: {part} cannot be frozen, as the network has no MoE layer")

    @classmethod
    def from_dict(cls, settings: Any) -> "Config":
        """Build the settings from the dictionaries of `to_dict`. Values may be text; missing ones are the defaults.

        Raises UserError, with the full key, if a setting is unknown, has the wrong type or is out of range.
        """
        try:
            return read_settings(cls, settings)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain nested dictionaries, for YAML and JSON."""
        return asdict(self)
