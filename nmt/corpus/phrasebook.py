"""Generate a parallel corpus: English, German and French sentences made from frames and CLDR data.

The frames (data/phrasebook/DOMAIN.toml) are parallel sentences with slots such as `{date}` or `{city:de}`.
nmt/corpus/lexicon.py defines the values of a slot and their forms in each language. This module reads the frames,
chooses values for their slots, and decides what is held out for dev and test.

A slot is `{kind}`, `{kind:form}`, `{kind.1}` or `{kind.1:form}`. The number distinguishes two slots of one kind. The
form is the grammatical form that the language needs there, named after a masculine example. `{good:einen}` is "einen
Schal" or "eine Jacke", `{good:du}` is "du parapluie" or "de la montre".

Composed values (numbers, dates, times, amounts) are held out by value: no training sentence contains a value of the
test split. Closed classes (countries, cities, dishes) and the count 1 occur in every split; a sentence made only of
those is held out by its combination of words.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from nmt.corpus.lexicon import LANGUAGES, LEXICON_FILES, Kind, Value, read_lexicon, read_toml
from nmt.resources import resource_dir

SPLITS = ("train", "dev", "test")

_MIN_COMBINATIONS = 300  # per frame: fewer would leave nothing new for the test split
_MAX_REDRAWS = 50  # after these a frame counts as exhausted and may repeat itself
_SLOT = re.compile(r"\{(\w+)(?:\.(\d+))?(?::(\w+))?\}")
# In German, a date after its weekday ends with a second comma: "am Montag, dem 3. März 2025, um 9 Uhr".
_UNCLOSED_DATE = re.compile(r", de[rm] \d+\. \w+ \d{4}(?= \w)")


class Phrase(NamedTuple):
    """A sentence, its translation, and its domain (the name of the frame file)."""

    source: str
    target: str
    domain: str


class Slot(NamedTuple):
    """A value in a sentence and in its translation."""

    kind: str
    """Its kind in the lexicon."""
    source: tuple[int, int]
    """Where it begins and ends in the sentence."""
    target: tuple[int, int]


# --- frames ---


class _Frame(NamedTuple):
    name: str
    domain: str
    slots: list[tuple[str, str]]  # (kind, number), in the order of the English text
    parts: dict[str, list[tuple[str, int, str]]]  # by language: text, then the slot's position and form


class _Rendered(NamedTuple):
    text: str
    spans: list[list[tuple[int, int]]]  # of each slot: the places in the text that it fills


class _Sentence(NamedTuple):
    rendered: list[_Rendered]  # in each language
    domain: str
    slots: list[str]  # kinds
    held_out: list[str]

    @property
    def texts(self) -> list[str]:
        return [each.text for each in self.rendered]


class _Book(NamedTuple):
    kinds: dict[str, Kind]
    domains: list[list[_Frame]]


def _parse(text: str, slots: list[tuple[str, str]], kinds: dict[str, Kind], language: str) -> list[Any]:
    """Return the parts of a frame's text. The English text comes first and fills the empty list of slots."""
    parts, end, growing = [], 0, not slots
    for match in _SLOT.finditer(text):
        slot, form = (match[1], match[2] or ""), match[3] or ""
        if slot[0] not in kinds:
            raise ValueError(f"unknown slot {match[0]} ({language}); known: {', '.join(kinds)}")
        if form not in kinds[slot[0]].forms[language]:
            known = ", ".join(sorted(kinds[slot[0]].forms[language] - {""})) or "none"
            raise ValueError(f"unknown form in {match[0]} ({language}); {slot[0]} has: {known}")
        if growing and slot not in slots:
            slots.append(slot)
        if slot not in slots:
            raise ValueError(f"slot {match[0]} is in {language} but not in {LANGUAGES[0]}")
        parts.append((text[end : match.start()], slots.index(slot), form))
        end = match.end()
    parts.append((text[end:], -1, ""))
    if lost := set(range(len(slots))) - {position for _, position, _ in parts}:
        raise ValueError(f"slot {'.'.join(slots[min(lost)]).rstrip('.')} is not in {language}")
    if any("{" in literal or "}" in literal for literal, _, _ in parts):
        raise ValueError(f"braces that are not a slot ({language}); a slot is {{kind}} or {{kind.1:form}}")
    return parts


def _frame(name: str, domain: str, table: dict[str, Any], kinds: dict[str, Kind]) -> _Frame:
    slots: list[tuple[str, str]] = []
    try:
        for language in LANGUAGES:
            if not isinstance(table.get(language), str) or not table[language]:
                raise ValueError(f"no text for {language}; a frame has {', '.join(LANGUAGES)}")
        parts = {language: _parse(table[language], slots, kinds, language) for language in LANGUAGES}
        combinations = prod(kinds[kind].size for kind, _ in slots) if slots else 0
        if combinations < _MIN_COMBINATIONS:
            raise ValueError(f"{combinations} combinations of words, {_MIN_COMBINATIONS} needed: add a slot")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return _Frame(name, domain, slots, parts)


@lru_cache(maxsize=8)
def _load(directory: Path) -> _Book:
    kinds = read_lexicon(directory)
    domains = []
    for path in sorted(directory.glob("*.toml")):
        if path.name in LEXICON_FILES:
            continue
        frames = []
        for i, table in enumerate(read_toml(path).get("frame", []), 1):
            name = f"{path.name}: frame {i} ({table.get('en', '')!r})"
            frames.append(_frame(name, path.stem, table, kinds))
        if not frames:
            raise ValueError(f"{path.name}: no [[frame]]; a domain file has at least one")
        domains.append(frames)
    return _Book(kinds, domains)


def _render(frame: _Frame, values: tuple[Value, ...], kinds: dict[str, Kind], language: str) -> _Rendered:
    text = ""
    spans: list[list[tuple[int, int]]] = [[] for _ in values]
    for literal, position, form in frame.parts[language]:
        text += literal
        if position >= 0:
            start = len(text)
            text += kinds[frame.slots[position][0]].render(values[position], language, form)
            spans[position].append((start, len(text)))
    if language == "de":
        commas = [match.end() for match in _UNCLOSED_DATE.finditer(text)]
        text = _UNCLOSED_DATE.sub(r"\g<0>,", text)
        # A comma at the end of a slot is outside of it.
        spans = [
            [(start + sum(at <= start for at in commas), end + sum(at < end for at in commas)) for start, end in each]
            for each in spans
        ]
    return _Rendered(text[0].upper() + text[1:], spans)


# --- sampling ---


@lru_cache(maxsize=1 << 17)
def _split_of(key: str) -> str:
    bucket = int.from_bytes(hashlib.md5(key.encode()).digest()[:4], "big") % 10
    return "test" if bucket == 0 else "dev" if bucket == 1 else "train"


def _draw_values(frame: _Frame, kinds: dict[str, Kind], split: str, rng: random.Random) -> tuple[Value, ...]:
    """Draw values for a frame's slots that belong to the split."""
    while True:
        values: list[Value] = []
        for position, (name, _) in enumerate(frame.slots):
            kind = kinds[name]
            taken = [values[i] for i in range(position) if frame.slots[i][0] == name]
            value = kind.draw(rng)
            while value in taken or (kind.held_out(value) and _split_of(kind.key(value)) != split):
                value = kind.draw(rng)
            values.append(value)
        for name in dict.fromkeys(name for name, _ in frame.slots if kinds[name].ordered):
            positions = sorted((n, i) for i, (other, n) in enumerate(frame.slots) if other == name)
            for (_, i), value in zip(positions, sorted(values[i] for _, i in positions), strict=True):
                values[i] = value
        # A held-out value makes the whole sentence new; other sentences are held out by their combination of words.
        if any(kinds[name].held_out(value) for (name, _), value in zip(frame.slots, values, strict=True)):
            return tuple(values)
        if _split_of(_identity(frame, values, kinds)) == split:
            return tuple(values)


def _identity(frame: _Frame, values: list[Value] | tuple[Value, ...], kinds: dict[str, Kind]) -> str:
    keys = [kinds[name].key(value) for (name, _), value in zip(frame.slots, values, strict=True)]
    return "|".join([*(literal for literal, _, _ in frame.parts["en"]), *keys])


def _draws(book: _Book, split: str, seed: int) -> Iterator[tuple[_Frame, tuple[Value, ...]]]:
    """Yield frames with their values, without end and independently of the languages."""
    rng = random.Random(f"{split} {seed}")
    seen: set[bytes] = set()
    exhausted: set[str] = set()
    while True:
        frame = rng.choice(rng.choice(book.domains))
        for _ in range(_MAX_REDRAWS):
            values = _draw_values(frame, book.kinds, split, rng)
            identity = _identity(frame, values, book.kinds).encode()
            digest = hashlib.blake2b(identity, digest_size=8).digest()
            if digest not in seen or frame.name in exhausted:
                break
        else:
            exhausted.add(frame.name)
        seen.add(digest)
        yield frame, values


def _generate(split: str, languages: tuple[str, ...], seed: int) -> Iterator[_Sentence]:
    """Yield, without end, a sentence in each language, its domain, and the keys of its held-out values."""
    book = _load(resource_dir("data/phrasebook"))
    for frame, values in _draws(book, split, seed):
        rendered = [_render(frame, values, book.kinds, language) for language in languages]
        kinds = [book.kinds[name] for name, _ in frame.slots]
        held_out = [kind.key(v) for kind, v in zip(kinds, values, strict=True) if kind.held_out(v)]
        yield _Sentence(rendered, frame.domain, [name for name, _ in frame.slots], held_out)


def phrasebook(
    split: str, source_language: str, target_language: str, num_pairs: int, seed: int = 0
) -> Iterator[Phrase]:
    """Yield `num_pairs` sentence pairs of a split ("train", "dev" or "test").

    The i-th pair depends only on the split, the seed and i: the content is the same for all languages, and a larger
    `num_pairs` only adds pairs. Domains are equally likely, and so are the frames of a domain. Pairs of a split do not
    repeat until a frame runs out of values. Splits share no held-out value (see above).

    Raises ValueError for an unknown split or language, equal languages, num_pairs < 1, or a broken frame.
    """
    found = phrasebook_slots(split, source_language, target_language, num_pairs, seed)
    return (phrase for phrase, _ in found)


def phrasebook_slots(
    split: str, source_language: str, target_language: str, num_pairs: int, seed: int = 0
) -> Iterator[tuple[Phrase, list[Slot]]]:
    """Yield what `phrasebook` does, and where the values of each pair are: those that each side has once."""
    return map(_phrase, _sentences(split, (source_language, target_language), num_pairs, seed))


def phrasebook_texts(
    split: str, languages: Sequence[str], num_phrases: int, seed: int = 0
) -> Iterator[tuple[list[str], str]]:
    """Yield each phrase in all of `languages`, and its domain: the content of `phrasebook`. Errors as there."""
    sentences = _sentences(split, tuple(languages), num_phrases, seed)
    return (([rendered.text for rendered in sentence.rendered], sentence.domain) for sentence in sentences)


def _sentences(split: str, languages: tuple[str, ...], num_pairs: int, seed: int) -> Iterator[_Sentence]:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    for language in languages:
        if language not in LANGUAGES:
            raise ValueError(f"phrasebook language is {language!r}; it must be one of {', '.join(LANGUAGES)}")
    if len(set(languages)) < len(languages):
        raise ValueError(f"source and target language are both {languages[0]!r}; they must differ")
    if num_pairs < 1:
        raise ValueError(f"num_pairs is {num_pairs}; it must be at least 1")
    _load(resource_dir("data/phrasebook"))  # here, so that a broken frame is reported by the call itself
    return islice(_generate(split, languages, seed), num_pairs)


def _phrase(sentence: _Sentence) -> tuple[Phrase, list[Slot]]:
    source, target = sentence.rendered
    slots = [
        Slot(kind, here[0], there[0])
        for kind, here, there in zip(sentence.slots, source.spans, target.spans, strict=True)
        if len(here) == len(there) == 1
    ]
    return Phrase(source.text, target.text, sentence.domain), slots
