"""Put required translations of terms where the model did not write them, by attention.

For each word of a source term, the output word with the most attention to it is found: the attention of all its
subwords, summed. The words from the first to the last of these are replaced by the required translation. This changes
words, not the grammar around them, so each replacement is flagged. Without such words, the term is flagged as missing.

Letters: T output subwords, S source subwords of a part, W words.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nmt.text.checks import Flag
from nmt.text.fields import find_fields
from nmt.text.terms import Match, Terms, Word, find_terms, missing, occurrences, words

_LEAST = 0.1  # attention of a word that is replaced
_WIDEST = 2  # words that are replaced per word of a source term of several words, and one more: "soupe à l'oignon"


class Attention(NamedTuple):
    """Attention of a translation to its source, with the characters at which subwords begin."""

    source_S: np.ndarray  # int64, place in the source text; -1: the end of the sentence, or a symbol
    target_T: np.ndarray  # int64, place in the translation; -1: the end of the sentence
    weight_TS: np.ndarray


class Placed(NamedTuple):
    """A translation with the required terms."""

    text: str
    flags: tuple[Flag, ...]
    """One for each term that was put in or is missing."""
    attention: Attention | None
    """The attention of `text`. Words that were put in have that of the words before."""


class _Edit(NamedTuple):
    """A replacement of text[start:end] of a translation."""

    start: int
    end: int
    text: str
    flag: Flag


def terms_of_parts(parts: Sequence[Sequence[str]], tables: Sequence[Sequence[Terms]]) -> dict[int, list[Match]]:
    """Return the terms of each part that has some, by its number among all parts.

    `parts` has the parts of each line, and `tables` its tables; no tables at all: no terms. What is in a field, such as
    a URL, is no term.
    """
    matches = {}
    number = 0
    for texts, known in zip(parts, tables, strict=True) if tables else ():
        for text in texts:
            found = find_terms(text, known)
            fields = find_fields(text) if found else []
            found = [
                each for each in found if all(each.end <= field.start or field.end <= each.start for field in fields)
            ]
            if found:
                matches[number] = found
            number += 1
    return matches


def place_terms(text: str, matches: Sequence[Match], attention: Attention | None) -> Placed:
    """Return a translation with each required term of its source in it, or flagged as missing.

    Words that are a required translation already are never replaced. Without `attention`, none is.
    """
    lacking = missing(matches, text) if matches else []
    if not lacking or attention is None:
        return Placed(text, tuple(map(_missing, lacking)), attention)
    found = words(text)
    taken = [span for match in matches for span in occurrences(match.target, match.kept, found)]
    free_W = np.array([not any(start <= word.start < end for start, end in taken) for word in found], dtype=bool)
    word_T = _word_of(attention.target_T, found)
    edits: list[_Edit] = []
    flags: list[Flag] = []
    for target, kept in dict.fromkeys((match.target, match.kept) for match in lacking):
        asked = [match for match in matches if (match.target, match.kept) == (target, kept)]
        # If only some of several occurrences are missing, they are those with the most attention from free words.
        asked.sort(key=lambda match: -float(_from(match, attention, word_T, free_W).max(initial=0.0)))
        for match in asked[: sum((each.target, each.kept) == (target, kept) for each in lacking)]:
            span = _span(match, attention, word_T, free_W)
            if span is None:
                flags.append(_missing(match))
                continue
            first, last = span
            free_W[first : last + 1] = False
            start, end = found[first].start, found[last].end
            put = _cased(target, found[first], first == 0 and not kept)
            edits.append(_Edit(start, end, put, Flag("term", f"{match.source}: {put} replaces {text[start:end]}")))
    edits.sort()
    for edit in reversed(edits):
        text = text[: edit.start] + edit.text + text[edit.end :]
    moved = attention._replace(target_T=_moved(attention.target_T, edits))
    return Placed(text, (*(edit.flag for edit in edits), *flags), moved)


def _moved(place_T: np.ndarray, edits: Sequence[_Edit]) -> np.ndarray:
    """Return where characters of a translation are after the edits; those replaced begin the new text."""
    moved_T = place_T.copy()
    for edit in edits:
        inside_T = (place_T >= edit.start) & (place_T < edit.end)
        moved_T[inside_T] -= (place_T - edit.start)[inside_T]
        moved_T[place_T >= edit.end] += len(edit.text) - (edit.end - edit.start)
    return moved_T


def _missing(match: Match) -> Flag:
    return Flag("term", f"{match.source}: {match.target} is missing")


def _word_of(place_T: np.ndarray, found: Sequence[Word]) -> np.ndarray:
    """Return the word in which, or before which, each place is; -1: none."""
    word_T = np.searchsorted(np.array([word.end for word in found], dtype=np.int64), place_T, side="right")
    return np.where((place_T < 0) | (word_T == len(found)), -1, word_T)


def _from(match: Match | Word, attention: Attention, word_T: np.ndarray, free_W: np.ndarray) -> np.ndarray:
    """Return the attention of each free output word to a span of the source, shape W; 0 for words that are not free."""
    inside_S = (attention.source_S >= match.start) & (attention.source_S < match.end)
    weight_T = attention.weight_TS[:, inside_S].sum(1)
    written_T = word_T >= 0
    return np.bincount(word_T[written_T], weight_T[written_T], minlength=len(free_W)) * free_W


def _span(match: Match, attention: Attention, word_T: np.ndarray, free_W: np.ndarray) -> tuple[int, int] | None:
    """Return the first and the last output word that a term is translated by; None if there are none."""
    parts = [word._replace(start=word.start + match.start, end=word.end + match.start) for word in words(match.source)]
    best = []
    for part in parts:
        weight_W = _from(part, attention, word_T, free_W)
        if weight_W.max(initial=0.0) >= _LEAST:
            best.append(int(weight_W.argmax()))
    if not best:
        return None
    first, last = min(best), max(best)
    wide = last - first > _WIDEST * len(parts)
    return None if wide or not free_W[first : last + 1].all() else (first, last)


def _cased(target: str, replaced: Word, begins: bool) -> str:
    """Return a target with a capital letter if it begins the text in place of a word that has one."""
    return target[0].upper() + target[1:] if begins and replaced.text[0].isupper() else target
