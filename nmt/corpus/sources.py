"""Read the sentence pairs of a corpus, one at a time: from the embedded phrasebook, files, or a dataset of the hub.

Lines are split by the rule in nmt/textfile.py. The texts of a pair never contain a "\\n": a blank replaces each one in
a JSON, Parquet or hub row.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from nmt.config import CorpusConfig, Direction, FilesConfig
from nmt.config.corpus import SPLITS
from nmt.corpus.hub import hub_files, hub_sources
from nmt.corpus.pairs import Columns, ReadReport, Rows, SentencePair
from nmt.corpus.segments import is_test_set, read_test_set
from nmt.corpus.tables import read_table
from nmt.errors import DataError
from nmt.resources import resource_dir
from nmt.textfile import TextReader, open_input

PHRASEBOOK_PAIRS = {"train": 30000, "dev": 500, "test": 1000}


_ROWS = 1000  # pairs that become rows together
_SHOWN = 4  # files that an error names


class Unit(NamedTuple):
    """Files that are read together, whatever other files the corpus has: what can be prepared again by itself."""

    name: str
    """Names of its files, for a reader."""
    key: dict[str, Any]
    """What identifies the content and how it is read, in a form for JSON."""
    size: int
    """Bytes of its files; 0 if unknown."""
    read: Callable[[ReadReport], Iterator[Rows]]
    """read(report) yields all rows, and counts what it finds in the report."""


def units(corpus: CorpusConfig, split: str) -> list[Unit]:
    """Return the units of "train", "dev" or "test", in order; none if the corpus has no such split.

    A split that is held out of the training text has none: its pairs are part of "train".
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    _refuse_ignored_files(corpus)
    if getattr(corpus, split).from_train:
        return []
    if corpus.source == "phrasebook":
        return [_phrasebook(corpus, split)]
    if corpus.source == "files" or _named_files(corpus, split):
        return _file_units(corpus, split)
    languages = corpus.sides
    return [
        Unit(
            found.name,
            {"hub": found.key, "columns": getattr(corpus, split).columns, "languages": list(languages)},
            found.size,
            lambda report, read=found.read: _in_rows(read(report), languages),  # type: ignore[misc]
        )
        for found in hub_sources(corpus, split)
    ]


def read_pairs(corpus: CorpusConfig, split: str, report: ReadReport | None = None) -> Iterator[SentencePair]:
    """Yield the pairs of "train", "dev" or "test", unfiltered, unit by unit.

    In a corpus with directions, each two languages of a line of "train" are one pair, in the direction of
    `CorpusConfig.language_pairs`. A line of "dev" or "test" is a pair in each direction, before the next line. Pairs
    with a blank side are left out and counted, because a line may lack a language.
    """
    report = report or ReadReport()
    found = units(corpus, split)
    limit = (corpus.max_pairs if split == "train" else 0) or None
    directions: list[Direction] = []
    if corpus.directions:
        directions = corpus.language_pairs() if split == "train" else corpus.all_directions()
    rows = itertools.chain.from_iterable(unit.read(report) for unit in found)
    lines = itertools.islice(itertools.chain.from_iterable(map(_row_by_row, rows)), limit)
    return _pairs(lines, directions, corpus.sides, report)


_Line = tuple[dict[str, str], str, str]
"""Texts of a row by language, its domain, its tag."""


def _row_by_row(rows: Rows) -> Iterator[_Line]:
    languages = list(rows.texts)
    domains: Iterable[str] = rows.domains or itertools.repeat("")
    for *texts, domain in zip(*rows.texts.values(), domains, strict=False):
        yield dict(zip(languages, texts, strict=True)), domain, rows.tag


def _pairs(
    lines: Iterable[_Line], directions: list[Direction], sides: Direction, report: ReadReport
) -> Iterator[SentencePair]:
    for texts, domain, tag in lines:
        if not directions:
            yield SentencePair(texts[sides.source], texts[sides.target], domain, tag)
        for direction in directions:
            source, target = (texts[language] for language in direction)
            if source.strip() and target.strip():
                yield SentencePair(source, target, domain, tag, direction)
            else:
                report.empty_rows += 1


def _in_rows(pairs: Iterable[SentencePair], languages: Direction) -> Iterator[Rows]:
    """Yield pairs as rows; all have the same tag."""
    source, target = languages
    waiting = iter(pairs)
    while some := list(itertools.islice(waiting, _ROWS)):
        domains = [pair.domain for pair in some]
        texts = {source: [pair.source for pair in some], target: [pair.target for pair in some]}
        yield Rows(texts, domains if any(domains) else [], some[0].tag)


def _phrasebook(corpus: CorpusConfig, split: str) -> Unit:
    num_phrases = corpus.max_pairs if split == "train" and corpus.max_pairs else PHRASEBOOK_PAIRS[split]
    languages = corpus.languages

    def read(_report: ReadReport) -> Iterator[Rows]:
        if corpus.directions:
            from nmt.corpus.phrasebook import phrasebook_texts

            texts = iter(phrasebook_texts(split, languages, num_phrases))
            while some := list(itertools.islice(texts, _ROWS)):
                columns = zip(*(each for each, _ in some), strict=True)
                yield Rows(dict(zip(languages, map(list, columns), strict=True)), [domain for _, domain in some])
            return
        from nmt.corpus.phrasebook import phrasebook

        phrases = phrasebook(split, *corpus.sides, num_phrases)
        yield from _in_rows(
            (SentencePair(phrase.source, phrase.target, phrase.domain) for phrase in phrases), corpus.sides
        )

    files = [_identity(path) for path in source_files(corpus)]
    key = {"phrasebook": files, "split": split, "languages": languages, "pairs": num_phrases}
    return Unit("the phrasebook", key, 0, read)


def source_files(corpus: CorpusConfig) -> list[Path]:
    """Return the local files of a corpus; none for a dataset of the hub.

    Raises DataError if one is missing or not a regular file. A pipe will not do, since files are read more than once.
    """
    if corpus.source == "phrasebook":
        code = [Path(__file__).with_name(name) for name in ("phrasebook.py", "lexicon.py")]
        tables = (path for path in resource_dir("data/phrasebook").rglob("*") if path.is_file())
        return sorted([*code, *tables])
    named = [file for split in SPLITS for file in _named_files(corpus, split)]
    for path, key in named:
        _check_readable(path, key, corpus)
    files = [path for path, _ in named]
    return files if corpus.source == "files" else [*hub_files(corpus), *files]


def _refuse_ignored_files(corpus: CorpusConfig) -> None:
    """Raise DataError if the settings name files that would not be read."""
    ignored = {"files": (), "phrasebook": SPLITS}.get(corpus.source, ("train",))
    for split in ignored:
        files: FilesConfig = getattr(corpus, split)
        if files.source or files.target or files.pairs or files.texts or files.scores:
            raise DataError(
                f"corpus.{split} names files, but corpus.source={corpus.source} would not read them: "
                f"set corpus.source=files or leave corpus.{split} empty"
            )


# ------------------------------------------------------------------------------------------------ files


def _named_files(corpus: CorpusConfig, split: str) -> list[tuple[Path, str]]:
    """Return every file of a split that is read, with the configuration key that names it."""
    files: FilesConfig = getattr(corpus, split)
    named = {"source": files.source, "target": files.target, "pairs": files.pairs}
    named |= {f"texts.{language}": files.texts.get(language, []) for language in corpus.languages}
    named["scores"] = files.scores
    return [(Path(corpus.root) / name, f"corpus.{split}.{side}") for side, names in named.items() for name in names]


def without_text(corpus: CorpusConfig, split: str) -> str:
    """Return, for an error, that the files that the settings name for a split have no pair; "" if they name none."""
    names = list(dict.fromkeys(str(path) for path, _ in _named_files(corpus, split)))
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"no pair of texts is in {', '.join(names[:_SHOWN])}{more}: the files are empty or lack a side; check them"


def _check_readable(path: Path, key: str, corpus: CorpusConfig) -> None:
    try:
        open_input(path, key).close()
    except DataError as error:
        _, split, *side = key.split(".")
        files: FilesConfig = getattr(corpus, split)
        whole = ",".join(files.texts[side[1]] if side[0] == "texts" else getattr(files, side[0]))
        # On the command line, an unquoted comma splits one name into two.
        if "," in whole and (Path(corpus.root) / whole).is_file():
            raise DataError(f"{error}; or if {whole} is one file, put quotes around it: {key}=['{whole}']") from error
        raise


class _Label(NamedTuple):
    """What the settings say about a file."""

    domain: str
    tag: str


def _labels(files: FilesConfig, num_files: int) -> list[_Label]:
    blank = [""] * num_files
    return list(map(_Label, files.domains or blank, files.tags or blank))


def _identity(path: Path) -> list[Any]:
    stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns]


_Files = list[tuple[Path, _Label]]


def _file_units(corpus: CorpusConfig, split: str) -> list[Unit]:
    files: FilesConfig = getattr(corpus, split)
    root = Path(corpus.root)
    for path, key in _named_files(corpus, split):
        _check_readable(path, key, corpus)
    if files.texts:
        names = {f"texts.{language}": files.texts[language] for language in corpus.languages}
        languages = corpus.languages
    else:
        names = {"source": files.source, "target": files.target}
        names |= {"scores": files.scores} if files.scores else {}
        languages = list(corpus.sides)
    num_aligned = len(next(iter(names.values())))
    labels = _labels(files, num_aligned + len(files.pairs))
    columns: dict[str, _Files] = {
        side: [(root / name, label) for name, label in zip(each, itertools.cycle(labels or [_Label("", "")]))]
        for side, each in names.items()
    }
    found = [_aligned_unit(group, languages, split) for group in _groups(columns)]
    for name, label in zip(files.pairs, labels[num_aligned:], strict=True):
        found.append(_table_unit(root / name, label, corpus, split))
    return found


def _groups(columns: dict[str, _Files]) -> list[dict[str, _Files]]:
    """Divide columns of files into groups that are read together.

    Lists of equal length are read file by file, so that an error names the file with the missing line.
    """
    if not all(columns.values()):
        return []
    if len({len(files) for files in columns.values()}) == 1:
        return [
            {side: [file] for side, file in zip(columns, each, strict=True)}
            for each in zip(*columns.values(), strict=True)
        ]
    return [columns]


def _aligned_unit(columns: dict[str, _Files], languages: list[str], split: str) -> Unit:
    paths = [[path for path, _ in files] for files in columns.values()]
    first = next(iter(columns.values()))
    key = {
        "lines": [[_identity(path) for path in each] for each in paths],
        "languages": languages,
        "labels": [list(label) for _, label in first],
    }
    every = [path for each in paths for path in each]
    name = " + ".join(path.name for path in every)
    size = sum(path.stat().st_size for path in every)
    return Unit(name, key, size, partial(_aligned, columns, languages, split))


def _aligned(columns: dict[str, _Files], languages: list[str], split: str, report: ReadReport) -> Iterator[Rows]:
    """Yield rows of line n of all columns of text, with the label of the first column's file."""
    # Scores are a column after those of the languages.
    readers = [
        _line_blocks(files, f"corpus.{split}.{side}", language, report)
        for (side, files), language in zip(columns.items(), [*languages, ""], strict=False)
    ]
    held: list[tuple[list[str], _Label]] = [([], _Label("", ""))] * len(readers)
    num_rows = 0
    while True:
        for place, reader in enumerate(readers):
            if not held[place][0]:
                held[place] = next(reader, ([], held[place][1]))
        count = min(len(lines) for lines, _ in held)
        if not count:
            break
        label = held[0][1]
        found = [lines[:count] for lines, _ in held]
        scores = [] if len(found) == len(languages) else _scores(found.pop(), columns["scores"], num_rows)
        texts = dict(zip(languages, found, strict=True))
        yield Rows(texts, [label.domain] * count if label.domain else [], label.tag, scores)
        num_rows += count
        held = [(lines[count:], label) for lines, label in held]
    if any(lines for lines, _ in held):
        counts = [
            num_rows + len(lines) + sum(len(more) for more, _ in reader)
            for (lines, _), reader in zip(held, readers, strict=True)
        ]
        raise DataError(_misaligned(list(columns.values()), counts, split))


def _scores(lines: list[str], files: _Files, before: int) -> list[float]:
    """Return the log-probabilities in lines of `nmt score`, which follow `before` others of these files."""
    found = []
    for number, line in enumerate(lines, start=before + 1):
        try:
            score = float(line.partition("\t")[0])
        except ValueError:
            score = math.nan
        if not -math.inf < score <= 0 or "_" in line.partition("\t")[0]:
            names = " + ".join(str(path) for path, _ in files)
            raise DataError(
                f"corpus.train.scores: {names} line {number}: {line[:40]!r} does not begin with a log-probability, "
                "which is a number of at most 0: give what nmt score writes without --header and --jsonl"
            )
        found.append(score)
    return found


def _misaligned(group: list[_Files], counts: list[int], split: str) -> str:
    other = next(place for place, count in enumerate(counts) if count != counts[0])
    names = [" + ".join(str(path) for path, _ in group[place]) for place in (0, other)]
    return (
        f"corpus.{split}: {counts[0]} lines in {names[0]} but {counts[other]} in {names[1]}: line n of one must "
        "translate line n of the other"
    )


def _line_blocks(files: _Files, key: str, language: str, report: ReadReport) -> Iterator[tuple[list[str], _Label]]:
    """Yield the lines of files, many at a time, each with the label of its file."""
    for path, label in files:
        if is_test_set(path):
            side = "target" if key.endswith(".target") else "source"
            yield list(read_test_set(path, key, side, language, report)), label
            continue
        with open_input(path, key) as stream:
            reader = TextReader(stream, f"{key}: {path}", several=True)
            before = 0
            try:
                for lines in reader.whole_blocks():
                    report.bytes_read += stream.tell() - before
                    before = stream.tell()
                    if lines:
                        yield lines, label
            finally:  # also if the caller stops early
                report.invalid_lines += reader.num_invalid


def _table_unit(path: Path, label: _Label, corpus: CorpusConfig, split: str) -> Unit:
    columns = Columns(corpus, split)

    def read(report: ReadReport) -> Iterator[Rows]:
        pairs = read_table(path, f"corpus.{split}.pairs", columns, report)
        labelled = (pair._replace(domain=pair.domain or label.domain, tag=label.tag) for pair in pairs)
        yield from _in_rows(labelled, corpus.sides)

    key = {"table": _identity(path), "columns": list(columns.names), "given": columns.given, "label": list(label)}
    return Unit(path.name, key, path.stat().st_size, read)
