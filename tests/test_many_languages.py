"""Corpora in several directions: which pairs they have, how they are stored, and the symbols before their sources."""

import json
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmt.config import CorpusConfig, Direction, ExamplesConfig, FilesConfig, FilterConfig, SubwordConfig
from nmt.corpus.pairs import ReadReport, SentencePair
from nmt.corpus.sources import read_pairs, source_files
from nmt.data.prepared import Prepared, prepared_path
from nmt.errors import DataError
from nmt.preparation.prepare import prepare
from nmt.run import RunDirectory
from tests.toy import train

WORDS = {
    "en": ["the", "small", "dog", "runs", "over", "a", "green", "meadow"],
    "de": ["der", "kleine", "Hund", "läuft", "über", "eine", "grüne", "Wiese"],
    "fr": ["le", "petit", "chien", "court", "sur", "un", "vert", "pré"],
}
ALL = [f"{source}-{target}" for source, target in permutations(WORDS, 2)]
Lines = dict[str, list[str]]


def write_texts(folder: Path, count: int = 60) -> dict[str, Lines]:
    """Write word for word translations in all languages; return the lines by split and language."""
    generator = np.random.default_rng(0)
    written = {}
    for split, size in (("train", count), ("dev", 6), ("test", 4)):
        picks = [generator.integers(0, 8, generator.integers(2, 9)) for _ in range(size)]
        lines = {
            language: [" ".join(words[pick] for pick in row) for row in picks] for language, words in WORDS.items()
        }
        for language, text in lines.items():
            (folder / f"{split}.{language}").write_text("".join(f"{line}\n" for line in text))
        written[split] = lines
    return written


def texts_of(split: str, languages: tuple[str, ...] = tuple(WORDS)) -> FilesConfig:
    return FilesConfig(texts={language: [f"{split}.{language}"] for language in languages})


def corpus_of(folder: Path, **changes: Any) -> CorpusConfig:
    options: dict[str, Any] = {split: texts_of(split) for split in ("train", "dev", "test")}
    options |= {"name": "toy", "directory": str(folder / "prepared"), "source": "files", "root": str(folder)}
    options |= {"directions": ALL, "subwords": SubwordConfig(kind="bpe", vocab_size=96)}
    return CorpusConfig(**(options | changes))


class Log(list[str]):
    def __call__(self, line: str) -> None:
        assert "\n" not in line
        self.append(line)


def in_two(split: str) -> FilesConfig:
    return FilesConfig(source=[f"{split}.en"], target=[f"{split}.de"])


def pairs_of(prepared: Prepared) -> dict[str, list[tuple[str, str]]]:
    """The text of the training pairs, by the name of their part."""
    subwords = prepared.subwords()
    return {
        part.name: [
            (subwords.decode(part.shards.source(pair)), subwords.decode(part.shards.target(pair)))
            for pair in range(len(part.shards))
        ]
        for part in prepared.parts()
    }


def prepared_from(corpus: CorpusConfig, log: Log | None = None) -> Prepared:
    prepared = prepare(corpus, log if log is not None else Log())
    prepared.verify()
    return prepared


# ------------------------------------------------------------------------------------------------ three languages


def test_every_direction_has_its_pairs_and_its_symbol(tmp_path: Path) -> None:
    lines = write_texts(tmp_path)["train"]
    log = Log()
    prepared = prepared_from(corpus_of(tmp_path), log)
    parts, subwords = prepared.parts(), prepared.subwords()
    assert [part.name for part in parts] == ALL
    for name, pairs in pairs_of(prepared).items():
        source, target = Direction.of(name)
        assert pairs == list(zip(lines[source], lines[target], strict=True))
    # In order of appearance as a target: en-de, en-fr, de-en.
    assert prepared.symbols.languages == ("de", "fr", "en")
    for part in parts:
        number = prepared.symbols.languages.index(part.direction.target)
        assert part.prefix == (subwords.symbol("language", number),)
        assert not set(part.prefix) & {int(piece) for pair in range(60) for piece in part.shards.source(pair)}
    assert "toy: 180 pairs read, 180 kept" in log
    assert f"toy: pairs by direction: {', '.join(f'{name} 60' for name in ALL)}" in log
    longest = max(int(part.shards.source_lengths.max()) for part in parts)
    assert prepared.manifest["longest_source_pieces"] == longest


def test_both_ways_share_their_arrays(tmp_path: Path) -> None:
    write_texts(tmp_path)
    prepared = prepared_from(corpus_of(tmp_path))
    assert sorted(prepared.manifest["shards"]) == ["train.de-fr", "train.en-de", "train.en-fr"]
    parts = {part.name: part.shards for part in prepared.parts()}
    there, back = parts["en-fr"], parts["fr-en"]
    for pair in range(60):
        assert np.shares_memory(there.source(pair), back.target(pair))
        assert np.array_equal(there.source(pair), back.target(pair))
        assert np.array_equal(there.target(pair), back.source(pair))
    chosen = np.array([5, 3, 59])
    for one, other in (("source", "target"), ("target", "source")):
        for here, same in zip(there.gather(one, chosen), back.gather(other, chosen), strict=True):
            assert np.array_equal(here, same)
    assert np.array_equal(there.source_lengths, back.target_lengths)


def test_dev_has_each_line_in_all_directions_before_the_next(tmp_path: Path) -> None:
    lines = write_texts(tmp_path)["dev"]
    prepared = prepared_from(corpus_of(tmp_path))
    sources, targets, domains = prepared.text("dev")
    expected = [(number, Direction.of(name)) for number in range(6) for name in ALL]
    assert prepared.directions("dev") == [direction for _, direction in expected]
    assert sources == [lines[direction.source][number] for number, direction in expected]
    assert targets == [lines[direction.target][number] for number, direction in expected]
    assert domains == []


def test_only_what_the_directions_need_is_read(tmp_path: Path) -> None:
    write_texts(tmp_path)
    corpus = corpus_of(tmp_path, directions=["en-de"])
    assert {path.name.split(".")[1] for path in source_files(corpus)} == {"en", "de"}
    prepared = prepared_from(corpus)
    assert [(part.name, len(part.prefix)) for part in prepared.parts()] == [("en-de", 1)]
    assert prepared.symbols.languages == ("de",)
    assert set(prepared.directions("test")) == {Direction("en", "de")}


def test_the_order_of_directions_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    """The arrays may be the same, but not what the symbols mean."""
    write_texts(tmp_path)
    learned = [prepared_from(corpus_of(tmp_path, directions=["en-de", *order])) for order in (["de-en"], [])]
    assert learned[0].manifest["shards"] == learned[1].manifest["shards"]
    assert learned[0].fingerprint != learned[1].fingerprint


@pytest.mark.slow
def test_files_of_a_language_have_labels_by_their_place(tmp_path: Path) -> None:
    write_texts(tmp_path)
    both = {language: [f"dev.{language}", f"test.{language}"] for language in WORDS}
    corpus = corpus_of(
        tmp_path,
        dev=FilesConfig(texts=both, domains=["news", "talks"]),
        train=FilesConfig(texts=both, tags=["", "caption"]),
        directions=["en-de", "de-en"],
    )
    prepared = prepared_from(corpus)
    assert prepared.text("dev")[2] == ["news"] * 12 + ["talks"] * 8
    assert [(part.name, len(part.shards)) for part in prepared.parts()] == [
        ("en-de", 6),
        ("en-de caption", 4),
        ("de-en", 6),
        ("de-en caption", 4),
    ]


TEXT = st.sampled_from(["", "  ", "a", "b", "same"])


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(TEXT, TEXT, TEXT), max_size=8),
    directions=st.lists(st.sampled_from(ALL), min_size=1, unique=True),
)
def test_holes_leave_out_what_they_must_and_no_more(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]], directions: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("holes")
    for place, language in enumerate(WORDS):
        for split in ("train", "dev"):
            (folder / f"{split}.{language}").write_text("".join(f"{row[place]}\n" for row in rows))
    corpus = corpus_of(folder, directions=directions)
    there = [
        (dict(zip(WORDS, row, strict=True)), Direction.of(name))
        for row in rows
        for name in directions
        if all(dict(zip(WORDS, row, strict=True))[language].strip() for language in Direction.of(name))
    ]
    report = ReadReport()
    pairs = list(read_pairs(corpus, "dev", report))
    assert pairs == [SentencePair(texts[way.source], texts[way.target], direction=way) for texts, way in there]
    assert report.empty_rows == len(rows) * len(directions) - len(pairs)
    # Training pairs are read once for both ways.
    stored = list(read_pairs(corpus, "train"))
    assert {frozenset(pair.direction or ()) for pair in stored} <= {
        frozenset(Direction.of(name)) for name in directions
    }
    both_ways = {(pair.source, pair.target, pair.direction) for pair in stored}
    both_ways |= {(pair.target, pair.source, pair.direction.reverse) for pair in stored if pair.direction}
    assert {(pair.source, pair.target, pair.direction) for pair in pairs} <= both_ways
    assert len(stored) == sum(
        all(row[list(WORDS).index(language)].strip() for language in way)
        for row in rows
        for way in corpus.language_pairs()
    )


def test_a_line_that_lacks_a_language_serves_the_others(tmp_path: Path) -> None:
    lines = write_texts(tmp_path)["train"]
    for split in ("train", "dev"):
        text = (tmp_path / f"{split}.fr").read_text().splitlines()
        (tmp_path / f"{split}.fr").write_text("\n".join(["", *text[1:3], " ", *text[4:]]) + "\n")
    log = Log()
    prepared = prepared_from(corpus_of(tmp_path), log)
    pairs = pairs_of(prepared)
    assert [len(pairs[name]) for name in ("en-de", "en-fr", "fr-de")] == [60, 58, 58]
    assert pairs["en-fr"][0] == (lines["en"][1], lines["fr"][1])
    assert "toy: pairs that lack a side: train 4, dev 8" in log
    assert len(prepared.directions("dev")) == 6 * 6 - 8


def test_duplicates_are_those_of_the_same_languages(tmp_path: Path) -> None:
    write_texts(tmp_path)
    for language in WORDS:
        (tmp_path / f"train.{language}").write_text("OK\nOK\nfine\n" * 30)
    filters = FilterConfig(duplicates=True)
    prepared = prepared_from(corpus_of(tmp_path, filters=filters, subwords=SubwordConfig(kind="bpe", vocab_size=16)))
    assert {name: len(pairs) for name, pairs in pairs_of(prepared).items()} == dict.fromkeys(ALL, 2)


def test_texts_of_unequal_length_are_refused(tmp_path: Path) -> None:
    write_texts(tmp_path)
    with (tmp_path / "train.fr").open("a") as stream:
        stream.write("un\nde\n")
    with pytest.raises(DataError, match=r"corpus.train: 60 lines in .*train\.en but 62 in .*train\.fr: line n of one"):
        prepare(corpus_of(tmp_path), Log())
    (tmp_path / "train.fr").unlink()
    with pytest.raises(DataError, match=r"corpus\.train\.texts\.fr"):
        prepare(corpus_of(tmp_path), Log())


def test_a_direction_without_text_is_refused(tmp_path: Path) -> None:
    write_texts(tmp_path)
    (tmp_path / "train.fr").write_text("\n" * 60)
    with pytest.raises(DataError, match=r"corpus.train has no pair of en-fr that passes corpus.filters"):
        prepare(corpus_of(tmp_path), Log())


@pytest.mark.slow
def test_a_run_has_the_text_and_the_symbols_of_all_directions(tmp_path: Path) -> None:
    write_texts(tmp_path, 40)
    texts = [
        f"corpus.{split}.{name}"
        for split in ("train", "dev", "test")
        for name in ("source=[]", "target=[]", f"texts={{{', '.join(f'{each}: [{split}.{each}]' for each in WORDS)}}}")
    ]
    changes = (*texts, f"corpus.directions=[{','.join(ALL)}]", "training.batch_tokens=700")
    folder = train(tmp_path, "many", 4, *changes)
    run = RunDirectory(folder)
    prepared = prepare(run.config().corpus, Log())
    assert (run.corpus_info()["languages"], run.corpus_info()["tags"]) == (["de", "fr", "en"], [])
    for split in ("dev", "test"):
        assert run.directions(split) == prepared.directions(split) != []
        assert run.text(split) == prepared.text(split)
    # A further run on it has the vocabulary, and its symbols mean the same.
    more = train(tmp_path, "more", 2, *changes[:-2], "corpus.directions=[de-en]", f"run.start_from={folder}")
    assert (more / "subwords.model").read_bytes() == (folder / "subwords.model").read_bytes()
    assert RunDirectory(more).corpus_info()["languages"] == ["de", "fr", "en"]
    assert RunDirectory(more).config().corpus.subwords.vocabulary == str(folder)


# ------------------------------------------------------------------------------------------------ two languages


def test_both_ways_from_source_and_target(tmp_path: Path) -> None:
    lines = write_texts(tmp_path)["train"]
    files = {split: in_two(split) for split in ("train", "dev", "test")}
    prepared = prepared_from(corpus_of(tmp_path, directions=["de-en", "en-de"], **files))
    both = {"en-de": list(zip(lines["en"], lines["de"], strict=True))}
    both["de-en"] = [(target, source) for source, target in both["en-de"]]
    assert pairs_of(prepared) == both
    assert [str(direction) for direction in prepared.directions("test")] == ["de-en", "en-de"] * 4
    assert prepared.symbols.languages == ("en", "de")


def test_both_ways_from_a_folder_of_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "validation"):
        rows = [{"translation": {"en": f"the {split} {number}", "de": f"das {split} {number}"}} for number in range(40)]
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    corpus = CorpusConfig(source=str(folder), directions=["de-en", "en-de"], max_pairs=30)
    pairs = list(read_pairs(corpus, "train"))
    assert len(pairs) == 30
    assert pairs[7] == SentencePair("das train 7", "the train 7", direction=Direction("de", "en"))
    assert [pair.source for pair in read_pairs(corpus, "dev")][:2] == ["das validation 0", "the validation 0"]
    assert (corpus.direction, corpus.sides) == (("de", "en"), ("en", "de"))


def test_what_is_held_out_is_in_no_direction(tmp_path: Path) -> None:
    write_texts(tmp_path, 200)
    held_out = {"train": in_two("train"), "dev": FilesConfig(from_train=9), "test": FilesConfig(from_train=7)}
    prepared = prepared_from(corpus_of(tmp_path, directions=["en-de", "de-en"], **held_out))
    sources, targets, _ = prepared.text("dev")
    assert len(sources) == 18
    assert (sources[0], targets[0]) == (targets[1], sources[1])
    assert [str(direction) for direction in prepared.directions("dev")] == ["en-de", "de-en"] * 9
    trained = pairs_of(prepared)
    assert len(trained["en-de"]) == len(trained["de-en"]) == 200 - prepared.manifest["held_out"]
    test = prepared.text("test")
    for found, split in ((set(zip(sources, targets, strict=True)), "dev"), (set(zip(*test[:2], strict=True)), "test")):
        assert len(found) == {"dev": 18, "test": 14}[split]
        assert not found & {*trained["en-de"], *trained["de-en"]}


def test_the_phrasebook_has_its_phrases_in_all_languages(tmp_path: Path) -> None:
    corpus = CorpusConfig(directory=str(tmp_path), directions=["en-de", "en-fr", "fr-de"], max_pairs=300)
    pairs = list(read_pairs(corpus, "dev"))
    assert len(pairs) == 3 * 500
    to_german = [pair for pair in pairs if pair.direction == ("en", "de")]
    plain = list(read_pairs(CorpusConfig(), "dev"))
    assert [(pair.source, pair.target, pair.domain) for pair in to_german] == [pair[:3] for pair in plain]
    assert [pair.target for pair in pairs[2::3]] == [pair.target for pair in to_german]
    assert len(list(read_pairs(corpus, "train"))) == 3 * 300
    with pytest.raises(ValueError, match="phrasebook language is 'cs'"):
        list(read_pairs(CorpusConfig(directions=["en-cs"]), "dev"))


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"directions": []}, "corpus.train.texts is for corpus.directions, which is empty"),
        ({"directions": ["en-de", "en"]}, "corpus.directions: 'en' is not a direction"),
        ({"directions": ["en-d/e"]}, "language 'd/e' must be of letters"),
        ({"directions": ["en-de", "en-de"]}, "has en-de twice"),
        ({"directions": ["en-cs"]}, "corpus.train.texts has no files of cs, a language of corpus.directions=[en-cs]"),
        ({"directions": [f"a-l{number}" for number in range(33)]}, "33 target languages: 32 at most"),
        ({"train": in_two("train")}, "corpus.train is text in corpus.source_language=en and corpus.target_language=de"),
        ({"dev": FilesConfig(from_train=9)}, "corpus.dev.from_train=9 holds out pairs, but corpus.directions="),
        *(
            ({"examples": ExamplesConfig(**{name: 0.1})}, f"corpus.examples.{name}=0.1")
            for name in ("terms", "title_case", "lower_case")
        ),
        ({"source": "wmt/x", "train": FilesConfig()}, "corpus.train is text in corpus.source_language=en"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        corpus_of(tmp_path, **changes)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({"texts": {"en": [], "de": []}}, "texts.en is empty"),
        ({"texts": {"en": ["a", "b"], "de": ["c"]}}, "corpus.train.texts has 1 files of de but 2 of en"),
        ({"texts": {"en": ["a"], "de": ["b"]}, "pairs": ["c.tsv"]}, "corpus.train.texts and corpus.train.pairs name"),
        ({"texts": {"en": ["a"], "de": ["b"]}, "tags": ["x", "y"]}, "corpus.train.tags has 2 labels for 1 files"),
        ({"source": ["a"], "target": ["b"], "tags": ["b/t"]}, "corpus.train.tags: 'b/t' must be of letters"),
        ({"source": list("abcdefghi"), "target": ["b"], "tags": list("abcdefghi")}, "has 9 different tags: 8 at most"),
    ],
)
def test_files_that_contradict_each_other(files: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        CorpusConfig(source="files", directions=["en-de", "de-en"], train=FilesConfig(**files))
    assert part in str(caught.value)


def test_a_corpus_that_would_ignore_its_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"corpus\.source=phrasebook would not read them"):
        list(read_pairs(corpus_of(tmp_path, source="phrasebook"), "train"))


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["parts"][0].update(shards="train"),
        lambda manifest: manifest["parts"][0].update(swapped="no"),
        lambda manifest: manifest.update(parts={}),
        lambda manifest: manifest.update(languages=["en"]),
        lambda manifest: manifest["shards"].update({"../train": manifest["shards"]["train.en-de"]}),
        lambda manifest: manifest["shards"].pop("train.en-de"),
    ],
)
def test_claims_of_a_manifest_of_parts(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    write_texts(tmp_path)
    path = prepare(corpus_of(tmp_path), Log()).path / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError):
        Prepared.open(path.parent).parts()


def test_new_settings_count_if_they_are_used(tmp_path: Path) -> None:
    paths = {prepared_path(corpus_of(tmp_path, directions=ALL[:count])) for count in (1, 2)}
    plain = CorpusConfig(source="files", train=in_two("train"))
    tagged = CorpusConfig(source="files", train=FilesConfig(source=["train.en"], target=["train.de"], tags=["bt"]))
    assert len({*paths, prepared_path(plain), prepared_path(tagged)}) == 4
