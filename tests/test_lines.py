"""As many lines come out as went in, each at its place, whatever bytes the lines are made of."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nmt
from nmt.cli import main
from nmt.decoding.searcher import Searcher
from nmt.decoding.translation import Translation
from nmt.decoding.translator import Translator
from nmt.errors import DataError
from nmt.streams.halt import Halt, Source
from nmt.streams.lines import Piece, Window, open_input, read_lines, windows
from nmt.streams.translating import JoinedLines, translate_stream
from tests.toy import ENGLISH, Cli

SEPARATORS = ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x85", "\u2028", "\u2029", "\x00", "\ufeff"]
ODD_TEXT = st.lists(st.sampled_from([*SEPARATORS, "\n", " ", "the", "dog", "\u3000", "</s>"])).map("".join)
BYTES = st.one_of(st.binary(max_size=60), ODD_TEXT.map(str.encode)).map(lambda content: b"x" + content)


def lines_by_the_rule(content: bytes) -> list[bytes]:
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return lines if lines[-1] else lines[:-1]


# ------------------------------------------------------------------------------------------------------ reading


def windows_of(stream: BinaryIO, most_lines: int) -> Iterator[list[Piece]]:
    with Halt() as halt:
        source = Source(stream, halt)
        ended = (0, 0)
        _, blocks = read_lines(source, "text")
        for pieces, lines, num_bytes in windows(blocks, source, most_lines):
            assert (lines[0], num_bytes[0]) == ended
            assert lines[1] - lines[0] == sum(piece.ends for piece in pieces)
            ended = lines[1], num_bytes[1]
            yield pieces


def in_windows(content: bytes, most_lines: int = 5) -> list[list[Piece]]:
    return list(windows_of(io.BytesIO(content), most_lines))


@given(content=ODD_TEXT.map(str.encode), most_lines=st.integers(1, 5))
def test_lines_end_at_newline_and_nowhere_else(content: bytes, most_lines: int) -> None:
    found = [piece for window in in_windows(content, most_lines) for piece in window]
    expected = [line.removesuffix(b"\r").decode() for line in lines_by_the_rule(content)]
    assert found == [Piece(line, True, True) for line in expected]


@pytest.mark.slow
def test_a_window_has_its_lines_or_enough_text() -> None:
    short = in_windows(b"a\n" * 100_000, most_lines=64)
    assert sum(map(len, short)) == 100_000
    assert all(len(window) == 64 for window in short[:-1])
    long = in_windows((b"the dog " * 5_000 + b"\n") * 100, most_lines=1_000)
    assert sum(map(len, long)) == 100
    assert max(sum(len(piece.text) for piece in window) for window in long) < 2 * 2**20


def test_a_very_long_line_comes_in_pieces_that_end_with_sentences() -> None:
    line = "The dog sleeps, said Dr. Weiß. " * 20_000
    found = [piece for window in in_windows(f"{line}\nshort\n".encode()) for piece in window]
    assert "".join(piece.text for piece in found[:-1]) == line
    assert [piece.begins for piece in found] == [True, *[False] * (len(found) - 2), True]
    assert [piece.ends for piece in found] == [*[False] * (len(found) - 2), True, True]
    assert len(found) > 9
    assert all(piece.text.endswith("Weiß. ") for piece in found[:-1])
    assert max(len(piece.text) for piece in found) < 2**17


@pytest.mark.slow
@pytest.mark.parametrize("unit", [b"a", b"a ", b"\x00", b"\xff", "é".encode(), b"."], ids=repr)
def test_a_line_without_end_is_never_held(unit: bytes) -> None:
    class Endless(io.RawIOBase):
        """As much of one line as is asked for, counted."""

        read = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:
            size = len(buffer) // len(unit) * len(unit)
            buffer[:size] = unit * (size // len(unit))
            Endless.read += size
            return size

    stream = io.BufferedReader(Endless())
    pieces = 0
    for window in windows_of(stream, most_lines=64):
        assert not any(piece.ends for piece in window)
        assert sum(len(piece.text) for piece in window) < 2 * 2**20
        pieces += len(window)
        if pieces > 40:
            break
    # What was read is handed on: nothing piles up.
    assert Endless.read < 4 * 2**20 * len(unit)


def test_what_a_pipe_holds_is_a_window_and_nothing_is_waited_for() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream:
        found = windows_of(stream, most_lines=1_000)
        for lines in (["one"], ["two", "three"], [""]):
            os.write(writing, "".join(f"{line}\n" for line in lines).encode() + b"begun")
            assert next(found) == [Piece(line, True, True) for line in lines]
            os.write(writing, b" and ended\n")
            assert next(found) == [Piece("begun and ended", True, True)]
        os.write(writing, b"last")
        os.close(writing)
        assert list(found) == [[Piece("last", True, True)]]


def test_windows_of_a_file_double_from_few_lines_to_the_most(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"a line of the text\n" * 50_000)
    with path.open("rb") as stream:
        sizes = [len(window) for window in windows_of(stream, most_lines=20_000)]
    assert sum(sizes) == 50_000
    assert all(64 * 2**place <= size for place, size in enumerate(sizes[:9]))
    assert sizes[0] < 5_000
    assert sizes[9:-1] == [20_000] * len(sizes[9:-1])


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_compression_is_told_by_content(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "text"
    path.write_bytes(compress(b"\xef\xbb\xbfa\r\n\xef\xbb\xbfb"))
    with path.open("rb") as stream:
        found = [piece.text for window in windows_of(stream, most_lines=9) for piece in window]
    assert found == ["a", "\ufeffb"]


def test_what_cannot_be_read_is_a_data_error(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path, "a\0b"):
        with pytest.raises(DataError, match="cannot read"):
            open_input(str(path))


# ---------------------------------------------------------------------------------------------------- translating


def test_pieces_of_windows_are_lines_again() -> None:
    cuts: list[Any] = []
    windows_of_pieces = [
        [Piece("a dog", True, True), Piece("One. ", True, False)],
        [Piece("Two. ", False, False)],
        [Piece("Three.", False, True), Piece("", True, True), Piece("東!", True, True)],
    ]

    def read(texts: list[str], options: Any, cut: Any, prefixes: Any, _terms: Any) -> list[str]:
        assert prefixes == {}
        cuts.append(cut)
        return texts

    def write(texts: list[str], found: list[str], _rank: Any) -> list[Translation]:
        return [
            Translation(text, finished=source != "Two. ", unlearned="東" * ("東" in source))
            for source, text in zip(texts, found, strict=True)
        ]

    def find(texts: list[str], progress: Callable[[float], None]) -> list[str]:
        progress(1.0)
        return [text.strip().upper() for text in texts]

    translator: Any = SimpleNamespace(read=read, find=find, write=write)
    lines = JoinedLines()
    written: list[str] = []
    shown: list[tuple[int, float]] = []
    translate_stream(
        translator,
        [Window(pieces, (number, number), (0, 0)) for number, pieces in enumerate(windows_of_pieces)],
        lambda pieces, found: written.append(lines.add(pieces, found)),
        lambda: None,
        progress=lambda window, done: shown.append((window.lines[0], done)),
    )
    assert written == ["A DOG\nONE.", " TWO.", " THREE.\n\n東!\n"]
    assert shown == [(0, 1.0), (1, 1.0), (2, 1.0)]
    assert cuts == [{1}, {0}, {0}]
    assert (lines.num_lines, lines.num_long, lines.num_cut_off, lines.num_unlearned) == (4, 1, 1, 1)
    assert lines.unlearned == {"東": 1}


# -------------------------------------------------------------------------------------------- the whole command


def translate(run: Path, folder: Path, content: bytes, *options: str) -> bytes:
    source, output = folder / "in.txt", folder / "out.txt"
    source.write_bytes(content)
    output.unlink(missing_ok=True)
    assert main(["translate", str(run), str(source), "-o", str(output), "decoding.beam_size=1", *options]) == 0
    return output.read_bytes()


@pytest.mark.slow
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=BYTES)
def test_any_bytes_give_as_many_lines(run: Path, tmp_path: Path, content: bytes) -> None:
    out = translate(run, tmp_path, content, "decoding.max_length_ratio=0.1", "decoding.batch_tokens=48")
    assert out.count(b"\n") == len(lines_by_the_rule(content))
    assert out == b"" or out.endswith(b"\n")
    text = out.decode("utf-8")
    assert len(text.splitlines()) == text.count("\n")


@pytest.mark.slow
def test_overlapping_stages_give_what_translate_gives(run: Path, tmp_path: Path) -> None:
    texts = [" ".join(ENGLISH[number % 12] for number in range(first, first + first % 9)) for first in range(300)]
    found = nmt.load(run).translate(texts, beam_size=1)
    lines = translate(run, tmp_path, "".join(f"{text}\n" for text in texts).encode()).decode()
    assert lines == "".join(f"{translation.text}\n" for translation in found)


def test_lines_without_a_letter_or_digit_come_back_as_they_are(run: Path, tmp_path: Path) -> None:
    kept = ["", "   ", "\t\u3000", "-", "...", " * * * ", "🚂🚃🚃", "\u200f!", "—", "$ % &"]
    content = "\n".join(["the dog", *kept, "a meadow", "", ""]).encode()
    lines = translate(run, tmp_path, content).decode().split("\n")
    assert lines[1:-3] == kept
    assert lines[0]
    assert lines[-3]
    assert lines[-2:] == ["", ""]


def test_unlearned_characters_are_told_once(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = "".join(f"{line}\n" for line in ["the dog", "🦆 the dog", "the 東京 dog 🦆", "🦆"]).encode()
    translate(run, tmp_path, content, "decoding.batch_tokens=1")
    notes = [line for line in capsys.readouterr().err.splitlines() if "never saw" in line]
    assert notes == [
        "2 lines with characters that the model never saw in training, check: 🦆 2, 東 1, 京 1",
    ]
    translate(run, tmp_path, b"the dog\n")
    assert "never saw" not in capsys.readouterr().err


@pytest.mark.slow
def test_more_lines_than_a_window(run: Path, tmp_path: Path) -> None:
    content = "".join(f"{word}\n" for word in ["the dog", "", "a"] * 25).encode()
    lines = translate(run, tmp_path, content, "decoding.batch_tokens=1").decode().split("\n")
    assert lines == [*lines[:3] * 25, ""]


def test_special_tokens_are_text(run: Path, tmp_path: Path) -> None:
    content = b"</s>\n<pad> the dog\n<s><unk></s>\n<0x0A>\n[PAD]\n"
    lines = translate(run, tmp_path, content, "decoding.markup=false").decode().split("\n")
    assert len(lines) == 6
    assert all(lines[:5])
    assert not any(token in line for line in lines for token in ("</s>", "<s>", "<pad>", "<unk>"))


def test_a_very_long_line_is_translated_in_parts_and_told(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    short = translate(run, tmp_path, b"the dog\na\n").decode().split("\n")
    capfd.readouterr()
    content = b"the dog\n" + b"the small dog runs " * 1000 + b"\n" + b"dog" * 700 + b"\na\n"
    lines = translate(run, tmp_path, content, "decoding.max_length_ratio=0.2").decode().split("\n")
    longest = json.loads((run / "corpus.json").read_text())["longest_source_pieces"]
    told = capfd.readouterr().err
    assert f"2 lines longer than {longest} subwords (the longest line of the training text) translated in parts" in told
    assert "cut off at the maximum length (decoding.max_length_ratio=0.2)" in told
    assert len(lines) == 5
    assert all(lines[:4])
    assert len(lines[1]) > 20 * len(short[0])


def test_a_line_in_pieces_is_that_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"the dog\n" + b"The small dog runs. A cat is in the meadow! " * 9 + b"\nthe dog\n"
    whole = translate(run, tmp_path, content)
    monkeypatch.setattr("nmt.streams.lines._MOST_BYTES", 90)
    assert translate(run, tmp_path, content) == whole
    assert whole.count(b"\n") == 3


def test_too_little_memory_is_told_in_one_line(run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def search(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Searcher, "_search_live", search)
    source = str(run / "text" / "test.source")
    cli.refuses(6, "translate", str(run), source, says=("out of memory in translating", "lower beam_size"))


def test_the_note_on_invalid_bytes(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    translate(run, tmp_path, b"\xff dog\nthe dog\n")
    note = "1 line with bytes that are not UTF-8; they were replaced by U+FFFD: save the text as UTF-8\n"
    assert note in capfd.readouterr().err


def test_strict_refuses_bytes_that_are_not_text(run: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "in").write_bytes(b"the dog\n\xff dog\n")
    command = ("translate", str(run), str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--strict")
    cli.refuses(3, *command, says=("in line 2 has bytes that are not UTF-8",))
    assert os.listdir(tmp_path) == ["in"]


def test_utf16_with_a_bom_is_translated_like_utf8(run: Path, tmp_path: Path) -> None:
    text = "the dog\n\na meadow\n"
    assert translate(run, tmp_path, text.encode("utf-16")) == translate(run, tmp_path, text.encode())


def test_output_appears_only_when_complete(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text("the dog\n" * 9000)

    def fail() -> None:
        assert not output.exists()
        raise RuntimeError("in the second window")

    in_second_window(monkeypatch, fail)
    with pytest.raises(RuntimeError):
        main(["translate", str(run), str(source), "-o", str(output)])
    assert sorted(os.listdir(tmp_path)) == ["in"]


def in_second_window(monkeypatch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    """Translate to the same text, and do something after the first window."""
    calls = iter(range(99))

    def find(*_: Any) -> None:
        if next(calls) == 1:
            do()

    monkeypatch.setattr(Translator, "read", lambda _self, texts, *_: texts)
    monkeypatch.setattr(Translator, "find", find)
    monkeypatch.setattr(Translator, "write", lambda _self, texts, _found, _rank: [Translation(text) for text in texts])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT])
def test_a_signal_leaves_nothing_and_is_told(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text("the dog\n" * 9000)
    output.write_text("before")
    in_second_window(monkeypatch, lambda: os.kill(os.getpid(), number))
    assert main(["translate", str(run), str(source), "-o", str(output)]) == 128 + number
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    assert output.read_text() == "before"
    first, last = capfd.readouterr().err.splitlines()
    assert first.endswith(f"lines translated so far; {output} was not written")
    assert last == ("nmt: interrupted" if number == signal.SIGINT else f"nmt: ended by {number.name}")


def test_a_program_that_writes_a_line_and_waits_gets_its_answer(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = translate(run, tmp_path, b"the dog\na meadow\n").splitlines(keepends=True)
    (to_read, question), (answer, to_write) = os.pipe(), os.pipe()
    status: list[int] = []
    with os.fdopen(to_read, "rb") as source, os.fdopen(to_write, "wb") as output, os.fdopen(answer, "rb") as answers:
        monkeypatch.setattr("sys.stdin", _Stream(buffer=source))
        monkeypatch.setattr("sys.stdout", _Stream(buffer=output))
        command = threading.Thread(target=lambda: status.append(main(["translate", str(run), "decoding.beam_size=1"])))
        command.start()
        for line, answered in zip((b"the dog\n", b"a meadow\n"), expected, strict=True):
            os.write(question, line)
            assert answers.readline() == answered
        os.close(question)
        command.join()
    assert status == [0]


def test_progress_is_for_a_terminal_alone(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    master, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stream, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", stream)
        translate(run, tmp_path, b"the dog\n" * 200)
        shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert re.search(r"100% 200 lines, [\d.,]+ lines/s, [\d:]+ left", shown)
    with io.StringIO() as no_terminal, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", no_terminal)
        translate(run, tmp_path, b"the dog\n" * 200)
        assert "%" not in no_terminal.getvalue()


class _Stream:
    """Stands for sys.stdin or sys.stdout."""

    def __init__(self, content: bytes = b"", buffer: BinaryIO | None = None) -> None:
        self.buffer = buffer or io.BytesIO(content)
        self.buffer.close = lambda: None

    def flush(self) -> None:
        pass


@pytest.fixture
def answers(run: Path, tmp_path: Path) -> tuple[bytes, bytes]:
    content = b"the dog\n\na meadow"
    return content, translate(run, tmp_path, content)


def test_standard_input_to_standard_output(
    run: Path, answers: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    content, expected = answers
    out = _Stream()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdin", _Stream(content))
        patch.setattr("sys.stdout", out)
        assert main(["translate", str(run), "decoding.beam_size=1"]) == 0
    assert out.buffer.seek(0) == 0
    assert out.buffer.read() == expected
