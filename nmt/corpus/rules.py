"""Rules that drop training pairs: those that look at one pair by itself, and those that compare pairs.

Each rule is a small record. A rule of one pair has a score and accepts some scores, so that thresholds can be chosen
from one pass over the text (`nmt prepare --scores`). A rule that compares pairs has a key: the first pair of each key
is kept. A pair counts for the first rule that rejects it, in the order of `whys`.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property

from nmt.config import CorpusConfig, Direction, FilterConfig
from nmt.corpus.damage import num_damaged
from nmt.corpus.languages import check_codes, probability
from nmt.errors import DataError
from nmt.text.fields import find_fields
from nmt.text.numbers import compare_numbers
from nmt.wording import counted, percent

_IN_URLS = ("@", "://", "www.", "WWW.", "Www.")
# The sign comes first, which is what the search looks for: twice as fast as a look behind every place.
_IN_NUMBERS = re.compile(r"[.,:/–-](?=\d)(?:(?<=\d.)|(?<=-)(?<!\w-))")
_KEPT = {".": "\ue000", ",": "\ue001", ":": "\ue002", "/": "\ue003", "-": "−", "–": "−"}
"""What replaces signs in numbers, as the signs themselves are removed."""
_REMOVED = ("P", "Z", "Cc", "Cf", "Sk")  # categories of Unicode
_MEANT = "%‰#&@"  # punctuation in Unicode, but not to a reader


class Candidate:
    """A pair under examination. What several rules need is computed once."""

    def __init__(self, source: str, target: str, direction: Direction, score: float | None = None) -> None:
        """`score`: the log-probability of the target, in nats, from `corpus.train.scores`; None: there is none."""
        self.source, self.target, self.direction, self.score = source, target, direction, score
        self.num_source_words = len(source.split())
        self.num_target_words = len(target.split())

    @cached_property
    def near(self) -> tuple[str, str]:
        """The texts without case, blanks and punctuation."""
        return near(self.source), near(self.target)


@dataclass(frozen=True)
class Rule:
    """A rule of single pairs."""

    name: str
    """The setting: corpus.filters.NAME."""
    score: Callable[[Candidate], float]
    accept: Callable[[float], bool]
    why: str
    """What is wrong with the pairs that it drops: "with more than 150 words"."""
    active: bool = True


@dataclass(frozen=True)
class KeyRule:
    """A rule that keeps the first pair of each key."""

    name: str
    key: Callable[[Candidate], int]
    """64 bits: among 40 million pairs, the probability of a collision, which drops a pair, is 4e-5."""
    why: str


@dataclass
class HeldOutTexts:
    """The texts of dev and test by language, as `near` writes them."""

    texts: dict[str, set[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str, str]]) -> "HeldOutTexts":
        """Return the texts of pairs, each with its direction: ("en-de", source, target)."""
        found = cls()
        for direction, *sides in pairs:
            for language, text in zip(Direction.of(direction), sides, strict=True):
                found.texts.setdefault(language, set()).add(near(text))
        for texts in found.texts.values():
            texts.discard("")  # lines of punctuation are not text that a model could know
        return found

    def digest(self) -> str:
        """Return a hash of the texts."""
        content = repr(sorted((language, sorted(texts)) for language, texts in self.texts.items()))
        return hashlib.sha256(content.encode(errors="replace")).hexdigest()


class Rules:
    """The rules of a corpus that look at single pairs, in order."""

    def __init__(self, corpus: CorpusConfig, held_out: HeldOutTexts) -> None:
        """`held_out`: the texts of dev and test. DataError if the settings do not fit the languages."""
        self._rules = list(_pair_rules(corpus.filters, held_out))
        self._active = [rule for rule in self._rules if rule.active]
        if corpus.filters.wrong_language:
            check_codes(tuple(dict.fromkeys((*corpus.sides, *corpus.languages))))

    @property
    def names(self) -> list[str]:
        """Names of all rules, in order, active or not."""
        return [rule.name for rule in self._rules]

    def refusal(self, candidate: Candidate) -> str:
        """Return the name of the first active rule that rejects a pair; "" if all accept it."""
        for rule in self._active:
            if not rule.accept(rule.score(candidate)):
                return rule.name
        return ""

    def scores(self, candidate: Candidate) -> dict[str, float]:
        """Return what each rule measures in a pair, active or not."""
        return {rule.name: rule.score(candidate) for rule in self._rules}


def _pair_rules(config: FilterConfig, held_out: HeldOutTexts) -> Iterator[Rule]:
    """Yield all rules of single pairs in order: the cheap ones first."""

    def is_zero(score: float) -> bool:
        return score == 0

    yield Rule("blank", _num_blank, is_zero, "with a blank side", config.blank)
    yield Rule("identical", _is_identical, is_zero, "the same on both sides", config.identical)
    most_words, most_ratio, threshold = config.max_words, config.max_length_ratio, config.wrong_language
    yield Rule(
        "max_words",
        lambda pair: max(pair.num_source_words, pair.num_target_words),
        lambda words: words <= most_words,
        f"with more than {counted(most_words, 'word')}",
        most_words > 0,
    )
    yield Rule(
        "max_length_ratio",
        _ratio,
        lambda ratio: ratio <= most_ratio,
        f"with one side more than {most_ratio:g} times as long",
        most_ratio > 0,
    )
    yield Rule("no_letters", _num_without_letters, is_zero, "with a side without letters", config.no_letters)
    yield Rule(
        "mojibake",
        lambda pair: num_damaged(pair.source) + num_damaged(pair.target),
        is_zero,
        "with damaged characters such as Ã©",
        config.mojibake,
    )
    yield Rule("urls", _num_other_urls, is_zero, "with another URL or e-mail address on one side", config.urls)
    yield Rule("numbers", _num_other_numbers, is_zero, "with another number on one side", config.numbers)
    yield Rule(
        "test_overlap",
        lambda pair: _num_held_out(pair, held_out),
        is_zero,
        "with a side that is in dev or test",
        config.test_overlap,
    )
    least = config.min_score
    yield Rule(
        "min_score",
        lambda pair: _log_prob_per_word(pair, needed=least is not None),
        lambda score: least is None or score >= least,
        f"with a log-probability per word below {least if least is not None else 0:g}",
        least is not None,
    )
    yield Rule(
        "wrong_language",
        _wrong_language,
        lambda share: share <= threshold,
        f"with a side in the language of the other one (probability above {percent(threshold)})",
        threshold > 0,
    )


def key_rules(config: FilterConfig) -> list[KeyRule]:
    """Return the active rules that compare pairs, in order."""
    rules = {
        "duplicates": (lambda pair: fingerprint(f"{pair.direction}\n{pair.source}", pair.target), "seen before"),
        "near_duplicates": (
            lambda pair: fingerprint(f"{pair.direction}\n{pair.near[0]}", pair.near[1]),
            "like an earlier pair except for case, blanks and punctuation",
        ),
        "duplicate_sources": (
            lambda pair: fingerprint(str(pair.direction), pair.source.strip()),
            "with the source of an earlier pair",
        ),
        "duplicate_targets": (
            lambda pair: fingerprint(str(pair.direction), pair.target.strip()),
            "with the target of an earlier pair",
        ),
    }
    return [KeyRule(name, *rule) for name, rule in rules.items() if getattr(config, name)]


def whys(corpus: CorpusConfig) -> dict[str, str]:
    """Return why each active rule drops pairs, by its name, in the order of counting.

    The last one is for encoded pairs. A side without subwords counts as blank.
    """
    found = {rule.name: rule.why for rule in _pair_rules(corpus.filters, HeldOutTexts()) if rule.active}
    found |= {rule.name: rule.why for rule in key_rules(corpus.filters)}
    most = corpus.filters.max_pieces
    return found | ({"max_pieces": f"with more than {counted(most, 'subword')}"} if most else {})


def near(text: str) -> str:
    """Return a text without case, blanks and punctuation, to find texts that differ in these only.

    What changes a meaning stays: marks of letters such as vowel signs, symbols such as + and $, per cent, the signs
    within a number, and a minus before one.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    text = _IN_NUMBERS.sub(lambda sign: _KEPT[sign[0]], text.casefold())
    text = _not_near().sub("", text)
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


@cache
def _not_near() -> re.Pattern[str]:
    """Return what `near` removes: a set of characters below U+10000 alone, which Python's patterns find in a table."""
    codes = (chr(code) for code in range(0x10000))
    found = [code for code in codes if unicodedata.category(code).startswith(_REMOVED) and code not in _MEANT]
    return re.compile(f"[{re.escape(''.join(found))}]+")


def fingerprint(source: str, target: str) -> int:
    """Return a hash of two texts (64 bits)."""
    digest = hashlib.blake2b(f"{source}\n{target}".encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def rank(source: str, target: str) -> int:
    """Return the number (64 bits) by which pairs are chosen to be held out. Blanks around a text do not count."""
    return fingerprint(source.strip(), target.strip())


# ------------------------------------------------------------------------------------------------ scores


def _num_blank(pair: Candidate) -> int:
    return (not pair.source or pair.source.isspace()) + (not pair.target or pair.target.isspace())


def _is_identical(pair: Candidate) -> bool:
    return pair.source.strip() == pair.target.strip()


def _ratio(pair: Candidate) -> float:
    fewer, more = pair.num_source_words, pair.num_target_words
    if fewer > more:
        fewer, more = more, fewer
    return more / fewer if fewer else float(more > 0) * 1e9


def _num_without_letters(pair: Candidate) -> int:
    return sum(not any(map(str.isalpha, text)) for text in (pair.source, pair.target))


def _num_other_urls(pair: Candidate) -> int:
    if not any(sign in text for text in (pair.source, pair.target) for sign in _IN_URLS):
        return 0
    sides = [_urls(pair.source), _urls(pair.target)]
    return (sides[0] - sides[1]).total() + (sides[1] - sides[0]).total()


def _num_other_numbers(pair: Candidate) -> int:
    found = compare_numbers(pair.source, pair.target)
    return len(found.missing) + len(found.added)


def _num_held_out(pair: Candidate, held_out: HeldOutTexts) -> int:
    there = (held_out.texts.get(language, ()) for language in pair.direction)
    return sum(text in texts for text, texts in zip(pair.near, there, strict=True))


def _log_prob_per_word(pair: Candidate, needed: bool) -> float:
    """Return the log-probability of the target per word, its end included, in nats; NaN if there is none."""
    if pair.score is None:
        if needed:
            raise DataError(
                "corpus.filters.min_score needs a score of each pair: name the files that nmt score wrote in "
                "corpus.train.scores"
            )
        return float("nan")
    return pair.score / (pair.num_target_words + 1)


def _wrong_language(pair: Candidate) -> float:
    source, target = pair.direction
    return max(probability(pair.source, source, target), probability(pair.target, target, source))


def _urls(text: str) -> Counter[str]:
    return Counter(each.text.rstrip("/") for each in find_fields(text) if each.kind == "url")
