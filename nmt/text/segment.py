"""Split text that is too long into parts, and join their translations.

A part ends after a sentence if possible, else after a clause, else at a blank. It ends inside a word only if that word
alone is too long. Parts contain the whole text with its blanks: "".join(parts) == text.

nmt/text/sentences.py finds the sentences. The rules here depend on marks and letters, not on languages. Scripts such as
Chinese and Japanese have no blanks, so their marks end a clause without a blank after them.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

from nmt.text.sentences import sentences

_CLOSING = "[\"'”’»)\\]」』）】》]*+"
# Marks of scripts with blanks, full stops of Latin, Armenian, Arabic, Ethiopic and Devanagari among them.
_MARK = "[.!?…\u0589\u061f\u06d4\u1362\u0964\u0965,;:\u060c\u061b–—]"
# They end a clause only before a blank: 3.14 and 1,000 are not split. A sentence may have full stops inside, as in a
# quotation. The lookbehind keeps a long row of marks from being matched again at each of them, which would take
# quadratic time.
_CLAUSE_END = re.compile(rf"(?<!{_MARK}){_MARK}++{_CLOSING}\s+|[。！？｡、，；：]+{_CLOSING}\s*")
_BLANKS = re.compile(r"\s+")
# Scripts without blanks between words: Thai to Tibetan, Burmese, Khmer, Chinese, Japanese, full-width forms.
_WITHOUT_BLANKS = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fff\u3001-\u30ff\u31f0-\u31ff\u3400-\u9fff"
    "\uf900-\ufaff\ufe30-\ufe4f\uff01-\uff9f\U00020000-\U0003ffff]"
)
_JOINER = "\u200d"


def split(text: str, fits: Callable[[Sequence[str]], Sequence[bool]], language: str = "") -> list[str]:
    """Return the parts of a text: its sentences. A sentence that does not fit is halved until its parts do.

    `fits` returns for each text whether it is short enough. A single character is never cut. `language` is that of the
    text, as for `sentences`.
    """
    return _halved(sentences(text, language), fits)


def _halved(parts: list[str], fits: Callable[[Sequence[str]], Sequence[bool]]) -> list[str]:
    found: list[str] = []
    for part, short in zip(parts, fits(parts), strict=True):
        if short or len(part) == 1:
            found.append(part)
        else:
            found += _halved(_cut(part, [_middle(part)]), fits)
    return found


def _middle(text: str) -> int:
    """Return the best place to cut a sentence in two: the clause end or blank nearest to its middle."""
    for places in (_ends(_CLAUSE_END, text), _ends(_BLANKS, text)):
        if places:
            return min(places, key=lambda place: abs(2 * place - len(text)))
    return _between_letters(text, len(text) // 2)


def last_place(text: str, language: str = "") -> int:
    """Return where to cut a text that is still being read: as late as possible, and in its second half."""
    last = len(text) - len(sentences(text, language)[-1])
    for places in ([last], _ends(_CLAUSE_END, text), _ends(_BLANKS, text)):
        if places and 2 * places[-1] >= len(text):
            return places[-1]
    return _between_letters(text, len(text) - 1)


def _cut(text: str, places: Sequence[int]) -> list[str]:
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


def _ends(pattern: re.Pattern[str], text: str) -> list[int]:
    """Return the ends of matches, except for matches at the beginning or the end of the text."""
    return [match.end() for match in pattern.finditer(text) if match.start() > 0 and match.end() < len(text)]


def _between_letters(text: str, place: int) -> int:
    """Return `place`, or one shortly before it that separates no letter from its accents; at least 1."""
    for near in range(place, max(place - 16, 0), -1):
        joined = unicodedata.category(text[near]).startswith("M") or _JOINER in text[near - 1 : near + 1]
        if not joined:
            return near
    return max(place, 1)


def join(parts: Sequence[str], translations: Sequence[str], keep_lines: bool = False) -> str:
    """Join the translations of parts, with the blanks that were between the parts; `keep_lines` as for `seam`."""
    return join_at(parts, translations, keep_lines)[0]


def join_at(parts: Sequence[str], translations: Sequence[str], keep_lines: bool = False) -> tuple[str, list[int]]:
    """Return what `join` does, and where each translation begins in it."""
    text, before = "", ""
    starts = []
    for part, translation in zip(parts, translations, strict=True):
        text += seam(before, part, text, translation, keep_lines)
        starts.append(len(text))
        text += translation
        before = part
    return text, starts


def seam(before: str, after: str, left: str, right: str, keep_lines: bool = False) -> str:
    """Return the text between `left` and `right`, the translations of two parts `before` and `after` of one text.

    It is the blanks between the parts. Spaces are left out if a translation is in a script without blanks. A space is
    added if only the source is in such a script. Line breaks become spaces; with `keep_lines`, LF and CR LF are LF.
    """
    if not (left and right):
        return ""
    gap = before[len(before.rstrip()) :] + after[: len(after) - len(after.lstrip())]
    kept = "\n" if keep_lines else ""
    gap = "".join(
        " " if character.splitlines() == [""] and character not in kept else character
        for character in gap.replace("\r\n", "\n")
    )
    if _WITHOUT_BLANKS.match(left[-1]) or _WITHOUT_BLANKS.match(right[0]):
        return gap.replace(" ", "")
    inside_word = not (_WITHOUT_BLANKS.match(before[-1:]) or _WITHOUT_BLANKS.match(after[:1]))
    return gap or ("" if inside_word else " ")
