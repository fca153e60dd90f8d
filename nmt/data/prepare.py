"""`nmt prepare`: read, filter, learn the subwords, encode, write. A finished corpus is reused.

The folder is written whole or not at all (`nmt.files.folder_atomically`), so a folder with the final name is complete.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from nmt.config import CorpusConfig, ExamplesConfig
from nmt.corpus.filters import Filters, HoldOut
from nmt.corpus.pairs import ReadReport, SentencePair
from nmt.corpus.sources import SPLITS, read_pairs, source_files
from nmt.data.examples import SYMBOLS, ExampleWriter
from nmt.data.held_out import describe_cut, encode_pairs
from nmt.data.prepared import FORMAT, VOCABULARY, Prepared, prepared_path
from nmt.data.shards import MANIFEST, SIDES, ShardWriter, file_record
from nmt.data.subwords import Subwords, list_characters, train_subwords
from nmt.errors import DataError, StorageError
from nmt.files import folder_atomically, remove
from nmt.lock import Held, locked
from nmt.wording import brief, counted

HELD_OUT = ("dev", "test")
_MOST_PAIRS = 1_000_000  # of dev or test
_MOST_BYTES = 1 << 28
_CHUNK = 20000  # sentence pairs per call of the encoder
_COUNTED = 100_000  # pairs in which words that translate each other are counted
_PROGRESS_SECONDS = 10.0

Log = Callable[[str], None]


def prepare(corpus: CorpusConfig, log: Log) -> Prepared:
    """Prepare the corpus and return it. A finished corpus is reused unless its source files have changed.

    DataError if the text or its settings cannot be used; StorageError if the folder cannot be written.
    """
    path = prepared_path(corpus)
    # No lock if no file must be read whole: many processes may start at the same moment.
    if path.exists() and _is_verified(path) and not _why_stale(path, corpus):
        return _finished(path, corpus, log)
    try:
        with _lock(path, log):
            return _prepare_alone(path, corpus, log)
    except StorageError:
        # A finished corpus may be in a place where this process cannot write.
        if path.exists() and not _why_stale(path, corpus):
            return _finished(path, corpus, log)
        raise


def _prepare_alone(path: Path, corpus: CorpusConfig, log: Log) -> Prepared:
    if path.exists():
        stale = _why_stale(path, corpus)
        if not stale:
            return _finished(path, corpus, log)
        log(f"{corpus.name}: {stale}; preparing again")
    with folder_atomically(path) as folder:
        _remove_leftovers(path.parent, folder)
        _Preparation(corpus, folder, log).run()
        remove(path)
    return Prepared.open(path)


def _finished(path: Path, corpus: CorpusConfig, log: Log) -> Prepared:
    prepared = Prepared.open(path)
    log(f"{corpus.name}: {prepared.manifest['pairs_kept']:,} pairs are prepared in {path}")
    return prepared


class _Preparation:
    """One preparation of a corpus, in an empty folder."""

    def __init__(self, corpus: CorpusConfig, folder: Path, log: Log) -> None:
        self.corpus = corpus
        self.folder = folder
        self.log = log
        self.started = time.monotonic()
        self.last_progress = self.started
        self.filters = Filters(corpus.filters)
        self.hold_out = HoldOut(corpus.dev.from_train, corpus.test.from_train)
        self.reports = {split: ReadReport() for split in SPLITS}
        self.characters_in_bytes: Counter[str] = Counter()
        self.num_lines_in_bytes = 0
        self.num_examples = dict.fromkeys(SYMBOLS, 0)
        self.spools = {side: folder / f"{side}.spool" for side in SIDES}

    def run(self) -> None:
        """Prepare the corpus; each step writes its files into the folder."""
        sources = [(path, _stat(path)) for path in source_files(self.corpus)]
        # The small splits come first, so that a mistake in their settings shows at once and not after an hour.
        texts = [name for split in HELD_OUT for name in self.write_text(split)]
        num_read, num_spooled = self.spool()
        if self.hold_out.wanted:
            texts += self.write_held_out(num_spooled)
            num_spooled -= self.hold_out.num_copies
        num_learnt = self.learn_subwords(num_spooled)
        subwords = Subwords.load(self.folder / VOCABULARY)
        writer = self.encode(subwords, num_spooled)
        for spool in self.spools.values():
            spool.unlink()
        self.check_kept(num_read, writer.num_pairs)
        self.warn_of_long_lines(subwords)
        seconds = time.monotonic() - self.started
        manifest = {
            "format": FORMAT,
            "corpus": asdict(self.corpus),
            "sources": [_source_record(path, before) for path, before in sources],
            "pairs_read": num_read,
            "pairs_kept": writer.num_pairs,
            "dropped": self.filters.dropped,
            "held_out": self.hold_out.num_copies,
            "empty_rows": {split: report.empty_rows for split, report in self.reports.items()},
            "invalid_utf8_lines": {split: report.invalid_lines for split, report in self.reports.items()},
            "source_pieces": writer.num_pieces["source"],
            "target_pieces": writer.num_pieces["target"],
            "longest_source_pieces": writer.longest["source"],
            "vocabulary_size": subwords.size,
            "vocabulary_sentences": num_learnt,
            "lines_in_bytes": self.num_lines_in_bytes,
            "characters_in_bytes": dict(self.characters_in_bytes.most_common()),
            "examples": self.num_examples,
            "symbols": [kind for kind, count in self.num_examples.items() if count],
            "files": {name: file_record(self.folder / name) for name in sorted((VOCABULARY, *texts))},
            "shards": {"train": writer.record()},
            "seconds": round(seconds, 1),
        }
        self.report(manifest)
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=True) + "\n")

    def write_text(self, split: str) -> list[str]:
        """Write dev or test as text, and return the names of its files.

        There are none yet if the split is held out from the training text. DataError if there is no dev text at all.
        """
        pairs = read_pairs(self.corpus, split, self.reports[split])
        names = self.write_pairs(split, pairs)
        if not names and split == "dev" and not self.corpus.dev.from_train:
            raise DataError(
                f"corpus.dev: corpus.source={self.corpus.source} has no validation text, which is needed to score a "
                "model: name its files, or set corpus.dev.from_train to hold out a few thousand pairs"
            )
        return names

    def write_pairs(self, split: str, pairs: Iterable[SentencePair]) -> list[str]:
        """Write the text of dev or test: one file per side, and one of domains if there are any. Return their names."""
        paths = [self.folder / f"{split}.{side}.txt" for side in (*SIDES, "domain")]
        num_pairs = num_bytes = num_blank = 0
        has_domains = False
        with ExitStack() as files:
            streams = [files.enter_context(path.open("wb")) for path in paths]
            for pair in pairs:
                lines = [f"{text}\n".encode() for text in pair]
                for stream, line in zip(streams, lines, strict=True):
                    stream.write(line)
                num_pairs += 1
                num_bytes += sum(map(len, lines))
                num_blank += not (pair.source.strip() and pair.target.strip())
                has_domains |= bool(pair.domain)
                # A run loads this text into memory.
                if num_pairs > _MOST_PAIRS or num_bytes > _MOST_BYTES:
                    raise DataError(
                        f"corpus.{split} has more than {_MOST_PAIRS:,} pairs or {_MOST_BYTES:,} bytes: a few thousand "
                        "pairs are enough to score a model; name smaller files"
                    )
        if num_pairs and num_blank == num_pairs:
            raise DataError(f"corpus.{split}: all of its {num_pairs:,} pairs have a blank side: name other files")
        if num_blank:
            self.log(f"{self.corpus.name}: {num_blank:,} of {num_pairs:,} pairs of {split} have a blank side")
        kept = paths if has_domains else paths[:2]
        if not num_pairs:
            kept = []
        for path in paths:
            if path not in kept:
                path.unlink()
        return [path.name for path in kept]

    def write_held_out(self, num_spooled: int) -> list[str]:
        """Write the pairs held out from the training text as dev and test, and return the names of the files."""
        settings = [f"corpus.{split}.from_train={getattr(self.corpus, split).from_train}" for split in HELD_OUT]
        if self.hold_out.num_copies >= num_spooled:
            raise DataError(f"{' and '.join(settings)} leave none of {num_spooled:,} training pairs: hold out fewer")
        names = []
        for split in HELD_OUT:
            if pairs := self.hold_out.pairs(split):
                names += self.write_pairs(split, pairs)
                self.log(f"{self.corpus.name}: {counted(len(pairs), 'pair')} held out of the training text for {split}")
        return names

    def warn_of_long_lines(self, subwords: Subwords) -> None:
        """Log which pairs of dev and test are too long to be scored whole."""
        for split in HELD_OUT:
            sides = [self.folder / f"{split}.{side}.txt" for side in SIDES]
            if sides[0].exists():
                texts = [side.read_bytes().decode().split("\n")[:-1] for side in sides]
                if told := describe_cut(encode_pairs(subwords, *texts).cut):
                    self.log(f"{self.corpus.name}: {split}: {told}")

    def spool(self) -> tuple[int, int]:
        """Write the filtered training text to one plain file per side. Return (pairs read, pairs written)."""
        num_read = num_spooled = 0
        with self.spools["source"].open("wb") as sources, self.spools["target"].open("wb") as targets:
            for pair in read_pairs(self.corpus, "train", self.reports["train"]):
                num_read += 1
                if self.filters.keep(pair):
                    num_spooled += 1
                    sources.write(f"{pair.source}\n".encode())
                    targets.write(f"{pair.target}\n".encode())
                    if self.hold_out.wanted:
                        self.hold_out.offer(pair)
                if num_read % 10000 == 0:
                    self.progress(f"{num_read:,} pairs read")
        self.check_kept(num_read, num_spooled)
        return num_read, num_spooled

    def learn_subwords(self, num_spooled: int) -> int:
        """Learn the vocabulary from pairs spread evenly over the corpus. Return the number of sentences used."""
        num_sampled = min(num_spooled, max(1, self.corpus.subwords.training_sentences // 2))
        self.log(f"{self.corpus.name}: learning the vocabulary from {2 * num_sampled:,} sentences")
        sample = self.sample(num_sampled, num_spooled)
        train_subwords(chain.from_iterable(sample), self.corpus.subwords, self.folder / VOCABULARY)
        return 2 * num_sampled

    def sample(self, num_sampled: int, num_spooled: int) -> Iterator[tuple[str, str]]:
        """Yield `num_sampled` of the spooled pairs, spread evenly over them."""
        taken = 0
        for number, pair in enumerate(self.spooled()):
            # After n pairs, the sample has n * num_sampled / num_spooled of them, rounded down.
            if (number + 1) * num_sampled // num_spooled > taken:
                taken += 1
                yield pair

    def encode(self, subwords: Subwords, num_spooled: int) -> ShardWriter:
        """Encode the spooled pairs and write the training arrays. Return their writer, closed."""
        pairs = self.spooled()
        num_encoded = 0
        examples = self.example_writer(subwords, num_spooled)
        with ShardWriter(self.folder, subwords.size) as writer:
            while chunk := list(islice(pairs, _CHUNK)):
                sources = subwords.encode_batch([source for source, _ in chunk])
                targets = subwords.encode_batch([target for _, target in chunk])
                kept = [
                    place
                    for place, pair in enumerate(zip(sources, targets, strict=True))
                    if self.filters.keep_encoded(len(pair[0]), len(pair[1]))
                ]
                if examples:
                    self.put_examples(examples, subwords, chunk, kept, sources, targets)
                writer.append([sources[place] for place in kept], [targets[place] for place in kept])
                for line in chain.from_iterable(chunk):
                    if unlearned := subwords.unlearned(line):
                        self.characters_in_bytes.update(unlearned)
                        self.num_lines_in_bytes += 1
                num_encoded += len(chunk)
                self.progress(f"{num_encoded:,} of {num_spooled:,} pairs encoded")
        return writer

    def example_writer(self, subwords: Subwords, num_spooled: int) -> ExampleWriter | None:
        """Return what rewrites pairs with symbols; None if the settings do not ask for any."""
        if self.corpus.examples == ExamplesConfig():
            return None
        num_counted = min(num_spooled, _COUNTED)
        return ExampleWriter(self.corpus.examples, subwords, lambda: self.sample(num_counted, num_spooled))

    def put_examples(
        self,
        writer: ExampleWriter,
        subwords: Subwords,
        chunk: list[tuple[str, str]],
        kept: list[int],
        sources: list[np.ndarray],
        targets: list[np.ndarray],
    ) -> None:
        """Put examples with symbols in place of some encoded pairs, the ones at `kept`. One that is too long is not."""
        found = {place: example for place in kept if (example := writer.example(*chunk[place]))}
        most = self.corpus.filters.max_pieces
        encoded = zip(
            subwords.encode_parts([example.source for example in found.values()]),
            subwords.encode_parts([example.target for example in found.values()]),
            strict=True,
        )
        for (place, example), (source, target) in zip(found.items(), encoded, strict=True):
            if not most or max(len(source), len(target)) <= most:
                sources[place], targets[place] = source, target
                self.num_examples[example.kind] += 1

    def spooled(self) -> Iterator[tuple[str, str]]:
        """Yield (source, target) of the filtered training text, without the pairs held out from it."""
        with self.spools["source"].open("rb") as sources, self.spools["target"].open("rb") as targets:
            for source, target in zip(sources, targets, strict=True):
                pair = source[:-1].decode(), target[:-1].decode()
                if not (self.hold_out.wanted and self.hold_out.holds(*pair)):
                    yield pair

    def check_kept(self, num_read: int, num_kept: int) -> None:
        """Raise DataError if no training pair was read or kept."""
        if not num_read:
            named = ": name its files in corpus.train" if self.corpus.source == "files" else ""
            raise DataError(f"corpus.train: there is no training text in corpus.source={self.corpus.source}{named}")
        if not num_kept:
            raise DataError(f"corpus.filters leave none of {num_read:,} training pairs: {self.filters.describe()}")

    def progress(self, text: str) -> None:
        """Log the progress, at most once every ten seconds."""
        if time.monotonic() - self.last_progress >= _PROGRESS_SECONDS:
            self.last_progress = time.monotonic()
            self.log(f"{self.corpus.name}: {text}")

    def report(self, manifest: dict[str, Any]) -> None:
        """Log a summary in a few lines."""
        subwords, dropped = self.corpus.subwords, self.filters.describe()
        self.log(
            f"{self.corpus.name}: {manifest['pairs_read']:,} pairs read, {manifest['pairs_kept']:,} kept"
            + (f", {manifest['held_out']:,} held out" if manifest["held_out"] else "")
            + (f"; dropped: {dropped}" if dropped else "")
        )
        if manifest["held_out"] > self.hold_out.wanted:
            more = manifest["held_out"] - self.hold_out.wanted
            self.log(f"{self.corpus.name}: {more:,} copies of the held-out pairs removed from the training text")
        if empty := _counts(manifest["empty_rows"]):
            self.log(f"{self.corpus.name}: rows left out because they are blank or lack a text: {empty}")
        if invalid := _counts(manifest["invalid_utf8_lines"]):
            self.log(f"{self.corpus.name}: lines that were not valid UTF-8, invalid bytes replaced: {invalid}")
        for note in (note for report in self.reports.values() for note in report.notes):
            self.log(f"{self.corpus.name}: {note}")
        self.log(
            f"vocabulary: {manifest['vocabulary_size']:,} {subwords.kind} subwords from "
            f"{manifest['vocabulary_sentences']:,} sentences"
        )
        if self.characters_in_bytes:
            self.log(
                f"{len(self.characters_in_bytes):,} characters, in {self.num_lines_in_bytes:,} lines, are not in the "
                f"vocabulary and are encoded as bytes: {list_characters(self.characters_in_bytes)}"
            )
        if shown := _counts(self.num_examples):
            self.log(f"{self.corpus.name}: pairs rewritten with symbols: {shown}")
        self.log(
            f"{brief(manifest['source_pieces'])} source and {brief(manifest['target_pieces'])} target "
            f"subwords, {manifest['seconds']:.0f} s"
        )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)


def _stat(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _source_record(path: Path, before: tuple[int, int]) -> dict[str, Any]:
    record = file_record(path)
    if _stat(path) != before:
        raise DataError(f"{path} changed while it was read: prepare the corpus again when it is complete")
    return {"path": str(path), **record, "mtime_ns": before[1]}


def _why_stale(path: Path, corpus: CorpusConfig) -> str:
    """Return why a finished folder cannot be used as it is; an empty string if it can."""
    try:
        prepared = Prepared.open(path)
        if not prepared.is_verified:
            prepared.verify()
    except ValueError as error:
        return str(error)
    recorded = {record["path"]: record for record in prepared.manifest["sources"]}
    # A machine that has the prepared folder but not its source text can still train.
    present = [Path(name) for name in recorded if Path(name).exists()]
    if len(present) == len(recorded) and set(map(str, source_files(corpus))) != set(recorded):
        return "it has other source files than before"
    for source in present:
        record = recorded[str(source)]
        size, mtime_ns = _stat(source)
        same = size == record["bytes"] and (
            mtime_ns == record["mtime_ns"] or file_record(source)["sha256"] == record["sha256"]
        )
        if not same:
            return f"{source} has changed"
    return ""


def _is_verified(path: Path) -> bool:
    try:
        return Prepared.open(path).is_verified
    except DataError:
        return False


def _remove_leftovers(directory: Path, own: Path) -> None:
    """Remove the folders of killed preparations with other settings. A live one would hold its lock."""
    for path in directory.glob(".*-????????.tmp"):
        if path != own:
            with suppress(Held, OSError), locked(path.with_name(f"{path.name.removesuffix('.tmp')}.lock")):
                remove(path)


@contextmanager
def _lock(path: Path, log: Log) -> Iterator[None]:
    """Hold the lock that lets one process at a time prepare `path`. StorageError if it cannot be written."""
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = path.with_name(f".{path.name}.lock")
            held.enter_context(locked(lock, lambda other: log(f"{other} is preparing {path}: waiting for it")))
        except OSError as error:
            raise StorageError(
                f"corpus.directory={path.parent} cannot be written ({error.strerror or error}): choose another"
            ) from error
        yield
