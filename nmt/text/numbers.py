"""Compare the numbers of a text with those of its translation.

Languages write one number in several ways: 1,234.5 and 1.234,5 and 1 234,5 and 1’234.5. A mark between digits is read
as a decimal mark and as a thousands separator wherever it may be either, and two numbers are equal if they have a
common reading. These are equal, too:

- a date or time with other marks: 14.30 and 14:30;
- a time of the 12-hour clock, if a text has "a.m." or "p.m.": 2:30 p.m. and 14:30;
- a number in words from the table below, ordinals included: 3 and "drei", 1 and "a", 2 and "second";
- a Roman numeral: 19 and "XIX";
- a year with its century and without: 1990 and 90;
- millions and billions in digits and with their word: 1,500,000 and "1.5 million".

A longer number in words (21 and "einundzwanzig"), and the words of other languages, are not recognised.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import NamedTuple

_BLANK = "[ \u00a0\u2009\u202f'’]"
# Digits in groups of three with blanks between them; else digits with marks between them.
_NUMBER = re.compile(rf"(?<!\d)\d{{1,3}}(?:{_BLANK}\d{{3}})+(?!\d)(?:[.,]\d+)?|\d+(?:[.,:hH]\d+)*")
_PARTS = re.compile(r"\d+")
_WORD = re.compile(r"[^\W\d_]+")
_HALF_DAY = re.compile(r"(?<![^\W\d_])[ap]\.?\s?m\b", re.IGNORECASE)
_ROMAN = re.compile(r"\b([IVXLC]+)(?:e|er|ème|th|nd|rd|st)?\b")
_ROMAN_VALUES = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}
_SCALES = {
    10**3: "thousand tausend mille mil mila duizend",
    10**6: "million millions millionen mio mn m millón millones milione milioni milhão milhões miljoen",
    10**9: "billion billions bn milliarde milliarden mrd md milliards miliardo miliardi miljard bilhão bilhões",
    10**12: "trillion trillions billionen billions billones bilioni biljoen trilhão",
}
_SCALE_OF = {word: scale for scale, words in _SCALES.items() for word in words.split()}

_LONGEST_SCALED = 20  # digits of a number before a word such as "million"
# Words of English, German, French, Spanish, Italian, Portuguese and Dutch.
_IN_WORDS = {
    0: "zero no null kein keine keinen zéro cero nessuno nul geen",
    1: "one a an single once first ein eine einen einem einer eines eins einmal einzige erste ersten erster "
    "erstes un une premier première premiers uno una primer primero primera primo prima um uma primeiro "
    "primeira een één eerste",
    2: "two both twice second double zwei beide beiden zweimal zweite zweiten zweiter zweites doppelt deux "
    "deuxième seconde dos segundo segunda due secondo seconda dois duas twee tweede",
    3: "three third thrice drei dritte dritten dritter drittes trois troisième tres tercer tercero tercera "
    "tre terzo terza três terceiro terceira drie derde",
    4: "four fourth vier vierte vierten quatre quatrième cuatro cuarto cuarta quattro quarto quarta quatro vierde",
    5: "five fifth fünf fünfte fünften cinq cinquième cinco quinto quinta cinque vijf vijfde",
    6: "six sixth sechs sechste sechsten sixième seis sexto sexta sei sesto sesta zes zesde",
    7: "seven seventh sieben siebte siebten sept septième siete séptimo sette settimo sete sétimo zeven zevende",
    8: "eight eighth acht achte achten huit huitième ocho octavo otto ottavo oito oitavo achtste",
    9: "nine ninth neun neunte neunten neuf neuvième nueve noveno nove nono negen negende",
    10: "ten tenth zehn zehnte zehnten dix dixième dizaine diez décimo dieci decimo dez tien tiende",
    11: "eleven eleventh elf elfte elften onze onzième once undici elfde",
    12: "twelve twelfth dozen zwölf zwölfte zwölften dutzend douze douzième douzaine doce dodici doze twaalf",
    13: "thirteen dreizehn treize trece tredici treze dertien",
    14: "fourteen vierzehn quatorze catorce quattordici catorze veertien",
    15: "fifteen fünfzehn quinze quinzaine quince quindici vijftien",
    16: "sixteen sechzehn seize dieciséis sedici dezasseis dezesseis zestien",
    17: "seventeen siebzehn diciassette diecisiete dezessete zeventien",
    18: "eighteen achtzehn dieciocho diciotto dezoito achttien",
    19: "nineteen neunzehn diecinueve diciannove dezenove negentien",
    20: "twenty zwanzig zwanziger zwanzigsten vingt vingtaine veinte venti vinte twintig",
    30: "thirty dreißig dreissig trente trentaine treinta trenta trinta dertig",
    40: "forty vierzig quarante quarantaine cuarenta quaranta quarenta veertig",
    50: "fifty fünfzig cinquante cinquantaine cincuenta cinquanta cinquenta vijftig",
    60: "sixty sechzig soixante sesenta sessanta sessenta zestig",
    70: "seventy siebzig septante setenta settanta zeventig",
    80: "eighty achtzig octante ochenta ottanta oitenta tachtig",
    90: "ninety neunzig nonante noventa novanta negentig",
    100: "hundred hundert einhundert cent centaine cien cento cem honderd",
    1000: "thousand tausend eintausend mille millier mil duizend",
    10**6: "million millions millionen millón milione milhão miljoen",
    10**9: "billion milliarde milliarden milliard miliardo bilhão miljard",
}
_IDEOGRAPHS = {character: value for value, character in enumerate("〇一二三四五六七八九十")} | {"百": 100, "千": 1000}
_VALUES_OF: dict[str, set[str]] = {}
for _value, _words in _IN_WORDS.items():
    for _word in _words.split():
        _VALUES_OF.setdefault(_word, set()).add(str(_value))
# German compounds begin with a number in words: dreitägig.
_SHORTEST_BEGINNING, _LONGEST_BEGINNING = 4, 8


class Numbers(NamedTuple):
    """What became of the numbers of a text in its translation."""

    total: int
    """Number of numbers in the text."""
    missing: list[str]
    """Those that the translation does not have, as they are written in the text."""
    added: list[str]
    """Numbers of the translation that the text does not have."""


class _Token(NamedTuple):
    text: str
    readings: tuple[str, ...]  # the text itself, and its values as `_plain` writes them

    @property
    def parts(self) -> list[str]:
        """The numbers between the marks of a date or time."""
        return [_plain(part) for part in _PARTS.findall(self.text)]


def compare_numbers(source: str, translation: str) -> Numbers:
    """Return which numbers of `source` are missing in `translation`, and which it has in addition."""
    if not (_PARTS.search(source) or _PARTS.search(translation)):
        return Numbers(0, [], [])
    written = _NUMBER.findall(source)
    total = len(written)
    if written == _NUMBER.findall(translation):
        return Numbers(total, [], [])
    missing, added = _tokens(source), _tokens(translation)
    # Numbers that are written the same belong together, before others can take their partners.
    missing, added = _unmatched(missing, added, _text, _text)
    missing, added = _unmatched(missing, added, _readings, _readings)
    if missing and added:
        missing, added = _without_split(missing, added)
        added, missing = _without_split(added, missing)
        if _HALF_DAY.search(source) or _HALF_DAY.search(translation):
            missing, added = _unmatched(missing, added, _hours, _hours)
        missing, added = _unmatched(missing, added, _short_year, _long_year)
        missing, added = _unmatched(missing, added, _long_year, _short_year)
    if missing:
        missing = _not_in_words(missing, translation)
    if added:
        added = _not_in_words(added, source)
    return Numbers(total, [token.text for token in missing], [token.text for token in added])


def _tokens(text: str) -> list[_Token]:
    found = []
    for match in _NUMBER.finditer(text):
        word = _WORD.match(text, match.end() + 1)
        found.append(_Token(match[0], _read(match[0], _SCALE_OF.get(word[0].casefold(), 0) if word else 0)))
    return found


def _read(text: str, scale: int) -> tuple[str, ...]:
    """Return the readings of a number; `scale` is the value of the word after it, such as 1000, or 0."""
    compact = re.sub(_BLANK, "", text)
    marks, groups = re.findall(r"\D", compact), re.split(r"\D", compact)
    found = []
    if set(marks) <= {".", ","}:
        in_groups = len(groups[0]) <= 3 and all(len(group) == 3 for group in groups[1:])
        if not marks or (len(set(marks)) == 1 and in_groups):
            found.append(_plain("".join(groups)))
        if len(marks) == 1 or (marks and marks[-1] not in marks[:-1]):
            found.append(_plain("".join(groups[:-1]), groups[-1]))
    if scale and len(text) <= _LONGEST_SCALED:
        found += [_plain(*f"{Decimal(number) * scale:f}".split(".")) for number in found]
    # A time of day: 14.30, 14:30, 14h30; the full hour is the hour alone.
    if len(groups) == 2 and len(groups[0]) <= 2 and len(groups[1]) == 2 and marks != [","]:
        hour, minute = map(int, groups)
        found.append(f"{hour}:{minute:02}" if minute else str(hour))
    return (text, *found)


def _plain(whole: str, part: str = "") -> str:
    """Return a number in ASCII digits, without leading zeros or zeros at the end of its decimals."""
    if not (whole + part).isascii():
        whole, part = ("".join(str(unicodedata.digit(digit)) for digit in digits) for digits in (whole, part))
    part = part.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{part}" if part else "")


_Keys = Callable[[_Token], Iterable[str]]


def _unmatched(
    lefts: list[_Token], rights: list[_Token], of_left: _Keys, of_right: _Keys
) -> tuple[list[_Token], list[_Token]]:
    """Return the tokens of both lists without those that make pairs with a common key."""
    places: dict[str, list[int]] = {}
    for place, right in enumerate(rights):
        for key in of_right(right):
            places.setdefault(key, []).append(place)
    used: set[int] = set()
    alone = []
    for left in lefts:
        for key in of_left(left):
            free = places.get(key, [])
            while free and free[-1] in used:
                free.pop()
            if free:
                used.add(free.pop())
                break
        else:
            alone.append(left)
    return alone, [right for place, right in enumerate(rights) if place not in used]


def _text(token: _Token) -> Iterable[str]:
    return (token.text,)


def _readings(token: _Token) -> Iterable[str]:
    return token.readings


def _hours(token: _Token) -> Iterable[str]:
    """Return what an hour, or a time such as 2.30, is on the 12-hour clock."""
    hour, *minutes = token.parts
    if len(hour) > 2 or len(minutes) > 1 or int(hour) > 24:
        return ()
    return (" ".join([str(int(hour) % 12), *(each for each in minutes if each != "0")]),)


def _short_year(token: _Token) -> Iterable[str]:
    return (token.text,) if len(token.text) == 2 else ()


def _long_year(token: _Token) -> Iterable[str]:
    return (token.text[2:],) if len(token.text) == 4 and token.text[:2] in ("18", "19", "20") else ()


def _without_split(wholes: list[_Token], parts: list[_Token]) -> tuple[list[_Token], list[_Token]]:
    """Return both lists without the `wholes` whose parts are in the other list as numbers: 14.30 for 14 and 30."""
    places: dict[str, list[int]] = {}
    for place, part in enumerate(parts):
        if part.text.isdecimal():
            places.setdefault(_plain(part.text), []).append(place)
    used: set[int] = set()
    left = []
    for whole in wholes:
        wanted = Counter(whole.parts)
        if wanted.total() > 1 and all(len(places.get(part, ())) >= count for part, count in wanted.items()):
            used.update(places[part].pop() for part in wanted.elements())
        else:
            left.append(whole)
    return left, [part for place, part in enumerate(parts) if place not in used]


def _not_in_words(tokens: list[_Token], text: str) -> list[_Token]:
    """Return the tokens whose numbers are not in `text` as words or Roman numerals."""
    found = {_roman(match[1]) for match in _ROMAN.finditer(text)}
    found |= {str(_IDEOGRAPHS[character]) for character in set(text) & _IDEOGRAPHS.keys()}
    for word in set(_WORD.findall(text.casefold())):
        found |= _VALUES_OF.get(word, set())
        for length in range(_SHORTEST_BEGINNING, min(_LONGEST_BEGINNING, len(word) - 1) + 1):
            found |= _VALUES_OF.get(word[:length], set())
    return [token for token in tokens if found.isdisjoint(token.readings)]


def _roman(numeral: str) -> str:
    """Return the value of a Roman numeral."""
    values = [_ROMAN_VALUES[letter] for letter in numeral]
    return str(sum(-value if value < after else value for value, after in zip(values, [*values[1:], 0], strict=True)))
