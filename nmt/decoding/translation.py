"""What a call of the translator is given besides text, and what it returns."""

from dataclasses import dataclass, field

import numpy as np

from nmt.config import DecodingConfig
from nmt.config.checks import above, at_least

_COUNTS = ("beam_size", "max_source_pieces", "batch_sentences", "n_best")


@dataclass(frozen=True)
class Options:
    """How one call translates. The settings of the same names, `decoding.*`, are documented in `DecodingConfig`.

    ValueError, which names the option, for a value that is not allowed.
    """

    beam_size: int
    experts_per_token: int
    alpha: float
    beta: float
    max_length_ratio: float
    max_source_pieces: int
    batch_sentences: int
    n_best: int = 1
    """Hypotheses per line, best first; at most `beam_size`. A line has fewer if the search finished fewer."""
    attention: bool = False
    """Whether hypotheses come with their attention to the source."""

    def __post_init__(self) -> None:
        for name in (*_COUNTS, "experts_per_token"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name}={value!r} is not a whole number")
        for name in ("alpha", "beta", "max_length_ratio"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"{name}={value!r} is not a number")
        for name in _COUNTS:
            at_least(name, getattr(self, name), 1)
        for name in ("alpha", "beta", "experts_per_token"):
            at_least(name, getattr(self, name), 0)
        above("max_length_ratio", self.max_length_ratio, 0.0)
        if self.n_best > self.beam_size:
            raise ValueError(f"n_best={self.n_best} must be at most beam_size={self.beam_size}")

    @classmethod
    def of(cls, decoding: DecodingConfig) -> "Options":
        """The options that settings name."""
        return cls(
            beam_size=decoding.beam_size,
            experts_per_token=decoding.experts_per_token,
            alpha=decoding.alpha,
            beta=decoding.beta,
            max_length_ratio=decoding.max_length_ratio,
            max_source_pieces=decoding.max_source_pieces,
            batch_sentences=decoding.batch_sentences,
        )


@dataclass(frozen=True)
class TextHypothesis:
    """One of the translations that a search found for a line."""

    text: str
    score: float
    """As `Translation.score`."""
    finished: bool
    """Whether the model ended all of it by itself."""
    pieces: tuple[str, ...]
    """What the model output, "</s>" included where it ended; those of all parts, one part after the other."""
    log_probs: tuple[float, ...]
    """log P of each piece given the source and the pieces before it, in nats."""
    attention: np.ndarray | None = field(default=None, compare=False)
    """float32, shape (pieces, source pieces), if asked for: where the model looked as it chose each piece. A row sums
    to 1. In a line of several parts, each looks at its own part alone."""


@dataclass(frozen=True)
class Translation:
    """One translated line."""

    text: str
    score: float = 0.0
    """GNMT eq. 14; 0 for a line that was not translated. That of parts is log P / lp(|Y|) + cp of all together: the sum
    of their log-probabilities over lp of the sum of their lengths, and the sum of their coverage penalties."""
    num_parts: int = 1
    """More than 1: it was too long to be translated as a whole."""
    finished: bool = True
    """Whether the model ended all of it by itself. Otherwise it was cut off at `max_length_ratio`."""
    unlearned: str = ""
    """Characters of the source, in order, that the vocabulary learned no piece for: the model has never seen them.
    Empty for what has no letters and digits and comes back as it is."""
    source_pieces: tuple[str, ...] = ()
    """What the model read, "</s>" included: the columns of the attention of `hypotheses`."""
    hypotheses: tuple[TextHypothesis, ...] = ()
    """The `n_best` best, of which the first is this translation; none for a line that was not translated. Of a line in
    several parts, number n joins number n of each part, or its last where it has fewer."""
