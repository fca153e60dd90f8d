"""A file of translations appears when it is complete; a pipe or a device is written to, never replaced."""

import bz2
import errno
import gzip
import io
import lzma
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pytest

import nmt.streams.output
from nmt.errors import Ended, StorageError, UserError
from nmt.streams.output import Output, open_output

NO_INPUT = io.BytesIO()


def write(path: Path | str, content: bytes = b"text", source: BinaryIO = NO_INPUT) -> None:
    with open_output(str(path), source) as output:
        output.stream.write(content)


def test_the_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("before")
    with open_output(str(path), NO_INPUT) as output:
        output.stream.write(b"after")
        output.stream.flush()
        assert not output.live
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt(), Ended(15)], ids=repr)
def test_after_an_error_nothing_is_left_behind(tmp_path: Path, error: BaseException) -> None:
    def fail_half_way() -> None:
        with open_output(str(tmp_path / "out"), NO_INPUT) as output:
            output.stream.write(b"half")
            raise error

    with pytest.raises(type(error)):
        fail_half_way()
    assert os.listdir(tmp_path) == []


def test_the_input_a_folder_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_text("keep me")
    (tmp_path / "link").symlink_to(path)
    os.link(path, tmp_path / "hard")
    with path.open("rb") as source:
        for same in (path, tmp_path / "." / "in", tmp_path / "link", tmp_path / "hard"):
            with pytest.raises(UserError, match="is the input"):
                write(same, source=source)
    with pytest.raises(UserError, match="is a folder"):
        write(tmp_path)
    with pytest.raises(StorageError, match="cannot write"):
        write(tmp_path / "no" / "out")
    assert path.read_text() == "keep me"


def test_the_mode_of_a_replaced_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "private"
    path.touch(mode=0o600)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o664)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o664


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write(path)
    assert path.read_bytes() == b"text"


def test_a_device_stays_a_device_and_a_link_a_link(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write(pipe)
    assert os.read(reading, 99) == b"text"
    os.close(reading)
    assert pipe.is_fifo()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"text"
    with pytest.raises(StorageError, match="cannot write /dev/full: No space"):
        write("/dev/full")


@contextmanager
def appending(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("form", ["/dev/fd/{}", "/proc/self/fd/{}", "/proc/thread-self/fd/{}", "a link"])
def test_an_open_descriptor_is_written_to_where_it_stands(tmp_path: Path, form: str) -> None:
    path = tmp_path / "all"
    path.write_bytes(b"before\n")
    with appending(path) as descriptor:
        name = form.format(descriptor)
        if form == "a link":
            name = str(tmp_path / "link")
            os.symlink(f"/dev/fd/{descriptor}", name)
        write(name, b"one\n")
        write(name, b"two\n")
        with path.open("rb") as source, pytest.raises(UserError, match="is the input"):
            write(name, source=source)
    assert path.read_bytes() == b"before\none\ntwo\n"
    with pytest.raises(StorageError, match="cannot write"):
        write(f"/dev/fd/{descriptor}")


def test_the_end_of_a_pipe_under_dev_fd_is_written_to() -> None:
    reading, writing = os.pipe()
    write(f"/dev/fd/{writing}")
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        assert stream.read() == b"text"


def test_dev_stdout_is_standard_output(tmp_path: Path) -> None:
    path = tmp_path / "all"
    path.write_bytes(b"before\n")
    kept = os.dup(1)
    with appending(path) as descriptor:
        os.dup2(descriptor, 1)
        try:
            write("/dev/stdout")
        finally:
            os.dup2(kept, 1)
            os.close(kept)
    assert path.read_bytes() == b"before\ntext"


@pytest.mark.parametrize(
    ("ending", "read"),
    [
        (".gz", gzip.decompress),
        (".bz2", bz2.decompress),
        (".XZ", lzma.decompress),
        (".zst", lambda data: pyarrow.input_stream(io.BytesIO(data), compression="zstd").read()),
    ],
)
def test_the_ending_of_the_name_says_the_compression(
    tmp_path: Path, ending: str, read: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"out.de{ending}"
    write(path)
    first = path.read_bytes()
    assert read(first) == b"text"
    write(path)
    assert path.read_bytes() == first


def test_an_ending_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.lz4 cannot be written; choose \.gz, \.xz, \.zst, "):
        write(tmp_path / "out.lz4")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "out"
    path.write_text("before")
    monkeypatch.setattr("nmt.files.os.fsync", no_space)
    with pytest.raises(StorageError, match=r"cannot write .*out: No space left on device"):
        write(path)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["out"]


def test_only_what_somebody_may_be_reading_is_live(tmp_path: Path) -> None:
    def live(path: Path | str) -> bool:
        with open_output(str(path), NO_INPUT) as output:
            assert isinstance(output, Output)
            return output.live

    assert not live(tmp_path / "out")
    assert live("/dev/null")
    assert nmt.streams.output.Output(NO_INPUT, live=True).live
