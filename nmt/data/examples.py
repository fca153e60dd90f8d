"""Rewrite texts with reserved symbols: terms and slots, in training pairs and in texts to translate.

term   The <term:0> pump<term:1> Pumpe<term:2> is new.      a source term with its required translation
slot   Room <slot:3> is free. -> Zimmer <slot:3> ist frei.  a span that is the same on both sides
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from nmt.config import ExamplesConfig
from nmt.data.association import Associations, Link, Pairs
from nmt.data.subwords import Subwords
from nmt.text.fields import find_fields
from nmt.text.terms import Match

Parts = list[str | int]
"""A text in parts: text, and ids of reserved symbols (`Subwords.encode_parts`)."""
SYMBOLS = ("slot", "term")
"""Kinds of symbols that a model may have learned, as in corpus.json."""
_Item = TypeVar("_Item")
_MOST_TERMS = 3  # per example
_WORD = re.compile(r"\S+")
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
    """A training pair rewritten with symbols of one kind."""

    kind: str
    """One of `SYMBOLS`."""
    source: Parts
    target: Parts


class ExampleWriter:
    """Rewrites some of the training pairs. The same pairs in the same order give the same examples."""

    def __init__(self, config: ExamplesConfig, subwords: Subwords, read: Callable[[], Pairs]) -> None:
        """Prepare to rewrite the shares of `config`; `read` yields pairs to find the translations of words in."""
        self._config = config
        self._subwords = subwords
        self._random = random.Random(1)
        self._associations = Associations(read) if config.terms else None

    def example(self, source: str, target: str) -> Example | None:
        """Return the next pair rewritten; None if it stays as it is."""
        drawn = self._random.random()
        if drawn < self._config.slots:
            return self._with_slots(source, target)
        if self._associations and drawn < self._config.slots + self._config.terms:
            return self._with_terms(source, target, self._associations.links(source, target))
        return None

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

def kinds_of(config): return SYMBOLS
