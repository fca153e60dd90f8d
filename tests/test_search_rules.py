"""The search with prefixes, repetitions forbidden, margins and draws, against searches written with lists."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from nmt.decoding.rules import Rules
from nmt.decoding.sampling import Sampling, stream_of
from nmt.decoding.search import BeamSettings
from nmt.decoding.trace import Hypothesis
from nmt.tokens import BOS, EOS, NUM_SPECIAL, PAD
from tests.test_search import (
    FORBIDDEN,
    VOCAB,
    A,
    B,
    Prefix,
    Row,
    complete_outputs,
    finish_at_different_times,
    output_of,
    random_row,
    rules_of,
    score_of,
    translate_all,
)

ALPHA, BETA = 0.6, 0.3


def with_prefixes(rules: Rules, prefixes: Sequence[Prefix]) -> Rules:
    longest = max(map(len, prefixes))
    return rules._replace(prefix_BP=torch.tensor([[*each, *[PAD] * (longest - len(each))] for each in prefixes]))


def repeats_itself(output: Prefix, n: int) -> bool:
    runs = [output[start : start + n] for start in range(len(output) - n + 1)]
    return len(set(runs)) < len(runs)


@pytest.mark.parametrize("beam", [1, 2, 110])
@pytest.mark.parametrize("seed", range(3))
def test_a_translation_begins_with_its_prefix(seed: int, beam: int) -> None:
    """The best of all outputs that begin with it; its subwords are scored as if they had been chosen."""
    prefixes: list[Prefix] = [(A, B, A), (), (B,), (A, A)]
    wanted, max_lengths, row = [[True] * 3] * 4, [5, 3, 3, 3], random_row(seed)
    rules = with_prefixes(rules_of(max_lengths), prefixes)
    found = translate_all(row, wanted, rules, BeamSettings(beam, ALPHA, BETA, keep=beam))
    for b, prefix in enumerate(prefixes):
        for each in found[b]:
            assert tuple(each.tokens[: len(prefix)]) == prefix
            assert each.score == pytest.approx(score_of(row, b, output_of(each), wanted[b], ALPHA, BETA), abs=1e-4)
        if beam > 100:
            outputs = [each for each in complete_outputs(max_lengths[b]) if each[: len(prefix)] == prefix]
            scores = {each: score_of(row, b, each, wanted[b], ALPHA, BETA) for each in outputs}
            assert [output_of(each) for each in found[b]] == sorted(scores, key=lambda each: -scores[each])


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("seed", range(2))
def test_no_run_occurs_twice(seed: int, n: int) -> None:
    """All outputs without one are found, and no other; the histories follow their hypotheses through the beam."""
    wanted, max_lengths, row = [[True] * 3] * 2, [5, 3], random_row(seed)
    rules = rules_of(max_lengths)._replace(no_repeat=n)
    found = translate_all(row, wanted, rules, BeamSettings(330, ALPHA, BETA, keep=330))
    for b, longest in enumerate(max_lengths):
        outputs = {each for each in complete_outputs(longest) if not repeats_itself(each[:-1], n)}
        assert outputs < set(complete_outputs(longest)) or n > longest - 2
        assert {output_of(each) for each in found[b]} == outputs


def test_a_prefix_may_repeat_itself() -> None:
    rules = with_prefixes(rules_of([6])._replace(no_repeat=1), [(A, A, A)])
    (found,) = translate_all(random_row(0), [[True] * 3], rules, BeamSettings(2, ALPHA, BETA))
    assert found[0].tokens[:3] == [A, A, A]
    assert A not in found[0].tokens[3:]


def plain_search(row: Row, wanted: list[bool], longest: int, settings: BeamSettings) -> list[tuple[Prefix, float]]:
    """(output, score) of the `keep` best, from lists of all candidates."""

    def total(output: Prefix) -> float:
        return score_of(row, 0, output, wanted, 0.0, 0.0)

    beam: list[Prefix] = [()]
    finished: dict[Prefix, float] = {}
    for length in range(1, longest + 1):
        tokens = [EOS, *range(NUM_SPECIAL, VOCAB)]
        candidates = sorted(((*each, token) for each in beam for token in tokens), key=lambda each: -total(each))
        candidates = candidates[: 2 * settings.beam_size]
        candidates = [each for each in candidates if total(each) >= total(candidates[0]) - settings.margin]
        for each in candidates[: settings.beam_size]:
            if each[-1] == EOS:
                finished[each] = score_of(row, 0, each, wanted, settings.alpha, settings.beta)
        best = max(finished.values(), default=-math.inf)
        penalty = (5 + length) ** settings.alpha / 6**settings.alpha
        going = [each for each in candidates if each[-1] != EOS and total(each) / penalty >= best - settings.margin]
        beam = going[: settings.beam_size]
        if not beam or len(finished) >= settings.beam_size:
            break
    ranked = sorted(finished.items(), key=lambda each: -each[1])[: settings.keep]
    return [each for each in ranked if each[1] >= ranked[0][1] - settings.margin]


@pytest.mark.parametrize("margin", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("beam", [1, 3, 6])
@pytest.mark.parametrize("seed", range(6))
def test_margins_drop_what_is_far_below_the_best(seed: int, beam: int, margin: float) -> None:
    row, wanted, longest = random_row(seed, end=1.0), [True, True, False], 5
    settings = BeamSettings(beam, ALPHA, BETA, keep=beam, margin=margin)
    (found,) = translate_all(row, [wanted], rules_of([longest]), settings)
    expected = plain_search(row, wanted, longest, settings)
    assert [output_of(each) for each in found if each.finished] == [output for output, _ in expected]
    for each, (_, score) in zip(found, expected, strict=False):
        assert each.score == pytest.approx(score, abs=1e-4)


def test_a_margin_that_drops_nothing_changes_nothing() -> None:
    row, wanted, max_lengths = finish_at_different_times(1)
    settings = BeamSettings(4, ALPHA, BETA, keep=4)
    unpruned, wide = (
        translate_all(row, wanted, rules_of(max_lengths), settings._replace(margin=margin)) for margin in (0.0, 1e6)
    )
    assert wide == unpruned


def test_a_margin_ends_a_search_early() -> None:
    """A translation of probability 0.9 is finished, and all others are far below it."""
    positions: list[int] = []

    def row(_sentence: int, prefix: Prefix) -> tuple[np.ndarray, np.ndarray]:
        positions.append(len(prefix))
        end = 0.9 if len(prefix) == 1 else 1e-9
        return np.log([1e-9, 1e-9, 1e-9, end, 0.04, 0.03, 0.03]), np.array([1.0])

    for margin, expected in ((0.0, 20), (2.0, 1)):
        positions.clear()
        settings = BeamSettings(4, 0.0, 0.0, keep=4, margin=margin)
        (found,) = translate_all(row, [[True]], rules_of([20]), settings)
        assert found[0].tokens == []
        assert max(positions) == expected


def draw(row: Row, sentences: Sequence[int], max_lengths: Sequence[int], draws: Sequence[int]) -> list[Hypothesis]:
    """One draw of each sentence."""
    streams = [stream_of(7, number, np.array([sentence])) for sentence, number in zip(sentences, draws, strict=True)]
    rules = rules_of(max_lengths)._replace(stream_B=torch.tensor(streams))
    wanted = [[True] * 3] * len(sentences)
    settings = BeamSettings(1, ALPHA, BETA)
    sampling = Sampling(1.0, 0, 1.0)
    found = translate_all(row, wanted, rules, settings, sentences=list(sentences), choose=sampling.choose)
    return [each for (each,) in found]


def test_draws_have_the_probabilities_of_whole_translations() -> None:
    """Of every output of at most two words, and of those that are cut off after three."""
    count, longest = 4000, 3
    row = random_row(3, end=1.0)
    allowed = [token for token in range(VOCAB) if token not in FORBIDDEN]

    def probability(output: Prefix) -> float:
        """Without what is forbidden, which is never drawn."""
        found = 1.0
        for position, token in enumerate(output):
            logits_V, _ = row(0, (BOS, *output[:position]))
            found *= math.exp(logits_V[token]) / np.exp(logits_V[allowed]).sum()
        return found

    found = draw(row, [0] * count, [longest] * count, range(count))
    outputs = complete_outputs(longest) + list(itertools.product(range(NUM_SPECIAL, VOCAB), repeat=longest))
    assert sum(map(probability, outputs)) == pytest.approx(1.0)
    for output in outputs:
        expected = probability(output)
        share = sum(output_of(each) == output for each in found) / count
        assert abs(share - expected) <= 4.5 * math.sqrt(expected * (1.0 - expected) / count) + 1e-9, output


def test_draws_do_not_depend_on_the_batch() -> None:
    row, _, max_lengths = finish_at_different_times(2)
    sentences, draws = [0, 1, 2, 3, 4, 4, 6, 7], [0, 0, 0, 0, 0, 1, 0, 0]
    together = draw(row, sentences, max_lengths, draws)
    order = [5, 2, 7, 0, 1, 6, 4, 3]
    shuffled = draw(row, [sentences[i] for i in order], [max_lengths[i] for i in order], [draws[i] for i in order])
    for place, i in enumerate(order):
        (alone,) = draw(row, [sentences[i]], [max_lengths[i]], [draws[i]])
        assert output_of(alone) == output_of(together[i]) == output_of(shuffled[place])
        expected = score_of(row, sentences[i], output_of(alone), [True] * 3, ALPHA, BETA)
        assert alone.score == pytest.approx(expected, abs=1e-4)
