"""Terms in a translator, on the command line and in Python: every required translation is in the text or flagged."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nmt
from nmt.decoding.loading import known_symbols
from nmt.decoding.trace import Hypothesis
from nmt.decoding.translation import Translation
from nmt.decoding.translator import Translator
from nmt.errors import CheckpointError, DataError
from nmt.run import RunDirectory
from nmt.text.terms import Terms, find_terms, missing
from tests.toy import Cli

Load = Callable[..., Translator]
TABLE = Terms.of({"dog": "Katze", "green meadow": "Weide", "looks": None, "morning": "Morgen"})


@pytest.fixture
def load(run: Path) -> Load:
    directory = RunDirectory.existing(str(run))

    def build(symbols: tuple[str, ...] = (), **decoding: Any) -> Translator:
        config = directory.config()
        found = Translator.load(directory, replace(config, decoding=replace(config.decoding, **decoding)))
        found.symbols = frozenset(symbols)
        found.longest_seen = 0
        return found

    return build


@pytest.fixture
def lines(run: Path) -> list[str]:
    return [*RunDirectory.existing(str(run)).text("test")[0], "", "the dog 狗", "the dog. " * 30]


def check(lines: list[str], found: list[Translation]) -> None:
    """Each term is in the text, or its absence is flagged; what was put in is flagged, too."""
    for line, translation in zip(lines, found, strict=True):
        flags = [flag for flag in translation.flags if flag.kind == "term"]
        absent = [flag for flag in flags if flag.detail.endswith("is missing")]
        assert len(absent) >= len(missing(find_terms(line, [TABLE]), translation.text))
        assert all(
            flag.detail.split(": ")[1].split(" replaces ")[0] in translation.text for flag in set(flags) - set(absent)
        )


@pytest.mark.slow
@pytest.mark.parametrize("symbols", [(), ("term",)])
def test_terms_are_in_the_text_or_flagged(load: Load, lines: list[str], symbols: tuple[str, ...]) -> None:
    translator = load(symbols, beam_size=2)
    found = translator.translate(lines, terms=[[TABLE]] * len(lines))
    check(lines, found)
    assert any(" replaces " in flag.detail for each in found for flag in each.flags)
    for each in found:
        assert not each.hypotheses or each.hypotheses[0].text == each.text
    # Lines without a term are as ever.
    plain = translator.translate(lines)
    for line, one, other in zip(lines, found, plain, strict=True):
        if not find_terms(line, [TABLE]):
            assert (one.text, one.flags) == (other.text, other.flags)
            assert one.score == pytest.approx(other.score, abs=1e-4)


def test_a_model_that_has_learned_symbols_reads_them(load: Load) -> None:
    text = "the small dog"
    translator = load(("term",))
    reading = translator.read([text], terms=[[TABLE]])
    start, _, end, _ = translator.subwords.reserved_ids("term")
    slot = translator.subwords.symbol("slot", 8)
    assert [piece for piece in reading.sources[0].tolist() if piece in (start, slot, end)] == [start, slot, end]
    plain = load().read([text], terms=[[TABLE]]).sources[0]
    assert plain.tolist() == translator.subwords.encode(text).tolist()
    # A text that its marks make too long is read without them.
    short = load(("term",), max_source_pieces=len(plain)).read([text], terms=[[TABLE]])
    assert np.array_equal(short.sources[0], plain)
    assert short.terms == reading.terms


@pytest.mark.slow
@pytest.mark.parametrize("symbols", [(), ("term",)])
def test_alignments_are_those_of_the_text_with_terms(load: Load, lines: list[str], symbols: tuple[str, ...]) -> None:
    translator = load(symbols)
    options = replace(translator.options, alignments=True)
    for line, each in zip(lines, translator.translate(lines, options, terms=[[TABLE]] * len(lines)), strict=True):
        assert all(0 <= source < len(line.split()) for source, _ in each.alignment)
        assert all(0 <= target < len(each.text.split()) for _, target in each.alignment)
        for flag in each.flags:
            put, _, old = flag.detail.split(": ")[-1].partition(" replaces ")
            if old and len(each.flags) == 1 and line.split().count("dog") == 1 and flag.detail.startswith("dog"):
                [place] = [number for number, word in enumerate(each.text.split()) if put in word]
                weights = {source: weight for source, target, weight in each.soft_alignment if target == place}
                assert line.split().index("dog") in weights


def test_slots_of_one_sentence_change_no_other(load: Load) -> None:
    """Only slots of a source may be in its translation, whatever it is searched with."""
    translator = load(beam_size=3)
    subwords, slots = translator.subwords, translator.subwords.reserved_ids("slot")
    sources = subwords.encode_parts([["the dog"], ["the ", slots[3], " looks ", slots[5]], ["a small meadow"]])
    # Slots become likely.
    with torch.no_grad():
        weight = translator.model.get_parameter(
            next(n for n, p in translator.model.named_parameters() if len(p) == subwords.size)
        )
        weight[list(slots)] *= 5.0
    found = translator.searcher.search(sources, translator.options)
    for source, hypotheses in zip(sources, found, strict=True):
        assert set(hypotheses[0].tokens) & set(slots) <= set(source.tolist())
        assert translator.searcher.search([source], translator.options)[0][0].tokens == hypotheses[0].tokens


@pytest.mark.parametrize(
    ("target", "tokens", "text"),
    [
        ("Katze", ["eine ", 8, " am Morgen"], "eine Katze am Morgen"),
        ("katze", [8, " am Morgen"], "Katze am Morgen"),
        (None, ["", 8, ""], "dog"),
        ("Katze", ["eine Wiese"], "eine Wiese"),
    ],
)
def test_slots_become_the_required_translations(
    load: Load, monkeypatch: pytest.MonkeyPatch, target: str | None, tokens: list[str | int], text: str
) -> None:
    translator = load(("term",))
    slots = translator.subwords.reserved_ids("slot")
    parts = [slots[part] if isinstance(part, int) else part for part in tokens]
    ids = translator.subwords.encode_parts([parts])[0].tolist()
    search = translator.searcher.search

    def replaced(*asked: Any) -> list[list[Hypothesis]]:
        best = search(*asked)[0][0]
        attention_TS = np.zeros((len(ids) + best.finished, len(asked[0][0]) + 1), dtype=np.float32)
        return [[best._replace(tokens=ids, attention_TS=attention_TS)]]

    monkeypatch.setattr(translator.searcher, "search", replaced)
    [found] = translator.translate(["Dog this morning"], terms=[[Terms.of({"dog": target, "Dog": target})]])
    assert found.text == text.replace("dog", "Dog")
    flags = [flag.detail for flag in found.flags if flag.kind == "term"]
    assert flags == (["Dog: Katze is missing"] if text == "eine Wiese" else [])


def test_fields_are_no_terms(load: Load) -> None:
    translator = load()
    options = replace(translator.options, markup=False)
    reading = translator.read(["<dog> dog http://dog.example", "dog"], options, terms=[[TABLE], []])
    assert {place: [match.start for match in found] for place, found in reading.terms.items()} == {0: [6]}


def test_a_text_that_is_not_translated_is_flagged(load: Load) -> None:
    [found] = load().translate(["狗"], terms=[[Terms.of({"狗": "Hund"})]])
    assert (found.text, [flag.detail for flag in found.flags if flag.kind == "term"]) == ("狗", ["狗: Hund is missing"])


def test_symbols_in_corpus_json() -> None:
    assert known_symbols({}) == frozenset()
    assert known_symbols({"symbols": ["slot", "term"]}) == {"slot", "term"}
    for damaged in ("term", [1], ["no"], {"term": 1}, [["term"]]):
        with pytest.raises(CheckpointError, match="symbols"):
            known_symbols({"symbols": damaged})


def test_in_python(run: Path, tmp_path: Path) -> None:
    model = nmt.load(run)
    (tmp_path / "t.tsv").write_text("dog\tKatze\n")
    by_path = model.translate("the dog", terms=tmp_path / "t.tsv")
    assert by_path == model.translate(["the dog"], terms={"dog": "Katze"})[0]
    assert "Katze" in by_path.text or by_path.flags
    assert model.translate("the dog", terms={}) == model.translate("the dog")
    with pytest.raises(DataError, match="the source term is empty"):
        model.translate("the dog", terms={"": "x"})
    with pytest.raises(DataError, match="terms is not a table"):
        model.translate("the dog", terms=["dog"])


def test_on_the_command_line(run: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "t.csv").write_text("dog,Katze\n")
    (tmp_path / "in.jsonl").write_text(
        '{"text": "the dog", "id": 1}\n{"text": "the dog", "terms": {"dog": "Maus"}}\n{"text": "the meadow"}\n'
    )
    paths = [str(run), str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    assert cli("translate", *paths, "--terms", str(tmp_path / "t.csv")) == 0
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for result, term in zip(results, ("Katze", "Maus"), strict=False):
        assert any(term in flag["detail"] for flag in result["flags"])
    assert results[1]["terms"] == {"dog": "Maus"}
    assert all(flag["kind"] != "term" for flag in results[2]["flags"])


def test_mistakes_on_the_command_line(run: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "t.tsv").write_text("dog Katze\n")
    (tmp_path / "in.jsonl").write_text('{"text": "the dog", "terms": {"dog": 3}}\n')
    cli.refuses(3, "translate", str(run), "--terms", str(tmp_path / "t.tsv"), says=("t.tsv line 1 has 1 column",))
    cli.refuses(3, "translate", str(run), "--terms", str(tmp_path / "no.tsv"), says=("no.tsv does not exist",))
    says = ("in.jsonl line 1: terms['dog'] is 3",)
    cli.refuses(3, "translate", str(run), str(tmp_path / "in.jsonl"), says=says)


def test_other_terms_are_not_resumed(run: Path, tmp_path: Path, cli: Cli) -> None:
    table, source = tmp_path / "t.tsv", tmp_path / "in.jsonl"
    table.write_text("dog\tKatze\n")
    source.write_text('{"text": "a"}\n' * 200 + "no object\n")
    command = ("translate", str(run), str(source), "-o", str(tmp_path / "out.jsonl"), "--resume", "--terms", str(table))
    command += ("decoding.beam_size=1", "decoding.max_length=3")
    assert cli(*command) == 3
    assert "the same command resumes" in cli.err
    table.write_text("dog\tMaus\n")
    cli.refuses(2, *command, says=("out.jsonl.part was begun with --terms=",))
    table.write_text("dog\tKatze\n")
    source.write_text('{"text": "a"}\n' * 200)
    assert cli(*command) == 0, cli.err
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 200
