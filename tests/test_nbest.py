"""Several translations per line in plain text, and prefixes from a file, through the command."""

from pathlib import Path

import pytest

import nmt
from nmt.decoding.translation import TextHypothesis, Translation
from nmt.streams.lines import Piece
from nmt.streams.nbest import NumberedLines
from tests.toy import Cli

LINES = ["the dog", "", "a green meadow", "-"]
GREEDY = "decoding.beam_size=2"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in"
    path.write_text("".join(f"{line}\n" for line in LINES))
    return path


def test_lines_are_numbered() -> None:
    lines = NumberedLines()
    ranked = tuple(TextHypothesis(text, score, True, (), ()) for text, score in (("ein", -0.5), ("zwei", -1.25)))
    assert (
        lines(Piece("one"), Translation("ein", -0.5, hypotheses=ranked))
        == "0 ||| ein ||| -0.500000\n0 ||| zwei ||| -1.250000"
    )
    assert lines(Piece("-"), Translation("-")) == "1 ||| - ||| 0.000000"


@pytest.mark.parametrize("way", [{"beam_size": 2}, {"temperature": 1.0}])
def test_n_best_in_plain_text(cli: Cli, run: Path, source: Path, way: dict[str, float]) -> None:
    settings = [f"decoding.{name}={value}" for name, value in way.items()]
    assert cli("translate", str(run), str(source), "--n-best", "2", *settings) == 0, cli.err
    expected = nmt.load(run).translate(LINES, n_best=2, **way)
    rows = [row.split(" ||| ") for row in cli.out.split("\n")[:-1]]
    assert [int(number) for number, _, _ in rows] == [0, 0, 1, 2, 2, 3]
    assert [text for number, text, _ in rows if number == "2"] == [each.text for each in expected[2].hypotheses]
    assert [float(score) for number, _, score in rows if number == "0"] == pytest.approx(
        [each.score for each in expected[0].hypotheses], abs=1e-4
    )
    assert rows[2] == ["1", "", "0.000000"]
    assert "4 lines in" in cli.err


def test_prefixes_from_a_file(cli: Cli, run: Path, source: Path, tmp_path: Path) -> None:
    prefixes = tmp_path / "begin"
    prefixes.write_text("der Hund\n\nam Morgen\n\n")
    command = ("translate", str(run), str(source), GREEDY)
    assert cli(*command, "--prefixes", str(prefixes), "-o", str(tmp_path / "out")) == 0, cli.err
    found = (tmp_path / "out").read_text().split("\n")[:-1]
    model = nmt.load(run)
    assert found == [
        each.text for each in model.translate(LINES, beam_size=2, prefix=["der Hund", "", "am Morgen", ""])
    ]
    assert found[0].startswith("der Hund")
    assert found[2].startswith("am Morgen")
    for text, short in (("der Hund\n", prefixes), ("\n" * 5, source)):
        prefixes.write_text(text)
        assert cli(*command, "--prefixes", str(prefixes), "-o", str(tmp_path / "new")) == 3
        count = short.read_text().count("\n")
        assert f"nmt: {short} ends after {count} line" in cli.err
        assert "has more: they must pair line by line" in cli.err
        assert not (tmp_path / "new").exists()


def test_mistakes(cli: Cli, run: Path, source: Path, tmp_path: Path) -> None:
    command = ("translate", str(run), str(source))
    cli.refuses(2, *command, "--prefixes", str(source), says=("is the input",))
    cli.refuses(2, *command, "--jsonl", "--prefixes", str(tmp_path / "p"), says=("--prefixes is for plain text",))
    cli.refuses(3, *command, "--prefixes", str(tmp_path / "none"), says=("cannot read",))
    cli.refuses(
        2, *command, "--n-best", "2", "--resume", "-o", str(tmp_path / "out"), says=("--resume with --n-best needs",)
    )
    cli.refuses(2, *command, "--n-best", "9", GREEDY, says=("--n-best 9 must be at most decoding.beam_size=2",))
    (tmp_path / "p").write_text("der Hund\n\nder \n\n")
    cli.refuses(
        2, *command, "--prefixes", str(tmp_path / "p"), says=("p line 3: prefix 'der ' cannot be kept exactly",)
    )
    records = tmp_path / "in.jsonl"
    records.write_text('{"text": "a"}\n{"text": "a", "prefix": "der "}\n')
    cli.refuses(2, "translate", str(run), str(records), says=("in.jsonl line 2: prefix 'der ' cannot be kept",))
    cli.refuses(2, *command, "--prefixes", str(tmp_path / "p"), "-o", str(tmp_path / "p"), says=("is the input",))


def test_other_prefixes_are_not_resumed(cli: Cli, run: Path, tmp_path: Path) -> None:
    """The complete lines begin with what another file had."""
    source, prefixes, kept = tmp_path / "in", tmp_path / "begin", tmp_path / "out.part"
    source.write_text("a\n" * 300)
    prefixes.write_text("der Hund\n" + "\n" * 200)  # too few lines
    command = ("translate", str(run), str(source), "decoding.beam_size=1", "decoding.max_length=3", "--resume")
    command += ("--prefixes", str(prefixes), "-o", str(tmp_path / "out"))
    assert cli(*command) == 3
    assert kept.read_text().count("\n") >= 64
    prefixes.write_text("am Morgen\n" + "\n" * 299)
    assert cli(*command) == 3
    assert "has translations of another text" in cli.err
    assert "the same command resumes" not in cli.err
    prefixes.write_text("der Hund\n" + "\n" * 299)
    assert cli(*command) == 0
    assert "resuming after" in cli.err
    assert (tmp_path / "out").read_text().count("\n") == 300


def test_both_limits_of_lengths_are_named(cli: Cli, run: Path, source: Path) -> None:
    assert cli("translate", str(run), str(source), GREEDY, "decoding.max_length=2") == 0
    assert "cut off at the maximum length (decoding.max_length_ratio=2, decoding.max_length=2)" in cli.err
