"""Markdown made of text that anybody may have written: names of runs, files and domains, pieces of sentences.

Nothing in such text can end a line, a cell or a piece of code early, or become markup or HTML.
"""

import re
import textwrap

_CODE = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)")
_NO_BREAK = "\0"
"""Stands for a blank at which a line may not end; no text written here has it."""


def plain(text: str) -> str:
    """Text that reads as it is; line ends and other control characters become blanks."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$!])", r"\\\1", _printable(text))


def code(text: str) -> str:
    """Text as code. Its fence is longer than any run of backticks in it."""
    text = " ".join(_printable(text).split()) or "?"
    fence = "`" * (1 + max((len(each) for each in re.findall("`+", text)), default=0))
    space = " " * (text.startswith("`") or text.endswith("`"))
    return f"{fence}{space}{text}{space}{fence}"


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else " " for each in text)


def wrapped(line: str) -> str:
    """A paragraph or an item of a list in lines of 100 characters; tables, titles and code stay as they are."""
    if line.startswith(("|", "#", "    ")):
        return line
    indent = "  " if line.startswith("- ") else ""
    # What stands between backticks stays in one line: the next one could begin with what means something to Markdown.
    kept = _CODE.sub(lambda found: found[0].replace(" ", _NO_BREAK), line)
    lines = textwrap.fill(kept, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return lines.replace(_NO_BREAK, " ")
