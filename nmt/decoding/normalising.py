"""Text as a model has learned it, for a run with `corpus.punctuation`.

All text that a model reads passes through here: lines to translate, sentence pairs to score, prefixes and terms. A
function that normalises a text is `str` if nothing changes.
"""

from collections.abc import Collection, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

from nmt.data.subwords import Subwords
from nmt.text.markup import outside_items
from nmt.text.punctuation import Normalise
from nmt.text.terms import Terms


class Pairs(NamedTuple):
    """Sentence pairs as a model reads them, in the order of the arguments of `encode_pairs`."""

    sources: list[str]
    targets: list[str]
    symbols: list[tuple[int, ...]]
    """Ids before each source."""


def has_words(text: str, unlearned: str = "") -> bool:
    """Return whether a text has something to translate: a letter or digit of any script that is not in `unlearned`."""
    return any(character.isalnum() and character not in unlearned for character in text)


def lines_as_read(
    lines: Sequence[str], normalise: Normalise, subwords: Subwords, with_items: bool, begun: Collection[int] = ()
) -> list[str]:
    """Return lines to translate as a model reads them.

    Lines without words that the model knows do not change, since they are not translated. Blanks at the ends of lines
    stay. With `with_items`, so do tags and fields, except in the lines whose numbers are in `begun`.
    """
    if normalise is str:
        return list(lines)
    change = partial(_changed, normalise, subwords)
    return [
        outside_items(line, change) if with_items and number not in begun else change(line)
        for number, line in enumerate(lines)
    ]


def _changed(normalise: Normalise, subwords: Subwords, text: str) -> str:
    new = between_blanks(text, normalise)
    return new if new != text and has_words(text, subwords.unlearned(text)) else text


def between_blanks(text: str, normalise: Normalise) -> str:
    """Return a text that is normalised, with the blanks at the ends of its lines as they were."""
    if normalise is str:
        return text
    if "\n" in text:
        return "\n".join(between_blanks(line, normalise) for line in text.split("\n"))
    inner = text.strip()
    if not inner:
        return text
    start = text.index(inner)
    return f"{text[:start]}{normalise(inner)}{text[start + len(inner) :]}"


def tables_as_read(
    tables: Sequence[Sequence[Terms]], source: Normalise, target: Normalise
) -> Sequence[Sequence[Terms]]:
    """Return tables of terms, for each line, as a model reads them. DataError if one term then has two translations."""
    if source is str:
        return tables
    return [[_table_as_read(table, source, target) for table in each] for each in tables]


# The last tables are kept, as a table is used for all windows of a file.
@lru_cache(maxsize=8)
def _table_as_read(terms: Terms, source: Normalise, target: Normalise) -> Terms:
    return terms.changed(source, target)
