"""Datasets of the hub and folders laid out like one: layouts, subsets, own dev files, nothing outside the folder."""

import gzip
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import nmt.corpus.tables
from nmt.config import CorpusConfig, FilesConfig
from nmt.corpus.pairs import ReadReport, SentencePair
from nmt.corpus.sources import read_pairs, source_files
from nmt.errors import DataError
from nmt.textfile import MOST_BYTES


def refusal(corpus: CorpusConfig, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        list(read_pairs(corpus, split))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`datasets` without network, its caches in a temporary folder."""
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, str(tmp_path / "cache"))
    return tmp_path


def write_mirror(folder: Path, splits: dict[str, int]) -> None:
    folder.mkdir(parents=True)
    for split, count in splits.items():
        rows = [{"translation": {"de": f"{split} {i}", "en": f"{split}\n{i}"}} for i in range(count)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize("layout", ["readme", "folders", "data"])
def test_mirrors_of_the_hub(offline: Path, layout: str) -> None:
    root = offline / "mirror"
    splits = {"train": 1234, "validation": 3, "test": 2}
    for subset in ("data",) if layout == "data" else ("de-en", "fr-en"):
        write_mirror(root / subset, splits)
    if layout == "readme":
        configs = "".join(
            f"- config_name: {subset}\n  data_files:\n"
            + "".join(f"  - split: {split}\n    path: {subset}/{split}-*\n" for split in splits)
            for subset in ("de-en", "fr-en")
        )
        (root / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# A mirror\n")
    corpus = CorpusConfig(source=str(root), subset="de-en")
    pairs = list(read_pairs(corpus, "train"))
    assert len(pairs) == 1234
    assert pairs[-1] == SentencePair("train 1233", "train 1233")
    assert [pair.target for pair in read_pairs(corpus, "dev")] == [f"validation {i}" for i in range(3)]
    assert len(list(read_pairs(corpus, "test"))) == 2
    some = CorpusConfig(source=str(root), subset="de-en", max_pairs=5)
    assert len(list(read_pairs(some, "train"))) == 5
    folder = "data" if layout == "data" else "de-en"
    assert {path.parent.name for path in source_files(corpus)} == {folder}
    assert len(source_files(corpus)) == 3
    assert not list((offline / "cache").rglob("*.arrow"))
    wrong = CorpusConfig(source=str(root), subset="de-en", target_language="fr")
    assert "corpus.target_language=fr; there are " in refusal(wrong)
    if layout == "readme":
        message = refusal(CorpusConfig(source=str(root), subset="cs-en"))
        assert "corpus.subset='cs-en' is not one of de-en, fr-en" in message


def test_absent_datasets_are_one_line(offline: Path) -> None:
    message = refusal(CorpusConfig(source=str(offline / "nowhere")))
    assert "there is no such folder" in message
    message = refusal(CorpusConfig(source="wmt/wmt14", subset="de-en"))
    assert "corpus.source=wmt/wmt14 corpus.subset=de-en cannot be read" in message
    write_mirror(offline / "only-train", {"train": 2})
    corpus = CorpusConfig(source=str(offline / "only-train"))
    assert len(list(read_pairs(corpus, "train"))) == 2
    assert list(read_pairs(corpus, "dev")) == []


def test_own_dev_files_beside_a_folder(offline: Path) -> None:
    write_mirror(offline / "only-train", {"train": 5})
    (offline / "d.tsv").write_text("a\tb\n")
    files = FilesConfig(pairs=["d.tsv"])
    corpus = CorpusConfig(source=str(offline / "only-train"), root=str(offline), dev=files)
    assert list(read_pairs(corpus, "dev")) == [SentencePair("a", "b")]
    assert len(list(read_pairs(corpus, "train"))) == 5
    assert source_files(corpus)[-1] == offline / "d.tsv"
    assert len(source_files(corpus)) == 2
    # Files go before a split of the folder.
    write_mirror(offline / "both", {"train": 5, "validation": 3})
    corpus.source = str(offline / "both")
    assert len(list(read_pairs(corpus, "dev"))) == 1
    corpus.train = files
    assert "corpus.train names files" in refusal(corpus)


def test_columns_of_a_folder(offline: Path) -> None:
    (offline / "set").mkdir()
    table = pyarrow.table({"id": [1, 2], "target": ["a", None], "source": ["x", "y"]})
    pyarrow.parquet.write_table(table, offline / "set" / "train.parquet")
    for columns in (["source", "target"], ["3", "2"]):
        corpus = CorpusConfig(source=str(offline / "set"), train=FilesConfig(columns=columns))
        assert list(read_pairs(corpus, "train")) == [SentencePair("x", "a")]
    message = refusal(CorpusConfig(source=str(offline / "set")))
    assert "there are id, target, source: set corpus.train.columns" in message


README = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {}\n---\n"


def test_nothing_outside_the_folder_is_read(offline: Path) -> None:
    folder = offline / "received" / "set"
    folder.mkdir(parents=True)
    secret = offline / "secret.jsonl"
    secret.write_text('{"en": "private", "de": "privat"}\n')
    corpus = CorpusConfig(source=str(folder))
    for name in ("../../secret.jsonl", str(secret)):
        (folder / "README.md").write_text(README.format(name))
        assert "is outside the folder" in refusal(corpus)
        with pytest.raises(DataError, match="is outside the folder"):
            source_files(corpus)
    (folder / "train.jsonl").symlink_to(secret)
    (folder / "README.md").write_text(README.format("train.jsonl"))
    assert "is outside the folder" in refusal(corpus)
    for name in ("http://localhost:1/train.jsonl", "zip://a.jsonl::https://x.org/a.zip", "hf://datasets/a/b.jsonl"):
        (folder / "README.md").write_text(README.format(name))
        message = refusal(corpus)
        assert "its README.md names" in message
        assert "download that file" in message
    for spelled in (
        README.format("x").replace("configs:", '"configs":').replace("path: x", "path: ftp://x.org/a"),
        README.format('"ftp\\x3a//x.org/a.jsonl"'),
        "\n\n" + README.format("ftp://x.org/a.jsonl"),
    ):
        (folder / "README.md").write_text(spelled)
        assert "its README.md names ftp://x.org/a" in refusal(corpus)
    (folder / "README.md").unlink()
    os.mkfifo(folder / ".huggingface.yaml")
    assert ".huggingface.yaml is not supported" in refusal(corpus)
    (folder / ".huggingface.yaml").unlink()
    (folder / "README.md").write_text("---\nlicense_link: https://x.org\n---\nSee https://x.org\n")
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl").write_text('{"en": "a", "de": "b"}\n')
    assert list(read_pairs(corpus, "train")) == [SentencePair("a", "b")]


def test_a_cell_without_end_is_refused(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nmt.corpus.tables, "_HARMLESS_BYTES", 1 << 20)
    (offline / "set").mkdir()
    table = pyarrow.table({"en": ["a" * 2_000_000], "de": ["b"]})
    pyarrow.parquet.write_table(table, offline / "set" / "train.parquet", compression="zstd")
    assert "this is not text" in refusal(CorpusConfig(source=str(offline / "set")))


def test_a_line_without_end_is_refused(offline: Path) -> None:
    for ending, text in (("jsonl", '{{"en": "{}", "de": "b"}}\n'), ("csv", "en,de\n{},b\n")):
        folder = offline / ending
        folder.mkdir()
        (folder / f"train.{ending}.gz").write_bytes(gzip.compress(text.format("a" * (MOST_BYTES + 1)).encode()))
        assert "has more than" in refusal(CorpusConfig(source=str(folder)))


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "json"])
def test_kinds_of_files_in_a_folder(offline: Path, ending: str) -> None:
    folder = offline / "set"
    folder.mkdir()
    text = '{"en": "a", "de": "b"}\n{"en": null, "de": "d"}\n' if "json" in ending else "en,de\na,b\n,\n"
    (folder / f"train.{ending}").write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    report = ReadReport()
    assert list(read_pairs(CorpusConfig(source=str(folder)), "train", report)) == [SentencePair("a", "b")]
    assert report.empty_rows == 1
