"""Symbols of a direction or a tag before each source: the model reads them, and no result shows them."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nmt.config import DecodingConfig, Direction, ModelConfig
from nmt.data.held_out import LONGEST_SIDE, encode_pairs
from nmt.data.symbols import Symbols
from nmt.decoding import lanes
from nmt.decoding.directions import Directions
from nmt.decoding.scoring import pair_log_probs
from nmt.decoding.search import length_penalty
from nmt.decoding.searcher import Searcher
from nmt.decoding.trace import Hypothesis
from nmt.decoding.translation import Options
from nmt.decoding.translator import Translator
from nmt.errors import DataError, UserError
from nmt.evaluation.perplexity import perplexity
from nmt.model.seq2seq import Seq2Seq
from nmt.parallel.mesh import World
from nmt.run import RunDirectory
from nmt.tokens import EOS

VOCABULARY = 40
CPU = torch.device("cpu")
OPTIONS = replace(Options.of(DecodingConfig()), beam_size=3, alpha=0.6, n_best=2, attention=True)
BOTH = Directions("both", (Direction("en", "de"), Direction("de", "en")), Symbols(("de", "en"), ("bt",)))


@pytest.fixture
def model(tiny_config: Callable[..., ModelConfig]) -> Seq2Seq:
    model = Seq2Seq(tiny_config(output_bias=True), VOCABULARY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.output.bias.data[EOS] = 2.0
    return model


def sources_of(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(4, VOCABULARY, length) for length in lengths]


def with_symbols(symbols: list[int], sources: list[np.ndarray]) -> list[np.ndarray]:
    return [np.array([*symbols, *source]) for source in sources]


def check_equal(found: list[list[Hypothesis]], expected: list[list[Hypothesis]], hidden: int) -> None:
    """`expected` has columns of attention for the first `hidden` positions."""
    for ours, theirs in zip(found, expected, strict=True):
        assert [each.tokens for each in ours] == [each.tokens for each in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-4)
            assert one.attention_TS == pytest.approx(other.attention_TS[:, hidden:], abs=1e-5)


@pytest.mark.parametrize("symbols", [[7], [7, 9]])
def test_a_search_reads_the_symbols_before_each_source(model: Seq2Seq, symbols: list[int]) -> None:
    """Without coverage and limits of length, the symbols are no more than further subwords."""
    options = replace(OPTIONS, beta=0.0, max_length=12, max_length_ratio=99.0)
    searcher, sources = Searcher([model], CPU, range(3)), sources_of(3, 9, 1, 8)
    found = searcher.search(sources, options, symbols=symbols)
    check_equal(found, searcher.search(with_symbols(symbols, sources), options), len(symbols))
    assert [each[0].tokens for each in found] != [each[0].tokens for each in searcher.search(sources, options)]
    assert [each[0].attention_TS.shape[1] for each in found] == [4, 10, 2, 9]


def test_coverage_is_for_the_text_alone(model: Seq2Seq) -> None:
    found = Searcher([model], CPU, range(3)).search(sources_of(3, 9, 1), replace(OPTIONS, beta=0.7), symbols=[7, 9])
    for each in found:
        for hypothesis in each:
            covered = hypothesis.attention_TS.sum(0)[:-1].clip(1e-6, 1.0)
            penalty = length_penalty(len(hypothesis.token_log_probs), OPTIONS.alpha)
            expected = hypothesis.log_prob / penalty + 0.7 * float(np.log(covered).sum())
            assert hypothesis.score == pytest.approx(expected, abs=1e-4)


def test_symbols_make_no_translation_longer(model: Seq2Seq) -> None:
    model.output.bias.data[EOS] = -99.0
    options = replace(OPTIONS, max_length_ratio=2.0)
    searcher = Searcher([model], CPU, range(3))
    for symbols in ([], [7], [7, 9]):
        found = searcher.search(sources_of(3, 9), options, symbols=symbols)
        assert [len(each[0].tokens) for each in found] == [16, 28]


def test_a_recorded_search_with_symbols_is_a_live_one(model: Seq2Seq, monkeypatch: pytest.MonkeyPatch) -> None:
    options, sources = replace(OPTIONS, beta=0.7), sources_of(*[3, 9, 30, 1] * 3)
    expected = Searcher([model], CPU, range(3)).search(sources, options, symbols=[7, 9])
    monkeypatch.setattr(lanes, "Graph", lambda work, _pool: type("Again", (), {"replay": staticmethod(work)}))
    recorded = Searcher([model], CPU, range(3))
    recorded.records = True
    check_equal(recorded.search(sources, options, symbols=[7, 9]), expected, 0)
    # The same lanes serve searches without symbols.
    check_equal(recorded.search(sources, options), Searcher([model], CPU, range(3)).search(sources, options), 0)


# ------------------------------------------------------------------------------------------------- translators


@pytest.fixture
def directory(run: Path) -> RunDirectory:
    return RunDirectory.existing(str(run))


@pytest.fixture
def translator(directory: RunDirectory) -> Translator:
    """A model that takes directions, although its training text had a single one."""
    loaded = Translator.load(directory, directory.config(["decoding.retry=false"]))
    loaded.directions = BOTH
    return loaded


def asked(translator: Translator, direction: str, **changes: Any) -> Options:
    return replace(translator.options, direction=Direction.of(direction), **changes)


def test_results_show_the_text_alone(translator: Translator, directory: RunDirectory) -> None:
    lines = directory.text("test")[0]
    options = asked(translator, "en-de", attention=True, alignments=True, tag="bt")
    for line, found in zip(lines, translator.translate(lines, options), strict=True):
        pieces = translator.subwords.pieces(translator.subwords.encode(line))
        assert found.source_pieces == (*pieces, "</s>")
        (best,) = found.hypotheses
        assert best.attention.shape == (len(best.pieces), len(pieces) + 1)
        assert all(0 <= source < len(line.split()) for source, _ in found.alignment)
        assert all(source < len(pieces) for source in best.attention[:, :-1].argmax(1))


@pytest.mark.parametrize("direction", ["en-de", "de-en"])
def test_scores_are_those_of_pairs_with_the_symbols(
    translator: Translator, directory: RunDirectory, direction: str
) -> None:
    lines = directory.text("test")[0]
    options = asked(translator, direction, markup=False)
    found = translator.translate(lines, options)
    prefix = BOTH.prefix(translator.subwords, Direction.of(direction))
    pairs = encode_pairs(translator.subwords, lines, [each.text for each in found], prefixes=[prefix] * len(lines))
    ids = [translator.searcher.search([source[1:]], options, symbols=prefix)[0][0].tokens for source in pairs.sources]
    scored = pair_log_probs(translator.models, pairs._replace(targets=[np.array(each) for each in ids]))
    for one, log_probs in zip(found, scored, strict=True):
        given = one.hypotheses[0].log_probs
        assert log_probs[: len(given)] == pytest.approx(given, abs=1e-4)


def test_a_direction_decides(translator: Translator) -> None:
    lines = ["the small dog runs", "a green meadow this morning"]
    there, back = (
        [each.score for each in translator.translate(lines, asked(translator, direction))]
        for direction in ("en-de", "de-en")
    )
    assert there != back
    assert translator.language(asked(translator, "de-en")) == "de"
    tagged = translator.translate(lines, asked(translator, "en-de", tag="bt"))
    assert [each.score for each in tagged] != there


def test_symbols_do_not_count_as_pieces(translator: Translator) -> None:
    line = "the dog runs. " * 6
    size = len(translator.subwords.encode(line))
    for limit, parts in ((size, 1), (size - 1, 6)):
        options = asked(translator, "en-de", max_source_pieces=limit)
        translator.longest_seen = 0
        assert translator.translate([line], options)[0].num_parts == parts


def test_what_a_model_does_not_have_is_refused(translator: Translator) -> None:
    with pytest.raises(UserError, match="2 directions: name one; it has: en-de, de-en"):
        translator.translate(["dog"])
    with pytest.raises(UserError, match="does not translate en-fr"):
        translator.translate(["dog"], asked(translator, "en-fr"))
    with pytest.raises(DataError, match="news is none of the tags"):
        translator.translate(["dog"], asked(translator, "en-de", tag="news"))
    with pytest.raises(ValueError, match="direction='en-de' is not a Direction"):
        replace(translator.options, direction="en-de")


def test_the_only_direction_need_not_be_named(directory: RunDirectory) -> None:
    translator = Translator.load(directory, directory.config())
    lines = directory.text("test")[0][:3]
    named = translator.translate(lines, asked(translator, "en-de"))
    assert named == translator.translate(lines)
    assert translator.source_symbols() == ()
    with pytest.raises(UserError, match="does not translate de-en"):
        translator.translate(lines, asked(translator, "de-en"))


# ------------------------------------------------------------------------------------------------------- pairs


def test_symbols_before_pairs(translator: Translator) -> None:
    sources, targets = ["the dog", "a " * 2 * LONGEST_SIDE], ["der Hund", "eine"]
    plain = encode_pairs(translator.subwords, sources, targets)
    prefixed = encode_pairs(translator.subwords, sources, targets, prefixes=[(70, 71), ()])
    assert prefixed.sources[0].tolist() == [70, 71, *plain.sources[0]]
    assert prefixed.sources[0].dtype == plain.sources[0].dtype
    assert prefixed.cut == plain.cut == [1]
    assert prefixed.sources[1].tolist() == plain.sources[1].tolist()
    with pytest.raises(ValueError, match="zip"):
        encode_pairs(translator.subwords, sources, targets, prefixes=[(70,)])


def test_perplexity_with_symbols_is_that_of_the_scores(translator: Translator, directory: RunDirectory) -> None:
    sources, targets, _ = directory.text("dev")
    prefixes = [BOTH.prefix(translator.subwords, BOTH.trained[place % 2]) for place in range(len(sources))]
    found = perplexity(translator.model, translator.subwords, sources, targets, 60, World(CPU), prefixes=prefixes)
    pairs = encode_pairs(translator.subwords, sources, targets, prefixes=prefixes)
    log_probs = [each for pair in pair_log_probs(translator.models, pairs) for each in pair]
    assert found.pieces == pytest.approx(math.exp(-sum(log_probs) / len(log_probs)), rel=1e-5)
    other = perplexity(translator.model, translator.subwords, sources, targets, 60, World(CPU))
    assert other.pieces != pytest.approx(found.pieces, rel=1e-4)
