"""Options and results of the translator."""

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from nmt.config import DecodingConfig, Direction
from nmt.config.checks import at_least, check_search
from nmt.decoding.alignment import Attended
from nmt.decoding.scoring import SCORE_DIGITS, WordScore, word_scores
from nmt.text.checks import Flag, check, in_order

_WHOLE = (
    *("beam_size", "experts_per_token", "max_source_pieces", "batch_tokens", "n_best"),
    *("min_length", "max_length", "no_repeat_ngram", "top_k", "seed"),
)
_NUMBERS = ("alpha", "beta", "max_length_ratio", "prune_margin", "temperature", "top_p")


@dataclass(frozen=True)
class Options:
    """Options of one call. Settings `decoding.*` have the same names, and are documented in `DecodingConfig`.

    ValueError, which names the option, if a value is not allowed.
    """

    beam_size: int
    experts_per_token: int
    alpha: float
    beta: float
    max_length_ratio: float
    max_source_pieces: int
    batch_tokens: int
    min_length: int
    max_length: int
    no_repeat_ngram: int
    retry: bool
    markup: bool
    prune_margin: float
    temperature: float
    top_k: int
    top_p: float
    seed: int
    n_best: int = 1
    """Hypotheses per line, best first; at most `beam_size`. A line has fewer if the search finished fewer. When
    sampling, it is the number of draws, which are independent: any number, and some may be equal."""
    attention: bool = False
    """True to return the attention of hypotheses to the source."""
    paragraphs: bool = False
    """True to translate each sentence of a line by itself. LF and CR LF between sentences become LF in the
    translation. False: only a line that is too long is translated in parts."""
    alignments: bool = False
    """True to return which words of a translation come from which words of its source (nmt/decoding/alignment.py)."""
    direction: Direction | None = None
    """Direction of the lines; None: the only one of the model."""
    tag: str = ""
    """Domain or origin that the model shall take the lines for, by a symbol that it has learned; empty: none."""

    def __post_init__(self) -> None:
        for name in _WHOLE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name}={value!r} is not a whole number")
        for name in _NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"{name}={value!r} is not a number")
        for name in ("retry", "attention", "paragraphs", "markup", "alignments"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} is not True or False")
        if self.direction is not None and not isinstance(self.direction, Direction):
            raise ValueError(f"direction={self.direction!r} is not a Direction")
        if not isinstance(self.tag, str):
            raise ValueError(f"tag={self.tag!r} is not a text")
        check_search(self)
        at_least("n_best", self.n_best, 1)
        if self.temperature == 0.0 and self.n_best > self.beam_size:
            raise ValueError(f"n_best={self.n_best} must be at most beam_size={self.beam_size}")

    @classmethod
    def of(cls, decoding: DecodingConfig) -> "Options":
        """Return the options in the settings."""
        names = {each.name for each in fields(DecodingConfig)}
        return cls(**{each.name: getattr(decoding, each.name) for each in fields(cls) if each.name in names})


RESULT_FIELDS = {
    "translation": "the translated text",
    "score": "score of GNMT eq. 14, by which hypotheses are ranked; 0 for a line that was not translated",
    "finished": "false if a part was cut off at its maximum length",
    "parts": "number of parts that were translated one by one; 0 for a line that was not translated",
    "unlearned": "characters of the text that the model has never seen, in order",
    "flags": "what to check: a list of objects with `kind` and `detail`",
    "pieces": "subwords of the translation, with `</s>` at each end that the model chose (on request)",
    "log_probs": "log-probability of each of `pieces`, in nats (on request)",
    "words": "pairs of a word of the translation, which blanks separate, and its log-probability; `</s>` is each end "
    "that the model chose (on request)",
    "alignment": "pairs (word of the text, word of the translation) of words between blanks, from 0 on (on request)",
    "soft_alignment": "triples (word of the text, word of the translation, weight); the weights of a word of the "
    "translation add up to 1, but for those under 0.01 (on request)",
    "hypotheses": "the best translations, the first one included: objects with `translation`, `score`, `finished`, and "
    "on request the other five (if more than one is requested)",
}
"""Names of the fields of `Translation.to_dict` and what they mean."""
Alignment = tuple[tuple[int, int], ...]
SoftAlignment = tuple[tuple[int, int, float], ...]


@dataclass(frozen=True)
class TextHypothesis:
    """One of the translations found for a line."""

    text: str
    score: float
    """As `Translation.score`."""
    finished: bool
    """As `Translation.finished`."""
    pieces: tuple[str, ...]
    """Output subwords, with "</s>" at each end that the model chose; those of all parts in order."""
    log_probs: tuple[float, ...]
    """log P of each subword given the source and the subwords before it, in nats."""
    attention: np.ndarray | None = field(default=None, compare=False)
    """Attention to the source at each output subword, if requested: float32, shape (pieces, source pieces). Each row
    sums to 1, less what goes to the symbols of a direction or tag, which are no pieces. In a line of several parts,
    each part attends to itself only."""
    alignment: Alignment = ()
    """(source word, target word) of each link, if alignments were requested. Words are what blanks separate in the line
    and in `text`, counted from 0; in the order of target words, each with one link at most."""
    soft_alignment: SoftAlignment = ()
    """(source word, target word, weight) of all weights of at least 0.01, if alignments were requested; in the order of
    target words. The weights of a target word add up to 1, but for those left out."""
    attended: Attended | None = field(default=None, compare=False, repr=False)
    """The attention with the places of subwords, from which alignments are read and tags are placed."""

    @property
    def words(self) -> tuple[WordScore, ...]:
        """Words of the translation, which blanks separate, and its ends, with their log-probabilities."""
        return word_scores(self.pieces, self.log_probs)

    def to_dict(self, *, pieces: bool = False, words: bool = False, alignments: bool = False) -> dict[str, Any]:
        """Return the hypothesis as values of JSON; options as in `Translation.to_dict`."""
        result: dict[str, Any] = {
            "translation": self.text,
            "score": round(self.score, SCORE_DIGITS),
            "finished": self.finished,
        }
        return result | self.details(pieces, words, alignments)

    def details(self, pieces: bool, words: bool, alignments: bool) -> dict[str, Any]:
        """Return what `Translation.to_dict` adds on request."""
        result: dict[str, Any] = {}
        if pieces:
            result |= {"pieces": [*self.pieces], "log_probs": [round(each, SCORE_DIGITS) for each in self.log_probs]}
        if words:
            result["words"] = [[each.word, round(each.log_prob, SCORE_DIGITS)] for each in self.words]
        if alignments:
            result["alignment"] = [[*pair] for pair in self.alignment]
            result["soft_alignment"] = [[*triple] for triple in self.soft_alignment]
        return result


@dataclass(frozen=True)
class Translation:
    """One translated line."""

    text: str
    score: float = 0.0
    """Score of GNMT eq. 14; 0 for a line that was not translated. For several parts, it is log P / lp(|Y|) + cp with
    the sums of their log-probabilities, lengths and coverage penalties."""
    num_parts: int = 1
    """Number of parts that were translated one by one; more than 1 if the line was too long, or with `paragraphs`."""
    finished: bool = True
    """True if the model ended every part itself. False if one was cut off at its maximum length
    (`max_length_ratio`)."""
    unlearned: str = ""
    """Characters of the source, in order, without a subword in the vocabulary: the model has never seen them. Empty for
    a line without letters and digits, which is returned unchanged."""
    source_pieces: tuple[str, ...] = ()
    """Source subwords with "</s>", if attention was requested: the columns of the attention of `hypotheses`."""
    hypotheses: tuple[TextHypothesis, ...] = ()
    """The `n_best` best; the first is this translation. Empty for a line that was not translated. For several parts,
    hypothesis n joins hypothesis n of each part, or its last one if it has fewer; a later one may then have a higher
    score, as `score` is no sum over parts."""
    source: str = field(default="", compare=False, repr=False)
    """The line as the model reads it, for `flags`."""
    noted: tuple[Flag, ...] = ()
    """Flags that come from translating the line: what the two texts do not show."""

    @cached_property
    def flags(self) -> tuple[Flag, ...]:
        """What to check in this translation, in the order of `KINDS` in nmt/text/checks.py.

        The texts are compared when this is first read, since most lines of a file are never asked for it.
        """
        found = check(self.source, self.text, unlearned=self.unlearned, cut=not self.finished)
        return in_order([*found, *self.noted])

    @property
    def alignment(self) -> Alignment:
        """`TextHypothesis.alignment` of this translation; empty for a line that was not translated."""
        return self.hypotheses[0].alignment if self.hypotheses else ()

    @property
    def soft_alignment(self) -> SoftAlignment:
        """`TextHypothesis.soft_alignment` of this translation; empty for a line that was not translated."""
        return self.hypotheses[0].soft_alignment if self.hypotheses else ()

    def to_dict(
        self, *, hypotheses: bool = False, pieces: bool = False, words: bool = False, alignments: bool = False
    ) -> dict[str, Any]:
        """Return the result as values of JSON, as in JSON Lines. `RESULT_FIELDS` has the names and their meaning.

        `hypotheses` and `words` add the field of that name, `pieces` adds `pieces` and `log_probs`, and `alignments`
        adds `alignment` and `soft_alignment`. Scores are rounded to 6 decimals.
        """
        result: dict[str, Any] = {
            "translation": self.text,
            "score": round(self.score, SCORE_DIGITS),
            "finished": self.finished,
            "parts": self.num_parts if self.hypotheses else 0,
            "unlearned": self.unlearned,
            "flags": [flag._asdict() for flag in self.flags],
        }
        best = self.hypotheses[0] if self.hypotheses else TextHypothesis(self.text, 0.0, True, (), ())
        result |= best.details(pieces, words, alignments)
        if hypotheses:
            result["hypotheses"] = [
                each.to_dict(pieces=pieces, words=words, alignments=alignments) for each in self.hypotheses
            ]
        return result
