"""Filter a block of text by the rules of single pairs, and store what passes with the keys to compare pairs by.

Runs in several processes. Everything here is a function of the block and the settings.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nmt.config import CorpusConfig, Direction
from nmt.corpus.pairs import Rows
from nmt.corpus.rules import Candidate, Rules, fingerprint, key_rules, rank
from nmt.data.kinds import Kind
from nmt.preparation.splits import Splits
from nmt.preparation.store import write_block
from nmt.preparation.tally import Tally, count_lengths, ranks
from nmt.text.normalisation import CONTROLS
from nmt.text.punctuation import normaliser

RANK = "rank"
"""Name of the keys that choose held-out pairs."""
OVERLAP = ("overlap.source", "overlap.target")
"""Names of the keys by which the sides of a pair are looked for among held-out pairs."""
_UNSEEN = frozenset(CONTROLS - {"\t"})


class Dirty(NamedTuple):
    """A block to filter."""

    path: Path
    """Where its filtered text goes."""
    seed: int
    """`StoredBlock.seed`."""
    rows: Rows
    first_row: int
    """Number of its first row in its unit."""
    name: str
    """Name of its files, for examples."""


def clean_settings(corpus: CorpusConfig) -> dict[str, Any]:
    """Return the settings that filtered text depends on, besides its source."""
    filters = asdict(corpus.filters)
    del filters["max_pieces"]  # of encoded text
    return {
        "filters": filters,
        "punctuation": corpus.punctuation,
        "kinds": [str(kind) for kind in Kind.of(corpus)],
        "sides": str(corpus.sides),
        "ranked": _is_ranked(corpus),
    }


def _is_ranked(corpus: CorpusConfig) -> bool:
    return bool(corpus.dev.from_train or corpus.test.from_train)


class Cleaner:
    """Filters blocks of a corpus; call it with a block, which it writes to its path.

    `folder` has the text of dev and test that comes from files.
    """

    def __init__(self, corpus: CorpusConfig, folder: Path) -> None:
        self._kinds = Kind.of(corpus)
        self._sides = corpus.sides
        self._rules = Rules(corpus, Splits(corpus, folder).held_out_texts())
        self._keys = {f"key.{rule.name}": rule.key for rule in key_rules(corpus.filters)}
        self._is_ranked = _is_ranked(corpus)
        if self._is_ranked:
            self._keys[f"key.{RANK}"] = lambda candidate: rank(candidate.source, candidate.target)
            if corpus.filters.test_overlap:
                for place, name in enumerate(OVERLAP):
                    self._keys[f"key.{name}"] = partial(overlap_key, place)
        self._corpus = corpus

    def __call__(self, dirty: Dirty) -> None:
        tally = Tally()
        kept: list[tuple[int, Candidate]] = []
        counts = []
        for kind in self._kinds:
            before = len(kept)
            if kind.tag == dirty.rows.tag:
                kept += self._kept(dirty, kind.direction, tally)
            counts.append(len(kept) - before)
        columns = {
            name: np.fromiter((key(candidate) for _, candidate in kept), np.uint64, len(kept))
            for name, key in self._keys.items()
        }
        columns["row"] = np.fromiter((dirty.first_row + row for row, _ in kept), np.uint32, len(kept))
        domains = [dirty.rows.domains[row] for row, _ in kept] if self._is_ranked and dirty.rows.domains else []
        texts = [candidate.source for _, candidate in kept], [candidate.target for _, candidate in kept]
        write_block(dirty.path, texts, domains, columns, {"pairs": counts, "tally": tally.to_dict()})

    def _kept(self, dirty: Dirty, direction: Direction | None, tally: Tally) -> Iterator[tuple[int, Candidate]]:
        """Yield the pairs of a direction that pass, each with its row, and count the others."""
        languages = direction or self._sides
        written = dirty.rows.texts[languages.source], dirty.rows.texts[languages.target]
        sides = normalised(self._corpus, dirty.rows, languages)
        shown = _Shown(dirty, languages, sides, tally)
        self._count_changes(written, sides, shown, tally)
        source_words: list[int] = []
        target_words: list[int] = []
        scores: Sequence[float | None] = dirty.rows.scores or [None] * len(sides[0])
        for row, (source, target, score) in enumerate(zip(*sides, scores, strict=True)):
            if direction and not (source.strip() and target.strip()):
                tally.counts["empty_rows"] += 1  # the line lacks a language
                continue
            candidate = Candidate(source, target, languages, score)
            source_words.append(candidate.num_source_words)
            target_words.append(candidate.num_target_words)
            if refusal := self._rules.refusal(candidate):
                shown.add(f"dropped.{refusal}", row)
            else:
                yield row, candidate
        tally.counts["read"] += len(source_words)
        count_lengths(tally, "read", np.array(source_words, np.int64), np.array(target_words, np.int64))

    def _count_changes(
        self, written: tuple[list[str], list[str]], sides: tuple[list[str], list[str]], shown: "_Shown", tally: Tally
    ) -> None:
        """Count the pairs that normalisation changes: that of punctuation, here, and that of the vocabulary, later."""
        found: dict[str, list[set[int]]] = {
            "controls": [
                {row for row, text in enumerate(side) if not (text.isprintable() or _UNSEEN.isdisjoint(text))}
                for side in sides
            ],
            "unicode": [
                {row for row, text in enumerate(side) if not (text.isascii() or unicodedata.is_normalized("NFC", text))}
                for side in sides
            ],
        }
        if self._corpus.punctuation != "keep":
            found["punctuation"] = [
                {row for row, (before, after) in enumerate(zip(*each, strict=True)) if before != after}
                for each in zip(written, sides, strict=True)
            ]
        for name, (of_source, of_target) in found.items():
            for row in sorted(of_source | of_target):
                before = {"before_source": written[0][row], "before_target": written[1][row]}
                shown.add(f"changed.{name}", row, before if name == "punctuation" else {})


def overlap_key(place: int, candidate: Candidate) -> int:
    """Return the key of a side of a pair, 0 for the source; 0 if it has no text that a model could know."""
    text = candidate.near[place]
    return fingerprint(candidate.direction[place], text) if text else 0


def normalised(corpus: CorpusConfig, rows: Rows, direction: Direction) -> tuple[list[str], list[str]]:
    """Return the sources and targets of a direction, with punctuation as the corpus has it."""
    sides = rows.texts[direction.source], rows.texts[direction.target]
    if corpus.punctuation == "keep":
        return sides
    source, target = (
        list(map(normaliser(corpus.punctuation, language), texts))
        for language, texts in zip(direction, sides, strict=True)
    )
    return source, target


class _Shown:
    """Counts pairs by name, and keeps examples of each name."""

    def __init__(
        self, dirty: Dirty, direction: Direction, sides: tuple[Sequence[str], Sequence[str]], tally: Tally
    ) -> None:
        self._dirty, self._direction, self._sides, self._tally = dirty, direction, sides, tally
        self._ranks = ranks(dirty.seed, np.arange(len(sides[0]))).tolist()

    def add(self, name: str, row: int, more: dict[str, Any] | None = None) -> None:
        """Count the pair in this row, from 0 in its block."""
        self._tally.counts[name] += 1
        source, target = (side[row] for side in self._sides)
        score = self._dirty.rows.scores[row] if self._dirty.rows.scores else None
        place = self._dirty.first_row + row
        self._tally.show(
            name, self._ranks[row], example(source, target, self._direction, self._dirty.name, place, score, more)
        )


def example(
    source: str,
    target: str,
    direction: Direction,
    file: str,
    row: int,
    score: float | None = None,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a pair as an example of the report; `row` is counted from 0 here, and from 1 there."""
    return {
        "source": source,
        "target": target,
        "direction": str(direction),
        "file": file,
        "row": row + 1,
        "score": score,
        **(more or {}),
    }
