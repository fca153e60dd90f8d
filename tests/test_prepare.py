"""Preparing a corpus: contents, idempotence, interruption, damage, two at once."""

import errno
import gzip
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import Queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nmt.corpus.sources
import nmt.data.held_out
import nmt.data.prepared
import nmt.files
import nmt.preparation.cleaning
import nmt.preparation.filtered
import nmt.preparation.journal
import nmt.preparation.prepare
import nmt.preparation.reuse
import nmt.preparation.splits
import nmt.preparation.store
from nmt.config import NUM_ADDED_PIECES, CorpusConfig, ExamplesConfig, FilesConfig, FilterConfig, SubwordConfig
from nmt.data.prepared import Prepared, prepared_path
from nmt.data.shards import ParallelShards
from nmt.errors import DataError
from nmt.preparation.prepare import prepare
from tests.processes import CONTEXT

ENGLISH = ["the", "small", "dog", "runs", "over", "a", "green", "meadow", "this", "morning", "and", "looks"]
GERMAN = ["der", "kleine", "Hund", "läuft", "über", "eine", "grüne", "Wiese", "am", "Morgen", "und", "sucht"]


def write_text(folder: Path, count: int = 400, seed: int = 0) -> None:
    generator = np.random.default_rng(seed)
    for split, size in (("train", count), ("dev", 20), ("test", 10)):
        picks = [generator.integers(0, len(GERMAN), generator.integers(2, 12)) for _ in range(size)]
        for language, words in (("en", ENGLISH), ("de", GERMAN)):
            text = "".join(" ".join(words[pick] for pick in sentence) + "\n" for sentence in picks)
            (folder / f"{split}.{language}").write_text(text)


def corpus_of(folder: Path, **settings: Any) -> CorpusConfig:
    files = {split: FilesConfig(source=[f"{split}.en"], target=[f"{split}.de"]) for split in ("train", "dev", "test")}
    defaults: dict[str, Any] = {
        "name": "toy",
        "directory": str(folder / "prepared"),
        "source": "files",
        "root": str(folder),
        "subwords": SubwordConfig(kind="bpe", vocab_size=96),
    }
    return CorpusConfig(**(files | defaults | settings))


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusConfig:
    write_text(tmp_path)
    return corpus_of(tmp_path)


class Log(list[str]):
    def __call__(self, line: str) -> None:
        assert "\n" not in line
        self.append(line)


def contents(path: Path) -> dict[str, Any]:
    """All files of a prepared folder, without what depends on the clock."""
    files: dict[str, Any] = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    files["report"] = json.loads((path / "report" / "prepare.json").read_text())
    del files["report"]["seconds"], files["report"]["path"]
    manifest = json.loads(files["manifest.json"])
    del manifest["seconds"]
    for source in manifest["sources"]:
        del source["mtime_ns"]
    files["manifest.json"] = manifest
    return files


def test_contents(corpus: CorpusConfig) -> None:
    log = Log()
    prepared = prepare(corpus, log)
    assert prepared.path == prepared_path(corpus)
    root = Path(corpus.root)
    subwords, shards = prepared.subwords(), prepared.parts()[0].shards
    lines = {side: (root / f"train.{side}").read_text().splitlines() for side in ("en", "de")}
    assert len(shards) == 400
    for pair in (0, 17, 399):
        assert subwords.decode(shards.source(pair)) == lines["en"][pair]
        assert np.array_equal(shards.target(pair), subwords.encode(lines["de"][pair]))
    assert shards.source_lengths.tolist() == [len(shards.source(pair)) for pair in range(400)]
    assert shards.target_lengths.dtype == np.int32
    source, target, domains = prepared.text("dev")
    assert ("\n".join(source) + "\n").encode() == (root / "dev.en").read_bytes()
    assert ("\n".join(target) + "\n").encode() == (root / "dev.de").read_bytes()
    assert domains == []
    manifest = prepared.manifest
    assert manifest["pairs_read"] == manifest["pairs_kept"] == 400
    assert manifest["source_pieces"] == shards.source_lengths.sum()
    assert manifest["vocabulary_size"] == subwords.size == NUM_ADDED_PIECES + 96
    assert (manifest["lines_in_bytes"], manifest["characters_in_bytes"]) == (0, {})
    assert len(manifest["sources"]) == 6
    assert "toy: 400 pairs read, 400 kept" in log
    assert "vocabulary: 424 bpe subwords from 800 sentences" in log
    prepared.verify()


def unwritable(*_: Any) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def test_second_call_does_nothing(corpus: CorpusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(corpus, Log())
    before = contents(first.path)
    monkeypatch.setattr(nmt.preparation.prepare, "_Preparation", None)
    log = Log()
    again = prepare(corpus, log)
    assert again.fingerprint == first.fingerprint
    assert len(log) == 1
    # A touched file is compared by contents; one that is gone (another machine) changes nothing.
    os.utime(Path(corpus.root) / "train.en", (1, 1))
    prepare(corpus, log)
    for file in Path(corpus.root).glob("*.*"):
        file.unlink()
    prepare(corpus, log)
    # Where nothing can be written, what is finished can be used.
    with monkeypatch.context() as patch:
        patch.setattr(nmt.preparation.reuse, "locked", unwritable)
        prepare(corpus, log)
    # What was read whole once, and has not been touched since, is neither locked nor read again.
    monkeypatch.setattr(nmt.data.prepared, "_UNSURE_SECONDS", -1.0)
    prepare(corpus, log)
    monkeypatch.setattr(nmt.preparation.prepare, "preparing", None)
    monkeypatch.setattr(Prepared, "verify", None)
    prepare(corpus, log)
    assert len(log) == 6
    assert contents(first.path) == before


def test_changed_source_rebuilds(corpus: CorpusConfig) -> None:
    first = prepare(corpus, Log())
    path = Path(corpus.root) / "train.de"
    path.write_text(path.read_text().replace("Hund", "Huhn"))
    log = Log()
    second = prepare(corpus, log)
    assert "train.de has changed" in log[0]
    assert second.path == first.path
    assert second.fingerprint != first.fingerprint
    assert sorted(file.name for file in second.path.parent.iterdir() if file.is_dir()) == [second.path.name, "toy.text"]


def test_corpora_of_older_versions_are_still_found() -> None:
    """The folders that versions without examples, directions, tags and inherited vocabularies made."""
    assert prepared_path(CorpusConfig()).name == "corpus-db9426fc"
    files = FilesConfig(source=["a"], target=["b"])
    assert prepared_path(CorpusConfig(source="files", train=files)).name == "corpus-f13160f6"
    # With examples of symbols, before there were others.
    assert prepared_path(CorpusConfig(examples=ExamplesConfig(slots=0.1))).name == "corpus-282dc485"
    assert prepared_path(CorpusConfig(examples=ExamplesConfig(slots=0.1, quoted=0.1))).name != "corpus-282dc485"


def test_any_setting_but_the_directory_gives_another_folder(corpus: CorpusConfig, tmp_path: Path) -> None:
    path = prepared_path(corpus)
    assert prepared_path(corpus_of(tmp_path, directory="elsewhere")).name == path.name
    assert prepared_path(corpus_of(tmp_path, max_pairs=1)) != path
    assert prepared_path(corpus_of(tmp_path, filters=FilterConfig(max_pieces=7))) != path


INTERRUPTIONS: list[tuple[Any, str]] = [
    (nmt.preparation.splits.Splits, "write_files"),
    (nmt.preparation.cleaning, "write_block"),
    (nmt.preparation.store.Unit, "finish"),
    (nmt.preparation.filtered.FilteredText, "drop_repeated"),
    (nmt.preparation.prepare, "train_subwords"),
    (nmt.preparation.prepare, "write_atomically"),
    (nmt.preparation.journal.Journal, "append"),
    (nmt.preparation.journal.Journal, "save"),
    (nmt.data.shards.ShardWriter, "record"),
    (nmt.preparation.prepare, "report"),
    (nmt.files, "sync"),
    (Path, "rename"),
]


@pytest.mark.parametrize(("owner", "name"), INTERRUPTIONS, ids=[name for _, name in INTERRUPTIONS])
def test_interruption_is_never_taken_as_done(corpus: CorpusConfig, tmp_path: Path, owner: Any, name: str) -> None:
    path = prepared_path(corpus)
    original: Callable[..., Any] = getattr(owner, name)
    # Interrupted before the step, then in its second call, if there is one, with the work of the first one done.
    for wanted in (1, 2):
        calls = 0

        def interrupted(*arguments: Any, wanted: int = wanted, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == wanted:
                raise KeyboardInterrupt
            return original(*arguments, **settings)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            if wanted == 1:
                with pytest.raises(KeyboardInterrupt):
                    prepare(corpus, Log())
            else:
                with suppress(KeyboardInterrupt):
                    prepare(corpus, Log())
        if calls == wanted:
            assert not path.exists()
            with pytest.raises(ValueError, match="corpus toy is not prepared"):
                Prepared.open(path)
    prepare(corpus, Log())
    assert not path.with_name(f".{path.name}.tmp").exists()
    clean = corpus_of(tmp_path, directory=str(tmp_path / "clean"))
    prepare(clean, Log())
    expected = contents(prepared_path(clean))
    expected["manifest.json"]["corpus"]["directory"] = corpus.directory
    assert contents(path) == expected


def test_damage_is_found_and_repaired(corpus: CorpusConfig) -> None:
    prepared = prepare(corpus, Log())
    before = contents(prepared.path)
    shard = prepared.path / "train.target.pieces"
    shard.write_bytes(before[shard.name][:-2])
    with pytest.raises(ValueError, match=r"train\.target\.pieces has \d+ bytes instead of \d+") as caught:
        prepared.parts()
    assert "\n" not in str(caught.value)
    for name, data in before.items():
        if name not in ("manifest.json", "report"):
            (prepared.path / name).write_bytes(bytes([data[0] ^ 1]) + data[1:])
            with pytest.raises(ValueError, match=name):
                prepared.verify()
            log = Log()
            prepare(corpus, log)
            assert name in log[0]
            assert contents(prepared.path) == before
    (prepared.path / "dev.source.txt").write_text("other\n")
    with pytest.raises(ValueError, match=r"dev\.source\.txt has changed since nmt prepare wrote it"):
        prepared.text("dev")
    (prepared.path / "train.source.offsets").unlink()
    with pytest.raises(ValueError, match=r"train\.source\.offsets is missing"):
        ParallelShards.open(prepared.path)
    (prepared.path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        Prepared.open(prepared.path)


def test_a_folder_of_another_version_is_prepared_again(corpus: CorpusConfig) -> None:
    path = prepare(corpus, Log()).path
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    log = Log()
    prepare(corpus, log)
    assert log[0] == f"toy: {path} was made by another version of this program: run nmt prepare again; preparing again"


def test_what_others_left_is_removed(corpus: CorpusConfig) -> None:
    """The folder of a preparation of this corpus with other settings that was killed, but not that of another one."""
    directory = Path(corpus.directory)
    for name in ("toy-00000000", "other-11111111"):
        (directory / f".{name}.tmp").mkdir(parents=True)
    prepare(corpus, Log())
    assert [path.name for path in sorted(directory.glob(".*.tmp"))] == [".other-11111111.tmp"]


def test_long_and_blank_lines_of_dev_are_told(corpus: CorpusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nmt.data.held_out, "LONGEST_SIDE", 50)
    for language, line in (("en", "the " * 200), ("de", "")):
        with (Path(corpus.root) / f"dev.{language}").open("a") as stream:
            stream.write(f"{line}\n")
    log = Log()
    prepare(corpus, log)
    assert "toy: 1 of 21 pairs of dev have a blank side" in log
    assert any("toy: dev: 1 pair has more than 50 subwords on a side (line 21)" in line for line in log)


def test_dev_has_a_bound(corpus: CorpusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, most in (("_MOST_PAIRS", 19), ("_MOST_BYTES", 500)):
        with monkeypatch.context() as patch:
            patch.setattr(nmt.preparation.splits, name, most)
            with pytest.raises(DataError, match=r"corpus\.dev has more than"):
                prepare(corpus, Log())


def _prepare_in_process(corpus: CorpusConfig, lines: "Queue[str]") -> None:
    prepare(corpus, lines.put)


@pytest.mark.slow
def test_two_at_once_build_once(corpus: CorpusConfig, tmp_path: Path) -> None:
    write_text(tmp_path, 3000)
    lines = CONTEXT.Queue()
    processes = [CONTEXT.Process(target=_prepare_in_process, args=(corpus, lines)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    said = [lines.get(timeout=5) for _ in range(lines.qsize())]
    assert sum("pairs read" in line for line in said) == 1
    assert sum("are prepared in" in line for line in said) == 1


def test_filters_and_odd_text(tmp_path: Path) -> None:
    write_text(tmp_path)
    # The Unicode line separator, a BOM, bad bytes, blanks, a pair that is too long once it is encoded.
    long = "".join(np.random.default_rng(1).choice(list("thedogrunsmall"), 600))
    odd = ["the dog\u2028runs", "", long, "\ufffd"]
    with (tmp_path / "train.en").open("ab") as stream:
        stream.write("\n".join(odd).encode() + b"\nbad \xff\n")
    with (tmp_path / "train.de").open("ab") as stream:
        stream.write(b"Hund\nHund\nHund\nHund\nHund\n")
    (tmp_path / "dev.jsonl").write_text('{"en": "a\\nb\\u2028c\\r", "de": "d", "domain": "letters"}\n')
    corpus = corpus_of(tmp_path, dev=FilesConfig(pairs=["dev.jsonl"]), test=FilesConfig())
    log = Log()
    prepared = prepare(corpus, log)
    assert (
        "toy: 405 pairs read, 403 kept; "
        "dropped: 1 with a blank side (blank), 1 with more than 200 subwords (max_pieces)" in log
    )
    assert "toy: lines that were not valid UTF-8, invalid bytes replaced: train 1; save the text as UTF-8" in log
    assert len(prepared.parts()[0].shards) == 403
    assert prepared.manifest["dropped"]["max_pieces"] == 1
    assert prepared.manifest["invalid_utf8_lines"] == {"dev": 0, "test": 0, "train": 1}
    assert prepared.text("dev") == (["a b\u2028c\r"], ["d"], ["letters"])
    assert prepared.text("test") == ([], [], [])


def test_characters_without_a_piece_are_told(tmp_path: Path) -> None:
    write_text(tmp_path)
    with (tmp_path / "train.de").open("ab") as stream:
        stream.write("東京 Ö\nder Hund\n東\n".encode())
    with (tmp_path / "train.en").open("ab") as stream:
        stream.write(b"the dog\nthe dog\nthe\n")
    corpus = corpus_of(tmp_path, subwords=SubwordConfig(kind="bpe", vocab_size=96, character_coverage=0.9995))
    log = Log()
    prepared = prepare(corpus, log)
    assert prepared.manifest["lines_in_bytes"] == 2
    assert prepared.manifest["characters_in_bytes"] == {"東": 2, "京": 1, "Ö": 1}
    told = "3 characters, in 2 lines, are not in the vocabulary and are encoded as bytes: 東 2, 京 1, Ö 1"
    assert told in log
    shards = prepared.parts()[0].shards
    assert prepared.subwords().decode(shards.target(len(shards) - 3)) == "東京 Ö"


def test_sample_is_spread_over_both_sides(corpus: CorpusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus.subwords.training_sentences = 100
    taken: list[str] = []
    original = nmt.preparation.prepare.train_subwords

    def spy(sentences: Iterator[str], *arguments: Any) -> None:
        taken.extend(sentences)
        original(taken, *arguments)

    monkeypatch.setattr(nmt.preparation.prepare, "train_subwords", spy)
    prepare(corpus, Log())
    root = Path(corpus.root)
    assert taken[::2] == (root / "train.en").read_text().splitlines()[7::8]
    assert taken[1::2] == (root / "train.de").read_text().splitlines()[7::8]


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"dev": FilesConfig()}, "or set corpus.dev.from_train"),
        (
            {"train": FilesConfig(), "dev": FilesConfig(["test.en"], ["test.de"]), "test": FilesConfig()},
            "corpus.train: there is no training text in corpus.source=files: name its files in corpus.train",
        ),
        (
            {"filters": FilterConfig(max_words=1)},
            "leave none of 400 training pairs: 400 with more than 1 word (max_words)",
        ),
        (
            {"filters": FilterConfig(max_pieces=1)},
            "leave none of 400 training pairs: 400 with more than 1 subword (max_pieces)",
        ),
        ({"subwords": SubwordConfig(vocab_size=9999)}, "corpus.subwords.vocab_size=9999 is too large"),
        ({"test": FilesConfig(pairs=["no.tsv"])}, "corpus.test.pairs"),
        ({"dev": FilesConfig(from_train=400)}, "corpus.dev.from_train=400 and corpus.test.from_train=0 leave none"),
        ({"dev": FilesConfig(pairs=["blank.jsonl"])}, "corpus.dev: all of its 2 pairs have a blank side"),
        ({"directory": "/dev/null/x"}, "corpus.directory=/dev/null/x cannot be written"),
    ],
)
def test_refusals(tmp_path: Path, settings: dict[str, Any], part: str) -> None:
    write_text(tmp_path)
    (tmp_path / "blank.jsonl").write_text('{"en": "", "de": "a"}\n{"en": "b", "de": " "}\n')
    corpus = corpus_of(tmp_path, **settings)
    with pytest.raises(ValueError, match=r".") as caught:
        prepare(corpus, Log())
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not prepared_path(corpus).exists()


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_files_without_text_are_named(tmp_path: Path, split: str) -> None:
    write_text(tmp_path)
    for name in ("no.en", "no.de", "no.tsv"):
        (tmp_path / name).write_text("")
    files = FilesConfig(["no.en"], ["no.de"], pairs=["no.tsv"])
    with pytest.raises(DataError, match=rf"^corpus\.{split}: no pair of texts is in .*no\.en, .*no\.de, .*no\.tsv: "):
        prepare(corpus_of(tmp_path, **{split: files}), Log())


def test_carriage_returns_as_line_ends(corpus: CorpusConfig) -> None:
    for language in ("en", "de"):
        path = Path(corpus.root) / f"train.{language}"
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r"))
    with pytest.raises(DataError, match=r"^corpus\.train\.source: .*train\.en has carriage returns as line ends"):
        prepare(corpus, Log())


def test_misaligned_training_text(corpus: CorpusConfig) -> None:
    with (Path(corpus.root) / "train.de").open("a") as stream:
        stream.write("zu viel\n")
    with pytest.raises(ValueError, match=r"corpus.train: 400 lines in .*train.en but 401 in .*train.de"):
        prepare(corpus, Log())
    assert not prepared_path(corpus).exists()


def test_file_that_changes_while_it_is_read(corpus: CorpusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    original = nmt.preparation.prepare.train_subwords

    def meanwhile(*arguments: Any) -> None:
        (Path(corpus.root) / "train.en").write_text("changed\n")
        original(*arguments)

    monkeypatch.setattr(nmt.preparation.prepare, "train_subwords", meanwhile)
    with pytest.raises(ValueError, match=r"train\.en changed while it was read"):
        prepare(corpus, Log())


def test_phrasebook_files_are_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = tmp_path / "tables"
    tables.mkdir()
    (tables / "travel.txt").write_text("1")
    monkeypatch.setattr(nmt.corpus.sources, "resource_dir", lambda _: tables)
    if not (Path(nmt.corpus.sources.__file__).with_name("phrasebook.py")).exists():
        pytest.skip("nmt/corpus/phrasebook.py is not there")
    pair = types.SimpleNamespace

    def phrasebook(split: str, source: str, target: str, num_pairs: int) -> Iterator[Any]:
        generator = np.random.default_rng(0)
        for _ in range(num_pairs):
            pick = generator.integers(0, len(GERMAN), 6)
            yield pair(
                source=" ".join(ENGLISH[i] for i in pick),
                target=" ".join(GERMAN[i] for i in pick),
                domain="travel",
            )

    monkeypatch.setitem(sys.modules, "nmt.corpus.phrasebook", types.SimpleNamespace(phrasebook=phrasebook))
    corpus = CorpusConfig(
        directory=str(tmp_path / "prepared"), max_pairs=200, subwords=SubwordConfig(kind="bpe", vocab_size=96)
    )
    prepared = prepare(corpus, Log())
    source, _, domains = prepared.text("test")
    assert len(source) == 1000
    assert set(domains) == {"travel"}
    (tables / "travel.txt").write_text("2")
    log = Log()
    prepare(corpus, log)
    assert "travel.txt has changed" in log[0]


def test_real_text(tmp_path: Path) -> None:
    data = Path(os.environ.get("NMT_REAL_TEXT", "")) / "multi30k"
    if "NMT_REAL_TEXT" not in os.environ:
        pytest.skip("NMT_REAL_TEXT names no folder of real text (with multi30k/val.en.gz and val.de.gz of Multi30k)")
    files = [FilesConfig(source=[f"{name}.en.gz"], target=[f"{name}.de.gz"]) for name in ("val", "val")]
    corpus = corpus_of(
        tmp_path,
        root=str(data),
        train=files[0],
        dev=files[1],
        test=FilesConfig(),
        subwords=SubwordConfig(kind="unigram", vocab_size=1000),
    )
    prepared = prepare(corpus, Log())
    with gzip.open(data / "val.de.gz", "rt", encoding="utf-8", newline="\n") as stream:
        lines = stream.read().split("\n")[:-1]
    assert len(lines) == len(prepared.parts()[0].shards) == 1014
    subwords, shards = prepared.subwords(), prepared.parts()[0].shards
    exact = sum(subwords.decode(shards.target(n)) == " ".join(line.split()) for n, line in enumerate(lines))
    assert exact > 950
