"""Reading sentence pairs: the line rule, compressions, formats, the hub's layout, filters."""

import bz2
import gzip
import lzma
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest

from nmt.config import CorpusConfig, FilesConfig
from nmt.corpus.pairs import ReadReport, SentencePair
from nmt.corpus.sources import read_pairs, source_files, units
from nmt.errors import DataError
from nmt.textfile import MOST_BYTES

ODD = "tab\tNUL\x00 CR\r mid\r dle \x0b\x0c\x1c\x85\u2028\u2029 end"


def compress(path: Path, data: bytes) -> None:
    if path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes(
            {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)(data)
        )


def files_corpus(root: Path, **settings: Any) -> CorpusConfig:
    train = settings.pop("train", FilesConfig(source=["a.en"], target=["a.de"]))
    return CorpusConfig(source="files", root=str(root), train=train, **settings)


def refusal(corpus: CorpusConfig, split: str = "train") -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        list(read_pairs(corpus, split))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_lines_are_paired_by_the_line_rule(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_bytes(b"\xef\xbb\xbfone\r\n\ntwo\xe2\x80\xa8\x85\nlast")
    (tmp_path / "a.de").write_bytes(b"1\n2\n3\n4\n")
    pairs = list(read_pairs(files_corpus(tmp_path), "train"))
    assert [(pair.source, pair.target) for pair in pairs] == [
        ("one", "1"),
        ("", "2"),
        ("two\u2028\ufffd", "3"),
        ("last", "4"),
    ]


@pytest.mark.parametrize("ending", ["", ".gz", ".xz", ".zst", ".bz2"])
def test_compressions(tmp_path: Path, ending: str) -> None:
    lines = [ODD, "two", "", "größer", "last"]
    compress(tmp_path / f"a.en{ending}", "\n".join(lines).encode())
    compress(tmp_path / f"a.de{ending}", b"1\n2\n3\n4\n5\n")
    corpus = files_corpus(tmp_path, train=FilesConfig(source=[f"a.en{ending}"], target=[f"a.de{ending}"]))
    pairs = list(read_pairs(corpus, "train"))
    assert [pair.source for pair in pairs] == lines
    assert [pair.target for pair in pairs] == list("12345")
    assert [path.name for path in source_files(corpus)] == [f"a.en{ending}", f"a.de{ending}"]
    assert len(list(read_pairs(files_corpus(tmp_path, train=corpus.train, max_pairs=2), "train"))) == 2
    assert list(read_pairs(corpus, "test")) == []


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.gz"
    path.write_bytes(gzip.compress(b"line\n" * 99)[:-9])
    message = refusal(files_corpus(tmp_path, train=FilesConfig(source=[path.name], target=[path.name])))
    assert f"corpus.train.source: {path} is damaged gzip data" in message


def test_what_is_no_text_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_bytes("one line\nanother\n".encode("utf-16-le"))
    (tmp_path / "a.de").write_bytes(b"1\n2\n")
    assert f"corpus.train.source: {tmp_path / 'a.en'} is UTF-16LE" in refusal(files_corpus(tmp_path))
    (tmp_path / "a.en").write_bytes(b"one\n" + b"a" * (MOST_BYTES + 1))
    assert f"corpus.train.source: {tmp_path / 'a.en'} line 2 has more than" in refusal(files_corpus(tmp_path))
    (tmp_path / "a.en").unlink()
    os.mkfifo(tmp_path / "a.en")
    with pytest.raises(DataError, match="is a pipe"):
        source_files(files_corpus(tmp_path))


def test_unequal_sides_are_refused_with_both_counts(tmp_path: Path) -> None:
    for name, count in (("a", 7), ("b", 9), ("c", 16)):
        (tmp_path / name).write_text("x\n" * count)
    assert "7 lines in" in refusal(files_corpus(tmp_path, train=FilesConfig(source=["a"], target=["b"])))
    message = refusal(files_corpus(tmp_path, train=FilesConfig(source=["c"], target=["b"])))
    assert f"corpus.train: 16 lines in {tmp_path / 'c'} but 9 in {tmp_path / 'b'}" in message
    # The same number of files on both sides is compared file by file, another number as a whole.
    message = refusal(files_corpus(tmp_path, train=FilesConfig(source=["a", "b"], target=["b", "a"])))
    assert "7 lines" in message
    split = files_corpus(tmp_path, train=FilesConfig(source=["a", "b"], target=["c"]))
    assert len(list(read_pairs(split, "train"))) == 16
    message = refusal(files_corpus(tmp_path, train=FilesConfig(source=["a", "b", "a"], target=["c"])))
    assert "23 lines" in message
    assert "16 in" in message


def test_missing_files_name_the_key(tmp_path: Path) -> None:
    message = refusal(files_corpus(tmp_path))
    assert "corpus.train.source" in message
    assert str(tmp_path / "a.en") in message
    (tmp_path / "a.en").mkdir()
    assert "is a folder" in refusal(files_corpus(tmp_path))
    (tmp_path / "a,b.en").write_text("x\n")
    quoted = files_corpus(tmp_path, train=FilesConfig(source=["a", "b.en"], target=["a,b.en"]))
    assert "put quotes around it: corpus.train.source=['a,b.en']" in refusal(quoted)
    phrasebook = CorpusConfig(dev=FilesConfig(pairs=["x.tsv"]))
    assert "corpus.dev names files" in refusal(phrasebook)


def test_invalid_utf8_is_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_bytes(b"gut\nschlecht \xff\xfe\nKaf\xe9\n")
    (tmp_path / "a.de").write_bytes(b"1\n2\n3\n")
    report = ReadReport()
    pairs = list(read_pairs(files_corpus(tmp_path), "train", report))
    assert report.invalid_lines == 2
    assert pairs[2].source == "Kaf\ufffd"


class FakePhrase(NamedTuple):
    source: str
    target: str
    domain: str


def test_phrasebook(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Module:
        @staticmethod
        def phrasebook(split: str, source: str, target: str, num_pairs: int) -> Iterator[FakePhrase]:
            asked.append((split, source, target, num_pairs))
            return iter([FakePhrase(f"s{number}", f"t{number}", "travel") for number in range(num_pairs)])

    monkeypatch.setitem(sys.modules, "nmt.corpus.phrasebook", Module)
    assert next(read_pairs(CorpusConfig(), "train")) == SentencePair("s0", "t0", "travel")
    assert len(list(read_pairs(CorpusConfig(max_pairs=7), "train"))) == 7
    assert len(list(read_pairs(CorpusConfig(max_pairs=7), "dev"))) == 500
    assert len(list(read_pairs(CorpusConfig(), "test"))) == 1000
    assert asked[0] == ("train", "en", "de", 30000)


def test_scores_of_a_model_belong_to_their_lines(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.en").write_text(f"{name} one\n{name} two\n")
        (tmp_path / f"{name}.de").write_text(f"{name} eins\n{name} zwei\n")
    (tmp_path / "a.tsv").write_text("-1.5\t3.2\n-2e1\t9\n")
    (tmp_path / "b.tsv").write_text("-3\n-4\n")
    files = FilesConfig(source=["a.en", "b.en"], target=["a.de", "b.de"], scores=["a.tsv", "b.tsv"])
    found = [rows for unit in units(files_corpus(tmp_path, train=files), "train") for rows in unit.read(ReadReport())]
    assert [score for rows in found for score in rows.scores] == [-1.5, -20.0, -3.0, -4.0]
    assert [text for rows in found for text in rows.texts["de"]] == ["a eins", "a zwei", "b eins", "b zwei"]
    (tmp_path / "b.tsv").write_text("-3\n")
    assert "2 lines in" in refusal(files_corpus(tmp_path, train=files))
    (tmp_path / "b.tsv").write_text("-3\nlog_prob\n")
    message = refusal(files_corpus(tmp_path, train=files))
    assert "b.tsv line 2: 'log_prob' does not begin with a log-probability" in message
    with pytest.raises(ValueError, match=r"corpus\.train\.scores names 1 files for 2"):
        files_corpus(tmp_path, train=FilesConfig(source=["a.en", "b.en"], target=["a.de", "b.de"], scores=["a.tsv"]))
    with pytest.raises(ValueError, match=r"corpus\.dev\.scores"):
        files_corpus(tmp_path, dev=FilesConfig(source=["a.en"], target=["a.de"], scores=["a.tsv"]))
