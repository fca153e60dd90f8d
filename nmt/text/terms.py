"""Tables of terms: find their source terms in a text, and check that a translation has the required translations.

A text is compared word by word. A word is a run of letters, digits and marks; any other character is a word by itself,
and so is each character of a script without blanks. So a term matches at the borders of words only: "pump" is not in
"pumps" or "heat-pumpx", but it is in "heat-pump".

Case counts, with one exception: at the start of a sentence, a term that begins with a small letter also matches with a
capital one. The longest term wins, matches do not overlap, and a line's own terms take precedence over the table's.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from nmt.errors import DataError
from nmt.text.normalisation import CONTROLS

KEPT = "="
"""Target of a term that is not translated; an empty target means the same."""
_MOST_SHOWN = 60  # characters of a term in an error
_SENTENCE_END = frozenset(".!?…:。！？")
# Scripts without blanks between words: Thai to Tibetan, Burmese, Khmer, Chinese, Japanese.
_ALONE = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fff\u3001-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff"
_ALONE += "\U00020000-\U0003ffff"
# An inflected form has the word's beginning, but for its last 2 letters; and at most 3 letters more than the word.
_SHORTEST_STEM, _DROPPED, _ADDED = 4, 2, 3


class Word(NamedTuple):
    """One word of a text: text[start:end], composed (NFC)."""

    text: str
    start: int
    end: int


class Match(NamedTuple):
    """A source term found in a text, at text[start:end]."""

    start: int
    end: int
    source: str
    """The term as the text has it."""
    target: str
    """Its required translation; `source` itself if it is not translated."""
    kept: bool = False
    """True if the term is not translated."""


Key = tuple[str, ...]
"""The words of a term. All but the first begin with a blank if there is one in the text."""


class Terms:
    """A table of source terms and their required translations."""

    def __init__(self) -> None:
        self._targets: dict[Key, str] = {}  # "" for a term that is not translated
        self._places: dict[Key, str] = {}  # where each term comes from, for errors
        self._lengths: dict[str, list[int]] = defaultdict(list)  # of the terms that begin with a word, longest first

    @classmethod
    def of(cls, entries: Mapping[str, str | None]) -> "Terms":
        """Return a table of {source: target}; None, "" and "=" mean that the term is not translated.

        DataError, which names the term, if one is empty, has control characters or is there twice; or if `entries` is
        not such a mapping.
        """
        terms = cls()
        if not isinstance(entries, Mapping):
            raise DataError(f"terms is not a table: give source terms with their translations, not {shown(entries)}")
        for source, target in entries.items():
            if not isinstance(source, str) or not isinstance(target, str | None):
                raise DataError(
                    f"terms[{shown(source)}] is {shown(target)}: a source term and its translation are texts"
                )
            terms.add(source, target or "", f"terms[{shown(source)}]")
        return terms

    def add(self, source: str, target: str, place: str) -> None:
        """Add a term that comes from `place`, such as "terms.tsv line 3". DataError as for `of`."""
        source, target = source.strip(), target.strip()
        for side, text in (("source", source), ("target", target)):
            if not CONTROLS.isdisjoint(text):
                raise DataError(f"{place}: the {side} term {shown(text)} has a control character: remove it")
        if not source:
            raise DataError(f"{place}: the source term is empty: write the term, or remove the line")
        key = _key(words(source))
        if key in self._targets:
            raise DataError(
                f"{place}: the source term {shown(source)} is in {self._places[key]}, too: keep one of the two"
            )
        self._targets[key] = "" if target == KEPT else target
        self._places[key] = place
        lengths = self._lengths[key[0]]
        if len(key) not in lengths:
            lengths.append(len(key))
            lengths.sort(reverse=True)

    def changed(self, source: Callable[[str], str], target: Callable[[str], str]) -> "Terms":
        """Return the table with both sides changed by these functions.

        DataError if two terms become equal and have different translations.
        """
        terms = Terms()
        for key, translation in self._targets.items():
            term, new = source("".join(key)), target(translation)
            if terms._targets.get(_key(words(term))) != new:
                terms.add(term, new, self._places[key])
        return terms

    def __len__(self) -> int:
        return len(self._targets)

    def at(self, found: Sequence[Word], first: int, starts: bool) -> tuple[int, str] | None:
        """Return (number of words, target) of the longest term at word `first` of `found`.

        `starts`: a sentence starts there. None if no term is there.
        """
        word = found[first].text
        small = word[0].lower() + word[1:] if starts and word[0].isupper() else word
        lengths = self._lengths.get(word, [])
        if small != word:
            lengths = sorted({*lengths, *self._lengths.get(small, [])}, reverse=True)
        for length in lengths:
            if first + length <= len(found):
                key = _key(found[first : first + length])
                for each in (key, (small, *key[1:])):
                    if (target := self._targets.get(each)) is not None:
                        return length, target
        return None


def find_terms(text: str, tables: Sequence[Terms]) -> list[Match]:
    """Return the terms of `tables` in a text, in order. Of two tables with a term of the same length, the first wins.

    The time grows with the text and hardly with the tables.
    """
    found = words(text) if any(map(len, tables)) else []
    matches: list[Match] = []
    place, starts = 0, True
    while place < len(found):
        length = 1
        if terms := [each for table in tables if (each := table.at(found, place, starts))]:
            length, target = max(terms, key=lambda term: term[0])  # the first of the longest
            start, end = found[place].start, found[place + length - 1].end
            matches.append(Match(start, end, text[start:end], target or text[start:end], not target))
        place += length
        last = found[place - 1].text
        # Opening quotation marks and brackets change nothing.
        starts = last in _SENTENCE_END or (starts and not last[0].isalnum())
    return matches


def missing(matches: Sequence[Match], translation: str) -> list[Match]:
    """Return the matches whose required translation is not in a translation, or not often enough.

    A term that is not translated must be there exactly. Any other may be inflected, and its case does not count: see
    `is_form`.
    """
    found = words(translation) if matches else []
    lacking = []
    for target, kept in dict.fromkeys((match.target, match.kept) for match in matches):
        asked = [match for match in matches if (match.target, match.kept) == (target, kept)]
        lacking += asked[len(occurrences(target, kept, found)) :]
    return sorted(lacking)


def occurrences(target: str, kept: bool, found: Sequence[Word]) -> list[tuple[int, int]]:
    """Return the spans (start, end) of a required translation in a text whose words are `found`; they do not overlap.

    `kept`: the target must be there exactly; else its words may be inflected.
    """
    wanted = [word.text for word in words(target)]
    spans = []
    place = 0
    while place + len(wanted) <= len(found):
        here = found[place : place + len(wanted)]
        if all(
            form.text == word if kept else is_form(word, form.text) for word, form in zip(wanted, here, strict=True)
        ):
            spans.append((here[0].start, here[-1].end))
            place += len(wanted)
        else:
            place += 1
    return spans


def is_form(word: str, form: str) -> bool:
    """Return whether `form` may be an inflected form of `word`, by their letters alone; case does not count.

    It is if both are equal. It also is if it begins like the word without its last two letters, but with at least four
    letters of it, and has at most three letters more: "Pumpen" for "Pumpe", not "Pumpenhaus".
    """
    word, form = word.casefold(), form.casefold()
    if word == form:
        return True
    stem = word[: max(len(word) - _DROPPED, _SHORTEST_STEM)]
    return len(stem) >= _SHORTEST_STEM and form.startswith(stem) and len(form) <= len(word) + _ADDED


def words(text: str) -> list[Word]:
    """Return the words of a text, in order: all characters except for blanks."""
    composed = unicodedata.is_normalized("NFC", text)
    return [
        Word(match[0] if composed else unicodedata.normalize("NFC", match[0]), *match.span())
        for match in _word().finditer(text)
    ]


@cache
def _word() -> re.Pattern[str]:
    # `\w` has no combining marks, which belong to the letter before.
    marks = [number for number in range(0x300, 0x10000) if unicodedata.category(chr(number))[0] == "M"]
    spans = "".join(f"{chr(first)}-{chr(last)}" for first, last in _runs(marks))
    return re.compile(rf"[{_ALONE}]|(?:(?![{_ALONE}])[\w{spans}\u200c\u200d])+|[^\s\w]")


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of each run of consecutive numbers."""
    first = last = numbers[0]
    for number in numbers[1:]:
        if number > last + 1:
            yield first, last
            first = number
        last = number
    yield first, last


def _key(found: Sequence[Word]) -> Key:
    return (
        found[0].text,
        *(f" {word.text}" if word.start > before.end else word.text for before, word in pairwise(found)),
    )


def shown(value: object) -> str:
    """Return a term, or what was given in its place, for an error: quoted and not too long."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"
