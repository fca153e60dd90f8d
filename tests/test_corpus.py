"""Reading sentence pairs: the line rule, compressions, formats, the hub's layout, filters."""

import gzip
import json
import lzma
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nmt.config import CorpusConfig, FilesConfig, FilterConfig
from nmt.data.corpus import Filters, ReadReport, SentencePair, read_pairs, source_files

ODD = "tab\tNUL\x00 CR\r mid\r dle \x0b\x0c\x1c\x85\u2028\u2029 end"


def compress(path: Path, data: bytes) -> None:
    if path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(data))


def files_corpus(root: Path, **settings: Any) -> CorpusConfig:
    train = settings.pop("train", FilesConfig(source=["a.en"], target=["a.de"]))
    return CorpusConfig(source="files", root=str(root), train=train, **settings)


def refusal(corpus: CorpusConfig, split: str = "train") -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        list(read_pairs(corpus, split))
    message = str(caught.value)
    assert "\n" not in message
    return message


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=60), st.text("a\n\r\x85\u2028\x00\ufeff", max_size=20).map(str.encode)))
@example(b"\xef\xbb\xbf")
@example(b"\xef\xbb\xbf\n")
@example(b"a\r\n\r\nb\r")
@example(b"\n")
def test_line_rule(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.en").write_bytes(data)
    expected = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not expected[-1]:
        expected.pop()
    (tmp_path / "a.de").write_bytes(b"x\n" * len(expected))
    report = ReadReport()
    pairs = list(read_pairs(files_corpus(tmp_path), "train", report))
    lines = [line[:-1] if line.endswith(b"\r") else line for line in expected]
    assert [pair.source for pair in pairs] == [line.decode(errors="replace") for line in lines]
    broken = sum(line.decode(errors="replace") != line.decode(errors="ignore") for line in lines)
    assert report.invalid_lines <= broken
    assert (report.invalid_lines == 0) == all(_is_utf8(line) for line in lines)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("ending", ["", ".gz", ".xz", ".zst"])
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


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_damaged_files_are_refused(tmp_path: Path, ending: str) -> None:
    for name, damage in (("cut", lambda data: data[: len(data) // 2]), ("wrong", lambda _: b"no archive\n")):
        path = tmp_path / f"{name}{ending}"
        compress(path, "\n".join(f"line {number * number}" for number in range(9999)).encode())
        path.write_bytes(damage(path.read_bytes()))
        message = refusal(files_corpus(tmp_path, train=FilesConfig(source=[path.name], target=[path.name])))
        assert "corpus.train.source" in message
        assert str(path) in message


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
    message = refusal(files_corpus(tmp_path, train=FilesConfig(source=["a.en"])), "train")
    assert "corpus.train" in message
    phrasebook = CorpusConfig(dev=FilesConfig(pairs=["x.tsv"]))
    assert "corpus.dev names files" in refusal(phrasebook)


@pytest.mark.parametrize("name", ["p.tsv", "p.tsv.gz", "p.jsonl", "p.jsonl.zst", "p.parquet", "n.parquet"])
def test_files_of_pairs(tmp_path: Path, name: str) -> None:
    rows = [("one\u2028", "eins"), ("two", "zw\x85ei"), ("", "drei")]
    flat = [{"de": de, "en": en, "domain": "numbers", "other": 1} for en, de in rows]
    nested = [{"translation": {"en": en, "de": de, "fr": "x"}} for en, de in rows]
    if ".tsv" in name:
        compress(tmp_path / name, "".join(f"{en}\t{de}\n" for en, de in rows).encode())
    elif ".jsonl" in name:
        chosen = nested if name.endswith("zst") else flat
        compress(tmp_path / name, "\n".join(json.dumps(row) for row in chosen).encode())
    else:
        table = pyarrow.Table.from_pylist(nested if name[0] == "n" else flat)
        pyarrow.parquet.write_table(table, tmp_path / name)
    pairs = list(read_pairs(files_corpus(tmp_path, train=FilesConfig(pairs=[name])), "train"))
    assert [(pair.source, pair.target) for pair in pairs] == rows
    domain = "numbers" if name in ("p.jsonl", "p.parquet") else ""
    assert {pair.domain for pair in pairs} == {domain}


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('{"en": "a"', "not valid JSON"),
        ("[" * 100000, "not valid JSON"),
        ("3", "must be an object"),
        ('{"translation": {"en": "a", "fr": "b"}}', "corpus.target_language=de; there are en, fr"),
        ('{"en": "a", "de": null}', "corpus.target_language=de"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, line: str, part: str) -> None:
    (tmp_path / "p.jsonl").write_text('{"en": "x", "de": "y"}\n' + line + "\n")
    message = refusal(files_corpus(tmp_path, train=FilesConfig(pairs=["p.jsonl"])))
    assert f"{tmp_path / 'p.jsonl'} line 2" in message
    assert part in message


def test_other_bad_files_of_pairs(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text("a\tb\na b\n")
    assert "line 2: 1 columns" in refusal(files_corpus(tmp_path, train=FilesConfig(pairs=["p.tsv"])))
    (tmp_path / "p.parquet").write_bytes(b"no parquet")
    assert "p.parquet is damaged" in refusal(files_corpus(tmp_path, train=FilesConfig(pairs=["p.parquet"])))
    (tmp_path / "p.csv").write_text("a,b\n")
    assert "must end in" in refusal(files_corpus(tmp_path, train=FilesConfig(pairs=["p.csv"])))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "q.parquet")
    message = refusal(files_corpus(tmp_path, train=FilesConfig(pairs=["q.parquet"])))
    assert "q.parquet row 1" in message
    assert "there are text" in message
    # A line break and a lone surrogate, which JSON can spell, cannot reach the prepared text.
    (tmp_path / "p.jsonl").write_text('{"en": "a\\nb", "de": "\\ud800c"}')
    assert list(read_pairs(files_corpus(tmp_path, train=FilesConfig(pairs=["p.jsonl"])), "train")) == [
        SentencePair("a b", "?c")
    ]


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

    monkeypatch.setitem(sys.modules, "nmt.data.phrasebook", Module)
    assert next(read_pairs(CorpusConfig(), "train")) == SentencePair("s0", "t0", "travel")
    assert len(list(read_pairs(CorpusConfig(max_pairs=7), "train"))) == 7
    assert len(list(read_pairs(CorpusConfig(max_pairs=7), "dev"))) == 500
    assert len(list(read_pairs(CorpusConfig(), "test"))) == 1000
    assert asked[0] == ("train", "en", "de", 30000)


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


def test_filters_count_what_they_drop() -> None:
    config = FilterConfig(identical=True, duplicates=True, max_words=5, max_length_ratio=2.0, max_pieces=9)
    filters = Filters(config)
    kept = [
        filters.keep(SentencePair(source, target))
        for source, target in (
            ("a b", "c d"),
            ("\u3000 ", "c"),
            ("a", " "),
            ("same ", "same"),
            ("a b", "c d"),
            ("1 2 3 4 5 6", "1 2 3 4 5 seven"),
            ("1 2 3 4 5", "1 2"),
            ("1 2 3 4", "1 2"),
        )
    ]
    assert kept == [True, False, False, False, False, False, False, True]
    assert [filters.keep_encoded(*sizes) for sizes in ((9, 9), (10, 2), (0, 3))] == [True, False, False]
    assert list(filters.dropped.items()) == [
        ("blank", 3),
        ("identical", 1),
        ("duplicates", 1),
        ("max_words", 1),
        ("max_length_ratio", 1),
        ("max_pieces", 1),
    ]
    off = Filters(FilterConfig(blank=False, max_words=0, max_pieces=0))
    assert off.keep(SentencePair("", "x " * 1000))
    assert off.keep_encoded(0, 9999)
