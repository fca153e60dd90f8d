"""A preparation that was killed, or whose settings or sources change, redoes only what it must."""

import json
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import nmt.preparation.blocks
import nmt.preparation.cleaning
import nmt.preparation.filtered
import nmt.preparation.journal
import nmt.preparation.prepare
from nmt.config import CorpusConfig, ExamplesConfig, FilesConfig, FilterConfig, SubwordConfig
from nmt.data.prepared import Prepared, prepared_path
from nmt.preparation.prepare import prepare, text_store_path
from tests.test_prepare import Log, contents, corpus_of, write_text

FILTERS = FilterConfig(duplicates=True, max_words=9)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nmt.preparation.blocks, "BLOCK_ROWS", 40)
    monkeypatch.setattr(nmt.preparation.journal, "_SAVE_SECONDS", 0.0)


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusConfig:
    """Two pairs of files, of ten and five blocks, with duplicates; some pairs are rewritten."""
    write_text(tmp_path)
    for language in ("en", "de"):
        lines = (tmp_path / f"train.{language}").read_text().splitlines(keepends=True)
        (tmp_path / f"more.{language}").write_text("".join(lines[50:250]))
        (tmp_path / f"train.{language}").write_text("".join(lines[:40] + lines))
    train = FilesConfig(source=["train.en", "more.en"], target=["train.de", "more.de"])
    examples = ExamplesConfig(terms=0.1, quoted=0.1, upper_case=0.1)
    return corpus_of(tmp_path, train=train, filters=FILTERS, examples=examples, dev=FilesConfig(from_train=15))


class Work(Counter[str]):
    """Counts the blocks that are filtered and encoded, and the vocabularies learned."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        for owner, name in (
            (nmt.preparation.cleaning.Cleaner, "__call__"),
            (nmt.preparation.prepare.Encoder, "__call__"),
            (nmt.preparation.prepare, "train_subwords"),
        ):
            self._count(patch, owner, name)

    def _count(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            self[getattr(owner, "__qualname__", name)] += 1
            return original(*arguments)

        patch.setattr(owner, name, call)

    def taken(self) -> dict[str, int]:
        found = dict(self)
        self.clear()
        return found


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(corpus: CorpusConfig, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2, 3):
        directory = tmp_path / str(processes)
        path = prepare(replace(corpus, directory=str(directory)), Log(), processes).path
        files = contents(path)
        del files["manifest.json"]["corpus"]["directory"], files["report"]["processes"]
        files["text"] = {str(each.relative_to(directory)): each.read_bytes() for each in directory.rglob("*.parquet")}
        assert len(files["text"]) == 16
        found.append(files)
    assert found[0] == found[1] == found[2]
    manifest = found[0]["manifest.json"]
    assert manifest["dropped"]["duplicates"] > 150
    assert manifest["dropped"]["max_words"] > 0
    assert manifest["held_out"] >= 15
    assert min(manifest["examples"][kind] for kind in ("quoted", "upper_case")) > 0


@pytest.mark.slow
def test_a_restart_goes_on_after_the_last_block(
    corpus: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = prepare(replace(corpus, directory=str(tmp_path / "clean")), Log(), 1).path
    work = Work(monkeypatch)

    def stop_after(calls: int, owner: Any, name: str) -> None:
        original, left = getattr(owner, name), calls

        def call(*arguments: Any, **settings: Any) -> Any:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            return original(*arguments, **settings)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, call)
            with pytest.raises(KeyboardInterrupt):
                prepare(corpus, Log(), 1)

    stop_after(4, nmt.preparation.cleaning, "write_block")
    assert work.taken() == {"Cleaner": 5}
    stop_after(9, nmt.preparation.cleaning, "write_block")  # in the second file
    assert work.taken() == {"Cleaner": 10}
    stop_after(3, nmt.preparation.prepare.Journal, "append")
    assert work.taken() == {"Cleaner": 3, "train_subwords": 1, "Encoder": 4}
    stop_after(2, nmt.preparation.prepare.Journal, "append")
    assert work.taken() == {"Encoder": 3}
    prepared = prepare(corpus, Log(), 1)
    assert work.taken() == {"Encoder": 16 - 5}
    expected = contents(clean)
    expected["manifest.json"]["corpus"]["directory"] = corpus.directory
    assert contents(prepared.path) == expected
    own = {path.name for path in prepared.path.iterdir() if not path.name.startswith(("train", "dev", "test"))}
    assert own == {"manifest.json", "report", "subwords.model"}


@pytest.mark.slow
def test_only_what_changed_is_done_again(corpus: CorpusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    first = prepare(corpus, Log(), 1)
    assert work.taken() == {"Cleaner": 16, "train_subwords": 1, "Encoder": 16}
    # Another vocabulary: the text stays.
    prepare(replace(corpus, subwords=SubwordConfig(kind="bpe", vocab_size=64)), Log(), 1)
    assert work.taken() == {"train_subwords": 1, "Encoder": 16}
    prepare(replace(corpus, filters=replace(FILTERS, max_pieces=100)), Log(), 1)
    assert work.taken() == {"train_subwords": 1, "Encoder": 16}
    # One changed file: the other one stays.
    path = Path(corpus.root) / "more.en"
    path.write_text(path.read_text().replace("dog", "cat"))
    second = prepare(corpus, Log(), 1)
    assert work.taken() == {"Cleaner": 5, "train_subwords": 1, "Encoder": 16}
    assert second.fingerprint != first.fingerprint
    # Another rule: all of it.
    prepare(replace(corpus, filters=replace(FILTERS, max_words=8)), Log(), 1)
    assert work.taken() == {"Cleaner": 16, "train_subwords": 1, "Encoder": 16}
    # Text that no setting of now would use is gone.
    assert len(list(text_store_path(corpus).iterdir())) == 2


@pytest.mark.slow
def test_damaged_text_is_made_again(corpus: CorpusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = contents(prepare(corpus, Log(), 1).path)
    files = sorted(text_store_path(corpus).rglob("*.parquet"))
    files[0].write_bytes(files[0].read_bytes()[:1000])
    files[1].unlink()
    work = Work(monkeypatch)
    (prepared_path(corpus) / "manifest.json").unlink()
    again = prepare(corpus, Log(), 1)
    assert work.taken()["Cleaner"] == 2
    assert contents(again.path) == first
    # A page that is damaged inside is found when it is read; the next call makes it again.
    data = bytearray(files[2].read_bytes())
    data[200] ^= 0xFF  # in the first page of the sources
    files[2].write_bytes(data)
    (again.path / "manifest.json").unlink()
    with suppress(ValueError):
        prepare(corpus, Log(), 1)
        pytest.fail("damage was not found")
    assert contents(prepare(corpus, Log(), 1).path) == first


def test_arrays_that_are_gone_are_made_again(corpus: CorpusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    path = prepared_path(corpus)
    with monkeypatch.context() as patch:
        patch.setattr(nmt.preparation.prepare, "report", None)
        with pytest.raises(TypeError):
            prepare(corpus, Log(), 1)
    unfinished = path.with_name(f".{path.name}.tmp")
    journal = json.loads((unfinished / "journal.json").read_text())
    assert journal["blocks"] == 16
    (unfinished / "train.target.offsets").unlink()
    work = Work(monkeypatch)
    prepared = prepare(corpus, Log(), 1)
    assert work.taken() == {"Encoder": 16}
    prepared.verify()
    assert Prepared.open(path).fingerprint == prepared.fingerprint
