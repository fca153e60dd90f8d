"""Every setting of the program, once: its type, its default and its documentation.

The YAML files of conf/ and the command line choose values; a misspelt key, a wrong type or a value that contradicts
another is refused with the full key before anything runs (nmt/config/reading.py). Hydra puts the files together and
is known to nmt/compose.py alone: the program is handed these plain objects.
"""

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from nmt.config.checks import above, at_least, fraction, one_of, plain_name
from nmt.config.corpus import NUM_ADDED_PIECES, CorpusConfig, FilesConfig, FilterConfig, SubwordConfig
from nmt.config.model import AttentionConfig, ModelConfig, MoEConfig
from nmt.config.reading import read_settings

__all__ = [
    "NUM_ADDED_PIECES",
    "AttentionConfig",
    "Config",
    "CorpusConfig",
    "DecodingConfig",
    "EvaluationConfig",
    "FilesConfig",
    "FilterConfig",
    "MoEConfig",
    "ModelConfig",
    "ParallelConfig",
    "RunConfig",
    "SubwordConfig",
    "TrainingConfig",
]

SCHEDULES = ("inverse_sqrt", "linear")
PRECISIONS = ("auto", "fp32", "bf16")
DEVICES = ("auto", "cpu", "cuda")
BEST_BY = ("perplexity", "bleu")
EXPERT_OPTIMIZERS = ("adam", "factored")
TOKENIZERS = ("auto", "13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "none")


@dataclass
class TrainingConfig:
    """How the network learns."""

    seed: int = 1
    """Initial weights, order of the data, dropout and gate noise all follow from it."""
    max_steps: int = 20000
    """Optimiser updates."""
    max_minutes: float = 0.0
    """Stop after this many minutes of training, validations and saves included, over all sittings; 0: no limit."""
    batch_tokens: int = 16384
    """Padded tokens of one micro-batch, on its larger side: what must fit in the memory of one GPU."""
    micro_batches: int = 1
    """Micro-batches summed into one update, over all GPUs together. Fixes what an update sees, whatever the number
    of GPUs: it must be a multiple of that number."""
    bands: int = 2
    """Parts of a micro-batch, each of other sentence lengths and with its share of `batch_tokens`. Gates, experts and
    softmax see the tokens of all together; LSTMs and attention work on one after the other. More bands mix an update
    better; fewer are faster on a GPU."""
    alike: int = 1
    """Of the micro-batches of an update, so many at a time have the same sentence lengths; a divisor of
    `micro_batches`. 1 mixes an update best. The number of GPUs lets all finish each micro-batch at the same moment."""
    learning_rate: float = 2.0e-3
    """Peak learning rate."""
    schedule: str = "inverse_sqrt"
    """inverse_sqrt: linear warm-up, hold, then step^-0.5 (S17 appendix E); linear: warm-up, then to 0 at max_steps or
    max_minutes, whichever comes first."""
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
    expert_optimizer: str = "adam"
    """What trains the experts: adam, as all else; factored: Adam without first moment, whose second moment is kept as
    the means of rows and columns of each expert's matrix (S17 appendix D). It takes next to no memory."""
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
    """What makes a checkpoint the best: perplexity, or bleu of the validation (from 1 on: less orders nothing)."""
    patience: int = 0
    """Stop after this many validations without a new best; 0: never."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_tokens", "micro_batches", "log_every", "validate_every"):
            at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("checkpoint_every", "keep_checkpoints"):
            at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("warmup_steps", "hold_steps", "clip_norm", "validation_sentences", "patience", "seed"):
            at_least(f"training.{name}", getattr(self, name), 0)
        if not 0.0 <= self.max_minutes < math.inf:
            raise ValueError(f"training.max_minutes={self.max_minutes} must be a number of at least 0 (0: no limit)")
        at_least("training.bands", self.bands, 1)
        at_least("training.alike", self.alike, 1)
        if self.micro_batches % self.alike:
            raise ValueError(
                f"training.alike={self.alike} must divide training.micro_batches={self.micro_batches}: an update has "
                "whole groups of like micro-batches"
            )
        above("training.learning_rate", self.learning_rate, 0.0)
        above("training.adam_epsilon", self.adam_epsilon, 0.0)
        for name in ("adam_beta1", "adam_beta2", "label_smoothing"):
            fraction(f"training.{name}", getattr(self, name))
        one_of("training.schedule", self.schedule, SCHEDULES)
        one_of("training.precision", self.precision, PRECISIONS)
        one_of("training.device", self.device, DEVICES)
        one_of("training.best_by", self.best_by, BEST_BY)
        one_of("training.expert_optimizer", self.expert_optimizer, EXPERT_OPTIMIZERS)
        if self.best_by == "bleu" and self.validation_sentences == 0:
            raise ValueError("training.best_by=bleu needs training.validation_sentences of at least 1")


@dataclass
class ParallelConfig:
    """How the processes that torchrun started share the work. None of it changes what an update computes."""

    expert_group_size: int = 0
    """Processes over which one copy of the experts is spread; 0: all of them. A divisor of their number makes each such
    group hold all experts, for instance the GPUs of one host."""
    timeout_seconds: int = 600
    """A process that the others wait for longer than this has failed: all of them stop."""
    overlap: bool = True
    """Sum the gradients of dense parameters while the backward pass goes on, instead of after it."""
    overlap_exchange: bool = False
    """Send tokens to their experts in two halves, one while experts work on the other. Pays where the exchange takes
    long and experts have rows enough to be halved (`scripts/bench/scaling.py` measures both)."""

    def __post_init__(self) -> None:
        at_least("parallel.expert_group_size", self.expert_group_size, 0)
        at_least("parallel.timeout_seconds", self.timeout_seconds, 1)


@dataclass
class DecodingConfig:
    """How a trained model translates. May be overridden for every command that takes a run."""

    checkpoint: str = "best"
    """best, last, average (the mean of the newest `average_checkpoints`), or a step such as 12000."""
    average_checkpoints: int = 3
    """Checkpoints in the mean, for checkpoint=average."""
    beam_size: int = 4
    """Hypotheses kept for each sentence; 1 is greedy search."""
    experts_per_token: int = 0
    """Experts that each token wakes while translating, in all groups together; 0: as many as in training. Fewer are
    cheaper, more may be better (`nmt evaluate RUN --dial 1,2,4` shows it)."""
    alpha: float = 0.2
    """Length normalisation lp(Y) = ((5+|Y|)/6)^alpha (GNMT eq. 14)."""
    beta: float = 0.2
    """Weight of the coverage penalty (GNMT eq. 14)."""
    max_length_ratio: float = 2.0
    """A translation has at most this many times the pieces of its source (GNMT section 7), and 10 more."""
    max_source_pieces: int = 250
    """Longer lines, and lines longer than any of the training text, are translated in parts: cut where sentences end,
    or where clauses or words do if a sentence is too long, and joined again. A note counts them."""
    batch_sentences: int = 64
    """Sentences searched together."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    precision: str = "auto"
    """bf16, fp32, or auto: bf16 on a GPU."""

    def __post_init__(self) -> None:
        for name in ("average_checkpoints", "beam_size", "max_source_pieces", "batch_sentences"):
            at_least(f"decoding.{name}", getattr(self, name), 1)
        for name in ("alpha", "beta", "experts_per_token"):
            at_least(f"decoding.{name}", getattr(self, name), 0)
        above("decoding.max_length_ratio", self.max_length_ratio, 0.0)
        one_of("decoding.device", self.device, DEVICES)
        one_of("decoding.precision", self.precision, PRECISIONS)
        if self.checkpoint not in ("best", "last", "average") and not re.fullmatch("[0-9]{1,18}", self.checkpoint):
            raise ValueError(
                f"decoding.checkpoint={self.checkpoint} is not best, last, average or the number of a step"
            )


@dataclass
class EvaluationConfig:
    """How translations are scored. May be overridden for every command that takes a run."""

    tokenize: str = "auto"
    """How BLEU cuts text into words, by sacreBLEU's names: 13a, intl, zh, ja-mecab, ko-mecab, char, none; auto: by the
    target language, 13a for those with blanks between words. Only scores with the same tokeniser can be compared."""

    def __post_init__(self) -> None:
        one_of("evaluation.tokenize", self.tokenize, TOKENIZERS)


@dataclass
class RunConfig:
    """Where a run lives."""

    name: str = ""
    """Folder of the run below `directory`. The same name continues the run."""
    directory: str = "runs"
    """Folder of all runs."""

    def __post_init__(self) -> None:
        plain_name("run.name", self.name)


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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The processes."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    """The translating."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """The scoring."""

    @classmethod
    def from_dict(cls, settings: Any) -> "Config":
        """What `to_dict` gave, or its values as text; what is left out has its default.

        ValueError names the full key of a setting that is unknown, of the wrong type or out of its range.
        """
        return read_settings(cls, settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, for YAML and JSON."""
        return asdict(self)
