"""A prepared folder that came from anybody: every claim of its manifest is checked before it is acted on."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nmt.config import CorpusConfig, FilesConfig, SubwordConfig
from nmt.data.prepared import Prepared, find_prepared, prepared_path
from nmt.data.shards import file_record
from nmt.errors import DataError
from nmt.preparation.prepare import prepare
from nmt.run import RunDirectory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    lines = [f"the dog {number % 40} runs over {number % 7}\n" for number in range(200)]
    for name in ("a", "b"):
        (root / name).write_text("".join(lines))
    files = FilesConfig(source=["a"], target=["b"])
    corpus = CorpusConfig(
        source="files",
        root=str(root),
        directory=str(root / "prepared"),
        train=files,
        dev=files,
        subwords=SubwordConfig(kind="bpe", vocab_size=32),
    )
    return prepare(corpus, lambda _: None).path


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "received-00000000"
    shutil.copytree(made, copy)
    return copy


def use(folder: Path) -> None:
    """Whatever training does with a prepared folder."""
    prepared = Prepared.open(folder)
    prepared.verify()
    prepared.subwords()
    prepared.parts()
    prepared.text("dev")


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        use(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert "prepare" in message
    return message


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def reseal(folder: Path) -> None:
    """What a sender can do: the sizes and hashes of the files as they are now."""
    change_manifest(
        folder,
        lambda manifest: [
            files.update({name: file_record(folder / name) for name in files})
            for files in (manifest["files"], manifest["shards"]["train"]["files"])
        ],
    )


def test_the_copy_is_right(folder: Path) -> None:
    use(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["shards"]["train"].update(dtype="|O"),
        lambda manifest: manifest["shards"]["train"].update(dtype="<i8"),
        lambda manifest: manifest["shards"]["train"].update(dtype="<i4"),
        lambda manifest: manifest["shards"]["train"].update(dtype=3),
        lambda manifest: manifest["shards"]["train"].update(pairs=199),
        lambda manifest: manifest["shards"]["train"].update(pairs="200"),
        lambda manifest: manifest["shards"]["train"]["files"].popitem(),
        lambda manifest: manifest["shards"]["train"]["files"].update({"../x": {"bytes": 1, "sha256": ""}}),
        lambda manifest: manifest["shards"].clear(),
        lambda manifest: manifest.pop("shards"),
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest.pop("format"),
        lambda manifest: manifest.update(sources=[3]),
        lambda manifest: manifest.update(format=0),
        lambda manifest: manifest.pop("source_pieces"),
        lambda manifest: manifest.update(pairs_kept="many"),
        lambda manifest: manifest.update(vocabulary_size=31),
        lambda manifest: manifest["files"].update({"../../secret": {"bytes": 1, "sha256": ""}}),
        lambda manifest: manifest["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}}),
        lambda manifest: manifest["files"].pop("subwords.model"),
    ],
)
def test_claims_of_the_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    change_manifest(folder, change)
    refusal(folder)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, '{"format": 2}'])
def test_no_manifest(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    assert "manifest.json is damaged" in refusal(folder)


def test_pipes_and_devices(folder: Path) -> None:
    for name in ("subwords.model", "manifest.json", "train.source.pieces"):
        path = folder / name
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        refusal(folder)
        path.unlink()
        path.symlink_to("/dev/zero")
        refusal(folder)
        path.unlink()
        path.write_bytes(content)
    use(folder)


@pytest.mark.parametrize("place", [0, 5, -1])
@pytest.mark.parametrize("value", [-1, 1, 10**15, -(2**62)])
def test_offsets_rise_from_nothing_to_all(folder: Path, place: int, value: int) -> None:
    path = folder / "train.source.offsets"
    offsets = np.fromfile(path, "<i8")
    offsets[place] += value if abs(value) > 1 else value * 1000
    offsets.tofile(path)
    reseal(folder)
    assert "train.source.offsets does not rise from 0" in refusal(folder)


def test_offsets_of_another_count(folder: Path) -> None:
    path = folder / "train.target.offsets"
    np.fromfile(path, "<i8")[:-1].tofile(path)
    reseal(folder)
    assert "train.target.offsets does not rise from 0" in refusal(folder)


def test_pieces_are_in_the_vocabulary(folder: Path) -> None:
    path = folder / "train.target.pieces"
    pieces = np.fromfile(path, "<u2")
    pieces[17] = 60000
    pieces.tofile(path)
    reseal(folder)
    assert "the target side of the prepared corpus has subword ids outside 0.." in refusal(folder)


@pytest.mark.parametrize("text", [b"one line\n", b"", b"\xff\n" * 200])
def test_text_of_dev(folder: Path, text: bytes) -> None:
    (folder / "dev.target.txt").write_bytes(text)
    reseal(folder)
    refusal(folder)


def test_what_was_verified_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = Prepared.open(folder)
    assert not prepared.is_verified
    prepared.verify()
    # It was written too short a time ago for its time stamps to tell every change.
    assert not prepared.is_verified
    monkeypatch.setattr("nmt.data.prepared._UNSURE_SECONDS", -1.0)
    prepared.verify()
    assert prepared.is_verified
    path = folder / "train.source.pieces"
    stat = path.stat()
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not prepared.is_verified
    with pytest.raises(DataError, match=r"train\.source\.pieces has changed since nmt prepare wrote it"):
        prepared.verify()


def test_a_prepared_corpus_is_found_by_its_folder_and_by_a_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = prepared_path(RunDirectory(run).config().corpus)
    assert find_prepared(str(wanted)).path == wanted
    assert find_prepared(str(run)).path == wanted
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    assert find_prepared("mine").path == wanted


def test_a_corpus_that_is_not_found_is_told_in_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    settings = tmp_path / "copy" / "config.yaml"
    written = (run / "config.yaml").read_text()
    for text, part in (
        (None, "nowhere is neither a prepared corpus nor a run"),
        (written.replace("name: toy", "name: other"), "corpus other is not prepared"),
        (written.replace("root:", "rot:"), "unknown setting corpus.rot"),
        ("run: {}", "it has no section corpus"),
    ):
        if text is not None:
            settings.write_text(text)
        with pytest.raises(DataError, match=part) as caught:
            find_prepared(str(settings.parent if text else tmp_path / "nowhere"))
        assert "\n" not in str(caught.value)
