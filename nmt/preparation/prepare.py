"""`nmt prepare`: read, filter, learn the subwords, encode, write, report. A finished corpus is reused.

The folder appears when it is complete. A preparation that was killed is resumed: filtered text stays in
NAME.text (`nmt.preparation.store`), and arrays that are not finished stay with their journal in a hidden folder.
"""

import errno
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nmt.config import CorpusConfig
from nmt.config.corpus import SPLITS
from nmt.corpus.pairs import ReadReport
from nmt.corpus.rules import whys
from nmt.corpus.sources import source_files, without_text
from nmt.data.association import Associations
from nmt.data.examples import KINDS, SYMBOLS
from nmt.data.kinds import Kind, longest_source, part_records
from nmt.data.prepared import FORMAT, VOCABULARY, Prepared, prepared_path
from nmt.data.shards import MANIFEST, SIDES, file_record
from nmt.data.subwords import Subwords, train_subwords
from nmt.data.symbols import Symbols
from nmt.data.vocabulary import Inherited
from nmt.errors import DataError, StorageError
from nmt.files import folder_atomically, read_json, remove, write_atomically
from nmt.preparation.encoding import Clean, Encoder
from nmt.preparation.filtered import FilteredText
from nmt.preparation.journal import JOURNAL, Journal
from nmt.preparation.progress import Stages
from nmt.preparation.report import REPORT, report
from nmt.preparation.reuse import Log, is_verified, preparing, remove_leftovers, source_record, state_of, why_stale
from nmt.preparation.splits import HELD_OUT, Splits
from nmt.preparation.store import TextStore
from nmt.preparation.summary import summary
from nmt.preparation.workers import available_cores, shared_out

_COUNTED = 100_000  # pairs in which words that translate each other are counted
_LEARNED = "vocabulary.json"
_LEARNED_SHAPE = {"key": str, "record": {str: object}}


def prepare(corpus: CorpusConfig, log: Log, processes: int = 0, stages: Stages | None = None) -> Prepared:
    """Prepare the corpus and return it. A finished corpus is reused unless its source files have changed.

    `processes`: how many share the work; 0: one per core. The result does not depend on it. `stages` reports the
    progress; None: to `log`. DataError if the text or its settings cannot be used; StorageError if the folder cannot be
    written; ProcessError if one of the processes dies.
    """
    path = prepared_path(corpus)
    # No lock if no file must be read whole: many processes may start at the same moment.
    if path.exists() and is_verified(path) and not why_stale(path, corpus):
        return _finished(path, corpus, log)
    stages = stages or Stages(lambda line, _share: log(f"{corpus.name}: {line}"))
    try:
        with preparing(path, corpus.name, log):
            return _prepare_alone(path, corpus, log, processes or available_cores(), stages)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        remedy = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check it"
        raise StorageError(
            f"corpus.directory={corpus.directory}: {error.strerror or error}{where}: {remedy}, or choose another "
            "folder; the same command resumes"
        ) from error
    except StorageError:
        # A finished corpus may be in a place where this process cannot write.
        if path.exists() and not why_stale(path, corpus):
            return _finished(path, corpus, log)
        raise


def _prepare_alone(path: Path, corpus: CorpusConfig, log: Log, processes: int, stages: Stages) -> Prepared:
    if path.exists():
        stale = why_stale(path, corpus)
        if not stale:
            return _finished(path, corpus, log)
        log(f"{corpus.name}: {stale}; preparing again")
    with folder_atomically(path, resumable=True) as folder:
        remove_leftovers(path, corpus.name)
        _Preparation(corpus, folder, log, processes, stages).run()
        remove(path)
    return Prepared.open(path)


def _finished(path: Path, corpus: CorpusConfig, log: Log) -> Prepared:
    prepared = Prepared.open(path)
    log(f"{corpus.name}: {prepared.manifest['pairs_kept']:,} pairs are prepared in {path}")
    return prepared


def text_store_path(corpus: CorpusConfig) -> Path:
    """Return the folder of the filtered text of a corpus, which all its preparations share."""
    return Path(corpus.directory) / f"{corpus.name}.text"


class _Preparation:
    """One preparation of a corpus, in a folder that may have what an earlier one left."""

    def __init__(self, corpus: CorpusConfig, folder: Path, log: Log, processes: int, stages: Stages) -> None:
        self.corpus = corpus
        self.folder = folder
        self.log = log
        self.processes = processes
        self.stages = stages
        self.kinds = Kind.of(corpus)
        self.reports = {split: ReadReport() for split in SPLITS}
        self.splits = Splits(corpus, folder, log)
        self.inherited = Inherited.of(corpus.subwords.vocabulary) if corpus.subwords.inherits else None
        self.symbols = self.named_symbols()

    def run(self) -> None:
        """Prepare the corpus; each step writes its files into the folder."""
        sources = [(path, state_of(path)) for path in source_files(self.corpus)]
        tick = self.stages.begin("read")
        # The small splits come first, so that a mistake in their settings shows at once and not after an hour.
        self.splits.write_files(self.reports)
        store = TextStore(text_store_path(self.corpus))
        text = FilteredText(self.corpus, store, self.folder, self.processes, tick)
        text.read()
        self.reports["train"] = text.report
        self.check_left(text)
        self.stages.begin("compare")
        text.drop_repeated()
        held_out = text.hold_out()
        num_held = text.num_held
        text.drop_overlap(self.splits.in_all_directions(held_out))
        self.splits.write_held_out(held_out)
        self.check_left(text)
        key = self.key_of(text)
        self.stages.begin("vocabulary")
        vocabulary = self.make_vocabulary(text, key)
        subwords = Subwords.load(self.folder / VOCABULARY)
        for part in part_records(self.corpus, self.kinds):  # an old vocabulary may have no symbols
            self.symbols.prefix(subwords, part["target"], part["tag"])
        self.stages.begin("encode")
        journal = self.encode(text, subwords, key)
        self.check_encoded(text, journal)
        self.splits.warn_of_long_lines(subwords)
        self.stages.begin("finish")
        dropped = {
            name: text.tally.counts[f"dropped.{name}"] + journal.tally.counts[f"dropped.{name}"] for name in self.why
        }
        manifest = {
            "format": FORMAT,
            "corpus": asdict(self.corpus),
            "sources": [source_record(path, before) for path, before in sources],
            "pairs_read": text.tally.counts["read"],
            "pairs_kept": sum(writer.num_pairs for writer in journal.writers.values()),
            "dropped": dropped,
            "held_out": num_held,
            "empty_rows": {split: each.empty_rows for split, each in self.reports.items()},
            "invalid_utf8_lines": {split: each.invalid_lines for split, each in self.reports.items()},
            **{f"{side}_pieces": sum(each.num_pieces[side] for each in journal.writers.values()) for side in SIDES},
            "longest_source_pieces": longest_source(self.corpus, journal.writers),
            "vocabulary_size": subwords.size,
            **vocabulary,
            "lines_in_bytes": journal.tally.counts["lines_in_bytes"],
            "characters_in_bytes": dict(journal.tally.characters.get("in_bytes", Counter()).most_common()),
            **self.examples_record(journal),
            **self.meanings(),
            "files": {name: file_record(self.folder / name) for name in sorted((VOCABULARY, *self.splits.names))},
            "shards": {kind.shards: writer.record() for kind, writer in journal.writers.items()},
        }
        self.stages.end()
        manifest["seconds"] = round(sum(self.stages.seconds.values()), 1)
        self.write_report(manifest, text, journal, subwords)
        notes = [note for each in self.reports.values() for note in each.notes]
        described = self.describe(dropped)
        for line in summary(self.corpus, manifest, described, text.num_wanted, notes, journal.tally):
            self.log(line)
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=True) + "\n")
        for name in (JOURNAL, _LEARNED):
            (self.folder / name).unlink()

    @property
    def why(self) -> dict[str, str]:
        """Why each rule drops pairs, by its name, in the order of counting."""
        return whys(self.corpus)

    def describe(self, dropped: Mapping[str, int]) -> str:
        """List how many pairs each rule dropped and why: "5 with more than 200 subwords (max_pieces)"."""
        return ", ".join(f"{dropped[name]:,} {why} ({name})" for name, why in self.why.items() if dropped[name])

    def named_symbols(self) -> Symbols:
        """Return the meanings of the symbols: those of the inherited vocabulary come first.

        A corpus in two languages names its target language only if the vocabulary has languages already.
        """
        before = self.inherited.symbols if self.inherited else Symbols()
        languages: list[str] = []
        if self.corpus.directions or before.languages:
            languages = [direction.target for direction in self.corpus.all_directions()]
        try:
            return before.extended(languages, filter(None, self.corpus.train.tags))
        except DataError as error:
            raise DataError(f"corpus.subwords.vocabulary={self.corpus.subwords.vocabulary}: {error}") from error

    def meanings(self) -> dict[str, Any]:
        """Return what the manifest records of symbols and parts: nothing for a corpus in two languages without tags."""
        record: dict[str, Any] = self.symbols.to_dict() if self.symbols != Symbols() else {}
        if self.corpus.directions or any(self.corpus.train.tags):
            record["parts"] = part_records(self.corpus, self.kinds)
        return record

    def key_of(self, text: FilteredText) -> str:
        """Return a hash of all that the vocabulary and the arrays depend on, to know what an earlier call left."""
        splits = {split: [self.splits.texts(split), self.splits.directions(split)] for split in HELD_OUT}
        described = {
            "settings": prepared_path(self.corpus).name,
            "units": text.unit_names,
            "splits": splits,
            "vocabulary": self.inherited.record() if self.inherited else None,
        }
        canonical = json.dumps(described, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(canonical.encode(errors="surrogatepass")).hexdigest()

    def make_vocabulary(self, text: FilteredText, key: str) -> dict[str, Any]:
        """Learn the vocabulary from pairs spread evenly over the corpus, or take over another one.

        Return what the manifest records: where it came from, or the number of sentences it was learned from.
        """
        with suppress(OSError, ValueError):
            learned = read_json(self.folder / _LEARNED, _LEARNED_SHAPE)
            if learned["key"] == key:
                return dict(learned["record"])
        if self.inherited:
            content = self.inherited.model
            record: dict[str, Any] = {"vocabulary_sentences": 0, "vocabulary": self.inherited.record()}
        else:
            total = text.total
            num_sampled = min(total, max(1, self.corpus.subwords.training_sentences // 2))
            self.log(f"{self.corpus.name}: learning the vocabulary from {2 * num_sampled:,} sentences")
            sentences = (each for pair in text.sample(num_sampled) for each in pair)
            train_subwords(sentences, self.corpus.subwords, self.folder / VOCABULARY)
            content = (self.folder / VOCABULARY).read_bytes()
            record = {"vocabulary_sentences": 2 * num_sampled}
        write_atomically(self.folder / VOCABULARY, content)
        write_atomically(self.folder / _LEARNED, json.dumps({"key": key, "record": record}).encode())
        return record

    def encode(self, text: FilteredText, subwords: Subwords, key: str) -> Journal:
        """Encode the text, from where an earlier call ended, and write the training arrays. Return their journal."""
        associations = None
        if self.corpus.examples.terms:
            sample = list(text.sample(min(text.total, _COUNTED)))
            associations = Associations(lambda: sample)
        total = text.total
        with Journal(self.folder, self.kinds, subwords.size, key) as journal:
            jobs = (
                Clean(number, block.stored, np.packbits(block.kept_N).tobytes(), block.name)
                for number, block in enumerate(text.blocks)
                if number >= journal.num_blocks
            )
            num_encoded = sum(int(block.kept_N.sum()) for block in text.blocks[: journal.num_blocks])
            arguments = (self.corpus, self.folder, associations)
            for encoded in shared_out(Encoder, arguments, jobs, self.processes):
                num_encoded += int(text.blocks[journal.num_blocks].kept_N.sum())
                journal.append(encoded)
                self.stages.tick(f"{num_encoded:,} of {total:,} pairs encoded", num_encoded / total)
            journal.save()
        return journal

    def examples_record(self, journal: Journal) -> dict[str, Any]:
        """Return what the manifest records of pairs rewritten in some way, and of symbols learned from them."""
        counts = {kind: journal.tally.counts[f"augmented.{kind}"] for kind in KINDS}
        return {"examples": counts, "symbols": [kind for kind in SYMBOLS if counts[kind]]}

    def write_report(self, manifest: dict[str, Any], text: FilteredText, journal: Journal, subwords: Subwords) -> None:
        """Write report/prepare.json."""
        found = report(
            self.corpus,
            manifest,
            text,
            journal.tally,
            self.splits,
            subwords,
            self.stages.seconds,
            self.processes,
        )
        (self.folder / REPORT).parent.mkdir(exist_ok=True)
        (self.folder / REPORT).write_text(json.dumps(found, indent=1, ensure_ascii=True) + "\n")

    def check_left(self, text: FilteredText) -> None:
        """Raise DataError if there is no training text, or if none is left of it, of two languages or of a tag."""
        num_read = text.tally.counts["read"]
        if not num_read:
            if empty := without_text(self.corpus, "train"):
                raise DataError(f"corpus.train: {empty}")
            named = ": name its files in corpus.train" if self.corpus.source == "files" else ""
            raise DataError(f"corpus.train: there is no training text in corpus.source={self.corpus.source}{named}")
        self.check_counts(num_read, text.num_pairs, {name: text.tally.counts[f"dropped.{name}"] for name in self.why})

    def check_encoded(self, text: FilteredText, journal: Journal) -> None:
        """Raise DataError if no pair is left after encoding, or none of two languages or of a tag."""
        counts = text.tally.counts + journal.tally.counts
        left = {kind: writer.num_pairs for kind, writer in journal.writers.items()}
        self.check_counts(counts["read"], left, {name: counts[f"dropped.{name}"] for name in self.why})

    def check_counts(self, num_read: int, num_pairs: Mapping[Kind, int], dropped: Mapping[str, int]) -> None:
        """Raise DataError if no training pair is left, or none of two languages or of a tag."""
        if not any(num_pairs.values()):
            raise DataError(f"corpus.filters leave none of {num_read:,} training pairs: {self.describe(dropped)}")
        if empty := [str(kind) or "text without a tag" for kind, count in num_pairs.items() if not count]:
            raise DataError(
                f"corpus.train has no pair of {empty[0]} that passes corpus.filters: give text for it, or leave it out "
                "of corpus.directions and corpus.train.tags"
            )
