"""Put tags and fields back into a translation, where they belong according to the attention.

A field replaces its substitute. Tags are placed between tokens, which are words and marks:

- A pair of tags encloses the stretch of the translation that comes from the text between the tags in the line. Token t
  comes from that text with weight w_t, and the stretch has the largest sum of w_t - 1/2. So a token from elsewhere is
  enclosed only if that keeps others together. Stretches of inner pairs are looked for within those of outer ones, and
  apart from those found already, the best first.
- A tag without a partner, and a field without its substitute, stays with the token that it is attached to. Otherwise,
  what was before it in the line comes before it as far as possible.

A pair from whose text no token comes keeps its place in the order of the line, and is flagged. Every item is in the
result exactly once.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from nmt.decoding.alignment import Attended, Span, Weights, weights
from nmt.text.checks import Flag
from nmt.text.markup import SLOTS, Item, Masked

# The article before an apostrophe is a token, so that a tag fits between it and its noun. So is 14:35.
_TOKEN = re.compile(r"\w+['’](?=\w)|\w+(?:[.,:]\d+)*|[^\w\s]")


_SHARE = 0.5  # of a token's weight that makes it belong to a text
_LEAST = 0.1  # weight with which a pair of tags has a place


class Restored(NamedTuple):
    """A translation with its tags and fields."""

    text: str
    flags: tuple[Flag, ...]
    complete: bool
    """True if the translation had each substitute as often as its line."""
    runs: tuple[Span, ...]
    """Where each token begins: in the translation without items, and in `text`."""

    def in_text(self, place: int) -> int:
        """Return the place in `text` of a place in the translation without items."""
        run = bisect_right(self.runs, place, key=lambda run: run[0]) - 1
        return self.runs[run][1] + place - self.runs[run][0] if run >= 0 else 0


class _Node:
    """A pair of tags with what it encloses, a single item, or the whole line."""

    def __init__(self, items: list[int], first: int, end: int) -> None:
        self.items = items  # numbers: two of a pair, one of a single item, none of the line
        self.first, self.end = first, end  # its source tokens; a single item may have none
        self.inner: list[_Node] = []
        self.span: Span = (0, 0)  # its target tokens


def restore(items: Sequence[Item], masked: Masked, attended: Attended) -> Restored:
    """Return the translation of `masked.text`, which is `attended.target`, with the items of the line."""
    found_at, complete = _found(masked, attended.target)
    asked = [(place, place + len(each)) for place, each in zip(masked.places, masked.substitutes, strict=True) if each]
    source, target = _tokens(masked.text, asked), _tokens(attended.target, sorted(found_at))
    root = _tree(items, masked, source, set(found_at.values()))
    root.span = (0, len(target))
    flags = [
        Flag(items[number].kind, f"{items[number].text} may be in a wrong place")
        for number in _place(root, items, weights(attended, source, target))
    ]
    text, runs = _written(items, masked, root, attended.target, target, found_at)
    return Restored(text, tuple(flags), complete, runs)


def is_clear(masked: Masked) -> bool:
    """Return whether a text that is copied has each substitute as often as the line: none touches a digit."""
    return _found(masked, masked.text)[1]


# --- tokens ---


def _found(masked: Masked, target: str) -> tuple[dict[Span, int], bool]:
    """Return where the substitutes of items are in a translation, and whether it has each as often as its line."""
    wanted: dict[str, list[int]] = {}
    for item, substitute in enumerate(masked.substitutes):
        if substitute:
            wanted.setdefault(substitute, []).append(item)
    found: dict[Span, int] = {}
    complete = True
    for substitute, given in wanted.items():
        pattern = re.escape(substitute)
        if substitute.isdigit():
            # A part of a longer number or word is no substitute, unless the line has it in a word.
            start = masked.places[given[0]]
            left = "" if masked.text[start - 1 : start].isalpha() else r"(?<![^\W\d])"
            right = "" if masked.text[start + len(substitute) :][:1].isalpha() else r"(?![^\W\d])"
            pattern = rf"{left}(?<!\d)(?<!\d[.,]){substitute}(?!\d|[.,]\d){right}"
        spans = [each.span() for each in re.finditer(pattern, target)]
        complete &= len(spans) == len(given)
        found.update(zip(spans, given, strict=False))
    return found, complete


def _tokens(text: str, substitutes: Sequence[Span]) -> list[Span]:
    """Return where the tokens of a text are; each substitute is one."""
    tokens: list[Span] = []
    place = 0
    for start, end in (*substitutes, (len(text), len(text))):
        tokens += [match.span() for match in _TOKEN.finditer(text, place, start)]
        if start < end:
            tokens.append((start, end))
        place = end
    return tokens


# --- places ---


def _tree(items: Sequence[Item], masked: Masked, source: Sequence[Span], placed: set[int]) -> _Node:
    """Return the line as a tree of its items, except for fields that are `placed` already."""
    starts, ends = [start for start, _ in source], [end for _, end in source]
    root = _Node([], 0, len(source))
    open_nodes = [root]
    for number, item in enumerate(items):
        place, length = masked.places[number], len(masked.substitutes[number])
        if item.role == "close":
            open_nodes[-1].items.append(number)
            open_nodes.pop().end = bisect_right(starts, place - 1)
        elif number not in placed:
            first = bisect_right(ends if item.role == "open" else starts, place if item.role == "open" else place - 1)
            node = _Node([number], first, first + (length > 0))
            open_nodes[-1].inner.append(node)
            if item.role == "open":
                open_nodes.append(node)
    return root


def _place(node: _Node, items: Sequence[Item], come: Weights) -> list[int]:
    """Set the target tokens of all nodes within a node, and return the items that may be in a wrong place."""
    low, high = node.span
    lost: list[int] = []
    pairs = [each for each in node.inner if len(each.items) == 2 and each.end > each.first]
    weight_of = {id(each): come.from_units(each.first, each.end)[low:high] for each in pairs}
    free = np.ones(high - low, dtype=bool)
    for pair in sorted(pairs, key=lambda each: -_best(weight_of[id(each)] - _SHARE, free)[0]):
        alone = len(pairs) == 1 and pair.first <= node.first and pair.end >= node.end
        weight_T = weight_of[id(pair)]
        start, end = (0, high - low) if alone else _stretch(weight_T, free)
        if free[start:end].any() and weight_T[start:end].max() >= _LEAST:
            free[start:end] = False
            pair.span = low + start, low + end
        else:
            lost.append(pair.items[0])
    found = [each for each in pairs if each.items[0] not in lost]
    after = low
    for each in node.inner:
        if each in found:
            after = each.span[1]
            continue
        gap = after if each in pairs else _gap(each, node, items[each.items[0]], come)
        if around := [span for span in (other.span for other in found) if span[0] < gap < span[1]]:
            gap = min(around[0], key=lambda end: abs(end - gap))
        each.span = gap, gap
    for each in node.inner:
        lost += _place(each, items, come) if each.inner else []
    # A field without its substitute belongs somewhere near.
    return lost + [each.items[0] for each in node.inner if items[each.items[0]].role == "kept"]


def _best(gain_T: np.ndarray, free_T: np.ndarray) -> tuple[float, int, int]:
    """Return the largest sum of a stretch of free tokens, and where the stretch begins and ends."""
    best = (0.0, 0, 0)
    total, start = 0.0, 0
    for place, (gain, free) in enumerate(zip(gain_T.tolist(), free_T.tolist(), strict=True)):
        if total <= 0.0 or not free:
            total, start = 0.0, place
        if free:
            total += gain
            if total > best[0]:
                best = (total, start, place + 1)
        else:
            start = place + 1
    return best


def _gap(node: _Node, outer: _Node, item: Item, come: Weights) -> int:
    """Return the number of target tokens before a node that encloses no text."""
    low, high = outer.span
    if node.first <= outer.first:
        return low
    if node.end >= outer.end:
        return high
    left = not item.before and (bool(item.after) or item.ends_word)
    unit = node.first - 1 if left else node.end
    start, end = _stretch(come.from_units(unit, unit + 1)[low:high], np.ones(high - low, dtype=bool))
    return low + (end if left else start)


def _stretch(weight_T: np.ndarray, free_T: np.ndarray) -> Span:
    """Return the stretch of free tokens to which `weight_T` belongs: the best one, or the token with most weight."""
    gain, start, end = _best(weight_T - _SHARE, free_T)
    if gain > 0.0 or not len(weight_T):
        return start, end
    most = int(np.where(free_T, weight_T, -1.0).argmax())
    return most, most + 1


# --- text ---


def _written(
    items: Sequence[Item],
    masked: Masked,
    root: _Node,
    translation: str,
    target: Sequence[Span],
    found_at: dict[Span, int],
) -> tuple[str, tuple[Span, ...]]:
    """Return the translation with all items, and the runs of `Restored`."""
    text, runs = "", []
    end = 0  # of the last token
    waiting: list[int] = []  # items since the last token
    for item, token in _walk(root):
        if item is not None:
            waiting.append(item)
            continue
        span = target[token]
        text += _spaced(items, masked, waiting, translation[end : span[0]], text, translation[span[0] : span[0] + 1])
        waiting, end = [], span[1]
        runs.append((span[0], len(text)))
        shown = items[found_at[span]].text if span in found_at else translation[slice(*span)]
        text += "" if shown in SLOTS else shown
    return text + _spaced(items, masked, waiting, translation[end:], text, ""), tuple(runs)


def _walk(node: _Node) -> Iterator[tuple[int | None, int]]:
    """Yield the items and target tokens of a node in order: (number of the item, 0) or (None, number of the token)."""
    place, end = node.span
    if node.items:
        yield node.items[0], 0
    for each in sorted(node.inner, key=lambda each: each.span):
        yield from ((None, token) for token in range(place, each.span[0]))
        yield from _walk(each)
        place = each.span[1]
    yield from ((None, token) for token in range(place, end))
    if len(node.items) == 2:
        yield node.items[1], 0


def _spaced(items: Sequence[Item], masked: Masked, numbers: list[int], gap: str, left: str, right: str) -> str:
    """Return the items between two tokens with blanks. `gap` is what the translation has there.

    `left` is the text before, and `right` the first character after them.
    """
    if not numbers:
        return gap
    chosen = [items[number] for number in numbers]
    blanks = [chosen[0].before, *(one.after or two.before for one, two in pairwise(chosen)), chosen[-1].after]
    if not gap:
        # At an end of the line, a translation has lost the blanks that its source has there.
        places = [masked.places[number] for number in numbers]
        begins, ends = not (left or masked.text[: places[-1]].strip()), not (right or masked.text[places[0] :].strip())
        kept = blanks if begins or ends else []
        blanks = ["" if (place == 0 if begins else place == len(chosen)) else blank for place, blank in enumerate(kept)]
        blanks = blanks or [""] * (len(chosen) + 1)
    elif not any(blanks) and not masked.parting.issuperset(numbers):
        roles = [item.role for item in chosen]
        last_close = len(roles) - roles[::-1].index("close") if "close" in roles else None
        blanks[last_close if last_close is not None else roles.index("open") if "open" in roles else -1] = gap
    # A field is a word.
    if chosen[0].role == "kept" and left[-1:].isalnum():
        blanks[0] = blanks[0] or " "
    if chosen[-1].role == "kept" and right.isalnum():
        blanks[-1] = blanks[-1] or " "
    return blanks[0] + "".join(item.text + blank for item, blank in zip(chosen, blanks[1:], strict=True))
