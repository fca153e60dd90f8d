"""A broken translation is resumed from its complete lines, and from nothing else."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import nmt.streams.lines
from nmt.decoding.translator import Translator
from nmt.errors import DataError, UserError
from nmt.streams.lines import Piece
from nmt.streams.partial import Partial, open_partial
from tests.toy import Cli

MADE_BY = {"decoding.beam_size": "4", "checkpoint": "step 8"}
Window = list[Piece]


def windows_of(text: str, sizes: list[int]) -> list[Window]:
    """The lines of a text in windows of pieces; a line with | comes in pieces."""
    pieces = []
    for line in text.split("\n"):
        parts = line.split("|")
        pieces += [Piece(part, place == 0, place == len(parts) - 1) for place, part in enumerate(parts)]
    windows = []
    while pieces:
        size = sizes[len(windows) % len(sizes)]
        windows.append(pieces[:size])
        pieces = pieces[size:]
    return windows


def translated(window: Window) -> bytes:
    return "".join(piece.text.upper() + "\n" * piece.ends for piece in window).encode()


class PowerLoss(BaseException):
    pass


def begin(partial: Partial, windows: list[Window], lost_after: int = 99) -> None:
    """Translate all that is left, or some windows."""
    partial.begin(MADE_BY)
    for number, window in enumerate(partial.rest(iter(windows))):
        if number == lost_after:
            raise PowerLoss
        partial.write(window, translated(window))


@example(text="a|b", sizes=[1], losses=[(1, b"")])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text("ab|\n", max_size=40),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    losses=st.lists(st.tuples(st.integers(0, 4), st.binary(max_size=3)), max_size=3),
)
def test_any_losses_leave_the_translation_of_all_lines(
    tmp_path: Path, text: str, sizes: list[int], losses: list[tuple[int, bytes]]
) -> None:
    final = tmp_path / "out"
    for lost_after, tail in losses:
        try:
            with open_partial(final) as partial:
                begin(partial, windows_of(text, sizes), lost_after)
                raise PowerLoss
        except PowerLoss:
            pass
        kept = tmp_path / "out.part"
        if kept.exists():
            with kept.open("ab") as stream:
                stream.write(tail)  # what the disk may have of lines that were not complete
    with open_partial(final) as partial:
        begin(partial, windows_of(text, sizes[::-1]))
        partial.replace(final)
    assert final.read_bytes().decode() == text.upper().replace("|", "") + "\n"
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_left_of_the_first_line_is_written_again(tmp_path: Path) -> None:
    windows = windows_of("a|b\nc", [1])

    def lose() -> None:
        with open_partial(tmp_path / "out") as partial:
            begin(partial, windows, 1)

    with pytest.raises(PowerLoss):
        lose()
    assert (tmp_path / "out.part").read_text() == "A"
    # No line is there that other settings could have made.
    with open_partial(tmp_path / "out") as partial:
        partial.begin(MADE_BY | {"decoding.beam_size": "8"})
        assert partial.num_lines == 0
        assert list(partial.rest(iter(windows))) == windows
    assert (tmp_path / "out.part").read_text() == ""


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A file of which two lines are complete."""

    def lose() -> None:
        with open_partial(tmp_path / "out") as partial:
            begin(partial, windows_of("a\nb\nc", [2]), 1)

    with pytest.raises(PowerLoss):
        lose()
    assert (tmp_path / "out.part").read_text() == "A\nB\n"
    return tmp_path / "out"


def resume(final: Path, text: str, made_by: dict[str, str] = MADE_BY) -> list[Window]:
    with open_partial(final) as partial:
        partial.begin(made_by)
        return list(partial.rest(iter(windows_of(text, [1]))))


def test_only_the_lines_after_the_complete_ones_are_translated(kept: Path) -> None:
    assert resume(kept, "a\nb\nc\nd") == [[Piece("c")], [Piece("d")]]
    assert resume(kept, "a\nb") == []


@pytest.mark.parametrize("text", ["a\nx\nc", "a", "a\nb|b\nc", "ab\n\nc"])
def test_another_text_is_refused(kept: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"out.part has translations of another text: the first 2 lines"):
        resume(kept, text)


def test_other_settings_are_refused_by_name(kept: Path) -> None:
    for made_by, part in (
        (MADE_BY | {"decoding.beam_size": "8"}, "decoding.beam_size=4, not 8"),
        (MADE_BY | {"--terms": "a.tsv"}, "--terms=nothing, not a.tsv"),
        ({"checkpoint": "step 8"}, "decoding.beam_size=4, not nothing"),
    ):
        with pytest.raises(UserError, match=f"out.part was begun with {part}: give the same, or remove"):
            resume(kept, "a\nb\nc", made_by)
    assert resume(kept, "a\nb\nc") == [[Piece("c")]]


@pytest.mark.parametrize(
    "content", [None, b"", b"[]", b'{"lines": 1}', b'{"lines":1,"bytes":9,"source":"","made_by":{}}']
)
def test_a_damaged_record_is_refused(kept: Path, content: bytes | None) -> None:
    record = kept.with_name("out.part.json")
    record.unlink()
    if content is not None:
        record.write_bytes(content)
    with pytest.raises(UserError, match=r"remove .*out\.part to start again"):
        resume(kept, "a\nb\nc")


def test_fewer_bytes_than_recorded_are_refused(kept: Path) -> None:
    os.truncate(kept.with_name("out.part"), 3)
    with pytest.raises(UserError, match=r"has fewer bytes than .*json records: remove"):
        resume(kept, "a\nb\nc")


def test_two_processes_do_not_write_one_file_and_links_are_not_followed(tmp_path: Path) -> None:
    with open_partial(tmp_path / "out"), pytest.raises(UserError, match="another process writes"):
        resume(tmp_path / "out", "a")
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "b.part").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        resume(tmp_path / "b", "a")
    assert (tmp_path / "victim").read_text() == "mine"


# --------------------------------------------------------------------------------------------- the whole command


@pytest.fixture
def interrupted(run: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that translates with --resume, interrupted once: (output without that, resumed output)."""
    texts = ["the dog", "a meadow", "", "the small dog runs", "a green meadow"] * 10
    monkeypatch.setattr(nmt.streams.lines, "_FIRST_LINES", 8)

    def translate(name: str, line: str = "{}") -> tuple[bytes, bytes]:
        source, output = tmp_path / f"in{Path(name).suffixes[0]}", tmp_path / name
        source.write_text("".join(line.format(text) + "\n" for text in texts))
        command = ("translate", str(run), str(source), "-o", str(output), "decoding.beam_size=1")
        assert cli(*command) == 0
        expected = output.read_bytes()
        output.unlink()
        find, calls = Translator.find, iter(range(99))

        def find_twice(*arguments: Any) -> Any:
            if next(calls) == 2:
                raise KeyboardInterrupt
            return find(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Translator, "find", find_twice)
            assert cli(*command, "--resume") == 130
        told, last = cli.err.splitlines()
        assert told.endswith(f"lines kept in {output}.part: the same command resumes")
        assert last == "nmt: interrupted"
        assert not output.exists()
        cli.refuses(2, *command[:-1], "decoding.beam_size=2", "--resume", says=("decoding.beam_size=1, not 2",))
        assert cli(*command, "--resume", "decoding.batch_tokens=64") == 0
        assert f"resuming after {told.split()[0]} lines in" in cli.err
        assert sorted(os.listdir(tmp_path)) == sorted([source.name, name])
        return expected, output.read_bytes()

    return translate


@pytest.mark.slow
def test_an_interrupted_file_is_resumed(interrupted: Any) -> None:
    expected, found = interrupted("out.txt")
    assert found == expected
    assert found.count(b"\n") == 50


@pytest.mark.slow
def test_an_interrupted_compressed_file_of_json_lines_is_resumed(interrupted: Any) -> None:
    expected, found = (
        [json.loads(line) for line in gzip.decompress(data).splitlines()]
        for data in interrupted("out.jsonl.gz", '{{"text": "{}", "id": 1.50}}')
    )
    # Batches of other sizes change the last digits of scores.
    for results in (expected, found):
        for each in results:
            each["score"] = pytest.approx(each["score"], abs=1e-4)
    assert found == expected
    assert len(found) == 50


def test_resume_needs_a_file_and_leaves_nothing_without_lines(run: Path, tmp_path: Path, cli: Cli) -> None:
    source = tmp_path / "in"
    source.write_bytes(b"\xff\n")
    cli.refuses(2, "translate", str(run), str(source), "--resume", says=("--resume", "name the output with -o"))
    cli.refuses(2, "translate", str(run), str(source), "--resume", "-o", "/dev/null", says=("--resume", "/dev/null"))
    cli.refuses(3, "translate", str(run), str(source), "--resume", "--strict", "-o", str(tmp_path / "out"), says=("1",))
    assert os.listdir(tmp_path) == ["in"]
