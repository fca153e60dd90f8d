"""Write the rules of text normalisation that SentencePiece compiles into the vocabulary file.

`nfc` keeps meaning. It composes letters and their marks (Unicode's canonical composition) and replaces control
characters and line breaks with a blank. Nothing else changes: superscripts, fractions, full-width punctuation,
typographic blanks, joiners and ligatures stay as written.
"""

import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

LINE_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
"""All characters that some program treats as the end of a line."""
CONTROLS = frozenset(map(chr, (*range(0x20), *range(0x7F, 0xA0)))) | frozenset(LINE_BREAKS)
"""Unicode's control characters (category Cc) and line breaks."""
_NAME, _NORMALISER, _RULES_FILE = 1, 3, 6  # fields of SentencePiece's ModelProto and NormalizerSpec


def write_nfc_rules(path: Path) -> None:
    """Write the rules of `nfc` in SentencePiece's format: code points, TAB, code points; one rule per line."""
    path.write_text(_nfc_rules(), encoding="ascii")


@cache
def _nfc_rules() -> str:
    # A rule cannot contain NUL: SentencePiece reads rules as C strings.
    rules = canonical_rules() | dict.fromkeys(CONTROLS - {"\0"}, " ")
    return "".join(f"{_code_points(text)}\t{_code_points(composed)}\n" for text, composed in sorted(rules.items()))


@cache
def canonical_rules() -> dict[str, str]:
    """Return, for every character that Unicode can decompose, all its other spellings, each with its NFC.

    Every replacement is canonically equivalent, so a text stays equivalent to itself. The result differs from NFC only
    in marks that belong to no composed character: these keep the order in which they were typed.
    """
    parts: dict[str, str] = {}
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        decomposition = unicodedata.decomposition(character)
        if decomposition and not decomposition.startswith("<"):
            parts[character] = "".join(chr(int(point, 16)) for point in decomposition.split())
    wholes: dict[str, list[str]] = defaultdict(list)
    for character, decomposition in parts.items():
        wholes[decomposition].append(character)
    spellings = {text for character in parts for text in _spellings(character, parts, wholes)} | _hangul_spellings()
    composed = {text: unicodedata.normalize("NFC", text) for text in spellings}
    return {text: result for text, result in composed.items() if text != result}


def _spellings(character: str, parts: dict[str, str], wholes: dict[str, list[str]]) -> set[str]:
    """Return all texts canonically equivalent to `character`, found by decomposing, composing and swapping marks."""
    seen, open_texts = {character}, [character]
    while open_texts:
        text = open_texts.pop()
        for start in range(len(text)):
            one, two = text[start], text[start : start + 2]
            others = [*wholes.get(one, ()), *([parts[one]] if one in parts else [])]
            found = [text[:start] + other + text[start + 1 :] for other in others]
            if len(two) == 2:
                found += [text[:start] + whole + text[start + 2 :] for whole in wholes.get(two, ())]
                first, second = map(unicodedata.combining, two)
                if first and second and first != second:
                    found.append(text[:start] + two[::-1] + text[start + 2 :])
            open_texts += [new for new in found if new not in seen]
            seen.update(found)
    return seen


def _hangul_spellings() -> set[str]:
    """Return all Korean syllables, as letters and as a syllable with a last letter (Unicode chapter 3.12)."""
    firsts, vowels, lasts = range(0x1100, 0x1113), range(0x1161, 0x1176), range(0x11A8, 0x11C3)
    pairs = [chr(first) + chr(vowel) for first in firsts for vowel in vowels]
    syllables = pairs + [unicodedata.normalize("NFC", pair) for pair in pairs]
    return set(pairs) | {syllable + chr(last) for syllable in syllables for last in lasts}


def name_nfc(model: bytes) -> bytes:
    """Name the normalisation of a trained model nfc, instead of the temporary file with the rules.

    Without this, training twice would not give the same bytes.
    """
    fields = []
    for number, field, content in _fields(model):
        if number == _NORMALISER:
            rest = b"".join(
                inner for inner_number, inner, _ in _fields(content) if inner_number not in (_NAME, _RULES_FILE)
            )
            field = _text_field(_NORMALISER, _text_field(_NAME, b"nfc") + rest)
        fields.append(field)
    return b"".join(fields)


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield (number, whole field, content) for each field of a protobuf message of numbers, floats and texts."""
    place = 0
    while place < len(message):
        start = place
        key, place = _varint(message, place)
        size = {1: 8, 5: 4}.get(key & 7, 0)
        if key & 7 == 0:
            size = _varint(message, place)[1] - place
        elif key & 7 == 2:
            size, place = _varint(message, place)
        yield key >> 3, message[start : place + size], message[place : place + size]
        place += size


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """Return the number at `place`, stored as 7 bits per byte, lowest bits first, and the place after it."""
    value = shift = 0
    while message[place] & 0x80:
        value |= (message[place] & 0x7F) << shift
        shift, place = shift + 7, place + 1
    return value | message[place] << shift, place + 1


def _text_field(number: int, content: bytes) -> bytes:
    size, digits = len(content), bytearray([number << 3 | 2])
    while size >= 0x80:
        digits.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*digits, size]) + content


def _code_points(text: str) -> str:
    return " ".join(f"{ord(character):X}" for character in text)
