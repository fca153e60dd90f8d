"""Which words a translation's words come from: against loops, by hand, and over the parts of a line."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nmt.decoding.alignment import Attended, Block, Span, links, pharaoh, soft_links, weights, words
from nmt.decoding.translation import TextHypothesis, Translation
from nmt.decoding.translator import Translator
from nmt.run import RunDirectory
from nmt.streams.alignments import AlignmentLines
from nmt.streams.lines import Piece
from tests.toy import Cli

Load = Callable[..., Translator]


@pytest.fixture
def load(run: Path) -> Load:
    directory = RunDirectory.existing(str(run))

    def build(**decoding: Any) -> Translator:
        config = directory.config()
        return Translator.load(directory, replace(config, decoding=replace(config.decoding, **decoding)))

    return build


def unit_at(place: int, units: list[Span]) -> int:
    return next((number for number, (_, end) in enumerate(units) if 0 <= place < end), -1)


def dense(attended: Attended, source: list[Span], target: list[Span]) -> np.ndarray:
    """The weights by loops; rows are target units."""
    found = np.zeros((len(target), len(source)))
    for block in attended.blocks:
        for row, to in enumerate(block.target_T.tolist()):
            for column, come in enumerate(block.source_S.tolist()):
                if unit_at(to, target) >= 0 and unit_at(come, source) >= 0:
                    found[unit_at(to, target), unit_at(come, source)] += block.attention_TS[row, column]
    return found / np.maximum(found.sum(1, keepdims=True), 1e-30)


def random_attention(seed: int) -> Attended:
    """Two parts with words of one to three subwords, and an end of the sentence each; some weights are 0."""
    generator = np.random.default_rng(seed)
    sides: list[str] = []
    places: list[list[np.ndarray]] = []
    for _ in range(2):
        text, parts = "", []
        for _ in range(2):
            at: list[int] = []
            for _ in range(generator.integers(1, 6)):
                text += " " * generator.integers(1, 3)
                for _ in range(generator.integers(1, 4)):
                    at.append(len(text))
                    text += "ab"
            parts.append(np.array([*at, -1]))
        sides.append(text)
        places.append(parts)
    blocks = []
    for source_S, target_T in zip(*places, strict=True):
        attention_TS = generator.random((len(target_T), len(source_S))) ** 4
        blocks.append(Block(source_S, target_T, attention_TS * (attention_TS > 0.05)))
    return Attended(sides[0], sides[1], tuple(blocks))


@pytest.mark.parametrize("seed", range(20))
def test_weights_and_links_are_those_of_loops(seed: int) -> None:
    attended = random_attention(seed)
    source, target = words(attended.source), words(attended.target)
    wanted = dense(attended, source, target)
    found = weights(attended, source, target)
    np.testing.assert_allclose(found.from_units(0, len(source)), wanted.sum(1), atol=1e-9)
    for first in range(len(source)):
        np.testing.assert_allclose(found.from_units(first, first + 2), wanted[:, first : first + 2].sum(1), atol=1e-9)
    linked = [
        (int(row.argmax()), place)
        for place, row in enumerate(wanted)
        if row.max() > 0 and row.max() >= 0.7 * wanted[:, row.argmax()].max()
    ]
    assert links(found) == tuple(linked)
    soft = {(come, to): weight for come, to, weight in soft_links(found)}
    assert soft.keys() == {(come, to) for to, come in np.argwhere(wanted >= 0.01).tolist()}
    assert all(weight == pytest.approx(wanted[to, come], abs=1e-4) for (come, to), weight in soft.items())


def test_a_word_that_nothing_calls_for_has_no_link() -> None:
    """Both target words look at the second source word, but the first of them looks elsewhere, too."""
    attention_TS = np.array([[0.45, 0.55], [0.05, 0.95]])
    found = weights(
        Attended("a b", "c d", (Block(np.array([0, 2]), np.array([0, 2]), attention_TS),)), words("a b"), words("c d")
    )
    assert links(found) == ((1, 1),)
    assert pharaoh(links(found)) == "1-1"
    assert soft_links(found) == ((0, 0, 0.45), (1, 0, 0.55), (0, 1, 0.05), (1, 1, 0.95))


def test_nothing_to_align() -> None:
    empty = weights(Attended("", "", ()), [], [])
    assert links(empty) == soft_links(empty) == ()
    assert len(empty.from_units(0, 5)) == 0
    only_ends = Block(np.array([-1]), np.array([-1]), np.ones((1, 1)))
    assert links(weights(Attended("a", "b", (only_ends,)), words("a"), words("b"))) == ()


@pytest.mark.parametrize("text", ["the small dog", "  the \u3000 dog ", "the\u00a0dog 東京 meadow.", "𝔘🚂 ﬁne…", ""])
def test_places_of_subwords(load: Load, text: str) -> None:
    """Each word begins with a subword, and no subword begins in a blank, except after the last word."""
    subwords = load().subwords
    ids = subwords.encode(text)
    shown = subwords.decode(ids)
    for found, there in ((subwords.places(text), text), (subwords.decoded_places(ids), shown)):
        assert len(found) == len(ids)
        assert (np.diff(found) >= 0).all()
        assert all(not there[place : place + 1].isspace() for place in found)
        assert {begin for begin, _ in words(there)} <= set(found.tolist())


def test_the_alignment_of_a_line_is_that_of_its_parts(load: Load) -> None:
    translator = load(max_source_pieces=8)
    options = replace(translator.options, alignments=True)
    parts = ["The small dog runs. ", "... ", "A cat! ", " The dog runs over a meadow."]
    (whole,) = translator.translate(["".join(parts)], options, long={0})
    alone = translator.translate(parts, options)
    assert whole.num_parts > len(parts) - 1
    wanted, source, target = [], 0, 0
    for part, found in zip(parts, alone, strict=True):
        wanted += [(come + source, to + target) for come, to in found.alignment]
        source, target = source + len(words(part)), target + len(words(found.text))
    assert whole.alignment == tuple(wanted)
    assert whole.alignment
    weight_of = np.zeros(target)
    for come, to, weight in whole.soft_alignment:
        assert come < source
        weight_of[to] += weight
    assert weight_of[[to for _, to in whole.alignment]] == pytest.approx(1.0, abs=0.1)


def test_alignments_change_nothing_else(load: Load) -> None:
    translator = load(beam_size=3)
    lines = ["the small dog", "", "...", "a meadow and a dog"]
    plain = translator.translate(lines, replace(translator.options, n_best=2))
    found = translator.translate(lines, replace(translator.options, n_best=2, alignments=True))
    assert all(each.alignment == each.soft_alignment == () for each in (*plain, *found[1:3]))
    assert all(each.alignment for each in (*found[0].hypotheses, *found[3].hypotheses))

    def without(each: Translation) -> Translation:
        kept = tuple(replace(one, alignment=(), soft_alignment=()) for one in each.hypotheses)
        return replace(each, hypotheses=kept)

    assert [without(each) for each in found] == plain


def aligned(text: str, *pairs: Span) -> Translation:
    return Translation(text, hypotheses=(TextHypothesis(text, 0.0, True, (), (), alignment=pairs),))


def test_lines_of_a_file() -> None:
    lines = AlignmentLines()
    assert lines.add([Piece("a b", True, True)], [aligned("c d", (0, 1), (1, 0))]) == "0-1 1-0\n"
    assert lines.add([Piece("", True, True)], [Translation("")]) == "\n"
    # A line in pieces: words are counted on, and a word that is cut in two is one word.
    assert lines.add([Piece("a b ", True, False)], [aligned("c", (1, 0))]) == "1-0"
    assert lines.add([Piece("... ", False, False)], [Translation("... ")]) == ""
    assert lines.add([Piece("dd", False, False)], [aligned("ee", (0, 0))]) == " 3-2"
    assert lines.add([Piece("dd x", False, True)], [aligned("ee y", (0, 0), (1, 1))]) == " 3-2 4-3\n"
    assert lines.add([Piece("a", True, True)], [aligned("b", (0, 0))]) == "0-0\n"


def test_alignments_through_the_command(run: Path, tmp_path: Path, cli: Cli) -> None:
    source, pairs, records = (tmp_path / name for name in ("in.txt", "pairs.gz", "out.jsonl"))
    source.write_text("the small dog\n\n...\na meadow\n")
    assert cli("translate", str(run), str(source), "--alignments", str(pairs)) == 0
    plain = cli.out
    lines = gzip.decompress(pairs.read_bytes()).decode().splitlines()
    assert cli("translate", str(run), str(source), "-o", str(records), "--soft-alignments") == 0
    found = [json.loads(line) for line in records.read_text().splitlines()]
    assert [each["translation"] for each in found] == plain.splitlines()
    assert lines == [pharaoh(each["alignment"]) for each in found]
    assert lines[0]
    assert lines[1:3] == ["", ""]
    assert all(len(each["soft_alignment"]) >= len(each["alignment"]) for each in found)
    out = str(tmp_path / "out.txt")
    cli.refuses(2, "translate", str(run), str(source), "-o", out, "--alignments", out, says=("is the output",))
