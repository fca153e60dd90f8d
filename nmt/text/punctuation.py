"""Punctuation as Moses' normalize-punctuation.perl writes it: typographic quotes, dashes and blanks become ASCII.

The recipes of WMT prepare text in this way. Each rule below is one of that script, in its order, for lines that end
with a line break. A test compares them with the package sacremoses, which is another version of the script. Where the
two differ, this is what holds here:

- ’ is always an apostrophe, as in sacremoses. The script makes a quote of it except between unaccented letters, so
  that d’être becomes d"être.
- Blanks at the ends of a line are removed, as in sacremoses.
- « and » between no-break spaces keep a blank outside the quotes, as in the script. sacremoses joins the words.
- Quotes change places with commas and periods in all languages but English and Czech as in French: as in the script.
  In sacremoses only German, Spanish and French do that.
- A period before a quote at the end of a line moves behind it in these languages, as in the script. It means to
  leave that period, but takes the line break for text.
- Digits and blanks are those of ASCII, as in the script.
"""

import re
from collections.abc import Callable
from functools import cache, partial

Normalise = Callable[[str], str]
"""A function that normalises a text; `str` if nothing changes."""
_NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"
_BLANKS = re.compile(" {2,}")
_BRACKET_AND_BLANK = re.compile(r"\) (?=[.!:?;,])")
_DIGIT_AND_BLANK = re.compile("(?<=[0-9]) %")
_DIGITS_APART = re.compile(f"([0-9]){_NO_BREAK_SPACE}([0-9])")
_QUOTE_AND_STOPS = re.compile(r'"([,.]+)')
_PERIODS_AND_QUOTE = re.compile(r'(\.+)"(\s*[^<])', re.ASCII)
_MARKS = {"„": '"', "“": '"', "”": '"', "–": "-", "—": " - ", "´": "'", "‘": "'", "‚": "'", "’": "'", "…": "..."}
_FRENCH_QUOTES = tuple(
    (quote.replace("_", _NO_BREAK_SPACE), plain)
    for quote, plain in (("_«_", ' "'), ("«_", '"'), ("«", '"'), ("_»_", '" '), ("_»", '"'), ("»", '"'))
)
_NO_BREAK_SPACES = tuple(
    (space.replace("_", _NO_BREAK_SPACE), space.replace("_", plain))
    for space, plain in (
        *(("_%", ""), ("nº_", " "), ("_:", ""), ("_ºC", " "), ("_cm", " ")),
        *(("_?", ""), ("_!", ""), ("_;", ""), (",_", " ")),
    )
)
_CZECH = ("cs", "cz")
_WITH_DECIMAL_COMMA = ("de", "es", "fr", *_CZECH)


def normaliser(punctuation: str, language: str) -> Normalise:
    """Return the function that normalises punctuation of text in a language, as `corpus.punctuation` asks for.

    The function takes any text and keeps its line breaks. For "keep" it is `str`, which changes nothing. A code such as
    de_AT or de-AT means de. The function can be pickled, and there is one for each language.

    Applied to its own result, it changes nothing in usual text. Rows of stops and quotes, as in `,,"`, can change more.
    """
    if punctuation == "keep":
        return str
    return _moses(re.split("[-_]", language, maxsplit=1)[0].lower())


@cache
def _moses(code: str) -> Normalise:
    return partial(_normalised, code)


def origins(given: str, normalised: str) -> list[int]:
    """Return for each character of a normalised text where it comes from in the text that was given.

    Letters and digits stay in order. Between two of them, marks come from marks in order, and more of them from the
    last one.
    """
    found: list[int] = []
    place = last = 0
    for character in normalised:
        if character.isalnum():
            while place < len(given) and not given[place].isalnum():
                place += 1
        elif not character.isspace():
            while place < len(given) and given[place].isspace():
                place += 1
        ahead = given[place : place + 1]
        if ahead and ahead.isalnum() == character.isalnum() and ahead.isspace() == character.isspace():
            last = place
            place += 1
        found.append(last)
    return found


def _normalised(code: str, text: str) -> str:
    """Return a text with normalised punctuation, line by line; `code` is the language."""
    if "\n" in text:
        return "\n".join(_normalised(code, line) for line in text.split("\n"))
    # Most lines need few of the rules. To look for one character is fast, and for a blank and another one is not.
    if "\r" in text:
        text = text.replace("\r", "")
    if "(" in text or ")" in text:
        text = _BLANKS.sub(" ", text.replace("(", " (").replace(")", ") "))
        text = _BRACKET_AND_BLANK.sub(")", text).replace("( ", "(").replace(" )", ")")
    elif "  " in text:
        text = _BLANKS.sub(" ", text)
    if "%" in text:
        text = _DIGIT_AND_BLANK.sub("%", text)
    if ":" in text:
        text = text.replace(" :", ":")
    if ";" in text:
        text = text.replace(" ;", ";")
    before = text
    if "`" in text:
        text = text.replace("`", "'")
    if "'" in text:
        text = text.replace("''", ' " ')
    if not text.isascii():
        text = _without_typography(text)
    if text != before and "  " in text:
        text = _BLANKS.sub(" ", text)
    if '"' in text:
        text = _with_moved_quotes(code, text)
    if _NO_BREAK_SPACE in text:
        text = _DIGITS_APART.sub(r"\1,\2" if code in _WITH_DECIMAL_COMMA else r"\1.\2", text)
    return text.strip(" ")


def _without_typography(text: str) -> str:
    """Return a text with ASCII in place of typographic quotes, dashes, ellipses and some no-break spaces."""
    before = text
    for mark, plain in _MARKS.items():
        if mark in text:
            text = text.replace(mark, plain)
    if text != before:
        text = text.replace("''", '"')
    if "«" in text or "»" in text:
        for quote, plain in _FRENCH_QUOTES:
            text = text.replace(quote, plain)
    if _NO_BREAK_SPACE in text:
        for space, plain in _NO_BREAK_SPACES:
            text = text.replace(space, plain)
    return text


def _with_moved_quotes(code: str, text: str) -> str:
    """Return a text whose quotes follow commas and periods in English, and precede them elsewhere but in Czech."""
    if code == "en":
        return _QUOTE_AND_STOPS.sub(r'\1"', text)
    if code in _CZECH:
        return text
    text = text.replace(',"', '",')
    # The line break, which the rule counts as text, is not part of `text`.
    return _PERIODS_AND_QUOTE.sub(r'"\1\2', f"{text}\n")[:-1]
