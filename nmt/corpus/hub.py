"""Datasets of the Hugging Face hub, and local folders laid out like one; the one file that knows `datasets`.

A folder may come from anybody: it names its data files by itself, and is read only inside itself.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nmt.config import CorpusConfig
from nmt.config.reading import parse_yaml
from nmt.corpus.pairs import Columns, ReadReport, SentencePair
from nmt.corpus.tables import COMPRESSIONS, read_table
from nmt.errors import DataError
from nmt.files import read_regular
from nmt.textfile import open_text

HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_OWN_ENDINGS = r"\.(parquet|jsonl(\.(gz|xz|zst|bz2))?)$"
_ROWS = 1000
_MOST_README_BYTES = 1 << 24
# What the library reads beside README.md, without a bound.
_OTHER_METADATA = (".huggingface.yaml",)


def hub_pairs(corpus: CorpusConfig, split: str, report: ReadReport) -> Iterator[SentencePair]:
    """The pairs of "train", "dev" or "test"; nothing if there is no such split, which for "train" is a DataError.

    The .parquet and .jsonl files of a local folder are read as files of pairs are; its other kinds are streamed by
    the library, which leaves no copy in the library's cache. A dataset of the hub is downloaded into that cache once,
    unless `max_pairs` wants a part of it only.
    """
    columns = Columns(corpus, split)
    where = f"corpus.source={corpus.source}"
    files = _data_files(corpus)
    if files is not None:
        if HUB_SPLITS[split] not in files:
            _check_split(corpus, split, files)
            return
        paths = files[HUB_SPLITS[split]]
        if all(re.search(_OWN_ENDINGS, path.name) for path in paths):
            for path in paths:
                yield from read_table(path, where, columns, report)
            return
        for path in paths:
            _check_lines(path, where)
    try:
        import datasets

        splits = datasets.load_dataset(**_arguments(corpus), streaming=files is not None or corpus.max_pairs > 0)
        chunks = iter(splits[HUB_SPLITS[split]].iter(batch_size=_ROWS)) if HUB_SPLITS[split] in splits else None
    except Exception as error:  # the library raises a dozen unrelated classes for what is one user mistake
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
    """The data files of a local folder, each of them inside it; none for a dataset that comes from the hub."""
    return sorted({path for paths in (_data_files(corpus) or {}).values() for path in paths})


def _data_files(corpus: CorpusConfig) -> dict[str, list[Path]] | None:
    """The files of each split of a local folder, by the hub's name of the split; None if it is no folder."""
    if not Path(corpus.source).is_dir():
        return None
    folder = Path(corpus.source).resolve()
    _refuse_addresses(corpus, folder)
    try:
        import datasets

        data_files = datasets.load_dataset_builder(**_arguments(corpus)).config.data_files or {}
    except Exception as error:  # see hub_pairs
        raise _error(corpus, error) from error
    files = {str(split): list(map(Path, paths)) for split, paths in data_files.items()}
    for path in (path for paths in files.values() for path in paths):
        if not path.resolve().is_relative_to(folder):
            raise DataError(
                f"corpus.source={corpus.source} names {path}, which lies outside the folder: only files inside are "
                "read; move it there, as a file and no link"
            )
    return files


def _check_split(corpus: CorpusConfig, split: str, there: Iterable[str]) -> None:
    """DataError if the split that lacks is the one for training."""
    if split == "train":
        raise _error(corpus, ValueError(f"it has no split train, only {', '.join(there) or 'none'}"))


def _check_lines(path: Path, where: str) -> None:
    """DataError if a line of a text file is longer than the library should be given: it would hold it whole."""
    if path.suffix in (".csv", ".tsv", ".txt", ".json", ".xml") or path.suffix in COMPRESSIONS:
        with open_text(path, where) as lines:
            for _ in lines:
                pass


def _refuse_addresses(corpus: CorpusConfig, folder: Path) -> None:
    """DataError if the folder names data by an address, which the library would fetch, or may do so unseen."""
    for name in _OTHER_METADATA:
        if os.path.lexists(folder / name):
            raise DataError(
                f"corpus.source={corpus.source}: {folder / name} is not read: say in README.md where the data are, and "
                "remove it"
            )
    try:
        text = read_regular(folder / "README.md", _MOST_README_BYTES).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"corpus.source={corpus.source}: README.md: {error.strerror}: remove it") from error
    # As the library finds it.
    header = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---", text.removeprefix("\ufeff"), re.DOTALL)
    try:
        said = parse_yaml(header[1]) if header else None
    except ValueError as error:
        raise DataError(f"corpus.source={corpus.source}: the header of README.md cannot be read: {error}") from error
    # The rest of the header may link to where it likes.
    configs = said.get("configs") if isinstance(said, dict) else None
    address = next((text for text in _texts(configs) if "://" in text), None)
    if address:
        raise DataError(
            f"corpus.source={corpus.source}: its README.md names {address}, but a folder is read from itself alone: "
            "download that file into the folder and name it there"
        )


def _texts(tree: Any) -> Iterator[str]:
    """All texts in nested lists and mappings, keys included."""
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


def _error(corpus: CorpusConfig, error: Exception) -> DataError:
    if isinstance(error, ImportError):
        return DataError(f"corpus.source={corpus.source} needs the package `datasets` ({error}): install it")
    subset = f" corpus.subset={corpus.subset}" if corpus.subset else ""
    reason = (str(error) or type(error).__name__).split("\n", 1)[0].rstrip(".")
    return DataError(
        f"corpus.source={corpus.source}{subset} cannot be read: {reason}. It must be phrasebook, "
        "files, a folder in the hub's layout, or a dataset of the Hugging Face hub, which needs the network"
    )
