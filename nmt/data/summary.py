"""What `nmt prepare` reports of a corpus: how much text was kept, and how the vocabulary fits it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nmt.config import CorpusConfig
from nmt.data.subwords import Subwords, list_characters
from nmt.wording import brief, percent


@dataclass
class Fit:
    """How a vocabulary cuts text."""

    characters_in_bytes: Counter[str] = field(default_factory=Counter)
    """How often each character without a subword of its own occurs."""
    lines_in_bytes: int = 0
    """Lines with such characters."""
    characters: int = 0
    words: int = 0
    pieces: int = 0
    """Subwords."""

    def add(self, subwords: Subwords, lines: Iterable[str], encoded: Iterable[np.ndarray]) -> None:
        """Count lines and their subwords."""
        for line in lines:
            self.characters += len(line)
            self.words += len(line.split())
            if unlearned := subwords.unlearned(line):
                self.characters_in_bytes.update(unlearned)
                self.lines_in_bytes += 1
        self.pieces += sum(map(len, encoded))

    def __str__(self) -> str:
        share = sum(self.characters_in_bytes.values()) / max(self.characters, 1)
        return (
            f"{self.pieces / max(self.words, 1):.2f} subwords per word, {percent(share)} of the characters are encoded "
            "as bytes"
        )


def summary(
    corpus: CorpusConfig, manifest: dict[str, Any], dropped: str, num_wanted: int, notes: Sequence[str], fit: Fit
) -> Iterator[str]:
    """Yield a summary in a few lines.

    `dropped` describes what the filters dropped, and `num_wanted` is the number of pairs to hold out.
    """
    name = corpus.name
    yield (
        f"{name}: {manifest['pairs_read']:,} pairs read, {manifest['pairs_kept']:,} kept"
        + (f", {manifest['held_out']:,} held out" if manifest["held_out"] else "")
        + (f"; dropped: {dropped}" if dropped else "")
    )
    if parts := manifest.get("parts"):
        counts = {part["name"]: manifest["shards"][part["shards"]]["pairs"] for part in parts}
        yield f"{name}: pairs by {'direction' if corpus.directions else 'tag'}: {_counts(counts)}"
    if manifest["held_out"] > num_wanted:
        more = manifest["held_out"] - num_wanted
        yield f"{name}: {more:,} copies of the held-out pairs removed from the training text"
    if empty := _counts(manifest["empty_rows"]):
        what = "pairs that lack a side" if corpus.directions else "rows left out because they are blank or lack a text"
        yield f"{name}: {what}: {empty}"
    if invalid := _counts(manifest["invalid_utf8_lines"]):
        yield f"{name}: lines that were not valid UTF-8, invalid bytes replaced: {invalid}"
    for note in notes:
        yield f"{name}: {note}"
    if inherited := manifest.get("vocabulary"):
        yield (
            f"vocabulary: {manifest['vocabulary_size']:,} subwords of {inherited['from']}; settings of learning, such "
            "as corpus.subwords.vocab_size, have no effect"
        )
        yield f"{name}: with this vocabulary, {fit}"
    else:
        yield (
            f"vocabulary: {manifest['vocabulary_size']:,} {corpus.subwords.kind} subwords from "
            f"{manifest['vocabulary_sentences']:,} sentences"
        )
    if fit.characters_in_bytes:
        yield (
            f"{len(fit.characters_in_bytes):,} characters, in {fit.lines_in_bytes:,} lines, are not in the "
            f"vocabulary and are encoded as bytes: {list_characters(fit.characters_in_bytes)}"
        )
    if shown := _counts(manifest["examples"]):
        yield f"{name}: pairs rewritten with symbols: {shown}"
    yield (
        f"{brief(manifest['source_pieces'])} source and {brief(manifest['target_pieces'])} target "
        f"subwords, {manifest['seconds']:.0f} s"
    )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
