"""Lines with tags and fields: the texts that are translated in their place, and the translations made of those.

A field, such as a placeholder, is translated with a substitute (nmt/text/markup.py). The same line is translated
several times, with other substitutes and at last without any. The first translation that has every substitute once
counts. If none has, fields are placed by the attention, and flagged. docs/results/quality.md compares these ways.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from nmt.data.subwords import one_line
from nmt.decoding.alignment import Attended, Block, links, soft_links, weights, words
from nmt.decoding.placing import Restored, is_clear, restore
from nmt.decoding.translation import TextHypothesis, Translation
from nmt.text.markup import Item, Masked, find_items, mask, numbers_for, slots_for, without
from nmt.text.punctuation import origins

_DIGITS = (4, 3, 2)
"""Lengths of the numbers in place of fields, in the order in which their translations are preferred."""


class Protected(NamedTuple):
    """A line with tags or fields."""

    line: str
    items: tuple[Item, ...]
    masked: tuple[Masked, ...]
    """The texts to translate, the preferred one first. None if the line has nothing to translate but fields."""


def protect(line: str, slots: bool, keep_lines: bool = False) -> Protected | None:
    """Return a line with its tags and fields taken out; None if it has none.

    `slots`: the model has learned the symbols of slots, which then replace fields. Control characters and line breaks
    become blanks, also in tags and beside them; with `keep_lines`, LF stays.
    """
    line = "\n".join(map(one_line, line.split("\n"))) if keep_lines else one_line(line)
    items = find_items(line)
    if not items:
        return None
    bare = mask(line, items, without(items))
    if not any(map(str.isalnum, bare.text)):
        return Protected(line, items, ())
    if all(without(items)):
        return Protected(line, items, (bare,))
    tried = [slots_for(line, items) if slots else None, *(numbers_for(line, items, digits) for digits in _DIGITS)]
    masked = [mask(line, items, substitutes) for substitutes in tried if substitutes is not None]
    return Protected(line, items, (*filter(is_clear, masked), bare))


def spread(lines: Sequence[str], kept: Mapping[int, Protected]) -> tuple[list[str], list[int]]:
    """Return (the texts to translate, the number of the line of each); `kept` has lines by their numbers."""
    texts = [
        [each.text for each in kept[place].masked] if place in kept else [line] for place, line in enumerate(lines)
    ]
    return [text for each in texts for text in each], [place for place, each in enumerate(texts) for _ in each]


def gather(found: Sequence[Translation], origin: Sequence[int], kept: Mapping[int, Protected]) -> list[Translation]:
    """Return one translation for each line, from those of `spread`."""
    of_line: dict[int, list[Translation]] = {}
    for translation, place in zip(found, origin, strict=True):
        of_line.setdefault(place, []).append(translation)
    places = sorted(of_line.keys() | kept.keys())
    return [_chosen(kept[place], of_line.get(place, [])) if place in kept else of_line[place][0] for place in places]


def with_alignments(found: Translation, given: str | None = None) -> Translation:
    """Return a translation with the alignments of its hypotheses to its line.

    `given` is the line before its punctuation was normalised; None: it is the line that was read.
    """
    return replace(found, hypotheses=tuple(_aligned(each, given) for each in found.hypotheses))


def _aligned(hypothesis: TextHypothesis, given: str | None) -> TextHypothesis:
    attended = hypothesis.attended
    assert attended is not None
    if given is not None:
        place_of = origins(given, attended.source)
        blocks = (each._replace(source_S=_mapped(each.source_S, place_of.__getitem__)) for each in attended.blocks)
        attended = Attended(given, attended.target, tuple(blocks))
    between = weights(attended, words(attended.source), words(attended.target))
    return replace(hypothesis, alignment=links(between), soft_alignment=soft_links(between))


def _chosen(kept: Protected, found: Sequence[Translation]) -> Translation:
    """Return the translation of a line, from those of its texts."""
    if not found:
        return Translation(one_line(kept.line), source=kept.line)
    for masked, translation in zip(kept.masked, found, strict=True):
        restored = [_restored(kept, masked, each) for each in translation.hypotheses]
        if restored and restored[0][1].complete:
            break
    # Without hypotheses, the model knows no letter of the line.
    text = restored[0][1].text if restored else one_line(kept.line)
    placed = restored[0][1].flags if restored else ()
    return replace(
        translation,
        text=text,
        hypotheses=tuple(hypothesis for hypothesis, _ in restored),
        source=kept.line,
        noted=(*translation.noted, *placed),
    )


def _restored(kept: Protected, masked: Masked, hypothesis: TextHypothesis) -> tuple[TextHypothesis, Restored]:
    """Return a hypothesis with the tags and fields of its line."""
    attended = hypothesis.attended
    assert attended is not None
    restored = restore(kept.items, masked, attended)
    blocks = tuple(
        Block(_mapped(block.source_S, masked.in_line), _mapped(block.target_T, restored.in_text), block.attention_TS)
        for block in attended.blocks
    )
    whole = Attended(kept.line, restored.text, blocks)
    return replace(hypothesis, text=restored.text, attended=whole), restored


def _mapped(places: np.ndarray, to: Callable[[int], int]) -> np.ndarray:
    """Return mapped places; -1, the end of the sentence, stays."""
    return np.array([place if place < 0 else to(place) for place in places.tolist()], dtype=np.int64)
