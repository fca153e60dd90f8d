"""nmt translate --checks: the lines with flags, as JSON Lines, and their counts."""

import json
from pathlib import Path

from nmt.decoding.translation import Translation
from nmt.streams.flagged import FlaggedLines
from nmt.streams.lines import Piece
from nmt.text.checks import KINDS, Flag
from tests.toy import Cli

NUMBER, END, LOOP = Flag("numbers", "5 is missing"), Flag("end", "ends with no mark"), Flag("loop", "“犬” 3 times")


def test_flagged_lines_are_numbered_and_counted_by_kind() -> None:
    lines = FlaggedLines()
    first = lines.add(
        [Piece("5 a."), Piece("b"), Piece("c, ", ends=False)],
        [Translation("A", noted=(NUMBER, END)), Translation("B"), Translation("C,", noted=(LOOP,))],
    )
    second = lines.add(
        [Piece("d, ", begins=False, ends=False), Piece("e", begins=False), Piece("f.")],
        [Translation("D,"), Translation("E", noted=(LOOP, LOOP)), Translation("F", noted=(END,))],
    )
    found = [json.loads(line) for line in (first + second).splitlines()]
    assert [each["line"] for each in found] == [1, 3, 3, 4]
    assert found[0] == {
        "line": 1,
        "source": "5 a.",
        "translation": "A",
        "flags": [{"kind": "numbers", "detail": "5 is missing"}, {"kind": "end", "detail": "ends with no mark"}],
    }
    assert (lines.num_lines, lines.num_flagged) == (4, 3)
    assert lines.summary() == "3 lines with flags: numbers 1, end 2, loop 1"


def test_no_flags_are_told_too() -> None:
    lines = FlaggedLines()
    assert lines.add([Piece("a")], [Translation("A")]) == ""
    assert lines.summary() == "no line has a flag"


def test_a_report_beside_the_translation(cli: Cli, run: Path, tmp_path: Path) -> None:
    source, out, report = (tmp_path / name for name in ("in.en", "out.de", "report.jsonl"))
    text = ["The dog has 5 bones.", "", "-", "a 犬"]
    source.write_text("".join(f"{line}\n" for line in text))
    assert cli("translate", str(run), str(source), "-o", str(out), "--checks", str(report)) == 0
    translations = out.read_text().splitlines()
    found = [json.loads(line) for line in report.read_text().splitlines()]
    assert {each["line"] for each in found} == {1, 4}
    for each in found:
        assert each["source"] == text[each["line"] - 1]
        assert each["translation"] == translations[each["line"] - 1]
        assert {flag["kind"] for flag in each["flags"]} <= KINDS.keys()
    assert "unknown" in {flag["kind"] for flag in found[-1]["flags"]}
    assert "2 lines with flags: " in cli.err


def test_reports_that_are_refused(cli: Cli, run: Path, tmp_path: Path) -> None:
    source, out, report = (str(tmp_path / name) for name in ("in.en", "out.de", "report.jsonl"))
    Path(source).write_text("the dog\n")
    command = ("translate", str(run), source, "-o", out)
    cli.refuses(2, *command, "--checks", out, says=("--checks", "is the output"))
    cli.refuses(2, *command, "--checks", report, "--alignments", report, says=("is the file of --alignments",))
    cli.refuses(2, *command, "--checks", report, "--resume", says=("--checks with --resume",))
    cli.refuses(2, *command, "--checks", source, says=("is the input",))
    assert not Path(out).exists()
    assert Path(source).read_text() == "the dog\n"
