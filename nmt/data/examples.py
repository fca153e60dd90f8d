"""Rewrite texts with reserved symbols: terms and slots, in training pairs and in texts to translate.

term   The <term:0> pump<term:1> Pumpe<term:2> is new.      a source term with its required translation
slot   Room <slot:3> is free. -> Zimmer <slot:3> ist frei.  a span that is the same on both sides
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

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


def annotated(text: str, matches: Sequence[Match], subwords: Subwords, masked: bool = False) -> Parts:
    """Return a source text with its terms and their required translations, marked with the symbols of terms.

    A mark comes before the blank that precedes a word, so that the words are encoded as ever. `masked` replaces the
    term by the mask symbol.
    """
    start, middle, end, mask = subwords.reserved_ids("term")
    parts: Parts = []
    place = 0
    for match in matches:
        before = text[place : match.start]
        kept = before.rstrip()
        term = mask if masked else before[len(kept) :] + text[match.start : match.end]
        parts += [kept, start, term, middle, f" {match.target}", end]
        place = match.end
    return [*parts, text[place:]]


def slotted(text: str, spans: Sequence[tuple[int, int]], slots: Sequence[int]) -> Parts:
    """Return a text with the ids `slots` in place of its `spans` (start, end), which are in order."""
    parts: Parts = []
    place = 0
    for (start, end), slot in zip(spans, slots, strict=True):
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
        # Slots are drawn at random so that all of them are learned.
        slots = self._random.sample(self._subwords.reserved_ids("slot"), len(chosen))
        by_target = sorted(range(len(chosen)), key=lambda number: chosen[number][1])
        return Example(
            "slot",
            slotted(source, [span for span, _ in chosen], slots),
            slotted(target, [chosen[number][1] for number in by_target], [slots[number] for number in by_target]),
        )

    def _with_terms(self, source: str, target: str, links: list[Link]) -> Example | None:
        if not links:
            return None
        matches = [
            Match(link.source.start, link.source.end, link.source.text, link.target.text)
            for link in self._chosen(links, _MOST_TERMS)
        ]
        masked = self._random.random() < 0.5
        return Example("term", annotated(source, matches, self._subwords, masked), [target])

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
