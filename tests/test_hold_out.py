"""Dev and test held out of the training text: a function of the pairs alone, and never in training."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from nmt.config import CorpusConfig, FilesConfig, SubwordConfig
from nmt.data.prepared import Prepared
from nmt.preparation.prepare import prepare


def text_of(prepared: Prepared, split: str) -> list[tuple[str, str]]:
    source, target, _ = prepared.text(split)
    return list(zip(source, target, strict=True))


def trained_on(prepared: Prepared) -> list[tuple[str, str]]:
    subwords, shards = prepared.subwords(), prepared.parts()[0].shards
    return [(subwords.decode(shards.source(pair)), subwords.decode(shards.target(pair))) for pair in range(len(shards))]


@pytest.fixture
def pairs() -> list[tuple[str, str]]:
    distinct = [(f"the dog {number}", f"der Hund {number}") for number in range(300)]
    return distinct + distinct[:150]


def corpus_of(folder: Path, **changes: Any) -> CorpusConfig:
    options: dict[str, Any] = {
        "name": "toy",
        "directory": str(folder / "prepared"),
        "root": str(folder),
        "dev": FilesConfig(from_train=30),
        "test": FilesConfig(from_train=20),
        "subwords": SubwordConfig(kind="bpe", vocab_size=32),
    }
    return CorpusConfig(**(options | changes))


@pytest.mark.slow
def test_files(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    for name, some in (("a.tsv", pairs[:200]), ("b.tsv", pairs[200:])):
        (tmp_path / name).write_text("".join(f"{source}\t{target}\n" for source, target in some))
    log: list[str] = []
    files = FilesConfig(pairs=["a.tsv", "b.tsv"], domains=["first", "second"])
    prepared = prepare(corpus_of(tmp_path, source="files", train=files), log.append)
    dev, test, train = text_of(prepared, "dev"), text_of(prepared, "test"), trained_on(prepared)
    assert (len(dev), len(test)) == (30, 20)
    assert len({*dev, *test}) == 50
    assert sorted(train) == sorted(pair for pair in pairs if pair not in {*dev, *test})
    assert prepared.manifest["held_out"] == len(pairs) - len(train) > 50
    assert set(prepared.text("dev")[2]) == {"first", "second"}
    assert "toy: 30 pairs held out of the training text for dev" in log
    assert f"toy: {len(pairs)} pairs read, {len(train)} kept, {len(pairs) - len(train)} held out" in log
    assert f"toy: {len(pairs) - len(train) - 50} copies of the held-out pairs removed from the training text" in log
    # Another order of the files holds out the same.
    other = corpus_of(tmp_path, source="files", train=FilesConfig(pairs=["b.tsv", "a.tsv"]))
    assert text_of(prepare(other, log.append), "dev") == dev


def test_a_folder_of_the_hub(tmp_path: Path, pairs: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    rows = [{"translation": {"en": source, "de": target}} for source, target in pairs]
    for split in ("train", "validation"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set" / f"{split}.parquet")
    # What is asked for goes before what the folder has.
    prepared = prepare(corpus_of(tmp_path, source=str(tmp_path / "set")), lambda _: None)
    dev = text_of(prepared, "dev")
    assert len(dev) == 30
    assert not set(dev) & set(trained_on(prepared))
