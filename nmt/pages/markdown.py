"""Markdown from untrusted text: names of runs, files and domains, parts of sentences.

Nothing in this text can end a line, a cell or code early, or become markup or HTML.
"""

import re
import textwrap

_CODE = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)")
_NO_BREAK = "\0"
"""Replaces a blank at which a line must not break. No printable text has this character."""


def plain(text: str) -> str:
    """Return Markdown that shows the text unchanged; line ends and other control characters become blanks."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$!])", r"\\\1", _printable(text))


def code(text: str) -> str:
    """Return the text as Markdown code, between more backticks than it has in a row."""
    text = " ".join(_printable(text).split()) or "?"
    fence = "`" * (1 + max((len(each) for each in re.findall("`+", text)), default=0))
    space = " " * (text.startswith("`") or text.endswith("`"))
    return f"{fence}{space}{text}{space}{fence}"


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else " " for each in text)


def wrapped(line: str) -> str:
    """Wrap a paragraph or list item at 100 characters; return tables, titles and code unchanged."""
    if line.startswith(("|", "#", "    ")):
        return line
    indent = "  " if line.startswith("- ") else ""
    # Code is not broken: a line that began with part of it could mean something else in Markdown.
    kept = _CODE.sub(lambda found: found[0].replace(" ", _NO_BREAK), line)
    lines = textwrap.fill(kept, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return lines.replace(_NO_BREAK, " ")
