"""Sentence pairs of a corpus, one at a time: from the embedded phrasebook, files, or a dataset of the hub.

The line rule: b"\\n" is the only separator of lines. CR, U+2028, U+0085 and NUL are ordinary characters in a
line (real corpora hold them, and whoever splits at them pairs every later line with a wrong translation).
A pair's texts never hold a "\\n": one that arrives inside a JSON, Parquet or hub row becomes a blank.
"""

import gzip
import hashlib
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nmt.config import CorpusConfig, FilesConfig, FilterConfig
from nmt.errors import DataError
from nmt.resources import resource_dir

SPLITS = ("train", "dev", "test")
HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
PHRASEBOOK_PAIRS = {"train": 30000, "dev": 500, "test": 1000}
COMPRESSIONS = (".gz", ".xz", ".zst")
_READ_ROWS = 1000


class SentencePair(NamedTuple):
    """A sentence, its translation, and where known the kind of text it is."""

    source: str
    target: str
    domain: str = ""


@dataclass
class ReadReport:
    """What was noticed while reading, besides the pairs."""

    invalid_lines: int = 0
    """Lines that were not valid UTF-8; the broken bytes became U+FFFD."""


def read_pairs(corpus: CorpusConfig, split: str, report: ReadReport | None = None) -> Iterator[SentencePair]:
    """Stream the pairs of "train", "dev" or "test", unfiltered; nothing if the corpus has no such split."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    _refuse_ignored_files(corpus)
    if corpus.source == "phrasebook":
        pairs = _phrasebook_pairs(corpus, split)
    elif corpus.source == "files":
        pairs = _file_pairs(corpus, split, report or ReadReport())
    else:
        pairs = _hub_pairs(corpus, split)
    limit = corpus.max_pairs if split == "train" else 0
    return itertools.islice(pairs, limit or None)


def source_files(corpus: CorpusConfig) -> list[Path]:
    """The local files a corpus is read from, all there; none for a dataset that comes from the hub."""
    if corpus.source == "phrasebook":
        code = [Path(__file__).with_name(name) for name in ("phrasebook.py", "lexicon.py")]
        tables = (path for path in resource_dir("data/phrasebook").rglob("*") if path.is_file())
        return sorted([*code, *tables])
    if corpus.source == "files":
        named = [file for split in SPLITS for file in _named_files(corpus, split)]
        for path, key in named:
            _check_readable(path, key)
        return [path for path, _ in named]
    folder = Path(corpus.source)
    if not folder.is_dir():
        return []
    try:
        import datasets

        data_files = datasets.load_dataset_builder(**_hub_arguments(corpus)).config.data_files
    except Exception as error:  # see _hub_pairs
        raise _hub_error(corpus, error) from error
    return sorted({Path(path) for paths in (data_files or {}).values() for path in paths})


def _refuse_ignored_files(corpus: CorpusConfig) -> None:
    if corpus.source == "files":
        return
    for split in SPLITS:
        files: FilesConfig = getattr(corpus, split)
        if files.source or files.target or files.pairs:
            raise DataError(
                f"corpus.{split} names files, but corpus.source={corpus.source} would not read them: "
                f"set corpus.source=files or empty corpus.{split}"
            )


def _phrasebook_pairs(corpus: CorpusConfig, split: str) -> Iterator[SentencePair]:
    from nmt.data.phrasebook import phrasebook

    num_pairs = PHRASEBOOK_PAIRS[split]
    if split == "train" and corpus.max_pairs:
        num_pairs = corpus.max_pairs
    for phrase in phrasebook(split, corpus.source_language, corpus.target_language, num_pairs):
        yield SentencePair(phrase.source, phrase.target, phrase.domain)


# ------------------------------------------------------------------------------------------------ files


def _named_files(corpus: CorpusConfig, split: str) -> list[tuple[Path, str]]:
    """Every file of a split with the configuration key that names it."""
    files: FilesConfig = getattr(corpus, split)
    root = Path(corpus.root)
    return [
        (root / name, f"corpus.{split}.{side}")
        for side in ("source", "target", "pairs")
        for name in getattr(files, side)
    ]


def _file_pairs(corpus: CorpusConfig, split: str, report: ReadReport) -> Iterator[SentencePair]:
    named = _named_files(corpus, split)
    for path, key in named:
        _check_readable(path, key)
    sources, targets, both = (
        [path for path, key in named if key == f"corpus.{split}.{side}"] for side in ("source", "target", "pairs")
    )
    if bool(sources) != bool(targets):
        lacking = "target" if sources else "source"
        raise DataError(f"corpus.{split}.{lacking} is empty, but the other side is not: name its files")
    # Lists of equal length are taken file by file, which finds a missing line in the file that lacks it.
    if len(sources) == len(targets):
        groups = [([source], [target]) for source, target in zip(sources, targets, strict=True)]
    else:
        groups = [(sources, targets)]
    for source_group, target_group in groups:
        yield from _aligned(source_group, target_group, split, report)
    for path in both:
        yield from _both_sides(path, f"corpus.{split}.pairs", corpus, report)


def _check_readable(path: Path, key: str) -> None:
    try:
        with path.open("rb"):
            return
    except FileNotFoundError:
        problem = "does not exist: correct the name, or set corpus.root to the folder it is in"
    except IsADirectoryError:
        problem = "is a folder: name the files in it"
    except OSError as error:
        problem = f"cannot be read ({error.strerror}): check its permissions"
    raise DataError(f"{key}: {path} {problem}")


def _aligned(sources: list[Path], targets: list[Path], split: str, report: ReadReport) -> Iterator[SentencePair]:
    """Line n of the source files with line n of the target files."""
    source_lines = (line for path in sources for line in _lines(path, f"corpus.{split}.source", report))
    target_lines = (line for path in targets for line in _lines(path, f"corpus.{split}.target", report))
    for number, (source, target) in enumerate(itertools.zip_longest(source_lines, target_lines)):
        if source is None or target is None:
            longer = number + 1 + sum(1 for _ in (target_lines if source is None else source_lines))
            num_sources, num_targets = (number, longer) if source is None else (longer, number)
            raise DataError(
                f"corpus.{split}: {num_sources} lines in {' + '.join(map(str, sources))} but {num_targets} "
                f"in {' + '.join(map(str, targets))}: line n of one must translate line n of the other"
            )
        yield SentencePair(source, target)


def _lines(path: Path, key: str, report: ReadReport) -> Iterator[str]:
    """The lines of a file by the line rule, without their "\\n" or "\\r\\n" and without a leading BOM."""
    with path.open("rb") as raw:
        first = True
        try:
            for line in _decompressed(raw, path.suffix):
                if first:
                    first = False
                    line = line.removeprefix(b"\xef\xbb\xbf")
                    if not line:  # the file held a BOM and nothing else
                        return
                line = line.removesuffix(b"\n").removesuffix(b"\r")
                try:
                    yield line.decode("utf-8")
                except UnicodeDecodeError:
                    report.invalid_lines += 1
                    yield line.decode("utf-8", errors="replace")
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            kind = path.suffix if path.suffix in COMPRESSIONS else "text"
            raise DataError(
                f"{key}: {path} is damaged or no {kind} file ({error}): get or compress it again"
            ) from error


def _decompressed(raw: io.BufferedReader, suffix: str) -> io.BufferedReader:
    # The buffered reader iterates over lines in C, whatever is below it.
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 17)
    if suffix == ".xz":
        return io.BufferedReader(lzma.LZMAFile(raw), 1 << 17)
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 17)
    return raw


def _both_sides(path: Path, key: str, corpus: CorpusConfig, report: ReadReport) -> Iterator[SentencePair]:
    """The pairs of a .tsv, .jsonl or .parquet file."""
    plain = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    if plain.suffix == ".tsv":
        for number, line in enumerate(_lines(path, key, report), start=1):
            fields = line.split("\t")
            if len(fields) != 2:
                raise DataError(f"{key}: {path} line {number}: {len(fields)} columns instead of source TAB target")
            yield SentencePair(*fields)
    elif plain.suffix == ".jsonl":
        for number, line in enumerate(_lines(path, key, report), start=1):
            where = f"{key}: {path} line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not valid JSON ({error}): a line must be one object") from error
            yield _row_pair(row, corpus, where)
    elif path.suffix == ".parquet":
        yield from _parquet_pairs(path, key, corpus)
    else:
        raise DataError(f"{key}: {path} must end in .tsv, .jsonl (either also with .gz, .xz or .zst) or .parquet")


def _parquet_pairs(path: Path, key: str, corpus: CorpusConfig) -> Iterator[SentencePair]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            wanted = ("translation", corpus.source_language, corpus.target_language, "domain")
            columns = [name for name in file.schema_arrow.names if name in wanted]
            if not columns:
                columns = file.schema_arrow.names  # for the message that says what is there
            for batch in file.iter_batches(batch_size=_READ_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield _row_pair(row, corpus, f"{key}: {path} row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{key}: {path} is damaged or no Parquet file ({_first_line(error)})") from error


def _row_pair(row: Any, corpus: CorpusConfig, where: str) -> SentencePair:
    """The pair in a row that has a column `translation` or one column per language."""
    columns = row.get("translation", row) if isinstance(row, dict) else None
    if not isinstance(columns, Mapping):
        raise DataError(f"{where}: must be an object with a text for each language, or with `translation`")
    texts = []
    for key in ("source_language", "target_language"):
        text = columns.get(getattr(corpus, key))
        if not isinstance(text, str):
            raise DataError(
                f"{where}: no text for corpus.{key}={getattr(corpus, key)}; "
                f"there are {', '.join(map(str, columns)) or 'none'}"
            )
        texts.append(_one_line(text))
    domain = row.get("domain")
    return SentencePair(texts[0], texts[1], _one_line(domain) if isinstance(domain, str) else "")


def _one_line(text: str) -> str:
    """`text` without line breaks by the line rule, and without lone surrogates, which JSON can spell."""
    return text.replace("\n", " ").encode("utf-8", errors="replace").decode("utf-8")


# -------------------------------------------------------------------------------------------------- hub


def _hub_pairs(corpus: CorpusConfig, split: str) -> Iterator[SentencePair]:
    """The pairs of a dataset of the hub, or of a local folder laid out like one.

    A local folder is streamed, which leaves no copy of it in the library's cache. A dataset of the hub is
    downloaded into that cache once, unless `max_pairs` wants a part of it only.
    """
    streaming = Path(corpus.source).is_dir() or corpus.max_pairs > 0
    try:
        import datasets

        splits = datasets.load_dataset(**_hub_arguments(corpus), streaming=streaming)
        if HUB_SPLITS[split] not in splits:
            if split == "train":
                raise DataError(f"it has no split train, only {', '.join(splits)}")
            return
        rows = splits[HUB_SPLITS[split]]
        chunks = iter(rows.iter(batch_size=_READ_ROWS))
    except Exception as error:  # the library raises a dozen unrelated classes for what is one user mistake
        raise _hub_error(corpus, error) from error
    where = f"corpus.source={corpus.source}"
    while True:
        try:
            chunk = next(chunks, None)
        except Exception as error:
            raise _hub_error(corpus, error) from error
        if chunk is None:
            return
        for values in zip(*chunk.values(), strict=True):
            yield _row_pair(dict(zip(chunk, values, strict=True)), corpus, where)


def _hub_arguments(corpus: CorpusConfig) -> dict[str, Any]:
    """What `datasets.load_dataset` needs to find the corpus."""
    if not Path(corpus.source).is_dir():
        if corpus.source.startswith((".", "/", "~")) or corpus.source.count("/") > 1:
            raise DataError("there is no such folder")
        return {"path": corpus.source, "name": corpus.subset or None}
    import datasets

    folder = Path(corpus.source).resolve()
    names = datasets.get_dataset_config_names(str(folder))
    if corpus.subset in names:
        return {"path": str(folder), "name": corpus.subset}
    if corpus.subset and (folder / corpus.subset).is_dir():
        return {"path": str(folder), "data_dir": corpus.subset}
    if names == ["default"] or (len(names) == 1 and not corpus.subset):
        return {"path": str(folder), "name": names[0]}
    raise DataError(f"corpus.subset={corpus.subset!r} is not one of {', '.join(names)}")


def _hub_error(corpus: CorpusConfig, error: Exception) -> DataError:
    if isinstance(error, ImportError):
        return DataError(f"corpus.source={corpus.source} needs the package `datasets` ({error}): install it")
    subset = f" corpus.subset={corpus.subset}" if corpus.subset else ""
    return DataError(
        f"corpus.source={corpus.source}{subset} cannot be read: {_first_line(error)}. It must be phrasebook, "
        "files, a folder in the hub's layout, or a dataset of the Hugging Face hub, which needs the network"
    )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n", 1)[0].rstrip(".")


# ---------------------------------------------------------------------------------------------- filters


class Filters:
    """The filters of training pairs, in a fixed order; `dropped` counts what each was first to refuse."""

    def __init__(self, config: FilterConfig) -> None:
        self.config = config
        self.dropped = dict.fromkeys(
            ("blank", "identical", "duplicates", "max_words", "max_length_ratio", "max_pieces"), 0
        )
        self._seen: set[int] = set()

    def keep(self, pair: SentencePair) -> bool:
        """Whether the text of a pair passes."""
        reason = self._refusal(pair.source, pair.target)
        if reason:
            self.dropped[reason] += 1
        return not reason

    def keep_encoded(self, num_source_pieces: int, num_target_pieces: int) -> bool:
        """Whether a pair passes once it is encoded. A side of which no piece is left is blank."""
        reason = ""
        longer = max(num_source_pieces, num_target_pieces)
        if self.config.blank and min(num_source_pieces, num_target_pieces) == 0:
            reason = "blank"
        elif self.config.max_pieces and longer > self.config.max_pieces:
            reason = "max_pieces"
        if reason:
            self.dropped[reason] += 1
        return not reason

    def _refusal(self, source: str, target: str) -> str:
        config = self.config
        if config.blank and not (source.strip() and target.strip()):
            return "blank"
        if config.identical and source.strip() == target.strip():
            return "identical"
        if config.duplicates and self._is_duplicate(source, target):
            return "duplicates"
        if config.max_words or config.max_length_ratio:
            fewer, more = sorted((len(source.split()), len(target.split())))
            if config.max_words and more > config.max_words:
                return "max_words"
            if config.max_length_ratio and more > config.max_length_ratio * fewer:
                return "max_length_ratio"
        return ""

    def _is_duplicate(self, source: str, target: str) -> bool:
        # 64 bits: among 40 million pairs one is lost by accident with probability 4e-5.
        digest = hashlib.blake2b(f"{source}\n{target}".encode(errors="replace"), digest_size=8).digest()
        fingerprint = int.from_bytes(digest, "little")
        if fingerprint in self._seen:
            return True
        self._seen.add(fingerprint)
        return False
