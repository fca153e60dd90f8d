"""The training text of a corpus after all filters: rules of single pairs, comparisons of pairs, pairs held out."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nmt.config import CorpusConfig
from nmt.corpus.pairs import ReadReport, SentencePair
from nmt.corpus.rules import Candidate, key_rules
from nmt.corpus.sources import units
from nmt.data.kinds import Kind
from nmt.errors import DataError
from nmt.preparation.blocks import blocks, num_rows_of
from nmt.preparation.cleaning import OVERLAP, RANK, Cleaner, Dirty, clean_settings, example, overlap_key
from nmt.preparation.duplicates import HeldOutRanks, evenly, repeated, split_at
from nmt.preparation.splits import Splits
from nmt.preparation.store import StoredBlock, TextStore, Unit, in_kinds
from nmt.preparation.tally import EXAMPLES, Tally, ranks
from nmt.preparation.workers import shared_out

Tick = Callable[[str, float | None], None]
"""tick(text, share) is called during the work; `share`: the part of this stage that is done, None if unknown."""


@dataclass
class Block:
    """A block of the training text in memory: where its pairs are, and which of them are kept."""

    stored: StoredBlock
    name: str
    """Name of its files."""
    kept_N: np.ndarray
    """bool"""

    def places(self, kind: int) -> np.ndarray:
        """Return the places of the kept pairs of a kind (int64)."""
        start = sum(self.stored.pairs[:kind])
        return start + np.flatnonzero(self.kept_N[start : start + self.stored.pairs[kind]])


class SourceText(NamedTuple):
    """The text of one unit."""

    name: str
    num_read: int
    blocks: list[Block]

    @property
    def num_kept(self) -> int:
        """Pairs that are kept."""
        return sum(int(block.kept_N.sum()) for block in self.blocks)


class _End(NamedTuple):
    """The end of a unit, after some number of blocks to filter."""

    num_dirty: int
    unit: Unit
    num_rows: int
    num_blocks: int
    report: ReadReport


class FilteredText:
    """The filtered text of a corpus. Call `read`, then `drop_repeated`, `hold_out` and `drop_overlap`."""

    def __init__(self, corpus: CorpusConfig, store: TextStore, folder: Path, processes: int, tick: Tick) -> None:
        """`folder` has the text of dev and test that comes from files."""
        self.kinds = Kind.of(corpus)
        self.blocks: list[Block] = []
        self.sources: list[SourceText] = []
        self.report = ReadReport()
        self.tally = Tally()
        """Counts of what was read and dropped."""
        self.num_wanted = corpus.dev.from_train + corpus.test.from_train
        """Pairs to hold out."""
        self.num_held = 0
        """Pairs held out, copies included."""
        self._corpus, self._store, self._folder = corpus, store, folder
        self._processes, self._tick = processes, tick
        self._units: list[tuple[str, Unit]] = []
        self._ends: deque[_End] = deque()
        self._sizes = (0, 0)  # bytes read, bytes of all files

    @property
    def unit_names(self) -> list[str]:
        """Names of the folders of the text, which are hashes of how it was read."""
        return [unit.path.name for _, unit in self._units]

    @property
    def num_pairs(self) -> dict[Kind, int]:
        """Kept pairs of each kind."""
        counts = np.zeros(len(self.kinds), dtype=np.int64)
        for block in self.blocks:
            counts += [int(part.sum()) for part in in_kinds(block.stored, block.kept_N)]
        return dict(zip(self.kinds, counts.tolist(), strict=True))

    @property
    def total(self) -> int:
        """Kept pairs."""
        return sum(int(block.kept_N.sum()) for block in self.blocks)

    # ------------------------------------------------------------------------------------------ single pairs

    def read(self) -> None:
        """Read and filter what is not in the store yet, and open all blocks.

        DataError if a source cannot be read; what was filtered before stays in the store.
        """
        cleaned = shared_out(Cleaner, (self._corpus, self._folder), self._dirty(), self._processes)
        for num_cleaned, _ in enumerate(cleaned, start=1):
            self._finish_units(num_cleaned)
        while self._ends:
            self._finish_units(self._ends[0].num_dirty)
        self._store.keep_only(unit for _, unit in self._units)
        for name, unit in self._units:
            before = self.tally.counts["read"]
            found = []
            for stored, tally in unit.blocks():
                found.append(Block(stored, name, np.ones(stored.total, dtype=bool)))
                self.tally.add(tally)
            self.blocks += found
            self.sources.append(SourceText(name, self.tally.counts["read"] - before, found))
            record = unit.record() or {}
            self.report.invalid_lines += record["report"]["invalid_lines"]
            self.report.empty_rows += record["report"]["empty_rows"]
            self.report.notes += record["report"]["notes"]
        self.report.empty_rows += self.tally.counts.pop("empty_rows", 0)

    def _dirty(self) -> Iterator[Dirty]:
        """Yield the blocks that are not in the store, unit by unit."""
        settings = clean_settings(self._corpus)
        if self._corpus.filters.test_overlap:
            settings["held_out"] = Splits(self._corpus, self._folder).held_out_texts().digest()
        sources = units(self._corpus, "train")
        self._sizes = (0, sum(source.size for source in sources) if all(source.size for source in sources) else 0)
        left = self._corpus.max_pairs
        num_dirty = num_read = 0
        for source in sources:
            if self._corpus.max_pairs and left <= 0:
                break
            unit = self._store.unit({"source": source.key, "rows": left, **settings})
            self._units.append((source.name, unit))
            num_rows = self._rows_of_finished(unit)
            if num_rows is None:
                report = ReadReport()
                num_rows = num_blocks = 0
                for rows in blocks(source.read(report), left):
                    if not unit.has_block(num_blocks):
                        seed = unit.seed_of(num_blocks)
                        yield Dirty(unit.block_path(num_blocks), seed, rows, num_rows, source.name)
                        num_dirty += 1
                    num_rows += num_rows_of(rows)
                    num_blocks += 1
                    self._tick_read(num_read + num_rows, report.bytes_read)
                self._ends.append(_End(num_dirty, unit, num_rows, num_blocks, report))
            num_read += num_rows
            left -= num_rows if self._corpus.max_pairs else 0
            self._sizes = (self._sizes[0] + source.size, self._sizes[1])

    def _rows_of_finished(self, unit: Unit) -> int | None:
        """Return the number of rows of a unit whose blocks are all there and sound; None for another one."""
        record = unit.record()
        if record is None:
            return None
        try:
            unit.blocks()
        except DataError:
            return None  # the damaged block is removed, and made again
        return int(record["rows"])

    def _tick_read(self, num_rows: int, num_bytes: int) -> None:
        done, size = self._sizes
        share = (done + num_bytes) / size if size else None
        if self._corpus.max_pairs:
            share = max(share or 0.0, num_rows / self._corpus.max_pairs)
        self._tick(f"{num_rows:,} pairs read", share)

    def _finish_units(self, num_cleaned: int) -> None:
        """Record the units whose blocks are all stored, once this many blocks are."""
        while self._ends and self._ends[0].num_dirty <= num_cleaned:
            end = self._ends.popleft()
            end.unit.finish(end.num_rows, end.num_blocks, end.report)

    # ------------------------------------------------------------------------------------------ pairs compared

    def drop_repeated(self) -> None:
        """Drop pairs that are like an earlier one by a rule of `corpus.filters`, and count them."""
        for rule in key_rules(self._corpus.filters):
            total = self.total
            self._tick(f"comparing {total:,} pairs ({rule.name})", None)
            repeated_N = repeated(lambda name=rule.name: self._keys(name), total)  # type: ignore[misc]
            counts = [int(block.kept_N.sum()) for block in self.blocks]
            for block, repeated_K in zip(self.blocks, split_at(repeated_N, counts), strict=True):
                places = np.flatnonzero(block.kept_N)[repeated_K]
                self._show_dropped(f"dropped.{rule.name}", block, places)
                block.kept_N[places] = False

    def _keys(self, name: str) -> Iterator[np.ndarray]:
        return (block.stored.keys(name)[block.kept_N] for block in self.blocks)

    def _show_dropped(self, name: str, block: Block, places: np.ndarray) -> None:
        """Count the pairs at these places of a block, and keep examples of them."""
        self.tally.counts[name] += len(places)
        if not len(places):
            return
        order = ranks(block.stored.seed, places)
        shown = self.tally.examples.get(name, [])
        most = shown[-1][0] if len(shown) == EXAMPLES else (1 << 64) - 1
        chosen = [number for number in np.argsort(order)[:EXAMPLES].tolist() if int(order[number]) < most]
        if not chosen:
            return
        rows = block.stored.rows()
        for number, pair in zip(chosen, self._pairs_at(block, places[chosen]), strict=True):
            row = int(rows[places[number]])
            direction = pair.direction or self._corpus.sides
            self.tally.show(name, int(order[number]), example(pair.source, pair.target, direction, block.name, row))

    def _pairs_at(self, block: Block, places: np.ndarray) -> list[SentencePair]:
        """Return the pairs at these places of a block."""
        kind_of = np.searchsorted(np.cumsum(block.stored.pairs), places, side="right")
        kinds = [self.kinds[number] for number in kind_of.tolist()]
        texts, domains = block.stored.texts(places), block.stored.domains(places)
        return [
            SentencePair(source, target, domain, kind.tag, kind.direction)
            for source, target, domain, kind in zip(*texts, domains, kinds, strict=True)
        ]

    # ------------------------------------------------------------------------------------------ pairs held out

    def hold_out(self) -> dict[str, list[SentencePair]]:
        """Take the pairs of dev and test, and all their copies, out of the text. Return those pairs by split.

        Pairs with a tag are not chosen. DataError if no training pair would be left.
        """
        chosen = HeldOutRanks(self._corpus.dev.from_train, self._corpus.test.from_train)
        if not chosen.wanted:
            return {}
        for block in self.blocks:
            untagged_N = np.repeat([not kind.tag for kind in self.kinds], block.stored.pairs)
            chosen.offer(block.stored.keys(RANK)[block.kept_N & untagged_N])
        total = self.total
        found: dict[int, SentencePair] = {}
        for block in self.blocks:
            keys = block.stored.keys(RANK)
            places = np.flatnonzero(block.kept_N & chosen.holds(keys))
            if len(places):
                for key, pair in zip(keys[places].tolist(), self._pairs_at(block, places), strict=True):
                    if not pair.tag:
                        found.setdefault(key, pair)
                block.kept_N[places] = False
        self.num_held = total - self.total
        if not self.total:
            settings = [
                f"corpus.{split}.from_train={getattr(self._corpus, split).from_train}" for split in ("dev", "test")
            ]
            raise DataError(f"{' and '.join(settings)} leave none of {total:,} training pairs: hold out fewer")
        return {split: [found[key] for key in chosen.ranks(split).tolist()] for split in ("dev", "test")}

    def drop_overlap(self, held_out: Iterable[SentencePair]) -> None:
        """Drop pairs with a side that is in the held-out pairs, and count them, if `test_overlap` asks for it.

        The rule itself sees the texts of files only, since pairs are held out after all rules.
        """
        if not self._corpus.filters.test_overlap:
            return
        found = {
            overlap_key(place, Candidate(pair.source, pair.target, pair.direction or self._corpus.sides))
            for pair in held_out
            for place in range(2)
        }
        keys = np.array(sorted(found - {0}), dtype=np.uint64)
        if not len(keys):
            return
        for block in self.blocks:
            known_N = np.isin(block.stored.keys(OVERLAP[0]), keys) | np.isin(block.stored.keys(OVERLAP[1]), keys)
            places = np.flatnonzero(block.kept_N & known_N)
            self._show_dropped("dropped.test_overlap", block, places)
            block.kept_N[places] = False

    # ------------------------------------------------------------------------------------------ samples

    def sample(self, count: int) -> Iterator[tuple[str, str]]:
        """Yield `count` of the kept pairs, spread evenly over each kind and over all of them."""
        total, start = self.total, 0
        wanted: list[list[np.ndarray]] = [[] for _ in self.blocks]
        for kind in range(len(self.kinds)):
            for number, block in enumerate(self.blocks):
                places = block.places(kind)
                wanted[number].append(places[evenly(count, total, start, len(places))])
                start += len(places)
        items = [(block.stored, np.concatenate(each)) for block, each in zip(self.blocks, wanted, strict=True)]
        by_kind: list[list[list[tuple[str, str]]]] = [[] for _ in self.kinds]
        for of_block, texts in zip(wanted, shared_out(_reader, (), items, self._processes), strict=True):
            pairs = iter(zip(*texts, strict=True))
            for kind, mine in enumerate(of_block):
                by_kind[kind].append([next(pairs) for _ in range(len(mine))])
        return chain.from_iterable(chain.from_iterable(by_kind))


def _reader() -> Callable[[tuple[StoredBlock, np.ndarray]], tuple[list[str], list[str]]]:
    return lambda item: item[0].texts(item[1]) if len(item[1]) else ([], [])
