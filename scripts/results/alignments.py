"""Measure alignments on the phrasebook and write results/alignments.json: python scripts/results/alignments.py RUN ...

The set is made as follows. Sentences are those of the phrasebook's test split that the run translates exactly as the
phrasebook does, since the place of every value is known in its own translation only. A value is a number, a date, an
amount with its unit, a name, a noun, and so on.

- Possible links: every word of a value with every word of its translation.
- Sure links: the one word of a value with the one word of its translation; word by word, if both have as many words,
  for numbers, dates and amounts; and words with the same digits.

Links of words outside of values are not counted: nothing is known about them.

    error rate = 1 - (sure links found + possible links found) / (links found + sure links)   (Och and Ney 2003)

Tags and placeholders are measured on lines with one value that has a tag around, after or before it, or that a
placeholder or URL replaces. The same is done to its translation, which the translation must equal. Values are those
that are composed, and single words.

Then run `python -m scripts.results.pages`.
"""

import argparse
import json
import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import sacrebleu

from nmt.corpus.lexicon import LANGUAGES, Words, read_lexicon
from nmt.corpus.phrasebook import Phrase, Slot, phrasebook_slots
from nmt.decoding import keeping
from nmt.decoding.alignment import Span, words
from nmt.decoding.translator import Translator
from nmt.resources import resource_dir
from nmt.run import RunDirectory

RESULTS = Path(__file__).parents[2] / "results" / "alignments.json"
SENTENCES, SEED = 1000, 7
NAMES = {"en": "English", "de": "German", "fr": "French"}


class Known(NamedTuple):
    """What is known about the links of a sentence pair."""

    sure: set[Span]
    possible: set[Span]
    source: set[int]
    """Source words that belong to a value."""
    target: set[int]


class Counts(NamedTuple):
    """Links of all sentences."""

    found: int
    found_possible: int
    found_sure: int
    sure: int

    def row(self) -> dict[str, Any]:
        """Return the figures of a table's row."""
        return {
            "error_rate": 1 - (self.found_sure + self.found_possible) / (self.found + self.sure),
            "precision": self.found_possible / self.found,
            "recall": self.found_sure / self.sure,
            "sure": self.sure,
        }


def known_links(phrase: Phrase, slots: list[Slot], closed: set[str]) -> Known:
    """Return the links of a pair; `closed` has the kinds of values that are words of the lexicon."""
    source, target = words(phrase.source), words(phrase.target)
    known = Known(set(), set(), set(), set())
    for slot in slots:
        here, there = _within(source, slot.source), _within(target, slot.target)
        known.source.update(here)
        known.target.update(there)
        pairs = {(come, to) for come in here for to in there}
        known.possible.update(pairs)
        if len(here) == len(there) and (len(here) == 1 or slot.kind not in closed):
            known.sure.update(zip(here, there, strict=True))
        else:
            digits = [re.sub(r"\D", "", phrase.source[slice(*span)]) for span in source]
            known.sure.update(
                (come, to)
                for come, to in pairs
                if digits[come] and digits[come] == re.sub(r"\D", "", phrase.target[slice(*target[to])])
            )
    return known


def _within(spans: list[Span], slot: Span) -> list[int]:
    """Return the numbers of the words that a slot touches."""
    return [number for number, (start, end) in enumerate(spans) if start < slot[1] and end > slot[0]]


def count(pairs: Iterator[tuple[Known, tuple[Span, ...]]]) -> Counts:
    """Return the counts over pairs of (what is known, the links found)."""
    total = Counts(0, 0, 0, 0)
    for known, links in pairs:
        judged = {link for link in links if link[0] in known.source or link[1] in known.target}
        each = len(judged), len(judged & known.possible), len(judged & known.sure), len(known.sure)
        total = Counts(*(before + more for before, more in zip(total, each, strict=True)))
    return total


TAGS = {"around": ("<b>", "</b>"), "after": ("", "<n/>"), "before": ("<n/>", "")}
"""Tags at a value, by their row: what is put before it and after it."""
FIELDS = ("{name}", "%1$s", "[X0X]", "https://example.org/a?b=1", "{0}", "info@example.org")
WAYS = {"attention": (), "a number of 4 digits": (4,), "numbers of 4, 3 and 2 digits": (4, 3, 2)}
"""Digits of the numbers that replace a field, by the name of the row."""


def simple(phrase: Phrase, slots: list[Slot], closed: set[str]) -> list[Slot]:
    """Return the values that are composed, or one word on both sides."""
    return [
        slot
        for slot in slots
        if slot.kind not in closed
        or len(phrase.source[slice(*slot.source)].split()) == len(phrase.target[slice(*slot.target)].split()) == 1
    ]


def changed(text: str, span: Span, before: str, value: str, after: str) -> str:
    """Return a text with something before, in place of and after one of its values."""
    return text[: span[0]] + before + (value or text[slice(*span)]) + after + text[span[1] :]


def tag_rows(translator: Translator, pairs: list[tuple[Phrase, Slot]], languages: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each of `TAGS`; the plain sentences of `pairs` are translated as the phrasebook does."""
    for name, (before, after) in TAGS.items():
        lines = [changed(phrase.source, slot.source, before, "", after) for phrase, slot in pairs]
        wanted = [changed(phrase.target, slot.target, before, "", after) for phrase, slot in pairs]
        found = [each.text for each in translator.translate(lines)]
        right = sum(one == two for one, two in zip(found, wanted, strict=True))
        yield {"languages": languages, "tag": name, "right": round(right / len(lines), 4), "lines": len(lines)}


def field_rows(translator: Translator, pairs: list[tuple[Phrase, Slot]], languages: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each way to translate a line with a field."""
    drawn = random.Random(SEED)
    fields = [drawn.choice(FIELDS) for _ in pairs]
    cases = list(zip(pairs, fields, strict=True))
    lines = [changed(phrase.source, slot.source, "", field, "") for (phrase, slot), field in cases]
    wanted = [changed(phrase.target, slot.target, "", field, "") for (phrase, slot), field in cases]
    sides = [side for line, field in zip(lines, fields, strict=True) for side in line.split(field)]
    halves = [each.text for each in translator.translate(sides)]
    plain = replace(translator.options, markup=False)
    ways = {
        "like text": [each.text for each in translator.translate(lines, plain)],
        "cut": [
            f"{left} {field} {right}" for left, field, right in zip(halves[::2], fields, halves[1::2], strict=True)
        ],
    }
    for way, digits in WAYS.items():
        keeping._DIGITS = digits
        ways[way] = [each.text for each in translator.translate(lines)]
    for way, found in ways.items():
        # A field counts like a word of four letters.
        shown, asked = (
            [text.replace(field, 4 * "\u2588") for text, field in zip(texts, fields, strict=True)]
            for texts in (found, wanted)
        )
        yield {
            "languages": languages,
            "way": way,
            "kept": round(
                sum(text.count(field) == 1 for text, field in zip(found, fields, strict=True)) / len(lines), 4
            ),
            "equal": round(sum(one == two for one, two in zip(found, wanted, strict=True)) / len(lines), 4),
            "chrf": round(sacrebleu.corpus_chrf(shown, [asked]).score, 1),
        }


def measure(path: str) -> list[list[dict[str, Any]]]:
    """Return the rows of a run in each table."""
    run = RunDirectory.existing(path)
    config = run.config()
    languages = config.corpus.source_language, config.corpus.target_language
    shown = f"{NAMES[languages[0]]} to {NAMES[languages[1]]}"
    kinds = read_lexicon(resource_dir("data/phrasebook"))
    closed = {name for name, kind in kinds.items() if isinstance(kind, Words)}
    translator = Translator.load(run, config)
    pairs = list(phrasebook_slots("test", *languages, SENTENCES, SEED))
    found = translator.translate([phrase.source for phrase, _ in pairs], replace(translator.options, alignments=True))
    equal = [
        (known_links(phrase, slots, closed), each.alignment)
        for (phrase, slots), each in zip(pairs, found, strict=True)
        if each.text == phrase.target
    ]
    values = [
        (phrase, slot)
        for (phrase, slots), each in zip(pairs, found, strict=True)
        if each.text == phrase.target
        for slot in simple(phrase, slots, closed)[:1]
    ][:400]
    alignment = {
        "languages": shown,
        "wiring": config.model.attention.wiring,
        "sentences": len(equal),
        **{name: round(value, 4) for name, value in count(iter(equal)).row().items()},
    }
    return [[alignment], [*tag_rows(translator, values, shown)], [*field_rows(translator, values, shown)]]


def main() -> None:
    """Measure the runs that are named, and write the file of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    tables = zip(*(measure(path) for path in parser.parse_args().runs), strict=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    result = json.loads(RESULTS.read_text())
    result["commit"] = commit.stdout.strip()
    for table, rows in zip(result["tables"], tables, strict=True):
        table["rows"] = [row for each in rows for row in each]
    RESULTS.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    assert set(NAMES) == set(LANGUAGES)
    main()
