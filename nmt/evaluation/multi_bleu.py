"""The paper's BLEU: that of Moses' script multi-bleu.perl, which counts the tokens it is given.

    BLEU = BP exp(1/4 sum_n log p_n)    p_n: matched n-grams / n-grams of the translations, n = 1 to 4
    BP = exp(1 - r / c) if c < r else 1    c, r: tokens of the translations and of the references

An n-gram matches at most as often as it is in that reference of the sentence which has it most often. r sums, over the
sentences, the length of the reference that is closest to the translation in length, the shorter one of two. Nothing is
smoothed: BLEU is 0 if any p_n is. On the same tokens, this is sacreBLEU's BLEU with smoothing method "none".
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_ORDER = 4
# What separates tokens in the script, which reads bytes. No-break spaces and U+2028 are parts of tokens.
_BLANKS = re.compile("[ \t\n\v\f\r]+")
# The script's length of a reference that differs from the translation by more tokens than this.
_FARTHEST = 9999

Ngrams = Counter[tuple[str, ...]]


@dataclass(frozen=True)
class MultiBleu:
    """What the script prints."""

    score: float
    """In percent."""
    precisions: list[float]
    """p_1 to p_4, in percent."""
    brevity_penalty: float
    length: int
    """Tokens of the translations."""
    reference_length: int

    @property
    def details(self) -> str:
        """All but the score, in the words of the script."""
        precisions = "/".join(f"{each:.1f}" for each in self.precisions)
        ratio = self.length / self.reference_length if self.reference_length else 0.0
        return (
            f"{precisions} (BP={self.brevity_penalty:.3f}, ratio={ratio:.3f}, hyp_len={self.length}, "
            f"ref_len={self.reference_length})"
        )

    def __str__(self) -> str:
        return f"BLEU = {self.score:.2f}, {self.details}"


def multi_bleu(hypotheses: Iterable[str], references: Sequence[Iterable[str]]) -> MultiBleu:
    """Return multi-bleu of tokenised lines; `references` has one list of lines per translator.

    Deviation: without any token in the translations, the script divides by zero; here, the score is 0.
    """
    matched, total = [0] * _ORDER, [0] * _ORDER
    length = reference_length = 0
    for hypothesis, *others in zip(hypotheses, *references, strict=True):
        words, sides = _words(hypothesis), [_words(other) for other in others]
        length += len(words)
        closest = min((abs(len(words) - len(side)), len(side)) for side in sides)
        reference_length += min(closest, (_FARTHEST, _FARTHEST))[1]
        for order in range(_ORDER):
            allowed: Ngrams = Counter()
            for side in sides:
                allowed |= _ngrams(side, order + 1)
            found = _ngrams(words, order + 1)
            total[order] += found.total()
            matched[order] += (found & allowed).total()
    precisions = [each / of if of else 0.0 for each, of in zip(matched, total, strict=True)]
    penalty = 0.0 if not length else math.exp(1 - reference_length / length) if length < reference_length else 1.0
    score = 0.0
    if all(precisions) and reference_length:
        score = penalty * math.exp(sum(map(math.log, precisions)) / _ORDER)
    return MultiBleu(100 * score, [100 * each for each in precisions], penalty, length, reference_length)


def _words(line: str) -> list[str]:
    return [word for word in _BLANKS.split(line) if word]


def _ngrams(words: list[str], order: int) -> Ngrams:
    return Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))
