"""nmt score: files of pairs against `Model.score`, and the line rule for any bytes."""

import gzip
import json
import lzma
import math
from pathlib import Path
from typing import Any

import pytest

import nmt
import nmt.streams.pairs
from nmt.data.held_out import LONGEST_SIDE
from nmt.data.subwords import split_words
from tests.toy import Cli

SOURCES = ["the small dog", "", "over \u2028a\x85 meadow", "a", "the dog 東京 runs", "  two  blanks "]
TARGETS = ["der kleine Hund", "x", "", "eine\x00 Wiese", "der Hund läuft", "am  Morgen "]


@pytest.fixture(scope="module")
def model(run: Path) -> nmt.Model:
    return nmt.load(run)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    names = str(tmp_path / "source"), str(tmp_path / "target")
    for name, lines in zip(names, (SOURCES, TARGETS), strict=True):
        Path(name).write_bytes("".join(f"{line}\n" for line in lines).encode())
    return names


def test_columns_are_what_the_interface_returns(cli: Cli, run: Path, model: nmt.Model, files: tuple[str, str]) -> None:
    expected = model.score(SOURCES, TARGETS)
    assert cli("score", str(run), *files, "--words", "--header") == 0, cli.err
    head, *rows = cli.out.split("\n")[:-1]
    assert head.split("\t") == ["log_prob", "word_perplexity", "word_log_probs"]
    assert len(rows) == len(SOURCES)
    for row, each in zip(rows, expected, strict=True):
        log_prob, perplexity, words = row.split("\t")
        assert float(log_prob) == pytest.approx(each.log_prob, abs=1e-4)
        assert float(perplexity) == pytest.approx(each.word_perplexity, rel=1e-4)
        assert [float(word) for word in words.split(" ")] == pytest.approx(
            [word.log_prob for word in each.words], abs=1e-4
        )
    assert f"{len(SOURCES)} pairs in" in cli.err
    whole = math.exp(-sum(each.log_prob for each in expected) / sum(len(each.pieces) for each in expected))
    assert f"perplexity {whole:,.3f} per subword" in cli.err


def test_words(model: nmt.Model) -> None:
    """The sum of a word's subwords; the words are those between blanks, whatever subwords or bytes spell them."""
    for target in ("der kleine Hund", "", "東京 der-Hund, qqq", "Hund"):
        (found,) = model.score(["the dog"], [target])
        assert [each.word for each in found.words] == [*target.split(), "</s>"]
        assert math.fsum(each.log_prob for each in found.words) == pytest.approx(found.log_prob)
        assert found.word_perplexity == pytest.approx(math.exp(-found.log_prob / (len(target.split()) + 1)))
        assert found.perplexity == pytest.approx(math.exp(-found.log_prob / len(found.pieces)))
        first, count = split_words(found.pieces)[0]
        assert found.words[0] == (first, math.fsum(found.log_probs[:count]))


def test_pieces_of_words() -> None:
    assert split_words([]) == []
    assert split_words(["▁", "<0xE6>", "<0x9D>", "<0xB1>", "x", "▁a", "</s>"]) == [("東x", 5), ("a", 1), ("</s>", 1)]
    assert split_words(["<0xE6>", "▁b", "▁"]) == [("\ufffd", 1), ("b", 1), ("", 1)]
    assert split_words(["▁<0x41>", "<0x4>"]) == [("<0x41><0x4>", 2)]


@pytest.mark.parametrize("way", [{"beam_size": 4}, {"temperature": 1.0}])
def test_a_search_scores_a_prefix_as_this_command_does(model: nmt.Model, way: dict[str, Any]) -> None:
    """To 1e-5 for each subword in float32; then also each word."""
    for line, target in zip(SOURCES, TARGETS, strict=True):
        if line and target == target.strip() and "  " not in target and "\0" not in target:
            given = model.score(line, target)
            found = model.translate(line, prefix=target, **way).hypotheses[0]
            count = len(given.pieces) - 1
            assert found.pieces[:count] == given.pieces[:count]
            assert found.log_probs[:count] == pytest.approx(given.log_probs[:count], abs=1e-5)
            words = given.words[:-2]  # the search may add to the last word
            assert [each.word for each in found.words[: len(words)]] == [each.word for each in words]
            for each, expected in zip(found.words, words, strict=False):
                assert each.log_prob == pytest.approx(expected.log_prob, abs=1e-4)


def test_json_lines(cli: Cli, run: Path, model: nmt.Model, files: tuple[str, str], tmp_path: Path) -> None:
    assert cli("score", str(run), *files, "-o", str(tmp_path / "out.jsonl.gz"), "--words") == 0, cli.err
    with gzip.open(tmp_path / "out.jsonl.gz", "rt") as stream:
        found = [json.loads(line) for line in stream]
    assert [list(each) for each in found] == [["log_prob", "word_perplexity", "complete", "words"]] * len(SOURCES)
    for each, expected in zip(found, model.score(SOURCES, TARGETS), strict=True):
        assert each["log_prob"] == pytest.approx(expected.log_prob, abs=1e-4)
        assert [word for word, _ in each["words"]] == [word.word for word in expected.words]
    assert cli("score", str(run), *files, "--jsonl") == 0
    assert [json.loads(line)["complete"] for line in cli.out.splitlines()] == [True] * len(SOURCES)
    cli.refuses(2, "score", str(run), *files, "--jsonl", "--header", says=("--header is for columns",))


def test_windows_and_compression_change_nothing(
    cli: Cli, run: Path, files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("score", str(run), *files) == 0
    before = [list(map(float, row.split("\t"))) for row in cli.out.splitlines()]
    monkeypatch.setattr(nmt.streams.pairs, "_MOST_PAIRS", 2)
    packed = [str(tmp_path / "a.gz"), str(tmp_path / "b.xz")]
    Path(packed[0]).write_bytes(gzip.compress(Path(files[0]).read_bytes()))
    Path(packed[1]).write_bytes(lzma.compress(Path(files[1]).read_bytes().removesuffix(b"\n")))
    assert cli("score", str(run), *packed, "-o", str(tmp_path / "out.gz")) == 0, cli.err
    with gzip.open(tmp_path / "out.gz", "rt") as stream:
        after = [list(map(float, row.split("\t"))) for row in stream]
    assert len(after) == len(before)
    for one, other in zip(before, after, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize(("source", "target"), [(b"a\n" * 7, b"b\n" * 5), (b"a\n" * 4, b"b\n" * 5), (b"", b"b\n")])
def test_files_of_different_lengths(
    cli: Cli, run: Path, tmp_path: Path, source: bytes, target: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pairs before are scored on standard output; a file of results does not appear."""
    monkeypatch.setattr(nmt.streams.pairs, "_MOST_PAIRS", 2)
    (tmp_path / "s").write_bytes(source)
    (tmp_path / "t").write_bytes(target)
    paths = str(tmp_path / "s"), str(tmp_path / "t")
    count = min(source.count(b"\n"), target.count(b"\n"))
    short, long = paths if source.count(b"\n") == count else paths[::-1]
    said = f"nmt: {short} ends after {count} lines, but {long} has more: they must pair line by line\n"
    assert cli("score", str(run), *paths) == 3
    assert cli.err == said
    assert cli.out.count("\n") == count
    assert cli("score", str(run), *paths, "-o", str(tmp_path / "out")) == 3
    assert not (tmp_path / "out").exists()


def test_any_bytes(cli: Cli, run: Path, tmp_path: Path) -> None:
    data = b"\xff\xfe\x00 der\r\n\x00\n" + bytes(range(11, 256)) + b"\n" + b"dog " * 3000 + b"\n\n"
    (tmp_path / "any").write_bytes(b"ab\n" + data)
    paths = [str(tmp_path / "any")] * 2
    assert cli("score", str(run), *paths) == 0, cli.err
    rows = [row.split("\t") for row in cli.out.splitlines()]
    assert len(rows) == data.count(b"\n") + 1
    assert all(math.isfinite(float(value)) for row in rows for value in row)
    assert f"1 pair with more than {LONGEST_SIDE:,} subwords on a side: only the beginning was scored" in cli.err
    assert cli.err.count("bytes that are not UTF-8; they were replaced by U+FFFD: save the text as UTF-8\n") == 2
    assert cli("score", str(run), *paths, "--strict") == 3


def test_mistakes(cli: Cli, run: Path, files: tuple[str, str], tmp_path: Path) -> None:
    cli.refuses(2, "score", str(run), "-", "-", says=("cannot both be standard input",))
    cli.refuses(3, "score", str(run), files[0], str(tmp_path / "none"), says=("cannot read", "none"))
    for path in files:
        before = Path(path).read_bytes()
        cli.refuses(2, "score", str(run), *files, "-o", path, says=("is the input",))
        assert Path(path).read_bytes() == before
    cli.refuses(2, "score", str(run), files[0], says=("TARGET",))


def test_empty_files(cli: Cli, run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert cli("score", str(run), str(tmp_path / "empty"), str(tmp_path / "empty")) == 0
    assert cli.out == ""
    assert cli.err.startswith("0 pairs in")
