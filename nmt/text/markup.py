"""Take the tags and fields of a line out of its text before it is translated: nmt/decoding/placing.py puts them back.

A tag leaves nothing behind. A field, such as a placeholder, leaves a substitute that the model copies: a number, or a
symbol that it has learned. In the translation, the field replaces its substitute. Each tag or field is an item of one
of four roles:

| role  | items |
|-------|-------|
| open  | a tag with a partner, as in <b>text</b> |
| close | its partner |
| empty | a tag without a partner, an element without text such as <a></a>, a blank such as &nbsp; |
| kept  | a placeholder, URL or e-mail address, a whole ICU message, an entity such as &amp; |
| kept  | elements in place of words, or not translated: <x id="1"/> <code>x = 1</code> <i translate="no">A</i> |
"""

import html
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from nmt.text.fields import Field, find_fields

SLOTS = "".join(map(chr, range(0xFDE0, 0xFDE8)))
"""Substitutes for the first slots of a vocabulary, by number. Unicode keeps these characters for use in programs."""
# Private-use characters: no line has all of them.
_HOLDERS = range(0xF0000, 0xFFFFE)
_NAME = re.compile(r"</?([A-Za-z][\w:.-]*)")
# Their text is not in a language.
_VERBATIM = frozenset(("code", "kbd", "samp", "var", "math", "script", "style"))
_NO_TRANSLATION = re.compile(r"""\stranslate=["']no["']""")
# Empty elements of XLIFF in place of a word or a number. Weblate sends them to DeepL.
_PLACEHOLDERS = frozenset(("x", "ph"))
_DEEPEST = 64  # tags of more deeply nested elements count as empty
_MESSAGE = re.compile(r"\{\s*\w+\s*,")
_BRACE = re.compile("[{}]")
_LONGEST_MESSAGE = 5000
_AFTER_WORD = tuple(".,;:!?)")


class Item(NamedTuple):
    """A tag or field of a line."""

    role: str
    """open, close, empty or kept."""
    kind: str
    """As `Field.kind`."""
    text: str
    start: int
    """Its place in the line."""
    end: int
    before: str
    """White space before it in the line."""
    after: str
    """White space after it."""
    ends_word: bool
    """True if it is between a word and a mark."""
    partner: int
    """Number of the item that closes or opens it; -1: none."""


class Masked(NamedTuple):
    """A line's text without its items, to be translated."""

    text: str
    substitutes: tuple[str, ...]
    """What is in `text` in place of each item; empty for tags, and for fields that are left out."""
    places: tuple[int, ...]
    """Where each item was, or its substitute begins, in `text`."""
    runs: tuple[tuple[int, int], ...]
    """Stretches that are copied from the line: where each begins in `text` and in the line, in order."""
    parting: frozenset[int]
    """Numbers of the tags that part words, for which `text` has a blank."""

    def in_line(self, place: int) -> int:
        """Return the place in the line of a place in `text`."""
        begins, there = self.runs[bisect_right(self.runs, place, key=lambda run: run[0]) - 1]
        return there + place - begins


def outside_items(line: str, change: Callable[[str], str]) -> str:
    """Return a line that is changed, but for its items.

    `change` is called with the whole line once, in which a character that it must keep is in place of each item.
    """
    items = find_items(line)
    if not items:
        return change(line)
    holder = next(character for character in map(chr, _HOLDERS) if character not in line)
    ends = [0, *(item.end for item in items)]
    text = "".join(f"{line[end : item.start]}{holder}" for end, item in zip(ends, items, strict=False))
    parts = change(text + line[ends[-1] :]).split(holder)
    kept = [*(item.text for item in items), ""]
    return "".join(f"{part}{text}" for part, text in zip(parts, kept, strict=True))


def find_items(line: str) -> tuple[Item, ...]:
    """Return the items of a line, in order. Most lines have none."""
    fields = find_fields(line)
    if not fields:
        return ()
    fields = _merged(line, fields)
    partners = _partners(fields)
    found = []
    for number, field in enumerate(fields):
        partner = partners.get(number, -1)
        role = _role(field) if partner < 0 else "open" if partner > number else "close"
        start, end = field.start, field.end
        # Slices of the neighbourhood, as a line may be long and have many items.
        left, right = line[max(start - 16, 0) : start], line[end : end + 16]
        before, after = left[len(left.rstrip()) :], right[: len(right) - len(right.lstrip())]
        ends_word = left[-1:].isalnum() and not right[:1].isalnum()
        found.append(Item(role, field.kind, field.text, start, end, before, after, ends_word, partner))
    return tuple(found)


def _role(field: Field) -> str:
    if field.text[0] == "&":
        return "empty" if html.unescape(field.text).isspace() else "kept"
    if field.kind != "tag" or field.text[-1] != ">":
        return "kept"
    return "kept" if _whole(field) and (_verbatim(field) or _name(field) in _PLACEHOLDERS) else "empty"


def _name(field: Field) -> str:
    """Return the name of a tag; empty for a comment or another field."""
    match = _NAME.match(field.text) if field.kind == "tag" else None
    return match[1] if match else ""


def _verbatim(field: Field) -> bool:
    return _name(field) in _VERBATIM or bool(_NO_TRANSLATION.search(field.text))


def _whole(field: Field) -> bool:
    """Return whether a field is a whole element, as <x/> and <x>text</x> are."""
    return field.text.endswith("/>") or "</" in field.text[1:]


def _merged(line: str, fields: list[Field]) -> list[Field]:
    """Return the fields with ICU messages, elements without text and verbatim elements as one field each."""
    partners = _partners(fields)
    found: list[Field] = []
    for number, field in enumerate(fields):
        if found and field.start < found[-1].end:
            continue
        end = field.end
        last = partners.get(number, -1)
        if field.kind == "placeholder" and _MESSAGE.match(field.text):
            end = max(end, _message_end(line, field.start))
        elif last > number and (_verbatim(field) or fields[last].start == field.end):
            end = fields[last].end
        found.append(Field(field.kind, line[field.start : end], field.start, end))
    return found


def _message_end(line: str, start: int) -> int:
    """Return where the ICU message that begins at `start` ends; 0 if its braces are not in pairs."""
    depth = 0
    for match in _BRACE.finditer(line, start, start + _LONGEST_MESSAGE):
        depth += 1 if match[0] == "{" else -1
        if not depth:
            return match.end()
    return 0


def _partners(fields: Sequence[Field]) -> dict[int, int]:
    """Return the partner of each tag that has one, in both directions. Elements are nested, never crossed."""
    partners: dict[int, int] = {}
    opened: list[int] = []
    waiting: dict[str, int] = {}  # how many tags of a name are opened
    for number, field in enumerate(fields):
        name = _name(field)
        if not name or _whole(field):
            continue
        if not field.text.startswith("</"):
            opened.append(number)
            waiting[name] = waiting.get(name, 0) + 1
        elif waiting.get(name):
            while True:
                last = opened.pop()
                waiting[_name(fields[last])] -= 1
                if _name(fields[last]) == name:
                    break
            if len(opened) < _DEEPEST:
                partners[last], partners[number] = number, last
    return partners


def mask(line: str, items: Sequence[Item], substitutes: Sequence[str]) -> Masked:
    """Return a line with its kept items replaced by `substitutes`, one for each; an empty one leaves the item out.

    A blank parts words that only tags part, as in "one<br/>two".
    """
    text, end = "", 0
    places: list[int] = []
    used: list[str] = []
    runs = [(0, 0)]
    given = iter(substitutes)
    tags: list[int] = []  # since the last text
    parting: set[int] = set()
    for number, item in enumerate((*items, None)):
        run = line[end : item.start if item else len(line)]
        if run:
            parts = len(tags) > 1 or any(items[tag].role == "empty" for tag in tags)
            if parts and text[-1:].isalnum() and run[0].isalnum():
                text += " "
                parting.update(tags)
            runs.append((len(text), end))
            text += run
            tags = []
        if item is None:
            break
        substitute = next(given) if item.role == "kept" else ""
        if item.role == "kept" and not substitute and line.startswith(_AFTER_WORD, item.end):
            text = text.rstrip()
        places.append(len(text))
        used.append(substitute)
        if substitute:
            runs += [(len(text), item.start), (len(text) + len(substitute), item.end)]
            text += substitute
            tags = []
        else:
            tags.append(number)
        end = item.end
    return Masked(text, tuple(used), tuple(places), tuple(runs), frozenset(parting))


def numbers_for(line: str, items: Sequence[Item], digits: int) -> list[str] | None:
    """Return numbers as substitutes for the kept items of a line: all with this many digits, and not in the line.

    An entity has its character as its substitute. None if there are too few such numbers.
    """
    first = int("3816472"[:digits])
    numbers = chain(range(first, 10**digits, 7), range(10 ** (digits - 1), first, 7))
    return _substitutes(items, (str(number) for number in numbers if str(number) not in line))


def slots_for(line: str, items: Sequence[Item]) -> list[str] | None:
    """Return `SLOTS` as substitutes for the kept items of a line, like `numbers_for`."""
    return None if set(SLOTS) & set(line) else _substitutes(items, iter(SLOTS))


def without(items: Iterable[Item]) -> list[str]:
    """Return substitutes that leave out all kept items of a line but entities."""
    return [_character(item) for item in items if item.role == "kept"]


def _substitutes(items: Sequence[Item], unused: Iterator[str]) -> list[str] | None:
    found = [_character(item) or next(unused, "") for item in items if item.role == "kept"]
    return found if all(found) else None


def _character(item: Item) -> str:
    """Return the character of an entity; empty for other items."""
    return html.unescape(item.text) if item.text[0] == "&" else ""
