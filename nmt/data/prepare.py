"""`nmt prepare`: read, filter, learn the subwords, encode, write. What is done stays done.

Everything is written into a temporary folder beside the final one, the manifest last, and renamed into place
as a whole. A folder under the final name is therefore complete, whenever the program was killed before.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from nmt.config import CorpusConfig
from nmt.data.corpus import read_pairs, source_files
from nmt.data.filters import Filters
from nmt.data.pairs import ReadReport
from nmt.data.shards import MANIFEST, SIDES, ParallelShards, ShardWriter, file_record
from nmt.data.subwords import Subwords, train_subwords
from nmt.errors import DataError, StorageError
from nmt.files import sync
from nmt.lock import locked

VOCABULARY = "subwords.model"
_FORMAT = 1  # of the prepared folder
_CHUNK = 20000  # sentence pairs encoded at a time
_PROGRESS_SECONDS = 10.0

Log = Callable[[str], None]


def prepared_path(corpus: CorpusConfig) -> Path:
    """Where the prepared corpus lies: any change of the section gives another folder."""
    section = asdict(corpus)
    del section["directory"]
    canonical = json.dumps(section, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    fingerprint = hashlib.sha256(canonical.encode(errors="surrogatepass")).hexdigest()
    return Path(corpus.directory) / f"{corpus.name}-{fingerprint[:8]}"


def prepare(corpus: CorpusConfig, log: Log) -> "Prepared":
    """Prepare the corpus, unless that is done already and its source files are as they were."""
    path = prepared_path(corpus)
    # Without the lock first: what is finished may lie where this process cannot write.
    if path.exists() and not _why_stale(path, corpus):
        return _finished(path, corpus, log)
    with _lock(path, log):
        if path.exists():
            stale = _why_stale(path, corpus)
            if not stale:
                return _finished(path, corpus, log)
            log(f"{corpus.name}: {stale}; preparing again")
        temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
        try:
            # We hold the lock: whatever lies there was left by a process that died.
            for leftover in (temporary, old):
                shutil.rmtree(leftover, ignore_errors=True)
            temporary.mkdir()
            _Preparation(corpus, temporary, log).run()
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            sync(path.parent)
        finally:
            for leftover in (temporary, old):
                shutil.rmtree(leftover, ignore_errors=True)
    return Prepared.open(path)


def _finished(path: Path, corpus: CorpusConfig, log: Log) -> "Prepared":
    prepared = Prepared.open(path)
    log(f"{corpus.name}: {prepared.manifest['pairs_kept']:,} pairs are prepared in {path}")
    return prepared


class Prepared:
    """A prepared corpus on disk."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path) -> "Prepared":
        """Open a finished folder. Arrays are checked by size when mapped, all else when it is read."""
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            usable = manifest["format"] == _FORMAT
        except FileNotFoundError as error:
            name = path.name.rpartition("-")[0] or path.name
            raise DataError(
                f"corpus {name} is not prepared (no {path}): run nmt prepare with the same corpus settings"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path / MANIFEST} is damaged: run nmt prepare again") from error
        if not usable:
            raise DataError(f"{path} is of another version of this program: remove it and run nmt prepare again")
        return cls(path, manifest)

    @cached_property
    def fingerprint(self) -> str:
        """Of the vocabulary and the training arrays: what a run must find unchanged to be resumed."""
        files = self.manifest["files"] | self.manifest["shards"]["train"]["files"]
        contents = [(name, files[name]["sha256"]) for name in sorted(files) if _is_trained_on(name)]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    def subwords(self) -> Subwords:
        """The vocabulary."""
        self._check(VOCABULARY, self.manifest["files"][VOCABULARY])
        return Subwords.load(self.path / VOCABULARY)

    def train(self) -> ParallelShards:
        """The training pairs, encoded."""
        return ParallelShards.open(self.path, "train")

    def text(self, split: str) -> tuple[list[str], list[str], list[str]]:
        """(source lines, target lines, domains) of "dev" or "test"; what is not known is empty."""
        sides = []
        for side in (*SIDES, "domain"):
            name = f"{split}.{side}.txt"
            if name in self.manifest["files"]:
                self._check(name, self.manifest["files"][name])
                text = (self.path / name).read_bytes().decode("utf-8")
                sides.append(text.split("\n")[:-1])
            else:
                sides.append([])
        return sides[0], sides[1], sides[2]

    def verify(self) -> None:
        """Read every file and compare it with the manifest: ValueError for the first that differs."""
        for name, record in (self.manifest["files"] | self.manifest["shards"]["train"]["files"]).items():
            self._check(name, record)

    def _check(self, name: str, record: dict[str, Any]) -> None:
        path = self.path / name
        if not path.is_file():
            raise DataError(f"{path} is missing: run nmt prepare again")
        if file_record(path) != record:
            raise DataError(f"{path} is not what was written: run nmt prepare again")


def _is_trained_on(name: str) -> bool:
    return name == VOCABULARY or name.startswith("train.")


class _Preparation:
    """One preparation, into an empty folder."""

    def __init__(self, corpus: CorpusConfig, folder: Path, log: Log) -> None:
        self.corpus = corpus
        self.folder = folder
        self.log = log
        self.started = time.monotonic()
        self.last_progress = self.started
        self.filters = Filters(corpus.filters)
        self.invalid_lines: dict[str, int] = {}
        self.spools = {side: folder / f"{side}.spool" for side in SIDES}

    def run(self) -> None:
        """Prepare; each step leaves its files in the folder."""
        sources = [(path, _stat(path)) for path in source_files(self.corpus)]
        # The small splits come first: a mistake in their settings should not cost an hour.
        texts = self.write_text("dev") + self.write_text("test")
        num_read, num_spooled = self.spool()
        num_learnt = self.learn_subwords(num_spooled)
        subwords = Subwords.load(self.folder / VOCABULARY)
        writer = self.encode(subwords, num_spooled)
        for spool in self.spools.values():
            spool.unlink()
        self.check_kept(num_read, writer.num_pairs)
        seconds = time.monotonic() - self.started
        manifest = {
            "format": _FORMAT,
            "corpus": asdict(self.corpus),
            "sources": [_source_record(path, before) for path, before in sources],
            "pairs_read": num_read,
            "pairs_kept": writer.num_pairs,
            "dropped": self.filters.dropped,
            "invalid_utf8_lines": self.invalid_lines,
            "source_pieces": writer.num_pieces["source"],
            "target_pieces": writer.num_pieces["target"],
            "vocabulary_size": subwords.size,
            "vocabulary_sentences": num_learnt,
            "files": {name: file_record(self.folder / name) for name in (VOCABULARY, *texts)},
            "shards": {"train": writer.record()},
            "seconds": round(seconds, 1),
        }
        self.report(manifest)
        for path in self.folder.iterdir():
            sync(path)
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=True) + "\n")
        sync(self.folder / MANIFEST)
        sync(self.folder)

    def write_text(self, split: str) -> list[str]:
        """Keep dev or test as text; the names of the files."""
        report = ReadReport()
        pairs = list(read_pairs(self.corpus, split, report))
        self.invalid_lines[split] = report.invalid_lines
        if not pairs and split == "dev":
            raise DataError(
                f"corpus.dev: there is no validation text in corpus.source={self.corpus.source}: "
                "it is needed to tell how well a model does"
            )
        columns = {"source": [pair.source for pair in pairs], "target": [pair.target for pair in pairs]}
        if any(pair.domain for pair in pairs):
            columns["domain"] = [pair.domain for pair in pairs]
        names = []
        for side, lines in columns.items() if pairs else ():
            names.append(f"{split}.{side}.txt")
            (self.folder / names[-1]).write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8"))
        return names

    def spool(self) -> tuple[int, int]:
        """Read and filter the training text into one plain file a side: (pairs read, pairs written)."""
        report = ReadReport()
        num_read = num_spooled = 0
        with self.spools["source"].open("wb") as sources, self.spools["target"].open("wb") as targets:
            for pair in read_pairs(self.corpus, "train", report):
                num_read += 1
                if self.filters.keep(pair):
                    num_spooled += 1
                    sources.write(f"{pair.source}\n".encode())
                    targets.write(f"{pair.target}\n".encode())
                if num_read % 10000 == 0:
                    self.progress(f"{num_read:,} pairs read")
        self.invalid_lines["train"] = report.invalid_lines
        self.check_kept(num_read, num_spooled)
        return num_read, num_spooled

    def learn_subwords(self, num_spooled: int) -> int:
        """Learn the vocabulary from pairs spread evenly over the corpus: the number of sentences used."""
        num_sampled = min(num_spooled, max(1, self.corpus.subwords.training_sentences // 2))
        self.log(f"{self.corpus.name}: learning the vocabulary from {2 * num_sampled:,} sentences")

        def sample() -> Iterator[str]:
            taken = 0
            for number, pair in enumerate(self.spooled()):
                # Pair n is taken when its share of the sample is due.
                if (number + 1) * num_sampled // num_spooled > taken:
                    taken += 1
                    yield from pair

        train_subwords(sample(), self.corpus.subwords, self.folder / VOCABULARY)
        return 2 * num_sampled

    def encode(self, subwords: Subwords, num_spooled: int) -> ShardWriter:
        """Write the training arrays."""
        pairs = self.spooled()
        num_encoded = 0
        with ShardWriter(self.folder, subwords.size) as writer:
            while chunk := list(islice(pairs, _CHUNK)):
                sources = subwords.encode_batch([source for source, _ in chunk])
                targets = subwords.encode_batch([target for _, target in chunk])
                kept = [
                    pair
                    for pair in zip(sources, targets, strict=True)
                    if self.filters.keep_encoded(len(pair[0]), len(pair[1]))
                ]
                writer.append([source for source, _ in kept], [target for _, target in kept])
                num_encoded += len(chunk)
                self.progress(f"{num_encoded:,} of {num_spooled:,} pairs encoded")
        return writer

    def spooled(self) -> Iterator[tuple[str, str]]:
        """The filtered training text."""
        with self.spools["source"].open("rb") as sources, self.spools["target"].open("rb") as targets:
            for source, target in zip(sources, targets, strict=True):
                yield source[:-1].decode(), target[:-1].decode()

    def check_kept(self, num_read: int, num_kept: int) -> None:
        """Refuse an empty training set."""
        if not num_read:
            raise DataError(f"corpus.train: there is no training text in corpus.source={self.corpus.source}")
        if not num_kept:
            raise DataError(
                f"corpus.filters leave nothing of {num_read:,} training pairs: {_counts(self.filters.dropped)}"
            )

    def progress(self, text: str) -> None:
        """Log how far we are, every ten seconds at most."""
        if time.monotonic() - self.last_progress >= _PROGRESS_SECONDS:
            self.last_progress = time.monotonic()
            self.log(f"{self.corpus.name}: {text}")

    def report(self, manifest: dict[str, Any]) -> None:
        """Say in three lines what was done."""
        subwords, dropped = self.corpus.subwords, _counts(manifest["dropped"])
        self.log(
            f"{self.corpus.name}: {manifest['pairs_read']:,} pairs read, {manifest['pairs_kept']:,} kept"
            + (f" ({dropped})" if dropped else "")
        )
        if invalid := _counts(self.invalid_lines):
            self.log(f"{self.corpus.name}: lines that were not valid UTF-8, broken bytes replaced: {invalid}")
        self.log(
            f"vocabulary: {manifest['vocabulary_size']:,} {subwords.kind} pieces from "
            f"{manifest['vocabulary_sentences']:,} sentences"
        )
        self.log(
            f"{_short(manifest['source_pieces'])} source and {_short(manifest['target_pieces'])} target "
            f"pieces, {manifest['seconds']:.0f} s"
        )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)


def _short(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count:,}"


def _stat(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _source_record(path: Path, before: tuple[int, int]) -> dict[str, Any]:
    record = file_record(path)
    if _stat(path) != before:
        raise DataError(f"{path} changed while it was read: prepare the corpus again when it is complete")
    return {"path": str(path), **record, "mtime_ns": before[1]}


def _why_stale(path: Path, corpus: CorpusConfig) -> str:
    """Why a finished folder cannot be used as it is; empty if it can."""
    try:
        prepared = Prepared.open(path)
        prepared.verify()
    except ValueError as error:
        return str(error)
    recorded = {record["path"]: record for record in prepared.manifest["sources"]}
    # A machine that got the prepared folder without the text it was made from can train all the same.
    present = [Path(name) for name in recorded if Path(name).exists()]
    if len(present) == len(recorded) and set(map(str, source_files(corpus))) != set(recorded):
        return "its source files are others than before"
    for source in present:
        record = recorded[str(source)]
        size, mtime_ns = _stat(source)
        same = size == record["bytes"] and (
            mtime_ns == record["mtime_ns"] or file_record(source)["sha256"] == record["sha256"]
        )
        if not same:
            return f"{source} has changed"
    return ""


@contextmanager
def _lock(path: Path, log: Log) -> Iterator[None]:
    """Let one process at a time prepare into `path`."""
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
