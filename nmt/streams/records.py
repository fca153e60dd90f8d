"""JSON Lines: one object per line, whose "text" is translated and whose other fields are carried through.

The fields of the result (`RESULT_FIELDS`) are added after those of the input, whose characters stay as they are. So
numbers keep all their digits, and names their order.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from nmt.decoding.translation import RESULT_FIELDS
from nmt.errors import DataError
from nmt.text.terms import Terms

_NAME = re.compile(r".*\.jsonl(\.(gz|xz|zst|bz2))?", re.IGNORECASE | re.DOTALL)


class Record(NamedTuple):
    """A line of JSON Lines."""

    raw: str
    """The line; "" if it is blank."""
    text: str
    """What to translate."""
    fields: Mapping[str, Any]
    """All fields of the object."""
    prefix: str = ""
    """What the translation begins with: the object's field "prefix"."""
    terms: Terms | None = None
    """The object's own terms, its field "terms"."""


def has_records(path: str) -> bool:
    """Return whether a file has JSON Lines by its name, such as a.jsonl or a.jsonl.gz."""
    return _NAME.fullmatch(path) is not None


def parse_record(line: str, where: str) -> Record:
    """Return the record of a line; a blank line has no fields and no text.

    DataError, which begins with `where`, if the line is not an object, has no text, has a prefix that is no text, has a
    field of the result, or has "terms" that are not an object of terms and translations.
    """
    raw = line.strip(" \t\r")
    if not raw:
        return Record("", "", {})
    try:
        fields = json.loads(raw, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON ({error.msg} at character {error.pos + 1}): correct it") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}): correct it") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise DataError(f'{where} has no text: write an object such as {{"text": "a sentence"}} in each line')
    for name in fields.keys() & RESULT_FIELDS.keys():
        raise DataError(f'{where} has a field "{name}", which is a field of results: rename or remove it')
    prefix = fields.get("prefix") or ""
    if not isinstance(prefix, str):
        raise DataError(f'{where} has a "prefix" that is no text: write what the translation begins with')
    # An escape such as \ud800 may be half a character.
    text = fields["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Record(raw, text, fields, prefix, _terms(fields.get("terms"), where))


def _terms(given: Any, where: str) -> Terms | None:
    if given is None:
        return None
    try:
        return Terms.of(given)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def record_line(record: Record | None, text: str, result: Mapping[str, Any]) -> str:
    """Return a line of JSON Lines: a record and its result. Without a record, it has a line of plain text, `text`."""
    if record is None:
        return json.dumps({"text": text, **result}, ensure_ascii=False)
    if not record.raw:
        return ""
    # The object has at least its text, so a comma is right.
    return f"{record.raw[:-1].rstrip()}, {json.dumps(result, ensure_ascii=False)[1:]}"


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")
