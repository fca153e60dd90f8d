"""Datasets of the Hugging Face hub, and local folders laid out like one; the one file that knows `datasets`.

A folder may come from anybody: it names its data files by itself, and is read only inside itself.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nmt.config import CorpusConfig
from nmt.data.pairs import Columns, ReadReport, SentencePair
from nmt.data.tables import check_parquet
from nmt.errors import DataError
from nmt.files import read_regular

HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_ROWS = 1000
_MOST_README_BYTES = 1 << 24


def hub_pairs(corpus: CorpusConfig, split: str, report: ReadReport) -> Iterator[SentencePair]:
    """The pairs of "train", "dev" or "test"; nothing if there is no such split, which for "train" is a DataError.

    A local folder is streamed, which leaves no copy of it in the library's cache. A dataset of the hub is
    downloaded into that cache once, unless `max_pairs` wants a part of it only.
    """
    streaming = Path(corpus.source).is_dir() or corpus.max_pairs > 0
    hub_files(corpus)
    try:
        import datasets

        splits = datasets.load_dataset(**_arguments(corpus), streaming=streaming)
        if HUB_SPLITS[split] not in splits:
            if split == "train":
                raise DataError(f"it has no split train, only {', '.join(splits)}")
            return
        chunks = iter(splits[HUB_SPLITS[split]].iter(batch_size=_ROWS))
    except Exception as error:  # the library raises a dozen unrelated classes for what is one user mistake
        raise _error(corpus, error) from error
    where = f"corpus.source={corpus.source}"
    columns = Columns(corpus, split)
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
    if not Path(corpus.source).is_dir():
        return []
    folder = Path(corpus.source).resolve()
    _refuse_addresses(corpus, folder)
    try:
        import datasets

        data_files = datasets.load_dataset_builder(**_arguments(corpus)).config.data_files or {}
    except Exception as error:  # see hub_pairs
        raise _error(corpus, error) from error
    paths = sorted({Path(path) for paths in data_files.values() for path in paths})
    for path in paths:
        if not path.resolve().is_relative_to(folder):
            raise DataError(
                f"corpus.source={corpus.source} names {path}, which lies outside the folder: only files inside are "
                "read; move it there, as a file and no link"
            )
        if path.suffix == ".parquet" and path.is_file():
            _check_parquet(path, f"corpus.source={corpus.source}: {path}")
    return paths


def _refuse_addresses(corpus: CorpusConfig, folder: Path) -> None:
    """DataError if the folder's own README names data by an address: the library would fetch it."""
    try:
        text = read_regular(folder / "README.md", _MOST_README_BYTES).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"corpus.source={corpus.source}: README.md: {error.strerror}: remove it") from error
    header = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    # The key `configs` to the next key: the rest of the header may link to where it likes.
    configs = re.search(r"^configs\s*:.*?(?=^[^\s#-]|\Z)", header[1] if header else "", re.DOTALL | re.MULTILINE)
    address = re.search(r"\w+://[^\s\"']+", configs[0]) if configs else None
    if address:
        raise DataError(
            f"corpus.source={corpus.source}: its README.md names {address[0]}, but a folder is read from itself alone: "
            "download that file into the folder and name it there"
        )


def _check_parquet(path: Path, where: str) -> None:
    from pyarrow import ArrowException, parquet

    try:
        metadata = parquet.read_metadata(path)
    except (ArrowException, OSError) as error:
        reason = str(error).split("\n", 1)[0]
        raise DataError(f"{where} is damaged or no Parquet file ({reason}): get it again") from error
    check_parquet(metadata, None, where)


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
