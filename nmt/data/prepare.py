"""`nmt prepare`: read, filter, learn the subwords, encode, write. A finished corpus is reused.

The folder is written whole or not at all (`nmt.files.folder_atomically`), so a folder with the final name is complete.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from nmt.config import CorpusConfig, ExamplesConfig
from nmt.config.corpus import SPLITS
from nmt.corpus.filters import Filters, HoldOut
from nmt.corpus.pairs import ReadReport, SentencePair
from nmt.corpus.sources import read_pairs, source_files
from nmt.data.examples import SYMBOLS, ExampleWriter
from nmt.data.held_out import describe_cut, encode_pairs
from nmt.data.kinds import Kind, longest_source, part_records
from nmt.data.prepared import FORMAT, VOCABULARY, Prepared, prepared_path
from nmt.data.shards import MANIFEST, SIDES, ShardWriter, file_record
from nmt.data.spools import Spools
from nmt.data.subwords import Subwords, train_subwords
from nmt.data.summary import Fit, summary
from nmt.data.symbols import Symbols
from nmt.data.vocabulary import Inherited, why_other
from nmt.errors import DataError, StorageError
from nmt.files import folder_atomically, remove
from nmt.lock import Held, locked
from nmt.wording import counted

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
        self.fit = Fit()
        self.num_examples = dict.fromkeys(SYMBOLS, 0)
        self.inherited = Inherited.of(corpus.subwords.vocabulary) if corpus.subwords.inherits else None
        self.symbols = self.named_symbols()
        self.spools = Spools(folder, Kind.of(corpus), self.hold_out)

    def run(self) -> None:
        """Prepare the corpus; each step writes its files into the folder."""
        sources = [(path, _stat(path)) for path in source_files(self.corpus)]
        # The small splits come first, so that a mistake in their settings shows at once and not after an hour.
        texts = [name for split in HELD_OUT for name in self.write_text(split)]
        num_read = self.spool()
        num_held = 0
        if self.hold_out.wanted:
            texts += self.write_held_out()
            num_held = self.spools.hold_back()
        vocabulary = self.make_vocabulary()
        subwords = Subwords.load(self.folder / VOCABULARY)
        for part in part_records(self.corpus, self.spools.num_pairs):  # an old vocabulary may have no symbols
            self.symbols.prefix(subwords, part["target"], part["tag"])
        writers = self.encode(subwords)
        self.spools.remove()
        self.check_left(num_read, {kind: writer.num_pairs for kind, writer in writers.items()})
        self.warn_of_long_lines(subwords)
        seconds = time.monotonic() - self.started
        manifest = {
            "format": FORMAT,
            "corpus": asdict(self.corpus),
            "sources": [_source_record(path, before) for path, before in sources],
            "pairs_read": num_read,
            "pairs_kept": sum(writer.num_pairs for writer in writers.values()),
            "dropped": self.filters.dropped,
            "held_out": num_held,
            "empty_rows": {split: report.empty_rows for split, report in self.reports.items()},
            "invalid_utf8_lines": {split: report.invalid_lines for split, report in self.reports.items()},
            **{f"{side}_pieces": sum(writer.num_pieces[side] for writer in writers.values()) for side in SIDES},
            "longest_source_pieces": longest_source(self.corpus, writers),
            "vocabulary_size": subwords.size,
            **vocabulary,
            "lines_in_bytes": self.fit.lines_in_bytes,
            "characters_in_bytes": dict(self.fit.characters_in_bytes.most_common()),
            "examples": self.num_examples,
            "symbols": [kind for kind, count in self.num_examples.items() if count],
            **self.meanings(writers),
            "files": {name: file_record(self.folder / name) for name in sorted((VOCABULARY, *texts))},
            "shards": {kind.shards: writer.record() for kind, writer in writers.items()},
            "seconds": round(seconds, 1),
        }
        notes = [note for report in self.reports.values() for note in report.notes]
        for line in summary(self.corpus, manifest, self.filters.describe(), self.hold_out.wanted, notes, self.fit):
            self.log(line)
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=True) + "\n")

    def named_symbols(self) -> Symbols:
        """Return the meanings of the symbols: those of the inherited vocabulary come first.

        A corpus in two languages names its target language only if the vocabulary has languages already.
        """
        before = self.inherited.symbols if self.inherited else Symbols()
        languages: Iterable[str] = ()
        if self.corpus.directions or before.languages:
            languages = (direction.target for direction in self.corpus.all_directions())
        try:
            return before.extended(languages, filter(None, self.corpus.train.tags))
        except DataError as error:
            raise DataError(f"corpus.subwords.vocabulary={self.corpus.subwords.vocabulary}: {error}") from error

    def meanings(self, kinds: Iterable[Kind]) -> dict[str, Any]:
        """Return what the manifest records of symbols and parts: nothing for a corpus in two languages without tags."""
        record: dict[str, Any] = self.symbols.to_dict() if self.symbols != Symbols() else {}
        if self.corpus.directions or any(self.corpus.train.tags):
            record["parts"] = part_records(self.corpus, kinds)
        return record

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
        """Write the text of dev or test, and return the names of the files.

        There is one file per side, one of domains if there are any, and one of directions in a corpus with directions.
        """
        paths = [self.folder / f"{split}.{side}.txt" for side in (*SIDES, "domain", "direction")]
        num_pairs = num_bytes = num_blank = 0
        used = {paths[0], paths[1], *(paths[3:] if self.corpus.directions else ())}
        with ExitStack() as files:
            streams = [files.enter_context(path.open("wb")) for path in paths]
            for pair in pairs:
                lines = [f"{text}\n".encode() for text in (*pair[:3], pair.direction or "")]
                for stream, line in zip(streams, lines, strict=True):
                    stream.write(line)
                num_pairs += 1
                num_bytes += sum(map(len, lines))
                num_blank += not (pair.source.strip() and pair.target.strip())
                if pair.domain:
                    used.add(paths[2])
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
        kept = [path for path in paths if path in used and num_pairs]
        for path in paths:
            if path not in kept:
                path.unlink()
        return [path.name for path in kept]

    def write_held_out(self) -> list[str]:
        """Write the pairs held out from the training text as dev and test, and return the names of the files."""
        settings = [f"corpus.{split}.from_train={getattr(self.corpus, split).from_train}" for split in HELD_OUT]
        if self.hold_out.num_copies >= self.spools.total:
            raise DataError(
                f"{' and '.join(settings)} leave none of {self.spools.total:,} training pairs: hold out fewer"
            )
        names = []
        for split in HELD_OUT:
            if pairs := self.hold_out.pairs(split):
                names += self.write_pairs(split, chain.from_iterable(map(self.in_all_directions, pairs)))
                self.log(f"{self.corpus.name}: {counted(len(pairs), 'pair')} held out of the training text for {split}")
        return names

    def in_all_directions(self, pair: SentencePair) -> list[SentencePair]:
        """Return a pair of the training text in each direction of the corpus between its languages."""
        if pair.direction is None:
            return [pair]
        back = pair._replace(source=pair.target, target=pair.source, direction=pair.direction.reverse)
        both = {pair.direction: pair, pair.direction.reverse: back}
        return [both[direction] for direction in self.corpus.all_directions()]

    def warn_of_long_lines(self, subwords: Subwords) -> None:
        """Log which pairs of dev and test are too long to be scored whole."""
        for split in HELD_OUT:
            sides = [self.folder / f"{split}.{side}.txt" for side in SIDES]
            if sides[0].exists():
                texts = [side.read_bytes().decode().split("\n")[:-1] for side in sides]
                if told := describe_cut(encode_pairs(subwords, *texts).cut):
                    self.log(f"{self.corpus.name}: {split}: {told}")

    def spool(self) -> int:
        """Write the filtered training text to plain files. Return the number of pairs read."""
        num_read = 0
        with self.spools:
            for pair in read_pairs(self.corpus, "train", self.reports["train"]):
                num_read += 1
                if self.filters.keep(pair):
                    self.spools.append(pair)
                if num_read % 10000 == 0:
                    self.progress(f"{num_read:,} pairs read")
        if not num_read:
            named = ": name its files in corpus.train" if self.corpus.source == "files" else ""
            raise DataError(f"corpus.train: there is no training text in corpus.source={self.corpus.source}{named}")
        self.check_left(num_read, self.spools.num_pairs)
        return num_read

    def make_vocabulary(self) -> dict[str, Any]:
        """Learn the vocabulary from pairs spread evenly over the corpus, or take over another one.

        Return what the manifest records: where it came from, or the number of sentences it was learned from.
        """
        if self.inherited:
            (self.folder / VOCABULARY).write_bytes(self.inherited.model)
            return {"vocabulary_sentences": 0, "vocabulary": self.inherited.record()}
        num_sampled = min(self.spools.total, max(1, self.corpus.subwords.training_sentences // 2))
        self.log(f"{self.corpus.name}: learning the vocabulary from {2 * num_sampled:,} sentences")
        sample = chain.from_iterable(self.spools.sample(num_sampled))
        train_subwords(sample, self.corpus.subwords, self.folder / VOCABULARY)
        return {"vocabulary_sentences": 2 * num_sampled}

    def encode(self, subwords: Subwords) -> dict[Kind, ShardWriter]:
        """Encode the spooled pairs and write the training arrays. Return their writers, closed, by kind."""
        examples = self.example_writer(subwords)
        writers: dict[Kind, ShardWriter] = {}
        num_encoded = 0
        for kind in self.spools.num_pairs:
            pairs = self.spools.pairs(kind)
            with ShardWriter(self.folder, subwords.size, kind.shards) as writers[kind]:
                while chunk := list(islice(pairs, _CHUNK)):
                    self.encode_chunk(chunk, subwords, examples, writers[kind])
                    num_encoded += len(chunk)
                    self.progress(f"{num_encoded:,} of {self.spools.total:,} pairs encoded")
        return writers

    def encode_chunk(
        self, chunk: list[tuple[str, str]], subwords: Subwords, examples: ExampleWriter | None, writer: ShardWriter
    ) -> None:
        """Encode some pairs and write those that pass the filters."""
        sources = subwords.encode_batch([source for source, _ in chunk])
        targets = subwords.encode_batch([target for _, target in chunk])
        kept = [
            place
            for place, pair in enumerate(zip(sources, targets, strict=True))
            if self.filters.keep_encoded(len(pair[0]), len(pair[1]))
        ]
        self.fit.add(subwords, chain.from_iterable(chunk), chain(sources, targets))
        if examples:
            self.put_examples(examples, subwords, chunk, kept, sources, targets)
        writer.append([sources[place] for place in kept], [targets[place] for place in kept])

    def example_writer(self, subwords: Subwords) -> ExampleWriter | None:
        """Return what rewrites pairs with symbols; None if the settings do not ask for any."""
        if self.corpus.examples == ExamplesConfig():
            return None
        num_counted = min(self.spools.total, _COUNTED)
        return ExampleWriter(self.corpus.examples, subwords, lambda: self.spools.sample(num_counted))

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

    def check_left(self, num_read: int, num_pairs: Mapping[Kind, int]) -> None:
        """Raise DataError if no training pair is left, or none of two languages or of a tag."""
        if not any(num_pairs.values()):
            raise DataError(f"corpus.filters leave none of {num_read:,} training pairs: {self.filters.describe()}")
        if empty := [str(kind) or "text without a tag" for kind, count in num_pairs.items() if not count]:
            raise DataError(
                f"corpus.train has no pair of {empty[0]} that passes corpus.filters: give text for it, or leave it out "
                "of corpus.directions and corpus.train.tags"
            )

    def progress(self, text: str) -> None:
        """Log the progress, at most once every ten seconds."""
        if time.monotonic() - self.last_progress >= _PROGRESS_SECONDS:
            self.last_progress = time.monotonic()
            self.log(f"{self.corpus.name}: {text}")


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
    return why_other(prepared.manifest["vocabulary"]) if "vocabulary" in prepared.manifest else ""


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
