"""Rewrite training pairs: with reserved symbols, which mark terms and slots also in texts to translate, or in other
letters and with quotation marks.

term        The <term:0> pump<term:1> Pumpe<term:2> is new.      a source term with its required translation
slot        Room <slot:3> is free. -> Zimmer <slot:3> ist frei.  a span that is the same on both sides
quoted      "Room 3 is free." -> "Zimmer 3 ist frei."
title_case  Room 3 Is Free. -> Zimmer 3 ist frei.                as headlines in English are written
lower_case  room 3 is free. -> Zimmer 3 ist frei.
upper_case  ROOM 3 IS FREE. -> ZIMMER 3 IST FREI.
"""

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

import numpy as np

from nmt.config import ExamplesConfig
from nmt.data.association import Associations, Link
from nmt.data.subwords import Subwords
from nmt.text.fields import find_fields
from nmt.text.terms import Match

Parts = list[str | int]
"""A text in parts: text, and ids of reserved symbols (`Subwords.encode_parts`)."""
SYMBOLS = ("slot", "term")
"""Kinds of symbols that a model may have learned, as in corpus.json."""
KINDS = {
    "slot": "slots",
    "term": "terms",
    "quoted": "quoted",
    "title_case": "title_case",
    "lower_case": "lower_case",
    "upper_case": "upper_case",
}
"""Kinds of examples, and the setting corpus.examples.* of each."""
_Item = TypeVar("_Item")
_MOST_TERMS = 3  # per example
_WORD = re.compile(r"\S+")
_LETTER = re.compile(r"[^\W\d_]")
_HEADLINE_WORD = 4  # letters, from which a word of a headline has a capital
_QUOTES = ("", *"\"'“”„«»‚‘’‹›")
_BEFORE, _AFTER = "\"'“”„«»‚‘’(¿¡", "\"'“”„«»‘’),.;:!?…"


class Annotated(NamedTuple):
    """A source text whose terms are marked with symbols, with their required translations."""

    parts: Parts
    origin: np.ndarray
    """int64, for each character of the text in `parts`: where in the source text it is. A required translation is where
    its term begins."""
    fills: dict[int, str]
    """What takes the place of each slot in the translation, by the id of the slot."""
    kept: frozenset[str]
    """Those of `fills` that are not translated."""

    def begins(self, text: str) -> bool:
        """Return whether a translation begins with a required translation, whose first letter may become a capital."""
        return any(text.startswith(fill) for fill in self.fills.values() if fill not in self.kept)

    def places(self, subwords: Subwords) -> np.ndarray:
        """Return where in the source text each subword of `parts` begins; -1 for a symbol."""
        places = subwords.part_places(self.parts)
        return np.where(places < 0, -1, np.append(self.origin, -1)[places])


def annotated(text: str, matches: Sequence[Match], slots: Sequence[int], subwords: Subwords) -> Annotated:
    """Return a source text with its terms marked; `slots` has the ids of slots. Terms beyond these are left unmarked.

    A mark comes before the blank that precedes a word, so that the words are encoded as ever.
    """
    start, end = subwords.symbol("term", 0), subwords.symbol("term", 2)
    marked = list(zip(matches, slots, strict=False))
    parts: Parts = []
    origin: list[int] = []
    place = 0
    for match, slot in marked:
        begins = place + len(text[place : match.start].rstrip())
        parts += [text[place:begins], start, text[begins : match.end], slot, f" {match.target}", end]
        origin += [*range(place, match.end), *[match.start] * (1 + len(match.target))]
        place = match.end
    origin += range(place, len(text))
    return Annotated(
        [*parts, text[place:]],
        np.array(origin, dtype=np.int64),
        {slot: match.target for match, slot in marked},
        frozenset(match.target for match, _ in marked if match.kept),
    )


def slotted(text: str, spans: Sequence[tuple[int, int]], slots: Sequence[int]) -> Parts:
    """Return a text with the ids `slots` in place of its `spans` (start, end), which do not overlap."""
    parts: Parts = []
    place = 0
    for (start, end), slot in sorted(zip(spans, slots, strict=True)):
        parts += [text[place:start], slot]
        place = end
    return [*parts, text[place:]]


class Example(NamedTuple):
    """A rewritten training pair."""

    kind: str
    """One of `KINDS`."""
    source: Parts
    target: Parts


class ExampleWriter:
    """Rewrites some of the training pairs, block by block.

    What it makes of a block depends on nothing but the number and the pairs of the block.
    """

    def __init__(self, config: ExamplesConfig, subwords: Subwords, associations: Associations | None) -> None:
        """Prepare to rewrite the shares of `config`; `associations` are for `config.terms`."""
        shares = [(kind, getattr(config, setting)) for kind, setting in KINDS.items()]
        self._kinds = [kind for kind, _ in shares]
        self._ends = list(accumulate(share for _, share in shares))
        self._subwords = subwords
        self._random = random.Random(0)
        self._associations = associations

    def begin(self, block: int) -> None:
        """Begin the block of this number."""
        self._random = random.Random(block + 1)

    def example(self, source: str, target: str) -> Example | None:
        """Return the next pair of the block rewritten; None if it stays as it is."""
        drawn = self._random.random()
        if drawn >= self._ends[-1]:
            return None
        kind = self._kinds[bisect_right(self._ends, drawn)]
        match kind:
            case "slot":
                return self._with_slots(source, target)
            case "term":
                links = self._associations.links(source, target) if self._associations else []
                return self._with_terms(source, target, links)
        made = in_style(kind, source, target)
        return Example(kind, [made[0]], [made[1]]) if made and made != (source, target) else None

    def _with_slots(self, source: str, target: str) -> Example | None:
        spans = equal_spans(source, target)
        if not spans:
            return None
        # Others stay as they are, as in a text that has both numbers and placeholders.
        chosen = self._chosen(spans, len(self._subwords.reserved_ids("slot")))
        slots = self._slots(len(chosen))
        source_spans, target_spans = zip(*chosen, strict=True)
        return Example("slot", slotted(source, source_spans, slots), slotted(target, target_spans, slots))

    def _with_terms(self, source: str, target: str, links: list[Link]) -> Example | None:
        if not links:
            return None
        chosen = self._chosen(links, _MOST_TERMS)
        slots = self._slots(len(chosen))
        matches = [Match(link.source.start, link.source.end, link.source.text, link.target.text) for link in chosen]
        spans = [(link.target.start, link.target.end) for link in chosen]
        marked = annotated(source, matches, slots, self._subwords)
        return Example("term", marked.parts, slotted(target, spans, slots))

    def _slots(self, count: int) -> list[int]:
        """Return the ids of slots, drawn at random so that all of them are learned."""
        return self._random.sample(self._subwords.reserved_ids("slot"), count)

    def _chosen(self, found: list[_Item], most: int) -> list[_Item]:
        """Return a random part of a list in its order: half of it on average, at least one, at most `most`."""
        count = min(max(1, sum(self._random.random() < 0.5 for _ in found)), most)
        return [found[place] for place in sorted(self._random.sample(range(len(found)), count))]


def in_style(kind: str, source: str, target: str) -> tuple[str, str] | None:
    """Return a pair written in another way, one of `KINDS` without symbols; None if it does not suit.

    Fields, such as URLs and placeholders, keep their letters.
    """
    match kind:
        case "quoted":
            texts = source.strip(), target.strip()
            marked = any(text[:1] in _QUOTES or text[-1:] in _QUOTES for text in texts)
            return None if marked or not all(texts) else (f'"{texts[0]}"', f'"{texts[1]}"')
        case "title_case":
            return _outside_fields(source, _as_headline), target
        case "lower_case":
            return _outside_fields(source, str.lower), target
        case "upper_case":
            return _outside_fields(source, str.upper), _outside_fields(target, str.upper)
    raise ValueError(f"{kind} is no way to write a text")


def _outside_fields(text: str, change: Callable[[str], str]) -> str:
    """Return a text with its letters changed, except for those of fields."""
    place, parts = 0, []
    for field in find_fields(text):
        parts += [change(text[place : field.start]), field.text]
        place = field.end
    return "".join([*parts, change(text[place:])])


def _as_headline(text: str) -> str:
    """Return a text with capitals as headlines in English have them: short words in the middle have none."""

    def word(match: re.Match[str]) -> str:
        short = len(match[0].strip(_BEFORE + _AFTER)) < _HEADLINE_WORD
        return match[0] if short and match.start() > 0 else _LETTER.sub(lambda first: first[0].upper(), match[0], 1)

    return _WORD.sub(word, text)


def equal_spans(source: str, target: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the spans (start, end) on the source side and on the target side that are equal, in source order.

    They are fields, and words with a digit or a capital letter that does not begin the text. Each occurs once per side.
    Words that are neighbours on both sides are one span.
    """
    sides = [_copyable(text) for text in (source, target)]
    spans: list[tuple[tuple[int, int], tuple[int, int]]] = []
    for text, here in sides[0].items():
        if not (there := sides[1].get(text)):
            continue
        if spans:
            (start, end), (target_start, target_end) = spans[-1]
            gap = source[end : here[0]]
            if gap.isspace() and gap == target[target_end : there[0]]:
                spans[-1] = ((start, here[1]), (target_start, there[1]))
                continue
        spans.append((here, there))
    return spans


def _copyable(text: str) -> dict[str, tuple[int, int]]:
    """Return the spans (start, end), in order, that a translation may copy, by their text. Each occurs once."""
    spans: list[tuple[int, int]] = [(field.start, field.end) for field in find_fields(text)]
    fields = iter(spans.copy())
    field = next(fields, None)
    for match in _WORD.finditer(text):
        while field and field[1] <= match.start():
            field = next(fields, None)
        if field and field[0] < match.end():
            continue
        word = match[0].lstrip(_BEFORE)
        start = match.end() - len(word)
        word = word.rstrip(_AFTER)
        if any(map(str.isdigit, word)) or (word[:1].isupper() and start > 0):
            spans.append((start, start + len(word)))
    counts: dict[str, int] = {}
    for start, end in spans:
        counts[text[start:end]] = counts.get(text[start:end], 0) + 1
    return {text[start:end]: (start, end) for start, end in sorted(spans) if counts[text[start:end]] == 1}
