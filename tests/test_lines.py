"""As many lines come out as went in, each at its place, whatever bytes the lines are made of."""

import io
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_training import one_thread, trained_run  # noqa: F401

import nmt.decoding.translator
from nmt.cli import main
from nmt.decoding.lines import LineReader, open_input, open_output, read_all
from nmt.errors import DataError, StorageError, UserError

SEPARATORS = ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x85", "\u2028", "\u2029", "\x00", "\ufeff"]
ODD_TEXT = st.lists(st.sampled_from([*SEPARATORS, "\n", " ", "the", "dog", "\u3000", "</s>"])).map("".join)
BYTES = st.one_of(st.binary(max_size=60), ODD_TEXT.map(str.encode))


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory)


def lines_by_the_rule(content: bytes) -> list[bytes]:
    lines = content.split(b"\n")
    return lines if lines[-1] else lines[:-1]


def is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------ reading


@given(content=st.one_of(st.binary(max_size=300), ODD_TEXT.map(str.encode)), window=st.integers(1, 5))
def test_lines_end_at_newline_and_nowhere_else(content: bytes, window: int) -> None:
    reader = LineReader(io.BytesIO(content), window)
    windows = list(reader)
    lines = [line for each in windows for line in each]
    expected = lines_by_the_rule(content)
    if expected:
        expected[0] = expected[0].removeprefix(b"\xef\xbb\xbf")
    assert lines == [line.decode("utf-8", errors="replace") for line in expected]
    assert reader.num_lines == len(expected)
    assert all(len(each) == window for each in windows[:-1])
    assert reader.num_invalid == sum(not is_utf8(line) for line in expected)


def test_invalid_bytes_are_replaced_and_counted() -> None:
    reader = LineReader(io.BytesIO(b"gut\n\xff\xfe\nGr\xf6\xdfe\nGr\xc3\xb6\n"), 9)
    assert next(iter(reader)) == ["gut", "\ufffd\ufffd", "Gr\ufffd\ufffde", "Grö"]
    assert reader.num_invalid == 2


def test_a_byte_order_mark_goes_from_the_first_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfa\n\xef\xbb\xbfb")
    assert read_all(str(path)) == ["a", "\ufeffb"]


def test_what_cannot_be_read_is_a_data_error(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(DataError, match="cannot read"):
            open_input(str(path))


# ------------------------------------------------------------------------------------------------------ writing


def test_the_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("before")
    with open_output(str(path), "-") as stream:
        stream.write(b"after")
        stream.flush()
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert os.listdir(tmp_path) == ["out"]


def test_after_an_error_nothing_is_left_behind(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with open_output(str(tmp_path / "out"), "-") as stream:
            stream.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert os.listdir(tmp_path) == []


def test_the_input_a_folder_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_text("keep me")
    (tmp_path / "link").symlink_to(path)
    for same in (path, tmp_path / "." / "in", tmp_path / "link"):
        with pytest.raises(UserError, match="is the input"), open_output(str(same), str(path)):
            pass
    with pytest.raises(UserError, match="is a folder"), open_output(str(tmp_path), str(path)):
        pass
    with pytest.raises(StorageError, match="cannot write"), open_output(str(tmp_path / "no" / "out"), str(path)):
        pass
    assert path.read_text() == "keep me"


def test_a_device_stays_a_device_and_a_link_a_link(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with open_output(str(pipe), "-") as stream:
        stream.write(b"text")
    assert os.read(reading, 99) == b"text"
    os.close(reading)
    assert pipe.is_fifo()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with open_output(str(tmp_path / "link"), "-") as stream:
        stream.write(b"text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"text"


# -------------------------------------------------------------------------------------------- the whole command


def translate(run: Path, folder: Path, content: bytes, *options: str) -> bytes:
    source, output = folder / "in.txt", folder / "out.txt"
    source.write_bytes(content)
    output.unlink(missing_ok=True)
    assert main(["translate", str(run), str(source), "-o", str(output), "decoding.beam_size=1", *options]) == 0
    return output.read_bytes()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=BYTES)
def test_any_bytes_give_as_many_lines(run: Path, tmp_path: Path, content: bytes) -> None:
    out = translate(run, tmp_path, content, "decoding.max_length_ratio=0.1", "decoding.batch_sentences=3")
    assert out.count(b"\n") == len(lines_by_the_rule(content))
    assert out == b"" or out.endswith(b"\n")
    text = out.decode("utf-8")
    assert len(text.splitlines()) == text.count("\n")


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
    translate(run, tmp_path, content, "decoding.batch_sentences=1")
    notes = [line for line in capsys.readouterr().err.splitlines() if "unknown" in line]
    assert notes == [
        "2 lines held characters that are unknown to the model, check these lines: 🦆 2, 東 1, 京 1",
    ]
    translate(run, tmp_path, b"the dog\n")
    assert "unknown" not in capsys.readouterr().err


def test_more_lines_than_a_window(run: Path, tmp_path: Path) -> None:
    content = "".join(f"{word}\n" for word in ["the dog", "", "a"] * 25).encode()
    lines = translate(run, tmp_path, content, "decoding.batch_sentences=1").decode().split("\n")
    assert lines == [*lines[:3] * 25, ""]


def test_special_tokens_are_text(run: Path, tmp_path: Path) -> None:
    content = b"</s>\n<pad> the dog\n<s><unk></s>\n<0x0A>\n[PAD]\n"
    lines = translate(run, tmp_path, content).decode().split("\n")
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
    assert "2 lines had more than 250 pieces; they were translated in parts" in capfd.readouterr().err
    assert len(lines) == 5
    assert all(lines[:4])
    assert len(lines[1]) > 20 * len(short[0])


def test_the_note_on_invalid_bytes(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    translate(run, tmp_path, b"\xff dog\nthe dog\n")
    assert "1 lines held bytes that are not UTF-8" in capfd.readouterr().err


def test_output_appears_only_when_complete(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text("the dog\n" * 70)
    calls = iter(range(9))
    whole = nmt.decoding.translator.Translator.translate

    def failing(self: nmt.decoding.translator.Translator, lines: list[str]) -> list[object]:
        assert not output.exists()
        if next(calls) == 1:
            raise RuntimeError("in the second window")
        return whole(self, lines)

    monkeypatch.setattr(nmt.decoding.translator.Translator, "translate", failing)
    with pytest.raises(RuntimeError):
        main(["translate", str(run), str(source), "-o", str(output), "decoding.batch_sentences=1"])
    assert sorted(os.listdir(tmp_path)) == ["in"]


class _Stream:
    """Stands for sys.stdin or sys.stdout."""

    def __init__(self, content: bytes = b"", terminal: bool = False) -> None:
        self.buffer = io.BytesIO(content)
        self.buffer.isatty = lambda: terminal  # type: ignore[method-assign]
        self.buffer.close = lambda: None  # type: ignore[method-assign]

    def flush(self) -> None:
        pass


@pytest.fixture
def answers(run: Path, tmp_path: Path) -> tuple[bytes, bytes]:
    content = b"the dog\n\na meadow"
    return content, translate(run, tmp_path, content)


@pytest.mark.parametrize("terminal", [False, True])
def test_standard_input_to_standard_output(
    run: Path, answers: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    content, expected = answers
    out = _Stream()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdin", _Stream(content, terminal))
        patch.setattr("sys.stdout", out)
        assert main(["translate", str(run), "decoding.beam_size=1"]) == 0
    assert out.buffer.getvalue() == expected
