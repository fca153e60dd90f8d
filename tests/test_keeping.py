"""Lines with tags and placeholders through a trained toy model: all of them are in its translations."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nmt.decoding.keeping import protect
from nmt.decoding.translator import Translator
from nmt.run import RunDirectory
from nmt.text.fields import find_fields
from nmt.text.markup import SLOTS
from nmt.text.terms import Terms
from tests.toy import Cli

Load = Callable[..., Translator]
LINES = [
    "<p>The small <b>dog</b> runs over {place}.</p>",
    "the dog %1$s<br/> looks at https://example.org/a?b=1",
    "{name}",
    "<b></b>",
    "<b>the dog",
    "the <i>green</i> meadow &amp; [X0X]",
    "<p>The dog runs. The dog looks <b>over the meadow. A dog</b> {n, plural, one {#} other {#s}}</p>",
]


@pytest.fixture
def load(run: Path) -> Load:
    directory = RunDirectory.existing(str(run))

    def build(**decoding: Any) -> Translator:
        config = directory.config()
        return Translator.load(directory, replace(config, decoding=replace(config.decoding, **decoding)))

    return build


def fields(text: str) -> list[str]:
    return sorted(field.text for field in find_fields(text) if field.text[0] != "&")


@pytest.mark.parametrize("decoding", [{}, {"max_source_pieces": 8}])
def test_all_fields_are_in_the_translation(load: Load, decoding: dict[str, Any]) -> None:
    translator = load(beam_size=3, **decoding)
    options = replace(translator.options, n_best=2, alignments=True)
    for line, found in zip(LINES, translator.translate(LINES, options), strict=True):
        for text in {found.text, *(each.text for each in found.hypotheses)}:
            assert fields(text) == fields(line), text
        assert not {flag.kind for flag in found.flags if "missing" in flag.detail} & {"placeholder", "url"}
        words = len(line.split()), len(found.text.split())
        assert all(source < words[0] and target < words[1] for source, target in found.alignment)
    assert translator.translate(LINES[2:4])[0].text == "{name}"


@pytest.mark.slow
def test_lines_without_fields_are_translated_as_ever(load: Load) -> None:
    translator = load(beam_size=2)
    plain = ["the small dog", "a < b > c", "5 % of a meadow", "{ the dog", ""]
    mixed = [LINES[0], *plain, *LINES[1:3]]
    without = translator.translate(plain, replace(translator.options, markup=False))
    assert translator.translate(plain) == without
    # Scores depend on the batch in their last digits.
    assert [each.text for each in translator.translate(mixed)[1:6]] == [each.text for each in without]
    as_text = translator.translate(LINES, replace(translator.options, markup=False))
    assert [each.text for each in as_text] != [each.text for each in translator.translate(LINES)]


def test_slots_replace_fields_if_the_model_knows_them(run: Path, load: Load) -> None:
    kept = protect(LINES[0], slots=True)
    assert kept is not None
    assert SLOTS[0] in kept.masked[0].text
    assert not set(SLOTS) & set("".join(each.text for each in kept.masked[1:]))
    known, decoding = load(), RunDirectory.existing(str(run)).config().decoding
    translator = Translator(known.model, known.subwords, decoding, known.device, symbols=["slot"])
    reading = translator.read(LINES)
    slots = translator.subwords.reserved_ids("slot")
    assert slots[0] in reading.sources[0]
    assert "".join(reading.unlearned).isprintable()
    for line, found in zip(LINES, translator.translate(LINES), strict=True):
        assert fields(found.text) == fields(line), found.text
        assert not set(found.text) & set(SLOTS)


def test_a_prefix_goes_before_fields(load: Load) -> None:
    translator = load(beam_size=2)
    (found,) = translator.translate(["the {name} dog"], prefixes={0: "der Hund"})
    assert found.text.startswith("der Hund")


def test_fields_through_the_command(run: Path, tmp_path: Path, cli: Cli) -> None:
    source = tmp_path / "in.txt"
    source.write_text("".join(f"{line}\n" for line in LINES))
    assert cli("translate", str(run), str(source)) == 0
    assert [fields(line) for line in cli.out.splitlines()] == [fields(line) for line in LINES]


def test_only_lines_that_need_attention_are_searched_with_it(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    translator = load(beam_size=2, retry=False)
    plain = ["the small dog", "a green meadow"]
    search = translator.searcher.search
    searched: list[tuple[int, bool]] = []

    def counted(sources: Any, options: Any, *others: Any) -> Any:
        searched.append((len(sources), options.attention))
        return search(sources, options, *others)

    monkeypatch.setattr(translator.searcher, "search", counted)
    told: list[float] = []
    translator.translate([plain[0], "the <b>dog</b>", plain[1]], progress=told.append)
    assert searched == [(2, False), (1, True)]
    assert told == sorted(told)
    assert told[-1] == 1.0
    table = Terms.of({"dog": "Hund"})
    searched.clear()
    translator.translate(plain, terms=[[table], [table]])
    assert searched == [(1, False), (1, True)]
    searched.clear()
    translator.translate(plain, replace(translator.options, alignments=True))
    assert searched == [(2, True)]
