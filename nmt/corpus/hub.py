"""Read datasets of the Hugging Face hub, and local folders with the same layout. Only this file uses `datasets`.

A folder may come from anybody. It names its own data files, and only files inside it are read.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from nmt.config import CorpusConfig
from nmt.config.reading import parse_yaml
from nmt.corpus.pairs import COMPRESSIONS, Columns, ReadReport, SentencePair
from nmt.corpus.tables import read_table
from nmt.errors import DataError
from nmt.files import read_regular
from nmt.textfile import open_text
from nmt.wording import shortened

HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_OWN_ENDINGS = r"\.(parquet|jsonl(\.(gz|xz|zst|bz2))?)$"
_ROWS = 1000
_MOST_README_BYTES = 1 << 24
# The library reads these too, with no bound on their size.
_OTHER_METADATA = (".huggingface.yaml",)


class HubSource(NamedTuple):
    """A data file of a local folder, or a split of a dataset of the hub."""

    name: str
    key: dict[str, Any]
    """What identifies the content, in a form for JSON."""
    size: int
    """Bytes; 0 if unknown."""
    read: Callable[[ReadReport], Iterator[SentencePair]]
    """read(report) yields the pairs."""


def hub_sources(corpus: CorpusConfig, split: str) -> list[HubSource]:
    """Return the sources of "train", "dev" or "test"; none if there is no such split. DataError if "train" is missing.

    In a local folder, .parquet and .jsonl files are read like files of pairs. The library streams all others, and
    datasets of the hub, which leaves no copy in its cache.
    """
    files = _data_files(corpus)
    asked = {"dataset": corpus.source, "subset": corpus.subset, "split": split}
    if files is None:
        return [HubSource(corpus.source, asked, 0, partial(_streamed, corpus, split))]
    if HUB_SPLITS[split] not in files:
        _check_split(corpus, split, files)
        return []
    paths = files[HUB_SPLITS[split]]
    if all(re.search(_OWN_ENDINGS, path.name) for path in paths):
        columns, where = Columns(corpus, split), f"corpus.source={corpus.source}"
        return [
            HubSource(path.name, {"file": _identity(path)}, path.stat().st_size, partial(_table, path, where, columns))
            for path in paths
        ]
    key = {**asked, "files": [_identity(path) for path in paths]}
    read = partial(_checked, corpus, split, paths)
    return [HubSource(corpus.source, key, sum(path.stat().st_size for path in paths), read)]


def _identity(path: Path) -> list[Any]:
    stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns]


def _table(path: Path, where: str, columns: Columns, report: ReadReport) -> Iterator[SentencePair]:
    return read_table(path, where, columns, report)


def _checked(corpus: CorpusConfig, split: str, paths: list[Path], report: ReadReport) -> Iterator[SentencePair]:
    for path in paths:
        _check_lines(path, f"corpus.source={corpus.source}")
    return _streamed(corpus, split, report)


def _streamed(corpus: CorpusConfig, split: str, report: ReadReport) -> Iterator[SentencePair]:
    columns = Columns(corpus, split)
    where = f"corpus.source={corpus.source}"
    try:
        import datasets

        splits = datasets.load_dataset(**_arguments(corpus), streaming=True)
        chunks = iter(splits[HUB_SPLITS[split]].iter(batch_size=_ROWS)) if HUB_SPLITS[split] in splits else None
    except Exception as error:  # the library raises a dozen unrelated classes for one mistake of the user
        raise _error(corpus, error) from error
    if chunks is None:
        _check_split(corpus, split, splits)
        return
    while True:
        try:
            chunk = next(chunks, None)
        except Exception as error:
            raise _error(corpus, error) from error
        if chunk is None:
            return
        names = columns.named(list(chunk), where)
        for values in zip(*chunk.values(), strict=True):
            pair = columns.pair(dict(zip(chunk, values, strict=True)), names, where, report)
            if pair:
                yield pair


def hub_files(corpus: CorpusConfig) -> list[Path]:
    """Return the data files of a local folder, all of them inside it; none for a dataset of the hub."""
    return sorted({path for paths in (_data_files(corpus) or {}).values() for path in paths})


def _data_files(corpus: CorpusConfig) -> dict[str, list[Path]] | None:
    """Return the files of each split of a local folder, by the hub's name of the split; None if it is not a folder."""
    if not Path(corpus.source).is_dir():
        return None
    folder = Path(corpus.source).resolve()
    _refuse_addresses(corpus, folder)
    try:
        import datasets

        data_files = datasets.load_dataset_builder(**_arguments(corpus)).config.data_files or {}
    except Exception as error:  # see _streamed
        raise _error(corpus, error) from error
    files = {str(split): list(map(Path, paths)) for split, paths in data_files.items()}
    for path in (path for paths in files.values() for path in paths):
        if not path.resolve().is_relative_to(folder):
            raise DataError(
                f"corpus.source={corpus.source} names {path}, which is outside the folder: only files inside are "
                "read; move it there, as a file and not as a link"
            )
    return files


def _check_split(corpus: CorpusConfig, split: str, there: Iterable[str]) -> None:
    """Raise DataError if the missing split is the one for training."""
    if split == "train":
        raise _error(corpus, ValueError(f"it has no split train, only {', '.join(there) or 'none'}"))


def _check_lines(path: Path, where: str) -> None:
    """Raise DataError if a line of a text file is too long: the library would read all of it into memory."""
    if path.suffix in (".csv", ".tsv", ".txt", ".json", ".xml") or path.suffix in COMPRESSIONS:
        with open_text(path, where) as lines:
            for _ in lines:
                pass


def _refuse_addresses(corpus: CorpusConfig, folder: Path) -> None:
    """Raise DataError if README.md names an address, which the library would fetch, or if other metadata may."""
    for name in _OTHER_METADATA:
        if os.path.lexists(folder / name):
            raise DataError(
                f"corpus.source={corpus.source}: {folder / name} is not supported: name the data files in README.md "
                "and remove it"
            )
    try:
        text = read_regular(folder / "README.md", _MOST_README_BYTES).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"corpus.source={corpus.source}: README.md: {error.strerror}: remove it") from error
    # The same pattern as the library's.
    header = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---", text.removeprefix("\ufeff"), re.DOTALL)
    try:
        said = parse_yaml(header[1]) if header else None
    except ValueError as error:
        raise DataError(f"corpus.source={corpus.source}: the header of README.md cannot be read: {error}") from error
    # Links in the rest of the header do no harm.
    configs = said.get("configs") if isinstance(said, dict) else None
    address = next((text for text in _texts(configs) if "://" in text), None)
    if address:
        raise DataError(
            f"corpus.source={corpus.source}: its README.md names {address}, but only files inside the folder are "
            "read: download that file into the folder and name it there"
        )


def _texts(tree: Any) -> Iterator[str]:
    """Yield all texts in nested lists and mappings, keys included."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _texts(key)
            yield from _texts(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value)
    elif isinstance(tree, str):
        yield tree


def _arguments(corpus: CorpusConfig) -> dict[str, Any]:
    """Return the arguments with which `datasets.load_dataset` finds the corpus."""
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
    # A copy of a single subset may be in a folder without subsets.
    if names == ["default"] or (len(names) == 1 and not corpus.subset):
        return {"path": str(folder), "name": names[0]}
    raise DataError(f"corpus.subset={corpus.subset!r} is not one of {', '.join(names)}")


def _error(corpus: CorpusConfig, error: Exception) -> DataError:
    if isinstance(error, ImportError):
        return DataError(f"corpus.source={corpus.source} needs datasets ({error}): pip install 'nmt-moe[train]'")
    subset = f" corpus.subset={corpus.subset}" if corpus.subset else ""
    reason = shortened((str(error) or type(error).__name__).split("\n", 1)[0].rstrip("."))
    return DataError(
        f"corpus.source={corpus.source}{subset} cannot be read: {reason}. It must be phrasebook, "
        "files, a folder in the hub's layout, or a dataset of the Hugging Face hub, which needs the network"
    )
