"""One process at a time: on one host by flock, on several by a file that its holder touches."""

import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nmt.lock
from nmt.lock import Held, locked


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("TOUCH", 0.02), ("WATCH", 0.3), ("LOOK", 0.01), ("WRITE", 0.02)):
        monkeypatch.setattr(nmt.lock, f"_{name}_SECONDS", seconds)


@pytest.fixture
def other_host(tmp_path: Path) -> Iterator[Any]:
    """A function that makes the lock file of another host, which touches it if it is alive."""
    over = threading.Event()
    threads = []

    def make(path: Path, alive: bool) -> None:
        record = {"pid": 7, "host": "far", "since": "then", "kernel": "another", "process": 7}
        path.write_text(json.dumps(record))

        def touch() -> None:
            while not over.wait(0.02):
                os.utime(path)

        if alive:
            threads.append(threading.Thread(target=touch))
            threads[-1].start()

    yield make
    over.set()
    for thread in threads:
        thread.join()


def no_flock(*_: Any) -> None:
    raise OSError(95, "Operation not supported")


def test_the_file_is_there_while_the_lock_is_held_and_says_by_whom(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path):
        record = json.loads(path.read_text())
        assert (record["pid"], record["process"]) == (os.getpid(), os.getpid())
        with (
            pytest.raises(Held, match=rf"^pid {os.getpid()} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d$"),
            locked(path),
        ):
            pass
        assert path.exists()
    assert os.listdir(tmp_path) == []
    with locked(path):
        pass


def test_the_lock_of_a_process_that_died_is_free_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".lock"
    monkeypatch.setattr(nmt.lock, "_WATCH_SECONDS", 1e9)
    code = "import os, sys; from pathlib import Path; from nmt.lock import locked\n"
    code += "with locked(Path(sys.argv[1])): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 9
    assert path.exists()
    with locked(path):
        assert json.loads(path.read_text())["process"] == os.getpid()
    assert not path.exists()


def test_another_process_can_be_waited_for(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    order: list[str] = []
    release = threading.Event()
    ready = threading.Event()

    def hold() -> None:
        with locked(path):
            ready.set()
            release.wait()
            order.append("first")

    def told(held: Held) -> None:
        order.append(str(held).split(" on ")[0])
        release.set()

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait()
    with locked(path, told):
        order.append("second")
    thread.join()
    assert order == [f"pid {os.getpid()}", "first", "second"]


@pytest.mark.parametrize("flock", [True, False])
def test_another_host_that_is_alive_has_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_host: Any, flock: bool
) -> None:
    """Whatever flock says, which may be kept to each host."""
    path = tmp_path / ".lock"
    if not flock:
        monkeypatch.setattr(fcntl, "flock", no_flock)
    other_host(path, alive=True)
    with pytest.raises(Held, match=r"^pid 7 on far since then$"), locked(path):
        pass
    assert json.loads(path.read_text())["host"] == "far"


@pytest.mark.parametrize("flock", [True, False])
def test_the_lock_of_another_host_that_is_not_touched_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_host: Any, flock: bool
) -> None:
    path = tmp_path / ".lock"
    if not flock:
        monkeypatch.setattr(fcntl, "flock", no_flock)
    other_host(path, alive=False)
    with locked(path):
        assert json.loads(path.read_text())["process"] == os.getpid()
    assert not path.exists()


def test_without_flock_there_is_still_one_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_flock)
    path = tmp_path / ".lock"
    with locked(path), pytest.raises(Held, match=f"^pid {os.getpid()} "), locked(path):
        pass
    assert not path.exists()


def test_of_several_at_once_one_is_inside(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        for _ in range(5):
            with locked(path, lambda _held: None):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 20


def test_who_was_taken_for_dead_leaves_the_lock_to_the_other(tmp_path: Path, other_host: Any) -> None:
    path = tmp_path / ".lock"
    with locked(path):
        other_host(path, alive=False)
    assert json.loads(path.read_text())["host"] == "far"


@pytest.mark.parametrize("content", [b"", b"no record", b"[]", b"\xff" * 9999])
def test_a_file_without_a_record_is_taken(tmp_path: Path, content: bytes) -> None:
    """As older versions of this program left them."""
    (tmp_path / ".lock").write_bytes(content)
    with locked(tmp_path / ".lock"):
        pass


def test_a_link_or_a_pipe_is_no_lock(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "link").symlink_to(victim)
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError, match=r"Too many levels|not a regular file"), locked(tmp_path / name):
            pass
    assert victim.read_text() == "mine"


def test_a_lock_that_is_another_file_as_well_is_left_alone(tmp_path: Path) -> None:
    """Whoever made a folder that was received may have linked a file of the user's there."""
    mine = tmp_path / "mine"
    mine.write_text("keep")
    os.link(mine, tmp_path / ".lock")
    with pytest.raises(OSError, match="hard link"), locked(tmp_path / ".lock"):
        pass
    assert mine.read_text() == "keep"
