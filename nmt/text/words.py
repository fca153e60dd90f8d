"""Words of a text in any script: to count them, and to mark those in which two texts differ."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

# A character of a script without blanks between words is a word: Thai to Burmese, Khmer, Japanese, Chinese.
_ALONE = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Marks within and around words. Everything else but blanks belongs to words, with the vowel signs of Indic scripts.
_MARKS = "!-/:-@\\[-`{-~\u00a1-\u00bf\u2000-\u206f\u2e00-\u2e7f\u3000-\u303f\uff01-\uff0f\uff1a-\uff20"
_MARKS += "\u055a-\u055f\u0589\u060c\u061b\u061f\u06d4\u0964\u0965\u1361-\u1368"  # of Armenian, Arabic, Hindi, Amharic
_RUN = re.compile(rf"[{_ALONE}]|[^\s{_MARKS}{_ALONE}]+")
_PART = re.compile(rf"\s+|{_RUN.pattern}|.", re.DOTALL)
_DIGIT = re.compile(r"\d")
_LETTER = re.compile(r"[^\W\d_]")
_MOST_COMPARED = 600  # parts of a text: comparing takes quadratic time, and more if parts are repeated


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without marks. What has a digit or no letter is no word."""
    return [run for run in _RUN.findall(text.casefold()) if _LETTER.search(run) and not _DIGIT.search(run)]


def num_words(text: str) -> int:
    """Return the number of words and numbers of a text."""
    return len(_RUN.findall(text))


def differences(first: str, second: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Return both texts in stretches (text, differs): words and marks that the other text lacks there differ.

    The stretches of a text joined are the text. Of a long text, the first 600 words, marks and blanks are compared.
    """
    sides = [_PART.findall(text) for text in (first, second)]
    matcher = SequenceMatcher(None, sides[0][:_MOST_COMPARED], sides[1][:_MOST_COMPARED], autojunk=False)
    blocks = matcher.get_matching_blocks()
    return (
        _stretches(sides[0], [(block.a, block.size) for block in blocks]),
        _stretches(sides[1], [(block.b, block.size) for block in blocks]),
    )


def _stretches(parts: Sequence[str], equal: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    """Return the stretches of a text, given its parts and where (begin, size) parts are equal to the other text's."""
    found: list[tuple[str, bool]] = []
    end = 0
    for begin, size in equal:
        for text, differs in (("".join(parts[end:begin]), True), ("".join(parts[begin : begin + size]), False)):
            if text:
                # Blanks alone are no difference that a reader sees.
                found.append((text, differs and bool(text.strip())))
        end = begin + size
    rest = "".join(parts[end:])
    return [*found, (rest, False)] if rest else found
