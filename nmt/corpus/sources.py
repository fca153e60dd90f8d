"""Read the sentence pairs of a corpus, one at a time: from the embedded phrasebook, files, or a dataset of the hub.

Lines are split by the rule in nmt/textfile.py. The texts of a pair never contain a "\\n": a blank replaces each one in
a JSON, Parquet or hub row.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from nmt.config import CorpusConfig, Direction, FilesConfig
from nmt.config.corpus import SPLITS
from nmt.corpus.hub import hub_files, hub_pairs
from nmt.corpus.pairs import Columns, ReadReport, SentencePair
from nmt.corpus.tables import read_table
from nmt.errors import DataError
from nmt.resources import resource_dir
from nmt.textfile import open_input, open_text

PHRASEBOOK_PAIRS = {"train": 30000, "dev": 500, "test": 1000}


class Unit(NamedTuple):
    key: dict
    size: int
    name: str
    read: object


def units(corpus, split):
    from nmt.corpus.pairs import Rows

    files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p, _ in _named_files(corpus, split)]

    def read(report):
        if getattr(corpus, split).texts or corpus.directions:
            rows = _rows(corpus, split, report)
        else:
            rows = (
                _Row({corpus.source_language: p.source, corpus.target_language: p.target}, p.domain, p.tag)
                for p in _pairs_in_two(corpus, split, report)
            )
        for tag, group in itertools.groupby(rows, key=lambda r: r.tag):
            while chunk := list(itertools.islice(group, 5000)):
                yield Rows({l: [r.texts[l] for r in chunk] for l in chunk[0].texts}, [r.domain for r in chunk], tag)

    return [
        Unit({"files": files, "source": corpus.source, "pb": str(corpus.sides)}, sum(f[1] for f in files), "file", read)
    ]


class _Row(NamedTuple):
    """The texts of one line, by language."""

    texts: Mapping[str, str]
    domain: str
    tag: str


def read_pairs(corpus: CorpusConfig, split: str, report: ReadReport | None = None) -> Iterator[SentencePair]:
    """Yield the pairs of "train", "dev" or "test", unfiltered; nothing if the corpus has no such split.

    A split that is held out of the training text yields nothing here: its pairs are part of "train".

    In a corpus with directions, each two languages of a line of "train" are one pair, in the direction of
    `CorpusConfig.language_pairs`. A line of "dev" or "test" is a pair in each direction, before the next line. Pairs
    with a blank side are left out and counted, because a line may lack a language.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    _refuse_ignored_files(corpus)
    report = report or ReadReport()
    limit = (corpus.max_pairs if split == "train" else 0) or None
    if getattr(corpus, split).from_train:
        return iter(())
    if not corpus.directions:
        return itertools.islice(_pairs_in_two(corpus, split, report), limit)
    directions = corpus.language_pairs() if split == "train" else corpus.all_directions()
    return _in_directions(itertools.islice(_rows(corpus, split, report), limit), directions, report)


def _pairs_in_two(corpus: CorpusConfig, split: str, report: ReadReport) -> Iterator[SentencePair]:
    """Yield the pairs of a split in the two languages of the settings."""
    if corpus.source == "phrasebook":
        from nmt.corpus.phrasebook import phrasebook

        phrases = phrasebook(split, *corpus.sides, _num_phrases(corpus, split))
        return (SentencePair(phrase.source, phrase.target, phrase.domain) for phrase in phrases)
    if corpus.source == "files" or _named_files(corpus, split):
        return _file_pairs(corpus, split, report)
    return hub_pairs(corpus, split, report)


def _rows(corpus: CorpusConfig, split: str, report: ReadReport) -> Iterator[_Row]:
    """Yield the lines of a split of a corpus with directions."""
    if corpus.source == "phrasebook":
        from nmt.corpus.phrasebook import phrasebook_texts

        phrases = phrasebook_texts(split, corpus.languages, _num_phrases(corpus, split))
        return (_Row(dict(zip(corpus.languages, texts, strict=True)), domain, "") for texts, domain in phrases)
    if getattr(corpus, split).texts:
        return _text_rows(corpus, split, report)
    source, target = corpus.sides
    pairs = _pairs_in_two(corpus, split, report)
    return (_Row({source: pair.source, target: pair.target}, pair.domain, pair.tag) for pair in pairs)


def _in_directions(rows: Iterable[_Row], directions: list[Direction], report: ReadReport) -> Iterator[SentencePair]:
    for row in rows:
        there = {language for language, text in row.texts.items() if text.strip()}
        for direction in directions:
            source, target = direction
            if source in there and target in there:
                yield SentencePair(row.texts[source], row.texts[target], row.domain, row.tag, direction)
            else:
                report.empty_rows += 1


def _num_phrases(corpus: CorpusConfig, split: str) -> int:
    return corpus.max_pairs if split == "train" and corpus.max_pairs else PHRASEBOOK_PAIRS[split]


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
        if files.source or files.target or files.pairs or files.texts:
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
    return [(Path(corpus.root) / name, f"corpus.{split}.{side}") for side, names in named.items() for name in names]


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


def _labels(files: FilesConfig, num_files: int) -> Iterator[_Label]:
    blank = [""] * num_files
    return map(_Label, files.domains or blank, files.tags or blank)


def _file_pairs(corpus: CorpusConfig, split: str, report: ReadReport) -> Iterator[SentencePair]:
    files: FilesConfig = getattr(corpus, split)
    root = Path(corpus.root)
    for path, key in _named_files(corpus, split):
        _check_readable(path, key, corpus)
    labels = _labels(files, len(files.source) + len(files.pairs))
    columns = {
        "source": [(root / name, next(labels)) for name in files.source],
        "target": [(root / name, _Label("", "")) for name in files.target],
    }
    for (source, target), label in _aligned(columns, split, report):
        yield SentencePair(source, target, *label)
    table_columns = Columns(corpus, split)
    for name, label in zip(files.pairs, labels, strict=True):
        for pair in read_table(root / name, f"corpus.{split}.pairs", table_columns, report):
            yield pair._replace(domain=pair.domain or label.domain, tag=label.tag)


def _text_rows(corpus: CorpusConfig, split: str, report: ReadReport) -> Iterator[_Row]:
    files: FilesConfig = getattr(corpus, split)
    for path, key in _named_files(corpus, split):
        _check_readable(path, key, corpus)
    labels = list(_labels(files, len(files.texts[corpus.languages[0]])))
    columns = {
        f"texts.{language}": [
            (Path(corpus.root) / name, label) for name, label in zip(files.texts[language], labels, strict=True)
        ]
        for language in corpus.languages
    }
    for texts, label in _aligned(columns, split, report):
        yield _Row(dict(zip(corpus.languages, texts, strict=True)), *label)


_Files = list[tuple[Path, _Label]]


def _aligned(columns: dict[str, _Files], split: str, report: ReadReport) -> Iterator[tuple[tuple[str, ...], _Label]]:
    """Yield line n of all columns of text, each in files, with the label of the first column's file."""
    sides = list(columns)
    # Lists of equal length are read file by file, so that an error names the file with the missing line.
    if len({len(files) for files in columns.values()}) == 1:
        groups: list[list[_Files]] = [[[file] for file in each] for each in zip(*columns.values(), strict=True)]
    else:
        groups = [list(columns.values())]
    for group in groups:
        readers = [
            _labelled_lines(files, f"corpus.{split}.{side}", report) for side, files in zip(sides, group, strict=True)
        ]
        for number, lines in enumerate(itertools.zip_longest(*readers)):
            if None in lines:
                counts = [
                    number + sum(1 for _ in itertools.chain([line] if line else [], reader))
                    for line, reader in zip(lines, readers, strict=True)
                ]
                raise DataError(_misaligned(group, counts, split))
            yield tuple(text for text, _ in lines), lines[0][1]


def _misaligned(group: list[_Files], counts: list[int], split: str) -> str:
    other = next(place for place, count in enumerate(counts) if count != counts[0])
    names = [" + ".join(str(path) for path, _ in group[place]) for place in (0, other)]
    return (
        f"corpus.{split}: {counts[0]} lines in {names[0]} but {counts[other]} in {names[1]}: line n of one must "
        "translate line n of the other"
    )


def _labelled_lines(files: _Files, key: str, report: ReadReport) -> Iterator[tuple[str, _Label]]:
    return ((line, label) for path, label in files for line in _lines(path, key, report))


def _lines(path: Path, key: str, report: ReadReport) -> Iterator[str]:
    with open_text(path, key) as lines:
        try:
            yield from lines
        finally:  # also if the caller stops early
            report.invalid_lines += lines.num_invalid
