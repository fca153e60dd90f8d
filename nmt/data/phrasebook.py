"""An embedded parallel corpus: English, German and French sentences made from frames and CLDR data.

The frames (data/phrasebook/DOMAIN.toml) are parallel sentences with slots such as `{date}` or `{city:de}`,
lexicon.toml says what may fill a slot, and grammar.toml which forms the words have. Dates, units, currencies,
countries and languages take their names from Babel (Unicode CLDR), numbers in words from num2words.

A slot is `{kind}`, `{kind:form}`, `{kind.1}` or `{kind.1:form}`: the number tells two slots of a kind apart,
the form is the grammatical form that the language needs there, named after a masculine example:
`{good:einen}` is "einen Schal" or "eine Jacke", `{good:du}` is "du parapluie" or "de la montre".

Whatever can be composed (numbers, dates, times, amounts) is held out by value: a value of the test split is
in no training sentence. Closed classes (countries, cities, dishes) and the count 1 occur in every split; a
sentence made only of those is held out by its combination of words.
"""

import hashlib
import random
import re
import tomllib
from collections.abc import Iterator
from datetime import date
from functools import cache, lru_cache
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from babel import Locale
from babel.numbers import get_currency_name
from babel.units import format_unit
from num2words import num2words

from nmt.resources import resource_dir

LANGUAGES = ("en", "de", "fr")
SPLITS = ("train", "dev", "test")

# British dates ("3 March 2025") and spellings ("litres") go with the 24-hour clock used throughout.
_LOCALES = {"en": Locale.parse("en_GB"), "de": Locale.parse("de"), "fr": Locale.parse("fr")}
_ONE_PROBABILITY = 0.08  # of the count 1: without it the singular would be rare
_MIN_COMBINATIONS = 300  # of a frame: fewer would leave nothing new for the test split
_MAX_REDRAWS = 50  # until a frame counts as exhausted and may repeat itself
_SLOT = re.compile(r"\{(\w+)(?:\.(\d+))?(?::(\w+))?\}")
_NOT_DOMAINS = ("grammar.toml", "lexicon.toml")

Value = tuple[Any, ...]
Forms = dict[str, str]


class Phrase(NamedTuple):
    """A sentence, its translation, and the domain (the name of the frame file) it belongs to."""

    source: str
    target: str
    domain: str


# --- words and numbers ---


@cache
def _names(what: str, language: str) -> dict[Any, str]:
    """CLDR's months (from 1), weekdays (Monday is 0), territories or languages."""
    locale = _LOCALES[language]
    if what in ("months", "days"):
        return dict(getattr(locale, what)["format"]["wide"])
    return dict(getattr(locale, what))


@cache
def _in_words(number: int, language: str) -> str:
    return str(num2words(number, lang=language))


def _plain(text: str) -> str:
    """CLDR's no-break spaces, as plain ones."""
    return text.replace("\u202f", " ").replace("\u00a0", " ")


@lru_cache(maxsize=1 << 16)
def _in_digits(hundredths: int, language: str, fixed: bool) -> str:
    """A number in digits; `fixed` writes two decimals or none, else trailing zeros are dropped."""
    symbols = _LOCALES[language].number_symbols["latn"]
    whole, part = divmod(abs(hundredths), 100)
    text = f"{whole:,}".replace(",", _plain(symbols["group"]))
    if part:
        text += symbols["decimal"] + (f"{part:02}" if fixed else f"{part:02}".rstrip("0"))
    minus = "moins" if language == "fr" else "minus"
    return f"{minus} {text}" if hundredths < 0 else text


def _forms(table: dict[str, list[str]], column: int, word: str) -> Forms:
    dative = f"{word}n" if word[-1] in "erl" else word
    forms = {form: row[column].replace("_+", dative).replace("_", word) for form, row in table.items()}
    return {"": word} | forms


def _french(table: dict[str, list[str]], gender: str, word: str, elided: bool | None = None) -> Forms:
    """The forms of a word of gender m, f, pl or - (no article); by default a vowel letter elides."""
    vowel = word[0].lower() in "aeiouàâéèêîôœ" if elided is None else elided
    columns = {"m": (0, 2), "f": (1, 3), "pl": (4, 5), "-": (6, 6)}
    return _forms(table, columns[gender][vowel], word)


def _noun(row: list[str], grammar: dict[str, Any]) -> dict[str, Forms]:
    english, german, french = row
    vowel = english[0] in "aeiou" and not english.startswith("uni")
    article, _, noun = german.removesuffix(" (pl)").partition(" ")
    column = 3 if german.endswith("(pl)") else ("der", "die", "das").index(article)
    # The French article says it all, except the gender of "l'église (f)".
    match = re.fullmatch(r"(le |la |les |l')(.+?)(?: \((m|f)\))?", french)
    if not match or (match[1] == "l'") != bool(match[3]):
        raise ValueError(f'{french!r} must begin with le, la or les, or be like "l\'église (f)"')
    gender = {"le ": "m", "la ": "f", "les ": "pl"}.get(match[1], match[3])
    elided = None if gender == "pl" else match[1] == "l'"
    return {
        "en": _forms(grammar["en_noun"], int(vowel), english),
        "de": _forms(grammar["de_noun"], column, noun),
        "fr": _french(grammar["fr_noun"], gender, match[2], elided),
    }


def _word(kind: str, row: list[str], grammar: dict[str, Any]) -> dict[str, Forms]:
    """The forms of a row of the lexicon in each language; lexicon.toml describes the rows."""
    if kind == "noun":
        return _noun(row, grammar)
    if kind == "name":
        return {"en": {"": row[0]}, "de": {"": row[1]}, "fr": _french(grammar["fr_noun"], "m", row[2])}
    names = [_names("languages" if kind == "language" else "territories", code)[row[0]] for code in LANGUAGES]
    if kind == "language":
        de = _forms(grammar["de_language"], 0, names[1])
        return {"en": {"": names[0]}, "de": de, "fr": _french(grammar["fr_noun"], "m", names[2])}
    _, german, french = row
    article, _, name = german.removesuffix("(pl)").strip().partition(" ")
    de = _forms(grammar["de_country"], 2 if "(pl)" in german else int(bool(article)), name or names[1])
    english = f"the {names[0]}" if french == "pl" else names[0]
    return {"en": {"": english}, "de": de, "fr": _french(grammar["fr_country"], french, names[2])}


# --- kinds of slots ---


class _Kind:
    """What may fill a slot: draws values, says which of them are held out, and renders them in a language."""

    ordered = True  # two values in one sentence appear in ascending order ("from 9:00 to 17:00")
    size = 0  # how many values there are

    def __init__(self, name: str) -> None:
        self.name = name
        self.forms: dict[str, set[str]] = {language: {""} for language in LANGUAGES}

    def draw(self, rng: random.Random) -> Value:
        raise NotImplementedError

    def key(self, value: Value) -> str:
        """A name of the value that no other value has."""
        return f"{self.name}:{value}"

    def held_out(self, value: Value) -> bool:
        """Whether the value belongs to one split only."""
        return True

    def render(self, value: Value, language: str, form: str) -> str:
        raise NotImplementedError


class _Words(_Kind):
    """A closed class of words; a value is the position of a word in the lexicon."""

    ordered = False

    def __init__(self, name: str, words: list[dict[str, Forms]]) -> None:
        super().__init__(name)
        self.words, self.size = words, len(words)
        self.forms = {language: set(words[0][language]) for language in LANGUAGES}

    def draw(self, rng: random.Random) -> Value:
        return (rng.randrange(len(self.words)),)

    def key(self, value: Value) -> str:
        # By the word: adding words to the lexicon then leaves the other combinations in their splits.
        return f"{self.name}:{self.words[value[0]]['en']['']}"

    def held_out(self, value: Value) -> bool:
        return False

    def render(self, value: Value, language: str, form: str) -> str:
        return self.words[value[0]][language][form]


class _Unit(NamedTuple):
    name: str
    forms: dict[str, list[str]]  # singular, plural, plural after a German dative preposition
    ranges: list[range]  # of amounts, in hundredths
    money: bool


class _Quantity(_Kind):
    """An amount with a unit ("3 weeks", "2.5 litres") or without; a value is (unit, hundredths)."""

    def __init__(self, name: str, units: list[_Unit], one: bool) -> None:
        super().__init__(name)
        self.units, self.one = units, one
        self.size = sum(len(amounts) for unit in units for amounts in unit.ranges)
        self.forms = {language: {"", "words", "dem"} for language in LANGUAGES}

    def draw(self, rng: random.Random) -> Value:
        unit = rng.randrange(len(self.units))
        if self.one and rng.random() < _ONE_PROBABILITY:
            return (unit, 100)
        return (unit, rng.choice(rng.choice(self.units[unit].ranges)))

    def key(self, value: Value) -> str:
        return f"{self.units[value[0]].name}:{value[1]}"

    def held_out(self, value: Value) -> bool:
        return not (self.one and value[1] == 100)

    def render(self, value: Value, language: str, form: str) -> str:
        unit, amount = self.units[value[0]], value[1]
        words = form == "words"
        number = _in_words(amount // 100, language) if words else _in_digits(amount, language, unit.money)
        # CLDR: the French singular reaches below 2 ("1,5 litre"), the others are for 1 itself.
        singular = abs(amount) < 200 if language == "fr" else abs(amount) == 100
        word = unit.forms[language][0 if singular else 2 if form == "dem" else 1]
        return f"{number}{'' if language == 'en' and word == '%' else ' '}{word}".rstrip()


class _Code(_Kind):
    """Room, flight and telephone numbers, years: patterns in which # is a digit, alike in all languages."""

    ordered = False

    def __init__(self, name: str, patterns: list[str]) -> None:
        super().__init__(name)
        self.patterns = patterns
        self.size = sum(10 ** pattern.count("#") for pattern in patterns)

    def draw(self, rng: random.Random) -> Value:
        text = rng.choice(self.patterns)
        while "#" in text:
            first = not any(letter.isdigit() for letter in text)
            text = text.replace("#", str(rng.randrange(int(first), 10)), 1)
        return (text,)

    def render(self, value: Value, language: str, form: str) -> str:
        return str(value[0])


class _Clock(_Kind):
    """A time of day on the 24-hour clock; a value is (hour, minute)."""

    size = 17 * 60

    def draw(self, rng: random.Random) -> Value:
        # Mostly the times that timetables and appointments have.
        minute = rng.randrange(60) if rng.random() < 0.3 else rng.randrange(0, 60, 5)
        return (rng.randrange(6, 23), minute)

    def render(self, value: Value, language: str, form: str) -> str:
        hour, minute = value
        if language == "en":
            return f"{hour}:{minute:02}"
        if language == "de":
            return f"{hour}:{minute:02} Uhr" if minute else f"{hour} Uhr"
        return f"{hour} h {minute:02}" if minute else f"{hour} h"


class _Date(_Kind):
    """A day with its month ("d"), also its year ("dy"), also its weekday ("dyE"): (year or 0, month, day)."""

    def __init__(self, name: str, parts: str) -> None:
        super().__init__(name)
        self.parts, self.size = parts, 16 * 365 if "y" in parts else 366
        self.forms["de"] = {"", "dem"}

    def draw(self, rng: random.Random) -> Value:
        # The leap year 2024 stands for the dates without a year.
        first = date(2020 if "y" in self.parts else 2024, 1, 1).toordinal()
        day = date.fromordinal(first + rng.randrange(self.size))
        return (day.year if "y" in self.parts else 0, day.month, day.day)

    def render(self, value: Value, language: str, form: str) -> str:
        year, month, day = value
        number = f"{day}." if language == "de" else "1er" if language == "fr" and day == 1 else str(day)
        text = f"{number} {_names('months', language)[month]}" + (f" {year}" if year else "")
        if "E" not in self.parts:
            return text
        link = {"en": ", ", "de": f", {form or 'der'} ", "fr": " "}[language]
        return _names("days", language)[date(year, month, day).weekday()] + link + text


# --- the lexicon ---


def _unit_forms(unit: dict[str, Any], language: str) -> list[str]:
    """Singular, plural and German dative plural; what the lexicon does not give comes from CLDR."""
    locale = _LOCALES[language]
    if language in unit:
        words = unit[language].split("|")
    elif "cldr" in unit:
        texts = (format_unit(n, unit["cldr"], length="long", locale=locale) for n in (1, 2))
        words = [_plain(text).split(" ", 1)[1] for text in texts]
    elif "currency" in unit:
        words = [get_currency_name(unit["currency"], n, locale=locale) for n in (1, 2)]
    else:
        words = [""]
    plural = words[min(1, len(words) - 1)]
    dative = f"{plural}n" if plural.endswith(("e", "er")) and " " not in plural else plural
    return [words[0], plural, words[2] if len(words) > 2 else dative]


def _kind(name: str, table: dict[str, Any], grammar: dict[str, Any]) -> _Kind:
    if table["type"] in ("noun", "name", "country", "language"):
        return _Words(name, [_word(table["type"], row, grammar) for row in table["words"]])
    if table["type"] == "code":
        return _Code(name, table["patterns"])
    if table["type"] != "quantity":
        raise ValueError("type must be noun, name, country, language, quantity or code")
    units = []
    for unit in table["units"]:
        ends = unit.get("ranges") or table["ranges"]
        ranges = [range(round(a * 100), round(b * 100) + 1, round(step * 100)) for a, b, step in ends]
        label = unit.get("name") or unit.get("cldr") or unit.get("currency") or unit["en"]
        forms = {language: _unit_forms(unit, language) for language in LANGUAGES}
        units.append(_Unit(label, forms, ranges, "currency" in unit))
    return _Quantity(name, units, table.get("one", True))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _lexicon(directory: Path) -> dict[str, _Kind]:
    """The kinds of slots: the calendar, and what lexicon.toml defines."""
    grammar = _read(directory / "grammar.toml")
    dates = {"date": "d", "fulldate": "dy", "weekdate": "dyE"}
    kinds: list[_Kind] = [_Clock("time"), *(_Date(name, parts) for name, parts in dates.items())]
    for name, what in (("weekday", "days"), ("month", "months")):
        rows = [[_names(what, language)[i] for language in LANGUAGES] for i in sorted(_names(what, "en"))]
        kinds.append(_Words(name, [_word("name", row, grammar) for row in rows]))
    for name, table in _read(directory / "lexicon.toml").items():
        try:
            kinds.append(_kind(name, table, grammar))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"lexicon.toml: [{name}]: {type(error).__name__}: {error}") from error
    return {kind.name: kind for kind in kinds}


# --- frames ---


class _Frame(NamedTuple):
    name: str
    domain: str
    slots: list[tuple[str, str]]  # (kind, number), in the order of the English text
    parts: dict[str, list[tuple[str, int, str]]]  # by language: text, then the slot's position and form


class _Sentence(NamedTuple):
    texts: list[str]
    domain: str
    held_out: list[str]


class _Book(NamedTuple):
    kinds: dict[str, _Kind]
    domains: list[list[_Frame]]


def _parse(text: str, slots: list[tuple[str, str]], kinds: dict[str, _Kind], language: str) -> list[Any]:
    """The parts of a frame's text; the English text, which comes first, fills the empty list of slots."""
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
        raise ValueError(f"braces that are no slot ({language}); a slot is {{kind}} or {{kind.1:form}}")
    return parts


def _frame(name: str, domain: str, table: dict[str, Any], kinds: dict[str, _Kind]) -> _Frame:
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
    kinds = _lexicon(directory)
    domains = []
    for path in sorted(directory.glob("*.toml")):
        if path.name in _NOT_DOMAINS:
            continue
        frames = []
        for i, table in enumerate(_read(path).get("frame", []), 1):
            name = f"{path.name}: frame {i} ({table.get('en', '')!r})"
            frames.append(_frame(name, path.stem, table, kinds))
        if not frames:
            raise ValueError(f"{path.name}: no [[frame]]; a domain file has at least one")
        domains.append(frames)
    return _Book(kinds, domains)


def _render(frame: _Frame, values: tuple[Value, ...], kinds: dict[str, _Kind], language: str) -> str:
    text = ""
    for literal, position, form in frame.parts[language]:
        text += literal
        if position >= 0:
            text += kinds[frame.slots[position][0]].render(values[position], language, form)
    return text[0].upper() + text[1:]


# --- sampling ---


@lru_cache(maxsize=1 << 17)
def _split_of(key: str) -> str:
    bucket = int.from_bytes(hashlib.md5(key.encode()).digest()[:4], "big") % 10
    return "test" if bucket == 0 else "dev" if bucket == 1 else "train"


def _draw_values(frame: _Frame, kinds: dict[str, _Kind], split: str, rng: random.Random) -> tuple[Value, ...]:
    """Values for a frame's slots that belong to the split."""
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
        # A sentence with an unseen value is new already; any other is held out as a whole.
        if any(kinds[name].held_out(value) for (name, _), value in zip(frame.slots, values, strict=True)):
            return tuple(values)
        if _split_of(_identity(frame, values, kinds)) == split:
            return tuple(values)


def _identity(frame: _Frame, values: list[Value] | tuple[Value, ...], kinds: dict[str, _Kind]) -> str:
    keys = [kinds[name].key(value) for (name, _), value in zip(frame.slots, values, strict=True)]
    return "|".join([*(literal for literal, _, _ in frame.parts["en"]), *keys])


def _draws(book: _Book, split: str, seed: int) -> Iterator[tuple[_Frame, tuple[Value, ...]]]:
    """Frames with their values, without end; they do not depend on the languages."""
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
    """Without end: a sentence in each of the languages, its domain, and the keys of its held-out values."""
    book = _load(resource_dir("data/phrasebook"))
    for frame, values in _draws(book, split, seed):
        texts = [_render(frame, values, book.kinds, language) for language in languages]
        kinds = [book.kinds[name] for name, _ in frame.slots]
        held_out = [kind.key(v) for kind, v in zip(kinds, values, strict=True) if kind.held_out(v)]
        yield _Sentence(texts, frame.domain, held_out)


def phrasebook(
    split: str, source_language: str, target_language: str, num_pairs: int, seed: int = 0
) -> Iterator[Phrase]:
    """Yields `num_pairs` sentence pairs of a split ("train", "dev" or "test").

    The i-th pair depends on the split, the seed and i only: other languages get the same content, a longer
    run begins with the shorter one. Domains are equally likely, and so are the frames of a domain. No pair of
    a split repeats another one until a frame runs out of values; splits share no held-out value (see above).

    Raises ValueError for an unknown split or language, equal languages, num_pairs < 1, or a broken frame.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    for language in (source_language, target_language):
        if language not in LANGUAGES:
            raise ValueError(f"phrasebook language is {language!r}; it must be one of {', '.join(LANGUAGES)}")
    if source_language == target_language:
        raise ValueError(f"source and target language are both {source_language!r}; they must differ")
    if num_pairs < 1:
        raise ValueError(f"num_pairs is {num_pairs}; it must be at least 1")
    _load(resource_dir("data/phrasebook"))  # here, so that a broken frame is reported by the call itself
    generated = islice(_generate(split, (source_language, target_language), seed), num_pairs)
    return (Phrase(texts[0], texts[1], domain) for texts, domain, _ in generated)
