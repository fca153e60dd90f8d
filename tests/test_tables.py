"""Files of pairs: columns by name and number, lines of names, blank and null rows, bad rows, cells without end."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import nmt.corpus.tables
from nmt.config import CorpusConfig, FilesConfig
from nmt.corpus.pairs import ReadReport, SentencePair
from nmt.corpus.sources import read_pairs
from nmt.errors import DataError

PAIRS = [("one", "eins"), ("two, 2", "zwei"), ("three", "drei")]


def corpus_of(root: Path, name: str, *columns: str, **settings: Any) -> CorpusConfig:
    return CorpusConfig(
        source="files", root=str(root), train=FilesConfig(pairs=[name], columns=list(columns)), **settings
    )


def read(root: Path, name: str, *columns: str, report: ReadReport | None = None) -> list[tuple[str, str]]:
    pairs = read_pairs(corpus_of(root, name, *columns), "train", report)
    return [(pair.source, pair.target) for pair in pairs]


def refusal(root: Path, name: str, *columns: str) -> str:
    with pytest.raises(DataError) as caught:
        read(root, name, *columns)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"corpus.train.pairs: {root / name}")
    return message


@pytest.mark.parametrize("name", ["p.tsv", "p.tsv.gz", "p.jsonl", "p.jsonl.zst", "p.parquet", "n.parquet"])
def test_files_of_pairs(tmp_path: Path, name: str) -> None:
    rows = [("one\u2028", "eins"), ("two", "zw\x85ei"), ("", "drei")]
    flat = [{"de": de, "en": en, "domain": "numbers", "other": 1} for en, de in rows]
    nested = [{"translation": {"en": en, "de": de, "fr": "x"}} for en, de in rows]
    if ".tsv" in name:
        data = "".join(f"{en}\t{de}\n" for en, de in rows).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    elif ".jsonl" in name:
        chosen = nested if name.endswith("zst") else flat
        data = "\n".join(json.dumps(row) for row in chosen).encode()
        (tmp_path / name).write_bytes(pyarrow.compress(data, "zstd", asbytes=True) if name.endswith("zst") else data)
    else:
        table = pyarrow.Table.from_pylist(nested if name[0] == "n" else flat)
        pyarrow.parquet.write_table(table, tmp_path / name)
    pairs = list(read_pairs(corpus_of(tmp_path, name), "train"))
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
        ('{"en": "a", "de": 3}', "de is a value of type int"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, line: str, part: str) -> None:
    (tmp_path / "p.jsonl").write_text('{"en": "x", "de": "y"}\n' + line + "\n")
    message = refusal(tmp_path, "p.jsonl")
    assert f"{tmp_path / 'p.jsonl'} line 2" in message
    assert part in message


def write_columns(path: Path, names: list[str], rows: list[list[Any]]) -> None:
    """Rows in the format that the ending says; .tsv and .csv with a line of names if there are any."""
    if path.suffix in (".tsv", ".csv"):
        separator = {".tsv": "\t", ".csv": ","}[path.suffix]
        quoted = [[f'"{cell}"' if separator in cell else cell for cell in row] for row in [names, *rows] if row]
        path.write_text("".join(separator.join(row) + "\n" for row in quoted))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows]), path
        )


@pytest.mark.parametrize("ending", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_columns_by_name(tmp_path: Path, ending: str) -> None:
    rows = [[str(number), target, "x", source] for number, (source, target) in enumerate(PAIRS)]
    write_columns(tmp_path / f"p{ending}", ["id", "EN-us", "note", "src"], rows)
    assert read(tmp_path, f"p{ending}", "src", "EN-us") == PAIRS
    message = refusal(tmp_path, f"p{ending}", "src", "trg")
    assert "no column trg of corpus.train.columns=[src, trg]" in message
    assert "id, EN-us, note, src" in message
    message = refusal(tmp_path, f"p{ending}")
    assert "set corpus.train.columns to the source column and the target column" in message


@pytest.mark.parametrize("ending", [".tsv", ".csv", ".parquet"])
def test_columns_by_number(tmp_path: Path, ending: str) -> None:
    rows = [["7", target, source] for source, target in PAIRS]
    write_columns(tmp_path / f"p{ending}", ["a", "b", "c"] if ending == ".parquet" else [], rows)
    assert read(tmp_path, f"p{ending}", "3", "2") == PAIRS
    assert "too few for corpus.train.columns=[3, 4]" in refusal(tmp_path, f"p{ending}", "3", "4").replace(
        "3 columns for", "too few for"
    )


def test_arrays_have_numbers(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps([1, *pair]) + "\n" for pair in PAIRS))
    assert read(tmp_path, "p.jsonl", "2", "3") == PAIRS


def test_a_line_of_names_is_no_pair(tmp_path: Path) -> None:
    for names in ("en\tde", "Source\tTarget", "DE\tid\tEN"):
        report = ReadReport()
        rows = [("eins", "1", "one")] if "id" in names else [("one", "eins")]
        (tmp_path / "p.tsv").write_text("\n".join([names, *("\t".join(row) for row in rows)]))
        assert read(tmp_path, "p.tsv", report=report) == [("one", "eins")]
        assert report.notes == [f"corpus.train.pairs: {tmp_path / 'p.tsv'}: its first line was read as column names"]


@pytest.mark.parametrize("ending", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_blank_and_null_rows_are_left_out_and_counted(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"p{ending}"
    if ending in (".tsv", ".csv"):
        separator = {".tsv": "\t", ".csv": ","}[ending]
        path.write_text(f"\none{separator}eins\n\n \n{separator}\ntwo{separator}zwei\n\n")
        left_out = 5
    elif ending == ".jsonl":
        path.write_text(
            '{"en": "one", "de": "eins"}\n\nnull\n{"en": null, "de": "x"}\n{"en": "two", "de": "zwei"}\n'
            '{"translation": null}\n\n'
        )
        left_out = 5
    else:
        rows = [{"en": "one", "de": "eins"}, None, {"en": "a", "de": None}, {"en": "two", "de": "zwei"}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"translation": row} for row in rows]), path)
        left_out = 2
    report = ReadReport()
    assert read(tmp_path, path.name, report=report) == [("one", "eins"), ("two", "zwei")]
    assert report.empty_rows == left_out


def test_csv_has_quotes_line_ends_and_semicolons(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b'"a ""b"", c","d\ne"\r\nf,g\r\n')
    assert read(tmp_path, "p.csv") == [('a "b", c', "d e"), ("f", "g")]
    (tmp_path / "q.csv").write_text("en;de\none, two;eins\n")
    assert read(tmp_path, "q.csv") == [("one, two", "eins")]
    (tmp_path / "r.csv").write_text('a,b\nc,"' + "d\n" * 100_000)
    assert "not valid CSV" in refusal(tmp_path, "r.csv")
    (tmp_path / "s.csv").write_text("")
    assert read(tmp_path, "s.csv") == []


def test_quotes_in_tsv_are_letters(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text('"a\tb\nc"\t"d\n')
    assert read(tmp_path, "p.tsv") == [('"a', "b"), ('c"', '"d')]


def test_other_bad_files(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text("a\tb\na b\n")
    assert "line 2: 1 columns" in refusal(tmp_path, "p.tsv")
    (tmp_path / "p.tsv").write_text("a\tb\nc\td\te\n")
    assert "line 2: 3 columns" in refusal(tmp_path, "p.tsv")
    (tmp_path / "p.tsv").write_text("a\tb\tc\n")
    assert "line 1: 3 columns instead of source and target: set corpus.train.columns" in refusal(tmp_path, "p.tsv")
    (tmp_path / "p.parquet").write_bytes(b"no parquet")
    assert "p.parquet is damaged" in refusal(tmp_path, "p.parquet")
    (tmp_path / "p.txt").write_text("a,b\n")
    assert "must end in" in refusal(tmp_path, "p.txt")
    pyarrow.parquet.write_table(pyarrow.table({"en": [1], "de": ["a"]}), tmp_path / "q.parquet")
    assert "column en is int64, not text" in refusal(tmp_path, "q.parquet")
    # A line break and a lone surrogate, which JSON can spell, cannot reach the prepared text.
    (tmp_path / "p.jsonl").write_text('{"en": "a\\nb", "de": "\\ud800c"}')
    assert read(tmp_path, "p.jsonl") == [("a b", "?c")]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), None])
@pytest.mark.parametrize("nested", [False, True])
def test_texts_of_parquet(tmp_path: Path, kind: pyarrow.DataType | None, nested: bool) -> None:
    """Every type that holds text, more rows than are read at once, texts that repeat."""
    texts = [f"{number % 7}" for number in range(2500)]
    values: Any = [text.encode() for text in texts] if kind == pyarrow.binary() else texts
    array = pyarrow.array(values, kind) if kind else pyarrow.array(values).dictionary_encode()
    table = pyarrow.table({"en": array, "de": array[::-1]})
    if nested:
        table = pyarrow.table({"translation": pyarrow.StructArray.from_arrays([array, array[::-1]], ["en", "de"])})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    assert read(tmp_path, "p.parquet") == list(zip(texts, texts[::-1], strict=True))


def test_a_domain_that_is_no_text_is_none(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"en": ["a"], "de": ["b"], "domain": [3]}), tmp_path / "p.parquet")
    assert list(read_pairs(corpus_of(tmp_path, "p.parquet"), "train")) == [SentencePair("a", "b")]


def test_cells_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nmt.corpus.tables, "_HARMLESS_BYTES", 1 << 20)
    monkeypatch.setattr(nmt.corpus.tables, "MOST_BYTES", 1 << 16)
    shrinks = pyarrow.table({"en": ["a" * 2_000_000], "de": ["b"]})
    pyarrow.parquet.write_table(shrinks, tmp_path / "p.parquet", compression="zstd")
    assert "this is not text" in refusal(tmp_path, "p.parquet")
    long = pyarrow.table({"en": ["x", "a" * ((1 << 16) + 1)], "de": ["b", "c"]})
    pyarrow.parquet.write_table(long, tmp_path / "q.parquet")
    assert "rows 1 to 2: a text has more than" in refusal(tmp_path, "q.parquet")


@pytest.mark.slow
def test_a_long_text_that_many_rows_share(tmp_path: Path) -> None:
    """In the file it stands once: 1,000 rows would be 4 GB at a time, and all of them 8 GB."""
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2000, "int32"), ["a" * 4_000_000])
    table = pyarrow.table({"en": texts, "de": ["b"] * 2000})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet", store_schema=False)
    before = pyarrow.default_memory_pool().max_memory()
    pairs = read_pairs(corpus_of(tmp_path, "p.parquet"), "train")
    assert len(next(pairs).source) == 4_000_000
    assert pyarrow.default_memory_pool().max_memory() < before + 500_000_000


def test_labels_are_one_a_file(tmp_path: Path) -> None:
    for name in ("a.en", "a.de", "b.en", "b.de"):
        (tmp_path / name).write_text(f"{name}\n")
    (tmp_path / "c.jsonl").write_text('{"en": "x", "de": "y"}\n{"en": "x", "de": "y", "domain": "own"}\n')
    files = FilesConfig(source=["a.en", "b.en"], target=["a.de", "b.de"], pairs=["c.jsonl"], domains=["A", "B", "C"])
    corpus = CorpusConfig(source="files", root=str(tmp_path), train=files)
    assert [pair.domain for pair in read_pairs(corpus, "train")] == ["A", "B", "C", "own"]
    # Also where the lists of the two sides have not the same number of files.
    (tmp_path / "ab.de").write_text("1\n2\n")
    files = FilesConfig(source=["a.en", "b.en"], target=["ab.de"], domains=["A", "B"])
    corpus = CorpusConfig(source="files", root=str(tmp_path), train=files)
    assert list(read_pairs(corpus, "train")) == [SentencePair("a.en", "1", "A"), SentencePair("b.en", "2", "B")]


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"source": ["a"]}, "corpus.train.target is empty"),
        ({"pairs": ["a"], "columns": ["x"]}, "corpus.train.columns"),
        ({"pairs": ["a"], "columns": ["x", "2"]}, "corpus.train.columns"),
        ({"pairs": ["a"], "columns": ["x", "x"]}, "corpus.train.columns"),
        ({"pairs": ["a"], "columns": ["0", "1"]}, "counted from 1"),
        ({"source": ["a"], "target": ["b"], "pairs": ["c"], "domains": ["x"]}, "1 labels for 2 files"),
        ({"pairs": ["a"], "columns": ["00", "1"]}, "counted from 1"),
        ({"source": ["a"], "target": ["b"], "columns": ["x", "y"]}, "corpus.train.pairs, which is empty"),
        ({"from_train": 5}, "corpus.train.from_train must be 0"),
        ({"from_train": -5}, "corpus.train.from_train"),
        ({"from_train": 5, "pairs": ["a"]}, "choose one of the two"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        CorpusConfig(source="files", train=FilesConfig(**settings))


def test_a_language_has_a_code_of_any_kind() -> None:
    assert CorpusConfig(target_language="no").target_language == "no"
    # What versions before kept of an unquoted no; their runs are still to be used.
    assert CorpusConfig(target_language="False").target_language == "False"
    with pytest.raises(ValueError, match=r"corpus.target_language is empty"):
        CorpusConfig(target_language="")


@pytest.mark.parametrize("name", ["a.TSV", "a.Csv", "a.JSONL", "a.Parquet", "a.tsv.GZ", "a.JsonL.Gz"])
def test_endings_are_read_in_any_case(tmp_path: Path, name: str) -> None:
    lower = tmp_path / name.lower().removesuffix(".gz")
    write_columns(lower, ["en", "de"], [["one", "eins"]])
    data = lower.read_bytes()
    lower.unlink()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
    assert read(tmp_path, name) == [("one", "eins")]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl"])
def test_rows_between_carriage_returns_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"a\tb\rc\td\re\tf\r")
    assert "has carriage returns as line ends" in refusal(tmp_path, name)
