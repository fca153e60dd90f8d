"""JSON Lines: texts are translated, all other fields come back as they were, and nothing is skipped."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nmt
from nmt.decoding.translation import RESULT_FIELDS, TextHypothesis, Translation
from nmt.errors import DataError
from nmt.streams.records import has_records, parse_record, record_line
from nmt.text.checks import Flag
from tests.toy import Cli

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.dictionaries(st.text().filter(lambda name: name not in RESULT_FIELDS), JSON, max_size=4)


@given(fields=FIELDS, text=st.text(), escaped=st.booleans(), pad=st.sampled_from(["", " ", "\t", "\r"]))
def test_every_field_comes_back_and_the_result_is_added(fields: Any, text: str, escaped: bool, pad: str) -> None:
    line = f"{pad}{json.dumps({**fields, 'text': text}, ensure_ascii=escaped, separators=(',', ':'))}{pad}"
    record = parse_record(line, "x line 1")
    assert record.text == text
    out = record_line(record, text, {"translation": "ü", "score": -0.5})
    assert json.loads(out) == {**fields, "text": text, "translation": "ü", "score": -0.5}
    # The characters of the input stay: no number is rounded, no name moves.
    assert out.startswith(line.strip(" \t\r")[:-1])


def test_digits_stay() -> None:
    record = parse_record('{"id": 1.10, "big": 12345678901234567890.123456789, "e": 1e999, "text": "a" }', "x")
    assert record_line(record, "a", {"score": 0.0}) == (
        '{"id": 1.10, "big": 12345678901234567890.123456789, "e": 1e999, "text": "a", "score": 0.0}'
    )


def test_a_blank_line_stays_blank_and_plain_text_becomes_a_record() -> None:
    record = parse_record(" \r", "x")
    assert (record.text, record_line(record, "", {"translation": ""})) == ("", "")
    assert json.loads(record_line(None, "a\u2028", {"score": 1})) == {"text": "a\u2028", "score": 1}


def test_half_a_character_is_replaced_in_the_text_only() -> None:
    record = parse_record(r'{"id": "\udc00", "text": "a\ud800b\ud834\udd1e"}', "x")
    assert record.text == "a\ufffdb𝄞"
    assert record_line(record, "", {"score": 1}).encode() == (
        rb'{"id": "\udc00", "text": "a\ud800b\ud834\udd1e", "score": 1}'
    )


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('{"text": "a"', "is not JSON"),
        ("plain text", "is not JSON (Expecting value at character 1)"),
        ('{"text": "a"} {"text": "b"}', "is not JSON (Extra data"),
        ('{"text": "a", "x": NaN}', "NaN is no number of JSON"),
        ('{"text": "a", "x": -Infinity}', "-Infinity"),
        ('{"text": "a", "x": ' + "[" * 100_000, "is not JSON"),
        ('{"text": "a", "x": ' + "1" * 5_000 + "}", "is not JSON"),
        ('["text"]', "has no text"),
        ('"text"', "has no text"),
        ("{}", "has no text"),
        ('{"text": null}', "has no text"),
        ('{"text": ["a"]}', "has no text"),
        ('{"text": "a", "prefix": ["b"]}', 'has a "prefix" that is no text'),
        ('{"text": "a", "score": 1}', 'has a field "score", which is a field of results'),
    ],
    ids=range(14),
)
def test_what_is_no_record_is_refused_in_one_line(line: str, part: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_record(line, "a.jsonl line 7")
    assert str(caught.value).startswith("a.jsonl line 7 ")
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "b/a.JSONL", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.jsonl.BZ2"])
def test_names_of_json_lines(name: str) -> None:
    assert has_records(name)
    assert not has_records(f"{name}.txt")
    assert not has_records(name.lower().replace("jsonl", "json"))


# --------------------------------------------------------------------------------------------------- results


def test_a_result_has_the_documented_fields() -> None:
    best = TextHypothesis(
        "ein Hund", -0.12345678, True, ("▁ein", "</s>"), (-0.1000000004, 0.0), None, ((0, 1),), ((0, 1, 0.5),)
    )
    translation = Translation("ein Hund", -0.12345678, hypotheses=(best, best), noted=(Flag("end", "? became ."),))
    everything = translation.to_dict(hypotheses=True, pieces=True, words=True, alignments=True)
    assert everything.keys() <= RESULT_FIELDS.keys()
    assert RESULT_FIELDS.keys() - everything.keys() == set()
    assert everything["score"] == -0.123457
    assert everything["log_probs"] == [-0.1, 0.0]
    assert everything["words"] == [["ein", -0.1], ["</s>", 0.0]]
    assert (everything["alignment"], everything["soft_alignment"]) == ([[0, 1]], [[0, 1, 0.5]])
    assert everything["flags"] == [{"kind": "end", "detail": "? became ."}]
    assert [each.keys() <= everything.keys() for each in everything["hypotheses"]] == [True, True]
    assert json.loads(json.dumps(everything)) == everything
    on_request = {"hypotheses", "pieces", "log_probs", "words", "alignment", "soft_alignment"}
    assert translation.to_dict().keys() == everything.keys() - on_request
    compared = Translation("Die Katze.", source="The cat 7?", noted=(Flag("numbers", "noted"), Flag("term", "noted")))
    assert [flag.kind for flag in compared.flags] == ["numbers", "numbers", "end", "term"]
    untouched = Translation("-").to_dict(hypotheses=True, pieces=True, words=True, alignments=True)
    assert untouched.keys() == everything.keys()
    assert (untouched["parts"], untouched["pieces"], untouched["hypotheses"]) == (0, [], [])


def test_the_fields_of_results_are_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "decoding.md").read_text()
    for name, meaning in RESULT_FIELDS.items():
        assert f"| `{name}` | {meaning} |" in page


# --------------------------------------------------------------------------------------------- the whole command

RECORDS = ['{"id": 1, "text": "the dog"}', "", '{"text": "a meadow", "n": {"b": [1.50]}}', '{"text": "-"}']
GREEDY = "decoding.beam_size=2"


def test_json_lines_through_the_command(run: Path, tmp_path: Path, cli: Cli) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl.gz"
    source.write_text("\n".join(RECORDS))
    assert cli("translate", str(run), str(source), "-o", str(output), "--n-best", "2", "--pieces", GREEDY) == 0
    lines = gzip.decompress(output.read_bytes()).decode().split("\n")
    assert len(lines) == 5
    assert lines[1] == lines[4] == ""
    texts = ["the dog", "a meadow", "-"]
    found = nmt.load(run).translate(texts, beam_size=2, n_best=2)
    for line, record, translation in zip((lines[0], *lines[2:4]), (RECORDS[0], *RECORDS[2:]), found, strict=True):
        assert line.startswith(record[:-1])
        assert json.loads(line) == json.loads(record) | translation.to_dict(hypotheses=True, pieces=True)


def test_json_lines_and_plain_text_meet_by_the_names_of_files(run: Path, tmp_path: Path, cli: Cli) -> None:
    records, text = tmp_path / "in.jsonl", tmp_path / "in.txt"
    records.write_text('{"text": "the dog"}\n{"text": "a\\nmeadow"}\n')
    text.write_text("the dog\na meadow\n")
    assert cli("translate", str(run), str(records), GREEDY) == 0
    plain = cli.out
    assert plain.count("\n") == 2
    assert cli("translate", str(run), str(text), "-o", str(tmp_path / "out.jsonl"), GREEDY) == 0
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [each["text"] for each in results] == ["the dog", "a meadow"]
    assert results[0]["translation"] == plain.split("\n")[0]
    assert cli("translate", str(run), str(records), "--jsonl", GREEDY) == 0
    assert json.loads(cli.out.splitlines()[0])["translation"] == results[0]["translation"]


def test_a_line_may_say_what_its_translation_begins_with(run: Path, tmp_path: Path, cli: Cli) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "the dog"}\n{"text": "the dog", "prefix": "eine"}\n{"text": "a", "prefix": null}\n')
    assert cli("translate", str(run), str(source), "-o", str(output), GREEDY) == 0
    results = [json.loads(line) for line in output.read_text().splitlines()]
    expected = nmt.load(run).translate(["the dog", "the dog", "a"], beam_size=2, prefix=["", "eine", ""])
    assert [each["translation"] for each in results] == [each.text for each in expected]
    assert results[1]["translation"].startswith("eine")
    assert results[1]["prefix"] == "eine"


def test_mistakes_in_json_lines_are_told(run: Path, tmp_path: Path, cli: Cli) -> None:
    broken, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    broken.write_text('{"text": "the dog"}\n{"text": "a"\n{"text": "b"}\n')
    command = ("translate", str(run), str(broken), "-o", str(output))
    cli.refuses(3, *command, says=(f"{broken} line 2 is not JSON", "correct it"))
    assert not output.exists()
    broken.write_text('{"text": "the dog"}\n{"text": "\\ud800"}\n')
    cli.refuses(3, *command, "--strict", says=("line 2 has halves of characters",))
    broken.write_text('{"text": "%s"}\n' % ("a" * 5_000_000))
    cli.refuses(3, *command, says=("line 1 has more than 4,194,304 bytes",))
    for option in ("--pieces", "--words", "--soft-alignments"):
        cli.refuses(2, "translate", str(run), str(broken), option, says=(f"{option} needs JSON Lines", ".jsonl"))
    cli.refuses(2, *command, "--n-best", "9", says=("--n-best 9", "beam_size"))
    cli.refuses(2, *command, "--n-best", "0", says=("n_best=0",))
