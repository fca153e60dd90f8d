"""Files written whole or not at all, through no name that somebody could foresee, and read with a bound."""

import os
import stat
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import nmt.files
from nmt.errors import StorageError
from nmt.files import (
    differs,
    folder_atomically,
    parse_json,
    read_json,
    read_regular,
    remove,
    replacing,
    unfinished,
    write_atomically,
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --------------------------------------------------------------------------------------------------------- writing


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content in (b"one", b"", b"two"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("before", [0o600, 0o640, 0o666])
def test_a_replaced_file_keeps_its_mode(tmp_path: Path, before: int) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    path.chmod(before)
    write_atomically(path, b"new")
    assert (path.read_bytes(), mode(path)) == (b"new", before)


def test_a_new_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_atomically(tmp_path / "a", b"")
    assert mode(tmp_path / "a") == mode(tmp_path / "plain")


def test_a_link_is_replaced_and_never_followed(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_text("mine")
    victim.chmod(0o600)
    link.symlink_to(victim)
    write_atomically(link, b"theirs")
    assert victim.read_text() == "mine"
    assert not link.is_symlink()
    assert link.read_text() == "theirs"


def test_the_temporary_name_cannot_be_foreseen_and_is_not_opened_if_it_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = set()
    for _ in range(20):
        with replacing(tmp_path / "a"):
            names |= set(os.listdir(tmp_path)) - {"a"}
    assert len(names) == 20
    monkeypatch.setattr(nmt.files.secrets, "token_hex", lambda _bytes: "guessed")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".guessed.tmp").symlink_to(victim)
    with pytest.raises(StorageError, match=r"cannot write .*a: File exists"):
        write_atomically(tmp_path / "a", b"theirs")
    assert victim.read_text() == "mine"


def test_a_file_may_have_the_longest_name_there_is(tmp_path: Path) -> None:
    write_atomically(tmp_path / ("n" * 255), b"x")
    assert (tmp_path / ("n" * 255)).read_bytes() == b"x"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_after_an_error_the_old_file_stays_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def fail(_descriptor: int) -> None:
        raise failure

    monkeypatch.setattr(nmt.files.os, "fsync", fail)
    with pytest.raises(StorageError if isinstance(failure, OSError) else KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*/no/a: No such file or directory"):
        write_atomically(tmp_path / "no" / "a", b"")


def test_what_is_removed_is_the_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    (folder / "inner").mkdir(parents=True)
    link.symlink_to(folder)
    remove(link)
    assert (folder / "inner").exists()
    (tmp_path / "file").touch()
    for name in ("folder", "file", "nothing"):
        remove(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_folder_takes_its_name_when_all_of_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(nmt.files, "sync", lambda path: synced.append(path.name))
    with folder_atomically(tmp_path / "deep" / "a") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("new")
        assert os.listdir(tmp_path / "deep") == [folder.name] == [".a.tmp"]
    assert (tmp_path / "deep" / "a" / "inner" / "file").read_text() == "new"
    assert os.listdir(tmp_path / "deep") == ["a"]
    assert sorted(synced[:-1]) == [".a.tmp", "file", "inner"]
    assert synced[-1] == "deep"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_folder_that_is_not_finished_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    def write() -> None:
        with folder_atomically(tmp_path / "a") as folder:
            (folder / "file").touch()
            raise failure

    with pytest.raises(type(failure)):
        write()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_what_stands_at_the_temporary_name_is_removed_and_never_written_through(tmp_path: Path, kind: str) -> None:
    left, victim = unfinished(tmp_path / "a"), tmp_path / "victim"
    victim.mkdir()
    if kind == "link":
        left.symlink_to(victim)
    elif kind == "file":
        left.touch()
    else:
        left.mkdir()
        (left / "half").touch()
    with folder_atomically(tmp_path / "a") as folder:
        (folder / "file").touch()
    assert os.listdir(victim) == []
    assert os.listdir(tmp_path / "a") == ["file"]
    assert not left.exists()


@pytest.mark.parametrize("name", ["", "theirs"])
def test_a_folder_that_is_not_empty_is_never_replaced(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a"
    path.mkdir()
    (path / name).mkdir(exist_ok=True)
    with pytest.raises(OSError, match="not empty") if name else nullcontext(), folder_atomically(path) as folder:
        (folder / "ours").touch()
    assert os.listdir(tmp_path) == ["a"]
    assert os.listdir(path) == [name or "ours"]


# --------------------------------------------------------------------------------------------------------- reading


def test_a_regular_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_regular(path) == read_regular(path, 5) == b"12345"
    with pytest.raises(OSError, match="it has more than 4 bytes"):
        read_regular(path, 4)


def test_pipes_devices_and_folders_are_not_read(tmp_path: Path) -> None:
    """A pipe without a writer must not be waited for, and a device has no end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "."):
        with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
            read_regular(tmp_path / name)


MANIFEST = {"step": int, "score": (float, None), "files": {str: {"size": int, "sha256": str}}, "steps": [int]}
GOOD: dict[str, Any] = {"step": 1, "score": 2, "files": {"a": {"size": 3, "sha256": "x"}}, "steps": [1, 2], "more": {}}


@pytest.mark.parametrize("change", [{}, {"score": None}, {"score": 2.5}, {"files": {}}, {"steps": []}, {"more": [1]}])
def test_a_value_of_the_shape_is_taken(change: dict[str, Any]) -> None:
    assert differs(GOOD | change, MANIFEST) == ""


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], "[] is not a mapping"),
        ({"step": 1}, "score is missing"),
        (GOOD | {"step": "1"}, "step: '1' is not a whole number"),
        (GOOD | {"step": True}, "step: True is not a whole number"),
        (GOOD | {"step": 1.5}, "step: 1.5 is not a whole number"),
        (GOOD | {"score": "x"}, "score: 'x' is not a number"),
        (GOOD | {"files": []}, "files: [] is not a mapping"),
        (GOOD | {"files": {"a": {"size": 1}}}, "files.a: sha256 is missing"),
        (GOOD | {"files": {"a": {"size": None, "sha256": ""}}}, "files.a.size: None is not a whole number"),
        (GOOD | {"steps": {}}, "steps: {} is not a list"),
        (GOOD | {"steps": [1, "2"]}, "steps.1: '2' is not a whole number"),
        (GOOD | {"steps": "x" * 99}, f"steps: '{'x' * 36}... is not a list"),
    ],
)
def test_a_value_of_another_shape_is_told_with_its_key(value: Any, problem: str) -> None:
    assert differs(value, MANIFEST) == problem


def test_json_is_read_with_all_its_faults_told_alike(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"step": 1}')
    assert read_json(path, {"step": int}) == {"step": 1}
    for text in ("", "{", "[1, 2", b"\xff\xfe", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, '{"step": null}', "1"):
        with pytest.raises(ValueError, match=r"\S"):
            parse_json(text, {"step": int})
    with pytest.raises(OSError, match="more than 3 bytes"):
        read_json(path, {"step": int}, most_bytes=3)
