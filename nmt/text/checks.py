"""Check a translation: what a reader should look at, found by comparing it with its source.

The checks know no language: they compare numbers, fields, marks and words of both texts. They are made to be quiet on
good translations, so they do not find every mistake.
"""

import html
import re
from collections import Counter
from collections.abc import Iterable
from operator import eq
from typing import NamedTuple

from nmt.text.fields import Field, find_fields
from nmt.text.numbers import compare_numbers

KINDS = {
    "numbers": "a number is missing, or one is added",
    "placeholder": "a placeholder such as %s, {name} or [X0X] is missing, changed or added",
    "tag": "a tag such as <b> is missing, changed or added",
    "url": "a URL or an e-mail address is missing, changed or added",
    "brackets": "a bracket or quotation mark has no partner",
    "end": "the last mark differs, such as a full stop for a question mark",
    "copy": "the text was returned untranslated",
    "length": "the translation is much longer or much shorter than its source",
    "loop": "the same words are repeated",
    "unknown": "a character is unknown to the model",
    "term": "a required term is missing, or was put in the place of other words",
    "cut": "the translation was cut off at its maximum length",
    "retried": "the first translation repeated itself or was empty, so other settings were used",
}
"""Meaning of each kind of flag, in the order of reports."""
KEPT = ("numbers", "placeholder", "tag", "url")
"""Kinds of what a translation keeps from its source, and that `kept` counts."""


class Flag(NamedTuple):
    """One thing to check in a translation."""

    kind: str
    """One of `KINDS`."""
    detail: str
    """What was found, for a reader: a missing number, the repeated words."""


class Kept(NamedTuple):
    """How many numbers, placeholders, tags or URLs of a text its translation has."""

    kept: int
    total: int

    @property
    def percent(self) -> float:
        """Share of those kept; 100 if there are none."""
        return 100.0 * self.kept / self.total if self.total else 100.0


def check(source: str, translation: str, *, unlearned: str = "", cut: bool = False) -> tuple[Flag, ...]:
    """Return the flags of a translation, in the order of `KINDS`.

    `unlearned` are the characters of the source that the model has never seen. `cut`: the translation was cut off at
    its maximum length. A source without letters and digits has no flags.
    """
    if not any(character.isalnum() for character in source):
        return ()
    fields, found = find_fields(source), find_fields(translation)
    # Digits in a URL or a placeholder belong to it.
    plain, translated = _without(source, fields), _without(translation, found)
    numbers = compare_numbers(plain, translated)
    flags = [Flag("numbers", detail) for detail in _details(numbers.missing, numbers.added)]
    for kind in KEPT[1:] if fields or found else ():
        flags += [Flag(kind, detail) for detail in _details(*_unequal(kind, fields, found, translation))]
    words, given = _WORD.findall(plain), _WORD.findall(translated)
    for kind, detail in (
        ("brackets", _brackets(plain, translated)),
        ("end", _end(plain, translated)),
        ("copy", _copy(words, given)),
        ("length", _length(plain, translated)),
        ("loop", _loop(words, given)),
        ("unknown", _unknown(source, translation, unlearned)),
        ("cut", "cut off at its maximum length" if cut else ""),
    ):
        if detail:
            flags.append(Flag(kind, detail))
    return tuple(flags)


def in_order(flags: Iterable[Flag]) -> tuple[Flag, ...]:
    """Return flags in the order of `KINDS`."""
    order = list(KINDS)
    return tuple(sorted(flags, key=lambda flag: order.index(flag.kind)))


def kept(source: str, translation: str) -> dict[str, Kept]:
    """Return how much of each kind of `KEPT` in the source the translation has."""
    fields, found = find_fields(source), find_fields(translation)
    numbers = compare_numbers(_without(source, fields), _without(translation, found))
    result = {"numbers": Kept(numbers.total - len(numbers.missing), numbers.total)}
    for kind in KEPT[1:]:
        total = sum(field.kind == kind for field in fields)
        missing, _ = _unequal(kind, fields, found, translation)
        result[kind] = Kept(total - len(missing), total)
    return result


def _details(missing: list[str], added: list[str]) -> list[str]:
    return [f"{shown} is missing" for shown in missing] + [f"{shown} is added" for shown in added]


def _without(text: str, fields: list[Field]) -> str:
    """Return a text without its fields."""
    if not fields:
        return text
    starts, ends = [0, *(field.end for field in fields)], [*(field.start for field in fields), len(text)]
    return " ".join(text[start:end] for start, end in zip(starts, ends, strict=True))


def _unequal(kind: str, fields: list[Field], found: list[Field], translation: str) -> tuple[list[str], list[str]]:
    """Return the fields of one kind that the translation lacks, and those that it has in addition."""
    wanted = Counter(field.text for field in fields if field.kind == kind)
    given = Counter(field.text for field in found if field.kind == kind)
    # An entity may have become its character: &nbsp;
    missing = [
        text for text in (wanted - given).elements() if not (text[0] == "&" and html.unescape(text) in translation)
    ]
    return missing, list((given - wanted).elements())


# --- marks ---

_PAIRS = {"(": ")", "[": "]", "{": "}", "（": "）", "【": "】", "「": "」", "『": "』", "《": "》"}
# Single quotation marks may be apostrophes. Of the others, languages disagree on which opens and which closes.
_QUOTES = '"“”„«»'
_CLOSING = " \t\u00a0\u202f\u200b\"'“”„’‘«»‹›)]}）】」』》*_"
_MARKS = {
    **dict.fromkeys(".。．｡।॥۔։።…‥", "a full stop"),
    **dict.fromkeys("?？؟", "a question mark"),
    **dict.fromkeys("!！", "an exclamation mark"),
    **dict.fromkeys(":：", "a colon"),
}
_GREEK = re.compile("[\u0370-\u03ff]")
# Thai, Lao, Burmese and Khmer do not end a sentence with a mark.
_WITHOUT_STOP = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")


def _brackets(source: str, translation: str) -> str:
    alone = _without_partner(translation)
    return f"not in pairs: {', '.join(alone)}" if alone and not _without_partner(source) else ""


def _without_partner(text: str) -> list[str]:
    found = [f"{left} {right}" for left, right in _PAIRS.items() if text.count(left) != text.count(right)]
    return found + ["quotation marks"] * (sum(map(text.count, _QUOTES)) % 2)


def _end(source: str, translation: str) -> str:
    wanted, given = _last_marks(source), _last_marks(translation)
    if not translation.strip() or wanted & given or not (wanted or given):
        return ""
    if "a full stop" in wanted | given and _WITHOUT_STOP.search(source + translation):
        return ""
    shown, asked = (" and ".join(sorted(marks)) or "no mark" for marks in (given, wanted))
    return f"ends with {shown}, the source with {asked}"


def _last_marks(text: str) -> set[str]:
    """Return the kinds of the marks at the end of a text."""
    found = set()
    for character in reversed(text.rstrip(_CLOSING)):
        if character == ";" and _GREEK.search(text):
            found.add("a question mark")
        elif character in _MARKS:
            found.add(_MARKS[character])
        else:
            break
    return found


# --- words ---

_IDEOGRAPH = "[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff]"
_WORD = re.compile(rf"{_IDEOGRAPH}|[^\W\d_]+")
_IS_IDEOGRAPH = re.compile(_IDEOGRAPH)
_IDEOGRAPH_LENGTH = 2.5  # letters of Latin script with as much text as one such character
_LENGTH_RATIO, _LENGTH_DIFFERENCE = 2.2, 20
_COPIED_WORDS, _COPIED_SHARE = 4, 0.8
LEAST_REPEATS = 3
"""How often the same words follow one another in a loop, at least."""
_LONGEST_PHRASE = 12
_LONG_WORD = 12  # letters
_LOOP_IN_WORD = re.compile(r"(\w{2,12}?)\1{3,}|([^\W\d_])\2{5,}")


def _copy(words: list[str], given: list[str]) -> str:
    """Report a translation with most of the source's words. Names alone are no copy."""
    if len(given) < _COPIED_WORDS or 2 * len(set(words) & set(given)) < len(set(words)):
        return ""
    share = (Counter(words) & Counter(given)).total() / max(len(words), len(given))
    if share < _COPIED_SHARE or not any(word.islower() or _IS_IDEOGRAPH.match(word) for word in words):
        return ""
    return f"{share:.0%} of the words are those of the source"


def _length(source: str, translation: str) -> str:
    left, right = _letters(source), _letters(translation)
    if left and not right:
        return "the translation is empty"
    shorter, longer = sorted((left, right))
    if longer - shorter < _LENGTH_DIFFERENCE or longer < _LENGTH_RATIO * shorter:
        return ""
    return f"{right / left:.1f} times as long as the source" if left else "longer than the source"


def _letters(text: str) -> float:
    """Return the length of a text without blanks, in letters of Latin script."""
    ideographs = 0 if text.isascii() else len(_IS_IDEOGRAPH.findall(text))
    return len("".join(text.split())) + (_IDEOGRAPH_LENGTH - 1) * ideographs


def loop(source: str, translation: str) -> str:
    """Return which words the translation repeats, although the source does not; empty if it repeats none."""
    given = _WORD.findall(translation)
    # Most texts repeat nothing, whatever their sources do.
    return _loop(_WORD.findall(source), given) if _loop([], given) else ""


def _loop(words: list[str], given: list[str]) -> str:
    if max(Counter(given).values(), default=0) >= LEAST_REPEATS:
        repeats, phrase = _most_repeated(given)
        if repeats >= LEAST_REPEATS and repeats > _most_repeated(words)[0]:
            return f"“{phrase}” {repeats} times"
    long, known = (" ".join(word for word in each if len(word) >= _LONG_WORD) for each in (given, words))
    within = _LOOP_IN_WORD.search(long)
    if within and not _LOOP_IN_WORD.search(known):
        part = within[1] or within[2]
        return f"“{part}” {len(within[0]) // len(part)} times"
    return ""


def _most_repeated(words: list[str]) -> tuple[int, str]:
    """Return the highest number of times that a phrase is repeated in a row, and the phrase."""
    best, phrase = 1, ""
    for length in range(1, min(_LONGEST_PHRASE, len(words) // 2) + 1):
        again = list(map(eq, words[length:], words))
        if sum(again) < length:
            continue
        run = longest = end = 0
        for place, same in enumerate(again):
            run = run + 1 if same else 0
            if run > longest:
                longest, end = run, place + 1
        if longest // length + 1 > best:
            best, phrase = longest // length + 1, " ".join(words[end : end + length])
    return best, phrase


def _unknown(source: str, translation: str, unlearned: str) -> str:
    if unlearned:
        return f"the model has never seen {' '.join(dict.fromkeys(unlearned))}"
    if added := [sign for sign in "⁇\ufffd" if translation.count(sign) > source.count(sign)]:
        return f"the translation has {' '.join(added)}"
    return ""
