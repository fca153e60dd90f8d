"""The report of `nmt prepare` as pages beside its figures: report/prepare.html and report/prepare.md.

The figures may come from a prepared corpus of anybody, so they are checked before anything is made of them.
"""

from pathlib import Path
from typing import Any

from nmt.errors import DataError
from nmt.files import differs, read_json, write_atomically
from nmt.pages.preparation_facts import Report
from nmt.pages.preparation_html import preparation_page
from nmt.pages.preparation_markdown import preparation_markdown
from nmt.terminal import printable

FORMAT = 1
_MOST_BYTES = 64 * 1024 * 1024
_LARGEST = 10**18  # of a figure: no text is larger, and beyond it a float is not precise

_EXAMPLE = {
    "source": str,
    "target": str,
    "direction": str,
    "file": str,
    "row": (int, None),
    "score": (float, None),
}
_BEFORE = {"before_source": (str, None), "before_target": (str, None)}
_COUNTED = {"name": str, "why": str, "pairs": int}
_CHARACTER = [(str, int)]
_LENGTHS = {"words": {str: [int]}, "ratio": [int]}
_COVERAGE = {"subwords_per_word": float, "characters_in_bytes": int}
_VOCABULARY = {
    "size": int,
    "kind": str,
    "from": str,
    "characters": int,
    "lines_in_bytes": int,
    "whole_words": float,
    "in_bytes": [_CHARACTER],
    "unused": int,
    "dev": (_COVERAGE, None),
    "test": (_COVERAGE, None),
}
_REQUIRED = {"format": int, "name": str, "pairs_read": int, "pairs_kept": int}
_OPTIONAL: dict[str, tuple[Any, Any]] = {
    "languages": ([str], []),
    "directions": ([str], []),
    "path": (str, ""),
    "held_out": (int, 0),
    "sources": ([{"path": str, "pairs_read": int, "pairs_kept": int}], []),
    "changes": ([{**_COUNTED, "examples": [{**_EXAMPLE, **_BEFORE}]}], []),
    "rules": ([{**_COUNTED, "examples": [_EXAMPLE]}], []),
    "augmented": ([{"name": str, "pairs": int, "examples": [_EXAMPLE]}], []),
    "histograms": ({str: {**_LENGTHS, "pieces": {str: [int]}}}, {}),
    "characters": ({str: [_CHARACTER]}, {}),
    "num_characters": ({str: int}, {}),
    "vocabulary": (({**_COVERAGE, **_VOCABULARY}, None), None),
    "overlap": ({str: {"pairs": int, "kept_with_source": int, "kept_with_target": int, "kept_with_both": int}}, {}),
    "final_pairs": ([_EXAMPLE], []),
    "seconds": ({str: float}, {}),
    "processes": (int, 1),
}
"""(shape, value if it is missing or null) of each part that a report may lack."""


def write_preparation(folder: Path) -> list[Path]:
    """Write report/prepare.html and report/prepare.md of a prepared corpus, made of its report/prepare.json.

    Returns the paths of the two pages. Raises DataError if the figures are missing or are not those of `nmt prepare`,
    StorageError if a page cannot be written.
    """
    report = read_preparation(folder / "report" / "prepare.json")
    paths = preparation_pages(folder)
    for path, content in zip(paths, (preparation_page(report), preparation_markdown(report)), strict=True):
        write_atomically(path, content.encode())
    return paths


def preparation_pages(folder: Path) -> list[Path]:
    """Return the paths of the two pages of a prepared corpus, the page for a browser first."""
    return [folder / "report" / name for name in ("prepare.html", "prepare.md")]


def read_preparation(path: Path) -> Report:
    """Return the figures in a report/prepare.json, with empty values for missing parts. Raises DataError."""
    try:
        report: Report = read_json(path, _REQUIRED, _MOST_BYTES)
        if report["format"] != FORMAT:
            raise ValueError(f"format {report['format']} is unknown: this version of nmt reads format {FORMAT}")
        for name, (shape, missing) in _OPTIONAL.items():
            if report.get(name) is None:
                report[name] = missing
            _add_missing(name, report[name])
            if problem := differs(report[name], shape, name):
                raise ValueError(problem)
        if problem := _odd_figure(report, "") or _odd_pair(report):
            raise ValueError(problem)
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        if isinstance(error, RecursionError):
            reason = "it is nested too deeply"
        line = " ".join(printable(reason).split())
        raise DataError(
            f"cannot use {path}: {line}; to write it anew, remove {path.parents[1]} and prepare again"
        ) from error
    return report


def _add_missing(name: str, part: Any) -> None:
    """Add null or empty values to a part where it may lack some."""
    if name == "vocabulary" and isinstance(part, dict):
        part |= {split: part.get(split) for split in ("dev", "test")}
    if name == "histograms" and isinstance(part, dict):
        for each in part.values():
            if isinstance(each, dict):
                each.setdefault("pieces", {})
    if name == "changes" and not differs(part, [{"examples": [{}]}]):
        for example in (example for each in part for example in each["examples"]):
            example |= {key: example.get(key) for key in _BEFORE}


def _odd_figure(value: Any, key: str) -> str:
    """Describe the first number that cannot be a count, a share or a time; "" if all can. Scores may be negative."""
    if isinstance(value, int | float):
        least = -_LARGEST if key.endswith(".score") else 0
        fits = least <= value <= _LARGEST  # not a number is neither
        return "" if fits else f"{key}: {value:.3g} is not a figure of a text"
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = (_odd_figure(each, f"{key}.{name}".lstrip(".")) for name, each in parts)
    return next((problem for problem in found if problem), "")


def _odd_pair(report: Report) -> str:
    """Describe the first entry of a list of characters that is not a character and its count; "" if all are."""
    lists = {f"characters.{side}": found for side, found in report["characters"].items()}
    if report["vocabulary"]:
        lists["vocabulary.in_bytes"] = report["vocabulary"]["in_bytes"]
    for key, found in lists.items():
        for place, each in enumerate(found):
            if [type(part) for part in each] != [str, int] or len(each[0]) != 1:
                return f"{key}.{place} is not [character, count]"
    return ""
