"""Encode a block of filtered text, rewrite some of its pairs with symbols, and count what the report shows.

Runs in several processes. Everything here is a function of the block, the settings and the vocabulary.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nmt.config import CorpusConfig, Direction, ExamplesConfig
from nmt.data.association import Associations
from nmt.data.examples import ExampleWriter
from nmt.data.kinds import Kind
from nmt.data.prepared import VOCABULARY
from nmt.data.subwords import Subwords
from nmt.data.word_cache import Cut, WordEncoder
from nmt.preparation.cleaning import example
from nmt.preparation.splits import Splits
from nmt.preparation.store import StoredBlock
from nmt.preparation.tally import WORD_BINS, Tally, count_characters, count_lengths, ranks

FINAL_PAIRS = 20
"""Pairs of the final text that the report shows."""


class Clean(NamedTuple):
    """A block to encode."""

    number: int
    """Number of the block in the corpus."""
    block: StoredBlock
    kept: bytes
    """Which of its pairs are left after all comparisons, as bits (`numpy.packbits`)."""
    name: str
    """Name of its files, for examples."""


class Side(NamedTuple):
    """The encoded texts of one side."""

    ids: np.ndarray
    """Subword ids of all texts, concatenated."""
    lengths: np.ndarray
    """int32: number of subwords of each text."""

    def only(self, kept_N: np.ndarray) -> "Side":
        """Return the texts that are True in `kept_N`."""
        return self if kept_N.all() else Side(self.ids[np.repeat(kept_N, self.lengths)], self.lengths[kept_N])

    def with_texts(self, new: dict[int, np.ndarray]) -> "Side":
        """Return the texts with other ids for some of them, by number."""
        texts = np.split(self.ids, np.cumsum(self.lengths)[:-1])
        for number, ids in new.items():
            texts[number] = ids.astype(self.ids.dtype)
        return Side(np.concatenate(texts), np.fromiter(map(len, texts), np.int32, len(texts)))


class Encoded(NamedTuple):
    """An encoded block."""

    sides: list[tuple[Side, Side]]
    """Sources and targets of each kind."""
    tally: Tally


class Encoder:
    """Encodes blocks of a corpus; call it with a block. `folder` has the vocabulary, and the text of dev and test."""

    def __init__(self, corpus: CorpusConfig, folder: Path, associations: Associations | None) -> None:
        self._corpus = corpus
        self._kinds = Kind.of(corpus)
        self._subwords = Subwords.load(folder / VOCABULARY)
        self._encoder = WordEncoder(self._subwords)
        self._seen = Splits(corpus, folder).seen()
        self._examples = None
        if corpus.examples != ExamplesConfig():
            self._examples = ExampleWriter(corpus.examples, self._subwords, associations)

    def __call__(self, clean: Clean) -> Encoded:
        tally = Tally()
        mask = np.unpackbits(np.frombuffer(clean.kept, np.uint8), count=clean.block.total).astype(bool)
        places = np.flatnonzero(mask)
        texts, rows = clean.block.texts(places), clean.block.rows()[places]
        if self._examples:
            self._examples.begin(clean.number)
        sides, start, end = [], 0, 0
        for kind, count in zip(self._kinds, clean.block.pairs, strict=True):
            first, end = int(np.searchsorted(places, start)), int(np.searchsorted(places, start + count))
            part = _Part(clean, kind.direction or self._corpus.sides, texts[0][first:end], texts[1][first:end])
            sides.append(self._encoded(part, rows[first:end], tally))
            start += count
        return Encoded(sides, tally)

    def _encoded(self, part: "_Part", rows: np.ndarray, tally: Tally) -> tuple[Side, Side]:
        """Encode the pairs of a kind, which come from these rows of their unit."""
        cut = self._cut(part.sources, tally), self._cut(part.targets, tally)
        found = Side(cut[0].ids, cut[0].lengths), Side(cut[1].ids, cut[1].lengths)
        lengths = found[0].lengths, found[1].lengths
        kept_N, why = np.ones(len(part.sources), dtype=bool), {}
        filters = self._corpus.filters
        if filters.blank:
            why["blank"] = np.minimum(*lengths) == 0
        if filters.max_pieces:
            why["max_pieces"] = np.maximum(*lengths) > filters.max_pieces
        order = ranks(part.clean.block.seed, rows)
        for name, refused_N in why.items():
            for number in np.flatnonzero(refused_N & kept_N).tolist():
                tally.counts[f"dropped.{name}"] += 1
                tally.show(f"dropped.{name}", int(order[number]), part.example(number, rows))
            kept_N &= ~refused_N
        numbers = np.flatnonzero(kept_N)
        self._count_kept(part, cut, numbers, rows, order, tally)
        if self._examples:
            found = self._rewritten(self._examples, part, found, numbers, rows, order, tally)
        return found[0].only(kept_N), found[1].only(kept_N)

    def _cut(self, texts: list[str], tally: Tally) -> Cut:
        """Encode the texts of a side, and count how the vocabulary cuts them."""
        cut = self._encoder.encode(texts)
        tally.counts["characters"] += sum(map(len, texts))
        tally.counts["words"] += int(cut.num_words.sum())
        tally.counts["whole_words"] += cut.num_whole
        tally.counts["pieces"] += len(cut.ids)
        strange = np.flatnonzero(self._encoder.is_byte[cut.ids])
        ends = np.cumsum(cut.lengths)
        for number in np.unique(np.searchsorted(ends, strange, side="right")).tolist():
            if unlearned := self._subwords.unlearned(texts[number]):
                tally.characters.setdefault("in_bytes", count_characters(())).update(unlearned)
                tally.counts["lines_in_bytes"] += 1
        tally.count("subwords", cut.ids, self._subwords.size)
        return cut

    def _count_kept(
        self,
        part: "_Part",
        cut: tuple[Cut, Cut],
        numbers: np.ndarray,
        rows: np.ndarray,
        order: np.ndarray,
        tally: Tally,
    ) -> None:
        """Count the pairs that are left, which have these numbers."""
        kept = [[side[number] for number in numbers.tolist()] for side in (part.sources, part.targets)]
        count_lengths(tally, "kept", cut[0].num_words[numbers], cut[1].num_words[numbers])
        for name, texts, side in zip(("source", "target"), kept, cut, strict=True):
            tally.count(f"kept.pieces.{name}", side.lengths[numbers], WORD_BINS)
            tally.characters[name] = tally.characters.get(name, count_characters(())) + count_characters(texts)
        for split, seen in self._seen.items():
            with_source = np.fromiter((text.strip() in seen.sources for text in kept[0]), bool, len(numbers))
            with_target = np.fromiter((text.strip() in seen.targets for text in kept[1]), bool, len(numbers))
            for name, each in (("source", with_source), ("target", with_target), ("both", with_source & with_target)):
                tally.counts[f"overlap.{split}.{name}"] += int(each.sum())
        for number in numbers[np.argsort(order[numbers])[:FINAL_PAIRS]].tolist():
            tally.show("final", int(order[number]), part.example(number, rows), FINAL_PAIRS)

    def _rewritten(
        self,
        writer: ExampleWriter,
        part: "_Part",
        found: tuple[Side, Side],
        numbers: np.ndarray,
        rows: np.ndarray,
        order: np.ndarray,
        tally: Tally,
    ) -> tuple[Side, Side]:
        """Return the encoded texts with examples in place of some pairs. One that is too long is left out."""
        tried = ((number, writer.example(part.sources[number], part.targets[number])) for number in numbers.tolist())
        made = {number: each for number, each in tried if each}
        if not made:
            return found
        encoded = zip(
            self._subwords.encode_parts([each.source for each in made.values()]),
            self._subwords.encode_parts([each.target for each in made.values()]),
            strict=True,
        )
        most = self._corpus.filters.max_pieces
        new: tuple[dict[int, np.ndarray], dict[int, np.ndarray]] = ({}, {})
        for (number, each), (source, target) in zip(made.items(), encoded, strict=True):
            if not most or max(len(source), len(target)) <= most:
                new[0][number], new[1][number] = source, target
                name = f"augmented.{each.kind}"
                tally.counts[name] += 1
                shown = part.example(number, rows)
                shown |= {"source": self._written(each.source), "target": self._written(each.target)}
                tally.show(name, int(order[number]), shown)
        return found[0].with_texts(new[0]), found[1].with_texts(new[1])

    def _written(self, parts: list[str | int]) -> str:
        """Return a rewritten text for a reader, with the names of its symbols."""
        return "".join(self._subwords.pieces([each])[0] if isinstance(each, int) else each for each in parts)


class _Part(NamedTuple):
    """The pairs of one kind in a block."""

    clean: Clean
    direction: Direction
    sources: list[str]
    targets: list[str]

    def example(self, number: int, rows: np.ndarray) -> dict[str, Any]:
        """Return a pair as an example of the report."""
        return example(self.sources[number], self.targets[number], self.direction, self.clean.name, int(rows[number]))
