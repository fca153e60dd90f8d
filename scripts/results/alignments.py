"""Measure alignments on the phrasebook and write results/alignments.json: python scripts/results/alignments.py RUN ...

The set is made as follows. Sentences are those of the phrasebook's test split that the run translates exactly as the
phrasebook does, since the place of every value is known in its own translation only. A value is a number, a date, an
amount with its unit, a name, a noun, and so on.

- Possible links: every word of a value with every word of its translation.
- Sure links: the one word of a value with the one word of its translation; word by word, if both have as many words,
  for numbers, dates and amounts; and words with the same digits.

Links of words outside of values are not counted: nothing is known about them.

    error rate = 1 - (sure links found + possible links found) / (links found + sure links)   (Och and Ney 2003)

Then run `python scripts/results/pages.py`.
"""

import argparse
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from nmt.corpus.lexicon import LANGUAGES, Words, read_lexicon
from nmt.corpus.phrasebook import Phrase, Slot, phrasebook_slots
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


def measure(path: str) -> dict[str, Any]:
    """Return the row of a run."""
    run = RunDirectory.existing(path)
    config = run.config()
    languages = config.corpus.source_language, config.corpus.target_language
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
    return {
        "languages": f"{NAMES[languages[0]]} to {NAMES[languages[1]]}",
        "wiring": config.model.attention.wiring,
        "sentences": len(equal),
        **{name: round(value, 4) for name, value in count(iter(equal)).row().items()},
    }


def main() -> None:
    """Measure the runs that are named, and write the file of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    rows = [measure(path) for path in parser.parse_args().runs]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    result = json.loads(RESULTS.read_text())
    result["commit"] = commit.stdout.strip()
    result["tables"][0]["rows"] = rows
    RESULTS.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    assert set(NAMES) == set(LANGUAGES)
    main()
