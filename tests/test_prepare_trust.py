"""What nmt prepare must not do: touch files of others, fail for want of a report, or hide what went wrong."""

import errno
import os
import stat
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest

import nmt.commands.prepare
import nmt.preparation.blocks
import nmt.preparation.journal
from nmt.cli import main
from nmt.commands.prepare import prepare_corpus
from nmt.config import CorpusConfig, FilesConfig, FilterConfig
from nmt.data.prepared import Prepared
from nmt.data.shards import SIDES
from nmt.errors import DataError, StorageError
from nmt.preparation.prepare import prepare, text_store_path
from nmt.preparation.report import REPORT
from tests.test_prepare import corpus_of, write_text


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusConfig:
    write_text(tmp_path, 60)
    return corpus_of(tmp_path)


def quiet(_line: str) -> None:
    pass


def test_only_its_own_folders_are_removed(corpus: CorpusConfig, tmp_path: Path) -> None:
    store = text_store_path(corpus)
    for name in ("notes.txt", "0123456789abcdef/h.en", "fedcba9876543210/00000.parquet", "fedcba9876543210/mine"):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_text("of the user")
    prepare(corpus, quiet)
    (tmp_path / "train.en").write_text((tmp_path / "train.en").read_text().replace("dog", "cat"))
    prepare(corpus, quiet)
    assert (store / "notes.txt").exists()
    assert (store / "0123456789abcdef" / "h.en").exists()
    assert (store / "fedcba9876543210" / "mine").exists()
    units = [path for path in store.iterdir() if (path / "unit.json").exists()]
    assert len(units) == 1  # that of the old text is gone


def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    write_text(tmp_path, 60)
    other = tmp_path / "prepared" / ".other-12345678.tmp"
    other.mkdir(parents=True)
    prepare(corpus_of(tmp_path, name="*"), quiet)
    assert other.exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_pairs_like_those_held_out_are_dropped_on_request(tmp_path: Path, processes: int) -> None:
    pairs = [(f"the dog number {number}", f"der Hund Nummer {number}") for number in range(100)]
    shouted = [(source.upper() + "!", f"{target} noch einmal") for source, target in pairs]
    other = [(f"something else {number}", f"etwas anderes {number}") for number in range(100)]
    text = "".join(f"{source}\t{target}\n" for source, target in (*pairs, *shouted, *other))
    (tmp_path / "all.tsv").write_text(text)
    dropped = {}
    for overlap in (False, True):
        held_out = {"dev": FilesConfig(from_train=20), "test": FilesConfig(from_train=10)}
        train, filters = FilesConfig(pairs=["all.tsv"]), FilterConfig(test_overlap=overlap)
        corpus = corpus_of(tmp_path, name=f"overlap{overlap}", train=train, filters=filters, **held_out)
        prepared = prepare(corpus, quiet, processes)
        kept = {subwords_of(prepared, pair, "source") for pair in range(len(prepared.parts()[0].shards))}
        held = {line for split in held_out for line in prepared.text(split)[0]}
        alike = {line for line in held if line.upper() + "!" in kept or line.lower().removesuffix("!") in kept}
        dropped[overlap] = prepared.manifest["dropped"].get("test_overlap", 0)
        assert bool(alike) != overlap
        assert prepared.manifest["pairs_kept"] == 300 - 30 - dropped[overlap]
    assert dropped[False] == 0
    assert dropped[True] > 5


def subwords_of(prepared: Prepared, pair: int, side: str) -> str:
    assert side in SIDES
    return prepared.subwords().decode(getattr(prepared.parts()[0].shards, side)(pair))


# ------------------------------------------------------------------------------------------------ reports


def test_a_finished_corpus_needs_no_place_to_write(corpus: CorpusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    found = prepare_corpus(corpus, quiet)

    def read_only(path: Path, _content: bytes) -> None:
        raise StorageError(f"cannot write {path}: Read-only file system")

    monkeypatch.setattr("nmt.pages.preparation.write_atomically", read_only)
    log: list[str] = []
    assert prepare_corpus(corpus, log.append).path == found.path
    assert log[-1].endswith("prepare.html")
    (found.path / "report" / "prepare.md").unlink()
    assert prepare_corpus(corpus, log.append).path == found.path
    assert "there are no pages of its report: cannot write" in log[-1]


def test_a_damaged_report_stops_nobody(corpus: CorpusConfig) -> None:
    found = prepare_corpus(corpus, quiet)
    (found.path / REPORT).write_text("{}")
    (found.path / "report" / "prepare.html").unlink()
    log: list[str] = []
    assert prepare_corpus(corpus, log.append).path == found.path
    assert "there are no pages of its report" in log[-1]
    (found.path / REPORT).unlink()
    assert prepare_corpus(corpus, log.append).path == found.path


@pytest.mark.parametrize("line", ["-inf", "nan", "inf", "5", "-1_0", "", "log_prob"])
def test_scores_are_log_probabilities(corpus: CorpusConfig, tmp_path: Path, line: str) -> None:
    lines = ["-1.5\ttext"] * 59
    (tmp_path / "scores").write_text("".join(f"{each}\n" for each in [*lines[:3], line, *lines[3:]]))
    corpus.train.scores = ["scores"]
    with pytest.raises(DataError, match=r"scores line 4: .* does not begin with a log-probability"):
        prepare(corpus, quiet)


def test_no_room_names_the_folder(corpus: CorpusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nmt.preparation.journal.Journal, "append", full)
    message = f"corpus.directory={corpus.directory}: No space left on device: make room there"
    with pytest.raises(StorageError, match=message):
        prepare(corpus, quiet)
    monkeypatch.undo()
    assert prepare(corpus, quiet).manifest["pairs_kept"] == 60


# ------------------------------------------------------------------------------------------------ --scores


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    write_text(tmp_path, 60)
    sides = [
        f"corpus.{split}.{side}=[{split}.{end}]"
        for split in ("train", "dev")
        for side, end in (("source", "en"), ("target", "de"))
    ]
    return ["prepare", "corpus=files", f"corpus.root={tmp_path}", f"corpus.directory={tmp_path / 'p'}", *sides]


def test_scores_go_where_they_are_sent(
    words: list[str], tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main([*words, "--scores", "-"]) == 0
    out = capfdbinary.readouterr().out
    assert out.count(b"\n") == 61
    assert main([*words, "--scores", "/dev/stdout"]) == 0
    assert capfdbinary.readouterr().out == out
    assert not stat.S_ISREG(os.lstat("/dev/stdout").st_mode)
    assert main([*words, "--scores", str(tmp_path / "found.gz")]) == 0
    import gzip

    assert gzip.decompress((tmp_path / "found.gz").read_bytes()) == out


def test_scores_replace_no_source(words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (tmp_path / "train.en").read_bytes()
    for name, says in (
        ("train.en", "train.en"),
        ("nowhere/found", "nowhere/found"),
        ("", "--scores needs the name of a file"),
    ):
        assert main([*words, f"--scores={tmp_path / name if name else ''}"]) in (2, 6)
        error = capfd.readouterr().err
        assert error.count("\n") == 1
        assert says in error
    assert (tmp_path / "train.en").read_bytes() == before
    assert main([*words, "--scores", "a", "--scores", "b"]) == 2
    assert "--scores is given twice" in capfd.readouterr().err
    assert not list(tmp_path.glob(".*.tmp"))


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("word", "says"),
    [
        (f"corpus.name={'é' * 101}", "must have at most 200 bytes"),
        ("corpus.filters.max_length_ratio=0.5", "max_length_ratio=0.5 must be at least 1, or 0 for no limit"),
        ("--processes=0", "--processes 0 must be a number of at least 1"),
    ],
)
def test_settings_in_one_line(words: list[str], word: str, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*words, word]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    assert len(error) < 300


# ------------------------------------------------------------------------------------------------ processes


@pytest.mark.slow
def test_processes_are_given_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the buffer of a pipe would make the main process wait until each has started."""
    monkeypatch.setattr(nmt.preparation.blocks, "BLOCK_ROWS", 20)
    write_text(tmp_path, 60)
    for language in ("en", "de"):
        lines = [f"{number} {language} {'x' * 100}" for number in range(2000)]
        (tmp_path / f"dev.{language}").write_text("".join(f"{line}\n" for line in lines))
    given = []
    start = BaseProcess.start

    def noted(self: Any) -> None:
        initializer, arguments = self._args[2:4]  # before them are queues
        given.append((initializer.__name__, arguments[0].__name__, len(ForkingPickler.dumps(arguments))))
        start(self)

    monkeypatch.setattr(BaseProcess, "start", noted)
    prepare(corpus_of(tmp_path, filters=FilterConfig(test_overlap=True)), quiet, 2)
    assert {name for _, name, _ in given} >= {"Cleaner", "Encoder"}
    assert max(size for *_, size in given) < 8192
