"""Options of a search through the translator: what each one promises, and that no batch changes what it gives."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nmt
from nmt.batch import make_batch
from nmt.config import DecodingConfig
from nmt.config.checks import LEAST_TEMPERATURE
from nmt.decoding.scoring import score
from nmt.decoding.translation import TextHypothesis, Translation
from nmt.decoding.translator import Translator
from nmt.errors import UserError
from nmt.run import RunDirectory
from nmt.tokens import EOS

Load = Callable[..., Translator]

WAYS: list[dict[str, Any]] = [
    {"beam_size": 1},
    {"beam_size": 4, "prune_margin": 3.0},
    {"no_repeat_ngram": 2, "beam_size": 3},
    {"min_length": 12, "beam_size": 3},
    {"max_length": 4},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "no_repeat_ngram": 1, "max_length": 8},
]


@pytest.fixture
def run(run: Path) -> RunDirectory:
    return RunDirectory.existing(str(run))


@pytest.fixture
def load(run: RunDirectory) -> Load:
    def build(**decoding: Any) -> Translator:
        config = run.config()
        # A hardly trained model ends nothing, and takes long.
        changes = {"max_length": 14} | decoding
        return Translator.load(run, replace(config, decoding=replace(config.decoding, **changes)))

    return build


@pytest.fixture
def lines(run: RunDirectory) -> list[str]:
    """One has two parts, one is blank, and two are the same."""
    sources = run.text("test")[0]
    return [*sources[:4], "", "The dog. " + "the dog " * 8, *sources[:2]]


def whole(translations: list[Translation]) -> list[TextHypothesis]:
    """What was found for lines that are not in parts, which each have a length of their own."""
    return [each for one in translations if one.num_parts == 1 for each in one.hypotheses]


def found_in(translations: list[Translation]) -> list[list[tuple[str, tuple[str, ...]]]]:
    return [[(each.text, each.pieces) for each in one.hypotheses] for one in translations]


def teacher_forced(model: nmt.Model, line: str, pieces: tuple[str, ...]) -> list[float]:
    """log P of these subwords, from one pass over the whole target."""
    translator = model._translator
    processor = translator.subwords._processor
    ids = [processor.piece_to_id(piece) for piece in pieces]
    source = translator.subwords.encode(line)
    ended = ids[-1] == EOS
    batch = make_batch(np.arange(1), [source], [np.array(ids[:-1] if ended else ids)])
    with torch.inference_mode():
        log_probs = score(translator.model, batch).log_prob_TB[:, 0].tolist()
    return log_probs if ended else log_probs[:-1]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_batches_and_order_do_not_matter(load: Load, lines: list[str], way: dict[str, Any]) -> None:
    translator = load(**way)
    options = replace(translator.options, n_best=min(3, translator.options.beam_size))
    together = found_in(translator.translate(lines, options))
    assert found_in(translator.translate(lines, replace(options, batch_tokens=50))) == together
    assert [found_in(translator.translate([line], options))[0] for line in lines[:3]] == together[:3]
    assert found_in(translator.translate(lines[::-1], options)) == together[::-1]
    # Equal lines are translated in the same way, wherever they are.
    assert together[-2:] == together[:2]


@pytest.mark.parametrize("way", WAYS)
def test_log_probabilities_are_those_of_the_given_translation(run: RunDirectory, way: dict[str, Any]) -> None:
    """Whatever chose the subwords: the score is that of `Model.score`, to 1e-5 for each subword."""
    model = nmt.load(run.path)
    way = {"max_length": 14} | way
    for line in run.text("test")[0][:2]:
        for prefix in ("", "der Hund"):
            found = model.translate(line, prefix=prefix, **{"n_best": min(way.get("beam_size", 3), 3), **way})
            for each in found.hypotheses:
                assert each.text.startswith(prefix)
                assert each.log_probs == pytest.approx(teacher_forced(model, line, each.pieces), abs=1e-5)
                length = (5 + len(each.pieces)) / 6
                assert sum(each.log_probs) / length**0.2 >= each.score - 1e-5  # as cp is at most 0


@pytest.mark.parametrize("way", [{"beam_size": 3}, {"temperature": 1.0}])
def test_least_and_greatest_lengths(load: Load, lines: list[str], way: dict[str, Any]) -> None:
    translator = load(**way)
    for least, most in ((0, 1), (0, 3), (9, 9), (6, 0), (40, 0)):
        options = replace(translator.options, min_length=least, max_length=most)
        for each in whole(translator.translate(lines[:3], options)):
            assert least <= len(each.pieces) <= (most or math.inf)
            assert each.finished == (each.pieces[-1] == "</s>")


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_run_of_subwords_occurs_twice(load: Load, lines: list[str], n: int) -> None:
    def repeated(no_repeat: int) -> int:
        options = replace(translator.options, no_repeat_ngram=no_repeat)
        runs = [
            [each.pieces[at : at + n] for at in range(len(each.pieces) - n + 1)]
            for each in whole(translator.translate(lines, options))
        ]
        return sum(len(set(each)) < len(each) for each in runs)

    translator = load(beam_size=2, min_length=25, max_length=25)
    assert repeated(0) > 0
    assert repeated(n) == 0


def test_draws_follow_the_seed_and_the_line(load: Load) -> None:
    translator = load(temperature=1.5)
    drawn = [
        found_in(translator.translate(["the small dog", "a cat"], replace(translator.options, seed=seed, n_best=5)))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({text for text, _ in drawn[0][0]}) > 1
    # More draws are the same ones, and more: each has its own stream.
    more = found_in(translator.translate(["the small dog"], replace(translator.options, n_best=9)))
    assert set(drawn[0][0]) <= set(more[0])
    found = translator.translate(["the small dog"], replace(translator.options, n_best=9))
    scores = [each.score for each in found[0].hypotheses]
    assert len(scores) == 9
    assert scores == sorted(scores, reverse=True)
    # Almost no temperature is greedy search.
    cold = translator.translate(["the small dog"], replace(translator.options, temperature=LEAST_TEMPERATURE))
    one = translator.translate(["the small dog"], replace(translator.options, temperature=1.0, top_k=1))
    greedy = load(beam_size=1).translate(["the small dog"])
    assert found_in(cold) == found_in(one) == found_in(greedy)


def test_prefixes(load: Load) -> None:
    """Each line has its own; a long line's translation begins with it, too, and what follows is the model's choice."""
    translator = load(beam_size=3, max_source_pieces=8)
    lines = ["the small dog", "a cat", "The dog. A cat! The small dog runs over a green meadow.", "", "the dog"]
    prefixes = {0: "der Hund läuft", 2: "xyz, 14", 4: "am Morgen"}
    for options in (translator.options, replace(translator.options, temperature=1.0, n_best=4)):
        found = translator.translate(lines, options, prefixes=prefixes)
        for place, prefix in prefixes.items():
            assert all(each.text.startswith(prefix) for each in found[place].hypotheses)
        plain = translator.translate(lines, options)
        assert [found[place] for place in (1, 3)] == [plain[place] for place in (1, 3)]
    # The prefix that the search would have chosen anyway changes nothing.
    best = translator.translate(["the small dog"])[0]
    assert translator.translate(["the small dog"], prefixes={0: best.text})[0].text.startswith(best.text)
    # A longer prefix than the greatest length is kept whole.
    short = translator.translate(["a"], replace(translator.options, max_length=2), prefixes={0: "der kleine Hund"})
    assert short[0].text.startswith("der kleine Hund")


@pytest.mark.parametrize(
    ("line", "prefix", "message"),
    [
        ("the dog", "der ", "cannot be kept exactly"),
        ("the dog", "der\nHund", "cannot be kept exactly"),
        ("the dog", " der", r"prefix ' der' cannot be kept exactly: the subwords of the vocabulary make it 'der'"),
        ("...", "der", r"'...' has nothing to translate"),
        ("", "der", "has nothing to translate"),
    ],
)
def test_a_prefix_that_cannot_be_kept_is_refused(load: Load, line: str, prefix: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load().translate(["a", line], prefixes={1: prefix})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_length": -1}, "min_length=-1 must be at least 0"),
        ({"min_length": 5, "max_length": 4}, r"max_length=4 must be 0 \(any\) or at least .*min_length=5"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram=-1 must be at least 0"),
        ({"prune_margin": -0.5}, "prune_margin=-0.5 must be at least 0"),
        ({"prune_margin": math.nan}, "prune_margin=nan must be at least 0"),
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"temperature": 1e-9}, r"temperature=1e-09 must be 0 \(no sampling\) or at least 0.01"),
        ({"temperature": math.inf}, "temperature=inf must be at most 1000"),
        ({"top_k": 5}, "top_k=5 is for sampling: set .*temperature=1 too, or .*top_k=0"),
        ({"top_p": 0.5}, "top_p=0.5 is for sampling"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0 must be greater than 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5 must be at most 1"),
        ({"temperature": 1.0, "top_k": -1}, "top_k=-1 must be at least 0"),
        ({"min_length": 10_001}, "min_length=10001 must be at most 10000"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"seed": 2**63}, "seed=9223372036854775808 must be at most"),
    ],
)
def test_wrong_values_name_the_setting_or_the_option(load: Load, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^decoding.{message}"):
        DecodingConfig(**changes)
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(load().options, **changes)


def test_the_interface_checks_prefixes(run: RunDirectory) -> None:
    model = nmt.load(run.path)
    for text, prefix, message in (
        ("a", ["b"], "must both be a str, or both a list"),
        (["a"], "b", "must both be a str, or both a list"),
        (["a", "b"], ["c"], "1 prefixes for 2 lines: give one each"),
        (["a"], [1], r"prefix\[0\] is an int"),
        ("a", 3, "prefix is an int"),
    ):
        with pytest.raises(nmt.UserError, match=message):
            model.translate(text, prefix=prefix)
    both = model.translate(["the dog", "a cat"], prefix=["am Morgen", ""])
    assert both[0].text.startswith("am Morgen")
    assert both[1].text == model.translate("a cat").text
    with pytest.raises(nmt.UserError, match="temperature='warm' is not a number"):
        model.translate("a", temperature="warm")
    with pytest.raises(nmt.UserError, match=r"top_k=1\.5 is not a whole number"):
        model.translate("a", temperature=1.0, top_k=1.5)
