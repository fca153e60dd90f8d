"""Vocabularies that a corpus takes from a run, an exported model, another corpus or a file; tags of training text."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nmt.config import NUM_ADDED_PIECES, Config, CorpusConfig, FilesConfig, RunConfig, SubwordConfig
from nmt.data.mixture import Corpora
from nmt.data.subwords import Subwords, train_subwords
from nmt.data.vocabulary import vocabulary_size
from nmt.errors import DataError
from nmt.preparation.prepare import prepare
from tests.test_many_languages import Log, corpus_of, in_two, pairs_of, prepared_from, texts_of, write_texts


def inheriting(folder: Path, vocabulary: Path | str, **changes: Any) -> CorpusConfig:
    return corpus_of(folder, subwords=SubwordConfig(vocabulary=str(vocabulary)), name="other", **changes)


TWO: dict[str, Any] = {"directions": [], **{split: in_two(split) for split in ("train", "dev", "test")}}


# ------------------------------------------------------------------------------------------------ inherited


def test_the_size_of_an_inherited_vocabulary_is_known_beforehand(run: Path) -> None:
    size = Subwords.load(run / "subwords.model").size
    assert vocabulary_size(SubwordConfig(vocabulary=str(run), vocab_size=999)) == size
    assert vocabulary_size(SubwordConfig(vocab_size=999)) == 999 + NUM_ADDED_PIECES


def test_a_corpus_takes_the_vocabulary_and_its_languages(tmp_path: Path) -> None:
    lines = write_texts(tmp_path)["train"]
    first = prepared_from(corpus_of(tmp_path, directions=["en-de", "de-en"]))
    log = Log()
    second = prepared_from(inheriting(tmp_path, first.path, directions=["fr-en", "en-fr"]), log)
    assert (second.path / "subwords.model").read_bytes() == (first.path / "subwords.model").read_bytes()
    assert first.symbols.languages == ("de", "en")
    assert second.symbols.languages == ("de", "en", "fr")
    assert pairs_of(second)["fr-en"] == list(zip(lines["fr"], lines["en"], strict=True))
    size = first.subwords().size
    told = f"vocabulary: {size:,} subwords of {first.path}; settings of learning, such as corpus.subwords.vocab_size, "
    assert told + "have no effect" in log
    [fit] = [line for line in log if "subwords per word" in line]
    pieces = second.manifest["source_pieces"] + second.manifest["target_pieces"]
    words = sum(len(line.split()) for language in ("fr", "en") for line in lines[language])
    assert f"{pieces / words:.2f} subwords per word" in fit
    letters = second.manifest["characters_in_bytes"]
    share = 100 * sum(letters.values()) / sum(len(line) for language in ("fr", "en") for line in lines[language])
    assert letters
    assert float(fit.split(", ")[2].split("%")[0]) == pytest.approx(share, rel=0.01)


def test_two_languages_have_the_symbol_of_a_vocabulary_with_languages(tmp_path: Path) -> None:
    """A model of several directions can only be trained on with the symbol that it knows."""
    write_texts(tmp_path)
    several = prepared_from(corpus_of(tmp_path))
    [part] = prepared_from(inheriting(tmp_path, several.path, **TWO)).parts()
    assert part.prefix == (several.subwords().symbol("language", several.symbols.languages.index("de")),)
    to_french = prepared_from(corpus_of(tmp_path, directions=["en-fr"], name="french"))
    assert prepared_from(inheriting(tmp_path, to_french.path, **TWO)).symbols.languages == ("fr", "de")
    one = prepared_from(corpus_of(tmp_path, **TWO))
    assert [part.prefix for part in one.parts()] == [()]
    again = prepared_from(inheriting(tmp_path, one.path, **TWO))
    assert again.parts()[0].prefix == ()
    assert "languages" not in again.manifest
    # The same text in the same subwords, but with a symbol, is another text to train on.
    assert len({again.fingerprint, prepare(inheriting(tmp_path, several.path, **TWO), Log()).fingerprint}) == 2


def test_a_vocabulary_file_has_no_meanings(tmp_path: Path) -> None:
    write_texts(tmp_path)
    several = prepared_from(corpus_of(tmp_path))
    shutil.copy(several.path / "subwords.model", tmp_path / "mine.model")
    taken = prepared_from(inheriting(tmp_path, tmp_path / "mine.model"))
    assert taken.symbols == several.symbols
    assert "languages" not in prepared_from(inheriting(tmp_path, tmp_path / "mine.model", **TWO)).manifest


def test_the_vocabulary_of_a_run_by_name(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "general").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    prepared = prepared_from(inheriting(tmp_path, "general"))
    assert (prepared.path / "subwords.model").read_bytes() == (run / "subwords.model").read_bytes()
    assert prepared.manifest["vocabulary"]["from"] == "general"


def test_a_vocabulary_that_changes_makes_the_corpus_stale(tmp_path: Path) -> None:
    write_texts(tmp_path)
    first = prepared_from(corpus_of(tmp_path, directions=["en-de"]))
    corpus = inheriting(tmp_path, first.path)
    before = prepared_from(corpus)
    assert len(prepare_log(corpus)) == 1
    # The same pieces with other meanings are another vocabulary.
    manifest = first.path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "languages": ["fr"]}))
    log = prepare_log(corpus)
    assert log[0] == f"other: the vocabulary of {first.path} has changed; preparing again"
    assert prepare(corpus, Log()).symbols.languages == ("fr", "de", "en")
    train_subwords(["the dog runs"] * 9, SubwordConfig(kind="bpe", vocab_size=16), first.path / "subwords.model")
    assert "has changed" in prepare_log(corpus)[0]
    after = prepare(corpus, Log())
    assert after.fingerprint != before.fingerprint
    shutil.rmtree(first.path)
    assert len(prepare_log(corpus)) == 1
    assert prepare(corpus, Log()).fingerprint == after.fingerprint


def prepare_log(corpus: CorpusConfig) -> Log:
    log = Log()
    prepare(corpus, log)
    return log


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    write_texts(tmp_path)
    (tmp_path / "no.model").write_text("no model")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    train_subwords(["the dog runs"] * 9, SubwordConfig(kind="bpe", vocab_size=16), damaged / "subwords.model")
    (damaged / "corpus.json").write_text('{"languages": 3}')
    for name, part in (
        ("nowhere", "is neither a run, an exported model or a prepared corpus nor a .model file"),
        ("no.model", "is not a vocabulary of this program"),
        ("damaged", "languages=3 is not a list of names"),
    ):
        with pytest.raises(DataError, match=part) as caught:
            prepare(inheriting(tmp_path, tmp_path / name), Log())
        assert str(caught.value).startswith(f"corpus.subwords.vocabulary={tmp_path / name}")
        assert "\n" not in str(caught.value)
    (damaged / "corpus.json").write_text(json.dumps({"languages": [f"l{number}" for number in range(31)]}))
    with pytest.raises(DataError, match="symbols for 32 languages, but with those it has already there are 34"):
        prepare(inheriting(tmp_path, damaged), Log())
    with pytest.raises(ValueError, match=r"corpus\.subwords\.vocabulary is empty"):
        SubwordConfig(vocabulary="")


def test_a_run_that_starts_from_another_has_its_vocabulary() -> None:
    config = Config(run=RunConfig(name="new", start_from="runs/old"))
    assert config.corpus.subwords.vocabulary == "runs/old"
    assert Config.from_dict(config.to_dict()) == config
    learn = {"run": {"start_from": "runs/old"}, "corpus": {"subwords": {"vocabulary": "learn"}}}
    assert Config.from_dict(learn).corpus.subwords.vocabulary == "learn"
    # A section that two configurations share is not changed.
    corpus = CorpusConfig()
    Config(run=RunConfig(name="new", start_from="runs/old"), corpus=corpus)
    assert (corpus.subwords.vocabulary, Config().corpus.subwords.inherits) == ("auto", False)


# ------------------------------------------------------------------------------------------------ tags


def tagged(folder: Path, **changes: Any) -> CorpusConfig:
    train = FilesConfig(
        source=["train.en", "test.en"], target=["train.de", "test.de"], pairs=["more.tsv"], tags=["bt", "", "web"]
    )
    return corpus_of(folder, **{**TWO, "train": train, **changes})


@pytest.mark.slow
def test_pairs_with_a_tag_are_a_part_of_their_own(tmp_path: Path) -> None:
    lines = write_texts(tmp_path)
    (tmp_path / "more.tsv").write_text("the dog\tder Hund\nthe meadow\tdie Wiese\n")
    log = Log()
    prepared = prepared_from(tagged(tmp_path), log)
    pairs, subwords = pairs_of(prepared), prepared.subwords()
    assert prepared.symbols.tags == ("bt", "web")
    assert {part.name: (part.tag, part.prefix) for part in prepared.parts()} == {
        "en-de": ("", ()),
        "en-de bt": ("bt", (subwords.symbol("tag", 0),)),
        "en-de web": ("web", (subwords.symbol("tag", 1),)),
    }
    assert pairs["en-de bt"] == list(zip(lines["train"]["en"], lines["train"]["de"], strict=True))
    assert pairs["en-de"] == list(zip(lines["test"]["en"], lines["test"]["de"], strict=True))
    assert pairs["en-de web"] == [("the dog", "der Hund"), ("the meadow", "die Wiese")]
    assert "toy: pairs by tag: en-de 4, en-de bt 60, en-de web 2" in log
    assert prepared.directions("dev") == []


def test_text_for_one_direction_is_mixed_into_a_corpus_of_several(tmp_path: Path) -> None:
    """How back-translated text enters a model of many directions."""
    write_texts(tmp_path)
    corpus = corpus_of(tmp_path, directions=["en-de", "de-en"])
    own = prepared_from(corpus)
    back = FilesConfig(texts={language: [f"test.{language}"] for language in ("en", "de")}, tags=["bt"])
    more = prepared_from(inheriting(tmp_path, own.path, directions=["en-de"], train=back))
    corpora = Corpora(replace(corpus, mixture={str(more.path): 1.0}), own)
    subwords, record = own.subwords(), corpora.record()
    assert (record["languages"], record["tags"]) == (["de", "en"], ["bt"])
    assert [part.prefix for part in more.parts()] == [(subwords.symbol("language", 0), subwords.symbol("tag", 0))]
    epoch = corpora.mixture(1).epoch(0)
    ids, _ = epoch.gather("source", np.arange(len(epoch.source_lengths)))
    assert {subwords.symbol("language", 0), subwords.symbol("language", 1), subwords.symbol("tag", 0)} <= set(ids)


@pytest.mark.slow
def test_tags_come_after_those_of_the_vocabulary(tmp_path: Path) -> None:
    write_texts(tmp_path)
    (tmp_path / "more.tsv").write_text("the dog\tder Hund\n")
    first = prepared_from(tagged(tmp_path, train=FilesConfig(source=["train.en"], target=["train.de"], tags=["web"])))
    second = prepared_from(tagged(tmp_path, subwords=SubwordConfig(vocabulary=str(first.path)), name="other"))
    assert second.symbols.tags == ("web", "bt")


@pytest.mark.slow
def test_pairs_without_a_tag_are_held_out_and_none_of_their_copies_stays(tmp_path: Path) -> None:
    lines = write_texts(tmp_path)
    (tmp_path / "more.tsv").write_text("the dog\tder Hund\n")
    copies = 2 * lines["train"]["en"][:50], 2 * lines["train"]["de"][:50]
    for language, text in zip(("en", "de"), copies, strict=True):
        (tmp_path / f"test.{language}").write_text("".join(f"{line}\n" for line in text))
    held_out = {"dev": FilesConfig(from_train=12), "test": FilesConfig()}
    prepared = prepared_from(tagged(tmp_path, **held_out))
    dev = set(zip(*prepared.text("dev")[:2], strict=True))
    pairs = pairs_of(prepared)
    assert len(dev) == 12
    assert dev <= set(zip(*copies, strict=True))
    assert not dev & {pair for part in pairs.values() for pair in part}
    assert [len(pairs[name]) for name in ("en-de", "en-de bt", "en-de web")] == [100 - 24, 60 - 12, 1]
    assert prepared.manifest["held_out"] == 36
    assert prepared.manifest["pairs_kept"] == 100 + 60 + 1 - 36


def test_settings_of_tags(tmp_path: Path) -> None:
    files = {"source": ["a"], "target": ["b"], "tags": ["bt"]}
    with pytest.raises(ValueError, match=r"corpus\.dev\.tags must be empty"):
        CorpusConfig(source="files", train=texts_of("train", ()), dev=FilesConfig(**files))
    with pytest.raises(ValueError, match=r"corpus\.dev\.from_train=9 holds out pairs without a tag"):
        CorpusConfig(source="files", train=FilesConfig(**files), dev=FilesConfig(from_train=9))
    with pytest.raises(ValueError, match=r"corpus\.train\.tags has 1 labels for 0 files"):
        CorpusConfig(train=FilesConfig(tags=["bt"]))


@pytest.mark.slow
def test_a_vocabulary_older_than_symbols_cannot_have_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path)
    (tmp_path / "more.tsv").write_text("the dog\tder Hund\n")
    monkeypatch.setattr(Subwords, "reserved_ids", lambda self, kind: range(0))
    with pytest.raises(DataError, match=r"the vocabulary is older than symbols of tags"):
        prepare(tagged(tmp_path), Log())
