"""Find the fields of a text: placeholders, tags, URLs and e-mail addresses, which a translation keeps as they are.

| kind        | examples |
|-------------|----------|
| placeholder | %s %1$s %.2f %(name)s %name% ; {} {0} {name} ${name} {{ name }} {n, plural, ...} ; [X0X] |
| tag         | <b> </b> <br/> <a href="x"> &amp; <!-- note --> |
| url         | https://example.org/page?id=1 www.example.org name@example.org |

A percent sign after a digit, as in "5%s", is no placeholder. Of an ICU field, only the head `{n, plural` is found: its
messages are translated. Fields do not overlap: where two could begin, the first kind of the table wins.
"""

import re
from typing import NamedTuple


class Field(NamedTuple):
    """One field of a text: text[start:end]."""

    kind: str
    """placeholder, tag or url: kinds of flags as well (nmt/text/checks.py)."""
    text: str
    start: int
    end: int


_PATTERNS = {
    "placeholder": "|".join(
        (
            r"\[X\d{1,6}X\]",
            r"(?<![\d%])%(?:\([\w.-]{1,80}\)|\d{1,3}\$)?[-+#0]{0,3}\d{0,4}(?:\.\d{1,3}|\.\*)?(?:hh|h|ll|l|z|j|t)?[diouxXeEfFgGcsr@](?![^\W_])",
            r"(?<![\d%])%[A-Za-z_][\w-]{0,80}%",
            r"\{\{\s{0,4}[\w.:-]{1,80}\s{0,4}\}\}",
            r"\$?\{[\w.:!$-]{0,80}\}",
            r"\{\s{0,4}\w{1,80}\s{0,4},\s{0,4}(?:plural|select|selectordinal|number|date|time)\b",
        )
    ),
    "tag": "|".join(
        (
            r"<!--.{0,500}?-->",
            r"</?[A-Za-z][\w:.-]{0,80}(?:\s(?:[^<>\"']++|\"[^\"<]{0,500}\"|'[^'<]{0,500}'){0,99}+)?/?>",
            r"&(?:[A-Za-z][A-Za-z0-9]{1,30}|#\d{1,7}|#[xX][0-9A-Fa-f]{1,6});",
        )
    ),
    "url": "|".join(
        (
            r"(?i:\b(?:https?|ftp|file)://|\bmailto:|\bwww\.(?=\w))[^\s<>\"“”„«»]{1,2000}",
            r"(?<![\w.+-])[\w.+-]{1,64}@(?:\w(?:[\w-]{0,62}\w)?\.){1,8}[A-Za-z]{2,24}\b",
        )
    ),
}
_FIELD = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in _PATTERNS.items()))
# Every field has one of these, or begins with "www.": text without them needs no closer look, which takes longer.
_MAYBE = ("%", "{", "<", "&", "@", "[X", "://")
# Marks after a URL belong to the sentence around it.
_AFTER_URL = ".,;:!?…'’»”)]}"


def find_fields(text: str) -> list[Field]:
    """Return the fields of a text, in order."""
    if not any(map(text.__contains__, _MAYBE)) and "www." not in text.lower():
        return []
    found = []
    for match in _FIELD.finditer(text):
        kind, shown = str(match.lastgroup), match[0]
        if kind == "url":
            shown = _without_marks(shown)
        found.append(Field(kind, shown, match.start(), match.start() + len(shown)))
    return found


def _without_marks(url: str) -> str:
    """Return a URL without the marks of the sentence at its end; a bracket stays if the URL opens it."""
    while url and url[-1] in _AFTER_URL and not (url[-1] == ")" and url.count("(") >= url.count(")")):
        url = url[:-1]
    return url
