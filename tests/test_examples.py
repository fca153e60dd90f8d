"""Training examples with reserved symbols: what is found, how it is written, and what nmt prepare makes of it."""

import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nmt.config import CorpusConfig, ExamplesConfig, FilesConfig, FilterConfig, SubwordConfig
from nmt.data.association import Associations
from nmt.data.examples import KINDS, Example, ExampleWriter, annotated, equal_spans, in_style, slotted
from nmt.data.subwords import Subwords
from nmt.preparation.prepare import prepare
from nmt.text.terms import Match

NOUNS = [("pump", "Pumpe"), ("valve", "Ventil"), ("hose", "Schlauch"), ("tank", "Kessel"), ("gauge", "Messer")]
NOUNS += [(f"thing{one}{two}", f"Ding{two}{one}") for one in "abcdefgh" for two in "klmnopqr"]
PLACES = ["Berlin", "Liland", "Oslo", "Prag"]


def pairs(count: int = 600, seed: int = 0) -> list[tuple[str, str]]:
    """Sentences in which each noun has one translation, and numbers and names are copied."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        (one, eins), (two, zwei) = (NOUNS[place] for place in generator.choice(len(NOUNS), 2, replace=False))
        number, place = generator.integers(100, 999), generator.choice(PLACES)
        made.append((f"The {one} and {number} {two} in {place}.", f"In {place}: {eins} und {number} {zwei}."))
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusConfig:
    folder = tmp_path_factory.mktemp("text")
    for split, found in (("train", pairs()), ("dev", pairs(9, 1)), ("test", pairs(9, 2))):
        for side, texts in zip(("en", "de"), zip(*found, strict=True), strict=True):
            (folder / f"{split}.{side}").write_text("".join(f"{text}\n" for text in texts))
    return corpus_of(folder)


def corpus_of(folder: Path, **settings: Any) -> CorpusConfig:
    files = {split: FilesConfig(source=[f"{split}.en"], target=[f"{split}.de"]) for split in ("train", "dev", "test")}
    subwords = SubwordConfig(kind="bpe", vocab_size=120)
    return CorpusConfig(
        **files, **{"source": "files", "root": str(folder), "directory": f"{folder}/p", "subwords": subwords} | settings
    )


@pytest.fixture(scope="module")
def subwords(corpus: CorpusConfig) -> Subwords:
    return prepare(corpus, lambda _: None).subwords()


# ---------------------------------------------------------------------------------------------------- association


def test_each_noun_is_linked_with_its_translation() -> None:
    found = Associations(pairs)
    for source, target in pairs(50, seed=3):
        expected = {(one, other) for one, other in NOUNS if f" {one} " in source}
        links = found.links(source, target)
        assert expected <= {(link.source.text, link.target.text) for link in links}
        for link in links:
            assert source[link.source.start : link.source.end] == link.source.text
            assert target[link.target.start : link.target.end] == link.target.text
            assert (link.source.text, link.target.text) in NOUNS or link.source.text == link.target.text in PLACES


def test_words_without_a_clear_partner_are_not_linked() -> None:
    # Two words that are always together could both be the translation of either.
    always = [("red stone", "Rot Stein")] * 9 + [("x", "y")] * 300
    assert Associations(lambda: always).links("red stone", "Rot Stein") == []
    # Words that occur twice on a side, that are rare, or on every line.
    assert Associations(pairs).links("pump pump", "Pumpe") == []
    assert Associations(lambda: [("pump", "Pumpe")] * 2).links("pump", "Pumpe") == []
    assert Associations(lambda: [("pump", "Pumpe")] * 100).links("pump", "Pumpe") == []
    assert Associations(lambda: iter(())).links("pump", "Pumpe") == []


# ------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("Room 12 is free.", "Zimmer 12 ist frei.", ["12"]),
        ("at 14:35, not 14:45", "um 14:35 Uhr", ["14:35"]),
        ("12 and 12", "12", []),
        ("In Rome", "In Rome", ["Rome"]),
        ("Rome is", "Rome ist", []),
        ("Mr Paul Weber is", "Herr Paul Weber ist", ["Paul Weber"]),
        ("Mr Paul Weber is", "Herr Weber, Paul, ist", ["Paul", "Weber"]),
        ("see https://a.de/b?c=1.", "siehe https://a.de/b?c=1!", ["https://a.de/b?c=1"]),
        ("Click <b>{name}</b>", "Auf <b>{name}</b> klicken", ["<b>", "{name}", "</b>"]),
        ("1,000 m", "1.000 m", []),
        ("", "", []),
    ],
)
def test_equal_spans(source: str, target: str, expected: list[str]) -> None:
    spans = equal_spans(source, target)
    assert [source[start:end] for (start, end), _ in spans] == expected
    assert [target[start:end] for _, (start, end) in spans] == expected


def test_a_source_with_terms(subwords: Subwords) -> None:
    text = "The pump (valve) is"
    matches = [Match(4, 8, "pump", "Pumpe"), Match(10, 15, "valve", "das Ventil", kept=True)]
    start, _, end, _ = subwords.reserved_ids("term")
    one, two, _ = slots = subwords.reserved_ids("slot")[:3]
    marked = annotated(text, matches, slots, subwords)
    expected = ["The", start, " pump", one, " Pumpe", end, " (", start, "valve", two, " das Ventil", end, ") is"]
    assert marked.parts == expected
    assert marked.fills == {one: "Pumpe", two: "das Ventil"}
    assert [marked.begins(text) for text in ("Pumpe ist", "Die Pumpe", "das Ventil")] == [True, False, False]
    # But for the marks and the translations, the subwords are those of the text.
    [ids] = subwords.encode_parts([marked.parts])
    found = ids.tolist()
    for slot in (one, two):
        first = found.index(slot)
        del found[first : found.index(end, first) + 1]
    assert [piece for piece in found if piece != start] == subwords.encode(text).tolist()
    # Without enough slots, the last terms are left as they are.
    assert annotated(text, matches, slots[:1], subwords).parts == [*expected[:6], " (valve) is"]


def test_places_of_a_source_with_terms(subwords: Subwords) -> None:
    text = "The pump  and the pump."
    matches = [Match(4, 8, "pump", "Ventil"), Match(18, 22, "pump", "Pumpe")]
    slots = subwords.reserved_ids("slot")
    marked = annotated(text, matches, slots, subwords)
    joined = "".join(part for part in marked.parts if isinstance(part, str))
    assert len(marked.origin) == len(joined)
    [ids] = subwords.encode_parts([marked.parts])
    places = subwords.part_places(marked.parts)
    assert len(places) == len(ids)
    inside = False
    for number, place, piece in zip(ids.tolist(), places.tolist(), subwords.pieces(ids), strict=True):
        if number in slots or number in subwords.reserved_ids("term"):
            assert place == -1
            inside = number in slots
            continue
        assert joined[place:].startswith(piece.replace("▁", ""))
        origin = marked.origin[place]
        assert (origin in (4, 18)) if inside else text[origin] == joined[place]
    assert marked.places(subwords).tolist() == [-1 if place < 0 else marked.origin[place] for place in places]
    assert np.array_equal(subwords.part_places([text]), subwords.places(text))


def test_slots_take_the_place_of_spans() -> None:
    assert slotted("a 12 b 3", [(7, 8), (2, 4)], [40, 36]) == ["a ", 36, " b ", 40, ""]
    assert slotted("a", [], []) == ["a"]


def test_examples_of_each_kind(subwords: Subwords) -> None:
    """The text of an example without its symbols is the text of the pair; equal pairs give equal examples."""
    writer = ExampleWriter(ExamplesConfig(slots=0.3, terms=0.3), subwords, Associations(pairs))
    found = [(pair, example) for pair in pairs() if (example := writer.example(*pair))]
    again = ExampleWriter(ExamplesConfig(slots=0.3, terms=0.3), subwords, Associations(pairs))
    assert [each for pair in pairs() if (each := again.example(*pair))] == [example for _, example in found]
    counts = Counter(example.kind for _, example in found)
    assert all(120 < counts[kind] < 240 for kind in ("slot", "term"))
    slots, terms = subwords.reserved_ids("slot"), subwords.reserved_ids("term")
    used: set[int] = set()
    for (source, target), example in found:
        asked, given = ([part for part in side if part in slots] for side in (example.source, example.target))
        assert sorted(map(int, asked)) == sorted(map(int, given))
        assert len(set(asked)) == len(asked) > 0
        used |= set(map(int, asked))
        if example.kind == "term":
            # <term:0> term, slot, required translation <term:2>
            marks = [place for place, part in enumerate(example.source) if part == terms[0]]
            assert [part for part in example.source if part in terms] == [terms[0], terms[2]] * len(asked)
            fills = {example.source[place + 2]: str(example.source[place + 3]).strip() for place in marks}
            rest = [part for place, part in enumerate(example.source) if place - 3 not in marks]
            assert "".join(part for part in rest if isinstance(part, str)) == source
        else:
            values = [source, *(part for part in example.source if isinstance(part, str))]
            fills = dict(zip(asked, _between(values[0], values[1:]), strict=True))
        assert "".join(fills.get(part, str(part)) for part in example.target) == target
    assert used == set(slots)


STYLES = ("quoted", "title_case", "lower_case", "upper_case")


def test_what_is_made_of_a_block_depends_on_the_block_alone(subwords: Subwords) -> None:
    config = ExamplesConfig(slots=0.1, terms=0.1, **dict.fromkeys(STYLES, 0.1))
    words = Associations(pairs)
    # The counts of words go to other processes.
    writers = [ExampleWriter(config, subwords, each) for each in (words, pickle.loads(pickle.dumps(words)))]
    blocks = [pairs(200, number) for number in range(3)]

    def made(writer: ExampleWriter, number: int) -> list[Example | None]:
        writer.begin(number)
        return [writer.example(*pair) for pair in blocks[number]]

    first = {number: made(writers[0], number) for number in (0, 1, 2)}
    assert {number: made(writers[1], number) for number in (2, 0, 1)} == first
    kinds = Counter(example.kind for each in first.values() for example in each if example)
    assert set(kinds) == set(KINDS)
    assert all(30 < kinds[kind] < 100 for kind in KINDS)
    blocks[1] = blocks[0]
    assert made(writers[0], 1) != first[0]


@pytest.mark.parametrize(
    ("kind", "source", "target", "expected"),
    [
        ("quoted", "It is late. ", "Es ist spät.", ('"It is late."', '"Es ist spät."')),
        ("quoted", "“It is late.”", "Es ist spät.", None),
        ("quoted", "It is late.", "«Es ist spät.", None),
        ("quoted", " ", "Es", None),
        (
            "title_case",
            "the minister of finance said (again) no to élan",
            "le ministre",
            ("The Minister of Finance Said (Again) no to Élan", "le ministre"),
        ),
        ("lower_case", "The ÉLAN at www.Site.ORG is %NAME%", "Der", ("the élan at www.Site.ORG is %NAME%", "Der")),
        ("upper_case", "See {name} <b>now</b>", "groß jetzt", ("SEE {name} <b>NOW</b>", "GROSS JETZT")),
    ],
)
def test_styles(kind: str, source: str, target: str, expected: tuple[str, str] | None) -> None:
    assert in_style(kind, source, target) == expected


def _between(text: str, parts: list[str]) -> list[str]:
    """What is between `parts` in a text."""
    found = re.fullmatch("(.+)".join(map(re.escape, parts)), text)
    assert found
    return list(found.groups())


# ----------------------------------------------------------------------------------------------------- preparing


@pytest.mark.slow
def test_prepare_writes_examples(corpus: CorpusConfig) -> None:
    plain = prepare(corpus, lambda _: None)
    assert (plain.manifest["examples"], plain.manifest["symbols"]) == (dict.fromkeys(KINDS, 0), [])
    log: list[str] = []
    made = prepare(corpus_of(Path(corpus.root), examples=ExamplesConfig(slots=0.2, terms=0.2)), log.append)
    subwords = made.subwords()
    symbols = {kind: set(subwords.reserved_ids(kind)) for kind in ("slot", "term")}
    sides: Counter[tuple[str, str]] = Counter()
    for pair in range(len(made.parts()[0].shards)):
        source, target = (
            set(side(pair).tolist()) for side in (made.parts()[0].shards.source, made.parts()[0].shards.target)
        )
        for kind, ids in symbols.items():
            sides[kind, "source"] += bool(ids & source)
            sides[kind, "target"] += bool(ids & target)
        if not (source | target) & (symbols["slot"] | symbols["term"]):
            assert np.array_equal(made.parts()[0].shards.source(pair), plain.parts()[0].shards.source(pair))
            assert np.array_equal(made.parts()[0].shards.target(pair), plain.parts()[0].shards.target(pair))
    counts = made.manifest["examples"]
    assert made.manifest["symbols"] == ["slot", "term"]
    assert sides == Counter(
        {
            ("slot", "source"): counts["slot"] + counts["term"],
            ("slot", "target"): counts["slot"] + counts["term"],
            ("term", "source"): counts["term"],
        }
    )
    assert f"corpus: pairs rewritten: slot {counts['slot']}, term {counts['term']}" in log
    assert made.fingerprint != plain.fingerprint
    assert made.path != plain.path
    # Dev and test, and the vocabulary, are as without examples.
    assert made.manifest["files"] == plain.manifest["files"]


def test_an_example_that_is_too_long_is_left_out(corpus: CorpusConfig) -> None:
    plain = prepare(corpus, lambda _: None).parts()[0].shards
    longest = int(max(plain.source_lengths.max(), plain.target_lengths.max()))
    config = corpus_of(
        Path(corpus.root), examples=ExamplesConfig(terms=0.99), filters=FilterConfig(max_pieces=longest), name="short"
    )
    made = prepare(config, lambda _: None)
    assert made.manifest["pairs_kept"] == 600
    assert made.parts()[0].shards.source_lengths.max() <= longest
    assert 0 < made.manifest["examples"]["term"] < 590
