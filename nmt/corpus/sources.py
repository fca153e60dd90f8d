"""Read the sentence pairs of a corpus, one at a time: from the embedded phrasebook, files, or a dataset of the hub.

Lines are split by the rule in nmt/textfile.py. The texts of a pair never contain a "\\n": a blank replaces each one in
a JSON, Parquet or hub row.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

from nmt.config import CorpusConfig, FilesConfig
from nmt.corpus.hub import hub_files, hub_pairs
from nmt.corpus.pairs import Columns, ReadReport, SentencePair
from nmt.corpus.tables import read_table
from nmt.errors import DataError
from nmt.resources import resource_dir
from nmt.textfile import open_input, open_text

SPLITS = ("train", "dev", "test")
PHRASEBOOK_PAIRS = {"train": 30000, "dev": 500, "test": 1000}


def read_pairs(corpus: CorpusConfig, split: str, report: ReadReport | None = None) -> Iterator[SentencePair]:
    """Yield the pairs of "train", "dev" or "test", unfiltered; nothing if the corpus has no such split.

    A split that is held out of the training text yields nothing here: its pairs are part of "train".
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    _refuse_ignored_files(corpus)
    report = report or ReadReport()
    if getattr(corpus, split).from_train:
        pairs: Iterator[SentencePair] = iter(())
    elif corpus.source == "phrasebook":
        pairs = _phrasebook_pairs(corpus, split)
    elif corpus.source == "files" or _named_files(corpus, split):
        pairs = _file_pairs(corpus, split, report)
    else:
        pairs = hub_pairs(corpus, split, report)
    limit = corpus.max_pairs if split == "train" else 0
    return itertools.islice(pairs, limit or None)


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
        if files.source or files.target or files.pairs:
            raise DataError(
                f"corpus.{split} names files, but corpus.source={corpus.source} would not read them: "
                f"set corpus.source=files or leave corpus.{split} empty"
            )


def _phrasebook_pairs(corpus: CorpusConfig, split: str) -> Iterator[SentencePair]:
    from nmt.corpus.phrasebook import phrasebook

    num_pairs = PHRASEBOOK_PAIRS[split]
    if split == "train" and corpus.max_pairs:
        num_pairs = corpus.max_pairs
    for phrase in phrasebook(split, corpus.source_language, corpus.target_language, num_pairs):
        yield SentencePair(phrase.source, phrase.target, phrase.domain)


# ------------------------------------------------------------------------------------------------ files


def _named_files(corpus: CorpusConfig, split: str) -> list[tuple[Path, str]]:
    """Return every file of a split with the configuration key that names it."""
    files: FilesConfig = getattr(corpus, split)
    root = Path(corpus.root)
    return [
        (root / name, f"corpus.{split}.{side}")
        for side in ("source", "target", "pairs")
        for name in getattr(files, side)
    ]


def _check_readable(path: Path, key: str, corpus: CorpusConfig) -> None:
    try:
        open_input(path, key).close()
    except DataError as error:
        _, split, side = key.split(".")
        whole = ",".join(getattr(getattr(corpus, split), side))
        # On the command line, an unquoted comma splits one name into two.
        if "," in whole and (Path(corpus.root) / whole).is_file():
            raise DataError(f"{error}; or if {whole} is one file, put quotes around it: {key}=['{whole}']") from error
        raise


def _file_pairs(corpus: CorpusConfig, split: str, report: ReadReport) -> Iterator[SentencePair]:
    files: FilesConfig = getattr(corpus, split)
    root = Path(corpus.root)
    for path, key in _named_files(corpus, split):
        _check_readable(path, key, corpus)
    labels = iter(files.domains or [""] * (len(files.source) + len(files.pairs)))
    sources = [(root / name, next(labels)) for name in files.source]
    targets = [root / name for name in files.target]
    # Lists of equal length are read file by file, so that an error names the file with the missing line.
    if len(sources) == len(targets):
        groups = [([source], [target]) for source, target in zip(sources, targets, strict=True)]
    else:
        groups = [(sources, targets)]
    for source_group, target_group in groups:
        yield from _aligned(source_group, target_group, split, report)
    columns = Columns(corpus, split)
    for name, label in zip(files.pairs, labels, strict=True):
        for pair in read_table(root / name, f"corpus.{split}.pairs", columns, report):
            yield pair if pair.domain else pair._replace(domain=label)


def _aligned(
    sources: list[tuple[Path, str]], targets: list[Path], split: str, report: ReadReport
) -> Iterator[SentencePair]:
    """Pair line n of the source files, each given with its domain, with line n of the target files."""
    source_lines = (
        (line, domain) for path, domain in sources for line in _lines(path, f"corpus.{split}.source", report)
    )
    target_lines = (line for path in targets for line in _lines(path, f"corpus.{split}.target", report))
    for number, (source, target) in enumerate(itertools.zip_longest(source_lines, target_lines)):
        if source is None or target is None:
            longer = number + 1 + sum(1 for _ in (target_lines if source is None else source_lines))
            num_sources, num_targets = (number, longer) if source is None else (longer, number)
            raise DataError(
                f"corpus.{split}: {num_sources} lines in {' + '.join(str(path) for path, _ in sources)} but "
                f"{num_targets} in {' + '.join(map(str, targets))}: line n of one must translate line n of the other"
            )
        yield SentencePair(source[0], target, source[1])


def _lines(path: Path, key: str, report: ReadReport) -> Iterator[str]:
    with open_text(path, key) as lines:
        try:
            yield from lines
        finally:  # also if the caller stops early
            report.invalid_lines += lines.num_invalid
