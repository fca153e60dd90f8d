"""Flags of a translation: what a reader should check."""

from typing import NamedTuple

KINDS = {
    "numbers": "a number is missing, or one is added",
    "placeholder": "a placeholder such as %s, {name} or [X0X] is missing, changed or added",
    "tag": "a tag such as <b> is missing, changed or added",
    "url": "a URL or an e-mail address is missing, changed or added",
    "brackets": "a bracket or quotation mark has no partner",
    "end": "the last mark differs, such as a full stop for a question mark",
    "copy": "the text was returned untranslated",
    "length": "the translation is much longer or much shorter than its source",
    "loop": "the same words are repeated",
    "unknown": "a character is unknown to the model",
    "term": "a required term is missing",
    "cut": "the translation was cut off at its maximum length",
    "retried": "the first translation repeated itself or was empty, so other settings were used",
}
"""Meaning of each kind of flag, in the order of reports."""


class Flag(NamedTuple):
    """One thing to check in a translation."""

    kind: str
    """One of `KINDS`."""
    detail: str
    """What was found, for a reader: a missing number, the repeated words."""
