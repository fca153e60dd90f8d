"""The words of the phrasebook: values for the slots of a sentence, and their forms in English, German and French.

`read_lexicon` returns the kinds of slots by name. The calendar kinds (dates, times, weekdays, months) are built in. All
others come from lexicon.toml: closed classes of words, whose forms follow the tables of grammar.toml, and quantities
and codes, which are composed. Names of dates, units, currencies, countries and languages come from Babel (Unicode
CLDR), numbers in words from num2words. Only this module uses these two libraries.
"""

import random
import re
import tomllib
from datetime import date
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from babel import Locale
from babel.numbers import get_currency_name
from babel.units import format_unit
from num2words import num2words

LANGUAGES = ("en", "de", "fr")
LEXICON_FILES = ("grammar.toml", "lexicon.toml")

# British dates ("3 March 2025") and spellings ("litres") go with the 24-hour clock used throughout.
_LOCALES = {"en": Locale.parse("en_GB"), "de": Locale.parse("de"), "fr": Locale.parse("fr")}
_ONE_PROBABILITY = 0.08  # of the count 1: otherwise the singular would be rare

Value = tuple[Any, ...]
"""A value of a slot, the same for all languages. Only its kind interprets it. Values of one kind can be compared."""
_Forms = dict[str, str]


# --- words and numbers ---


@cache
def _names(what: str, language: str) -> dict[Any, str]:
    """Return CLDR's names of months (from 1), weekdays (Monday is 0), territories or languages."""
    locale = _LOCALES[language]
    if what in ("months", "days"):
        return dict(getattr(locale, what)["format"]["wide"])
    return dict(getattr(locale, what))


@cache
def _in_words(number: int, language: str) -> str:
    return str(num2words(number, lang=language))


def _plain(text: str) -> str:
    """Replace CLDR's no-break spaces with plain ones."""
    return text.replace("\u202f", " ").replace("\u00a0", " ")


@lru_cache(maxsize=1 << 16)
def _in_digits(hundredths: int, language: str, fixed: bool) -> str:
    """Write a number in digits: with `fixed`, two decimals or none; else without trailing zeros."""
    symbols = _LOCALES[language].number_symbols["latn"]
    whole, part = divmod(abs(hundredths), 100)
    text = f"{whole:,}".replace(",", _plain(symbols["group"]))
    if part:
        text += symbols["decimal"] + (f"{part:02}" if fixed else f"{part:02}".rstrip("0"))
    minus = "moins" if language == "fr" else "minus"
    return f"{minus} {text}" if hundredths < 0 else text


def _forms(table: dict[str, list[str]], column: int, word: str) -> _Forms:
    dative = f"{word}n" if word[-1] in "erl" else word
    forms = {form: row[column].replace("_+", dative).replace("_", word) for form, row in table.items()}
    return {"": word} | forms


def _french(table: dict[str, list[str]], gender: str, word: str, elided: bool | None = None) -> _Forms:
    """Return the forms of a word of gender m, f, pl or - (no article). By default, words with a first vowel elide."""
    vowel = word[0].lower() in "aeiouàâéèêîôœ" if elided is None else elided
    columns = {"m": (0, 2), "f": (1, 3), "pl": (4, 5), "-": (6, 6)}
    return _forms(table, columns[gender][vowel], word)


def _noun(row: list[str], grammar: dict[str, Any]) -> dict[str, _Forms]:
    english, german, french = row
    vowel = english[0] in "aeiou" and not english.startswith("uni")
    article, _, noun = german.removesuffix(" (pl)").partition(" ")
    column = 3 if german.endswith("(pl)") else ("der", "die", "das").index(article)
    # The French article shows gender and number, except the gender of "l'église (f)".
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


def _word(kind: str, row: list[str], grammar: dict[str, Any]) -> dict[str, _Forms]:
    """Return the forms of a row of the lexicon in each language; lexicon.toml describes the rows."""
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


class Kind:
    """A kind of slot: draws its values, decides which of them are held out, and renders them in a language."""

    ordered = True  # two values in one sentence appear in ascending order ("from 9:00 to 17:00")
    size = 0  # number of values

    def __init__(self, name: str) -> None:
        self.name = name
        self.forms: dict[str, set[str]] = {language: {""} for language in LANGUAGES}

    def draw(self, rng: random.Random) -> Value:
        """Return a random value, of any split."""
        raise NotImplementedError

    def key(self, value: Value) -> str:
        """Return a unique name of the value."""
        return f"{self.name}:{value}"

    def held_out(self, value: Value) -> bool:
        """Return whether the value belongs to one split only."""
        return True

    def render(self, value: Value, language: str, form: str) -> str:
        """Return the text of a value in one of the language's grammatical forms in `self.forms`."""
        raise NotImplementedError


class Words(Kind):
    """A closed class of words; a value is the position of a word in the lexicon."""

    ordered = False

    def __init__(self, name: str, words: list[dict[str, _Forms]]) -> None:
        super().__init__(name)
        self.words, self.size = words, len(words)
        self.forms = {language: set(words[0][language]) for language in LANGUAGES}

    def draw(self, rng: random.Random) -> Value:
        return (rng.randrange(len(self.words)),)

    def key(self, value: Value) -> str:
        # The word, not its position: new words in the lexicon then leave other combinations in their splits.
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


class _Quantity(Kind):
    """An amount with or without a unit ("3 weeks", "2.5 litres"); a value is (unit, hundredths)."""

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
        # CLDR: the French singular is for all amounts below 2 ("1,5 litre"), the others are for 1 only.
        singular = abs(amount) < 200 if language == "fr" else abs(amount) == 100
        word = unit.forms[language][0 if singular else 2 if form == "dem" else 1]
        return f"{number}{'' if language == 'en' and word == '%' else ' '}{word}".rstrip()


class _Code(Kind):
    """Room, flight and telephone numbers, years: patterns in which # is a digit, the same in all languages."""

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


class _Clock(Kind):
    """A time of day on the 24-hour clock; a value is (hour, minute)."""

    size = 17 * 60

    def draw(self, rng: random.Random) -> Value:
        # Mostly multiples of five minutes, as in timetables and appointments.
        minute = rng.randrange(60) if rng.random() < 0.3 else rng.randrange(0, 60, 5)
        return (rng.randrange(6, 23), minute)

    def render(self, value: Value, language: str, form: str) -> str:
        hour, minute = value
        if language == "en":
            return f"{hour}:{minute:02}"
        if language == "de":
            return f"{hour}:{minute:02} Uhr" if minute else f"{hour} Uhr"
        return f"{hour} h {minute:02}" if minute else f"{hour} h"


class _Date(Kind):
    """A day and month ("d"), with year ("dy"), or with year and weekday ("dyE"): (year or 0, month, day)."""

    def __init__(self, name: str, parts: str) -> None:
        super().__init__(name)
        self.parts, self.size = parts, 16 * 365 if "y" in parts else 366
        self.forms["de"] = {"", "dem"}

    def draw(self, rng: random.Random) -> Value:
        # Dates without a year come from the leap year 2024.
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
    """Return singular, plural and German dative plural: from the lexicon if it has them, else from CLDR."""
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


def _kind(name: str, table: dict[str, Any], grammar: dict[str, Any]) -> Kind:
    if table["type"] in ("noun", "name", "country", "language"):
        return Words(name, [_word(table["type"], row, grammar) for row in table["words"]])
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


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises ValueError, with the file's name, if it is broken."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name}: {error}") from error


def read_lexicon(directory: Path) -> dict[str, Kind]:
    """Return the kinds of slots by name: the calendar, and those in the folder's files. ValueError if one is broken."""
    grammar = read_toml(directory / "grammar.toml")
    dates = {"date": "d", "fulldate": "dy", "weekdate": "dyE"}
    kinds: list[Kind] = [_Clock("time"), *(_Date(name, parts) for name, parts in dates.items())]
    for name, what in (("weekday", "days"), ("month", "months")):
        rows = [[_names(what, language)[i] for language in LANGUAGES] for i in sorted(_names(what, "en"))]
        kinds.append(Words(name, [_word("name", row, grammar) for row in rows]))
    for name, table in read_toml(directory / "lexicon.toml").items():
        try:
            kinds.append(_kind(name, table, grammar))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"lexicon.toml: [{name}]: {type(error).__name__}: {error}") from error
    return {kind.name: kind for kind in kinds}
