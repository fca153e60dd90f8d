"""Beam search against the enumeration of every translation, and against what its documentation promises."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from nmt.batch import make_batch, make_rows, source_batch
from nmt.config import ModelConfig
from nmt.decoding.rules import Rules
from nmt.decoding.scoring import score
from nmt.decoding.search import (
    BeamSettings,
    Choose,
    StepOutput,
    beam_search,
    coverage_penalty,
    length_penalty,
    top_k,
)
from nmt.decoding.trace import Candidates, Hypothesis
from nmt.model.attention import Memory
from nmt.model.seq2seq import DecoderState, Seq2Seq
from nmt.tokens import BOS, EOS, NUM_SPECIAL, PAD, UNK

WORDS = 3
VOCAB = NUM_SPECIAL + WORDS
A, B = NUM_SPECIAL, NUM_SPECIAL + 1
FORBIDDEN = [PAD, UNK, BOS]

Prefix = tuple[int, ...]
Row = Callable[[int, Prefix], tuple[np.ndarray, np.ndarray]]
"""(logits_V, attention_S) of a sentence after a prefix that begins with BOS."""


@dataclass
class FakeState:
    """Columns that remember all they were fed; column k * B + b must be of sentence b."""

    columns: list[tuple[int, Prefix]]
    sentences: list[int]
    log: list[int]  # sentences left after each shrink

    def take_(self, after: "FakeState", columns_R: Tensor) -> None:
        self.columns = [after.columns[column] for column in columns_R.tolist()]

    def shrink(self, columns_R: Tensor, sentences_B: Tensor) -> "FakeState":
        self.log.append(len(sentences_B))
        columns = [self.columns[column] for column in columns_R.tolist()]
        return FakeState(columns, [self.sentences[b] for b in sentences_B.tolist()], self.log)


def fake_step(row: Row) -> Callable[[Tensor, FakeState], StepOutput]:
    def step(previous_KB: Tensor, state: FakeState) -> StepOutput:
        count = len(state.sentences)
        assert previous_KB.shape == (len(state.columns) // count, count)
        assert [sentence for sentence, _ in state.columns] == state.sentences * previous_KB.shape[0]
        columns = [
            (sentence, (*prefix, token))
            for (sentence, prefix), token in zip(state.columns, previous_KB.flatten().tolist(), strict=True)
        ]
        rows = [row(*column) for column in columns]
        logits, attention = (
            torch.tensor(np.array(side), dtype=torch.float32).unflatten(0, previous_KB.shape)
            for side in zip(*rows, strict=True)
        )
        return StepOutput(logits, attention, FakeState(columns, state.sentences, state.log))

    return step


def rules_of(max_lengths: Sequence[int], min_lengths: Sequence[int] | None = None) -> Rules:
    least = [1] * len(max_lengths) if min_lengths is None else list(min_lengths)
    return Rules(torch.tensor(least), torch.tensor(max_lengths), torch.tensor(FORBIDDEN))


def translate_all(
    row: Row,
    wanted: Sequence[Sequence[bool]],
    rules: Rules,
    settings: BeamSettings,
    sentences: Sequence[int] | None = None,
    log: list[int] | None = None,
    choose: Choose = top_k,
    look_every: int = 1,
) -> list[list[Hypothesis]]:
    ids = list(range(len(wanted))) if sentences is None else list(sentences)
    state = FakeState([(sentence, ()) for sentence in ids] * settings.beam_size, ids, [] if log is None else log)
    return beam_search(fake_step(row), state, torch.tensor(wanted), rules, settings, choose, look_every)


def translate(
    row: Row,
    wanted: Sequence[Sequence[bool]],
    max_lengths: Sequence[int],
    beam: int,
    alpha: float = 0.2,
    beta: float = 0.2,
    sentences: Sequence[int] | None = None,
    log: list[int] | None = None,
    look_every: int = 1,
) -> list[Hypothesis]:
    """The best hypothesis of each sentence."""
    settings = BeamSettings(beam, alpha, beta)
    found = translate_all(
        row, wanted, rules_of(max_lengths), settings, sentences=sentences, log=log, look_every=look_every
    )
    return [best for (best,) in found]


def random_row(seed: int, sources: int = 3, end: float = 0.0) -> Row:
    """Everything depends on the sentence and the whole history; the forbidden pieces are the likeliest."""

    @cache
    def row(sentence: int, prefix: Prefix) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([seed, sentence, *prefix])
        logits_V = 1.5 * rng.standard_normal(VOCAB)
        logits_V[: NUM_SPECIAL - 1] += 3.0
        logits_V[EOS] += end
        attention_S = np.exp(2.0 * rng.standard_normal(sources))
        return logits_V, attention_S / attention_S.sum()

    return row


def score_of(row: Row, sentence: int, output: Prefix, wanted: Sequence[bool], alpha: float, beta: float) -> float:
    """GNMT eq. 14 of one output, EOS included if it has one, in float64 and from nothing but the model."""
    log_prob, coverage_S = 0.0, np.zeros(len(wanted))
    for position, token in enumerate(output):
        logits_V, attention_S = row(sentence, (BOS, *output[:position]))
        log_prob += logits_V[token] - math.log(np.exp(logits_V).sum())
        coverage_S += attention_S
    penalty = sum(
        math.log(max(min(covered, 1.0), 1e-6)) for covered, want in zip(coverage_S, wanted, strict=True) if want
    )
    return log_prob / ((5 + len(output)) ** alpha / 6**alpha) + beta * penalty


def output_of(hypothesis: Hypothesis) -> Prefix:
    """Its pieces, EOS included if it ends."""
    return (*hypothesis.tokens, EOS) if hypothesis.finished else tuple(hypothesis.tokens)


def complete_outputs(max_length: int) -> list[Prefix]:
    """Every sequence of words with EOS, up to a length that counts EOS."""
    words = range(NUM_SPECIAL, VOCAB)
    return [(*body, EOS) for length in range(max_length) for body in itertools.product(words, repeat=length)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.2, 0.2), (1.0, 0.0), (0.6, 1.5)])
def test_a_beam_that_holds_everything_finds_the_best_of_everything(alpha: float, beta: float, seed: int):
    """The beam is larger than the vocabulary, too."""
    wanted = [[True, True, True], [True, True, False], [True, False, False]]
    max_lengths = [4, 2, 3]
    row = random_row(seed)
    found = translate(row, wanted, max_lengths, beam=110, alpha=alpha, beta=beta)
    for b, max_length in enumerate(max_lengths):
        scores = {output: score_of(row, b, output, wanted[b], alpha, beta) for output in complete_outputs(max_length)}
        best = max(scores, key=scores.__getitem__)
        assert (*found[b].tokens, EOS) == best
        assert found[b].score == pytest.approx(scores[best], abs=1e-4)
        assert found[b].finished


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.6, 0.3)])
@pytest.mark.parametrize("keep", [1, 2, 7, 40])
def test_the_best_of_everything_in_order(keep: int, alpha: float, beta: float, seed: int):
    """As many as are asked for, or all that there are."""
    wanted, max_lengths = [[True, True, True], [True, False, False]], [4, 2]
    row = random_row(seed)
    found = translate_all(row, wanted, rules_of(max_lengths), BeamSettings(110, alpha, beta, keep))
    for b, max_length in enumerate(max_lengths):
        scores = {output: score_of(row, b, output, wanted[b], alpha, beta) for output in complete_outputs(max_length)}
        best = sorted(scores, key=scores.__getitem__, reverse=True)[:keep]
        assert [output_of(each) for each in found[b]] == best
        assert [each.score for each in found[b]] == pytest.approx([scores[output] for output in best], abs=1e-4)


@pytest.mark.parametrize("beam", [2, 3, 5])
@pytest.mark.parametrize("look_every", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_all_of_a_hypothesis_is_its_own(seed: int, look_every: int, beam: int):
    """However hypotheses changed places and batches shrank: log-probabilities and attention, piece by piece."""
    row, wanted, max_lengths = finish_at_different_times(seed)
    settings = BeamSettings(beam, 0.6, 1.0, keep=beam, attention=True)
    found = translate_all(row, wanted, rules_of(max_lengths), settings, look_every=look_every)
    assert max(map(len, found)) == beam
    for b, hypotheses in enumerate(found):
        assert hypotheses == sorted(hypotheses, key=lambda each: -each.score)
        assert len({output_of(each) for each in hypotheses}) == len(hypotheses)
        for each in hypotheses:
            output = output_of(each)
            assert len(output) <= max_lengths[b]
            assert each.score == pytest.approx(score_of(row, b, output, wanted[b], 0.6, 1.0), abs=1e-4)
            rows = [row(b, (BOS, *output[:position])) for position in range(len(output))]
            expected = [
                logits_V[token] - math.log(np.exp(logits_V).sum())
                for (logits_V, _), token in zip(rows, output, strict=True)
            ]
            assert each.token_log_probs == pytest.approx(expected, abs=1e-5)
            assert each.log_prob == sum(each.token_log_probs)
            assert each.attention_TS == pytest.approx(np.array([attention_S for _, attention_S in rows]), abs=1e-6)


def test_unfinished_ones_in_order():
    """None can finish; at the greatest length the best of the beam stand in."""
    row, wanted = random_row(1, end=-math.inf), [[True] * 3] * 2
    found = translate_all(row, wanted, rules_of([2, 3]), BeamSettings(60, 0.2, 0.2, keep=4), look_every=3)
    for b, length in enumerate([2, 3]):
        outputs = itertools.product(range(NUM_SPECIAL, VOCAB), repeat=length)
        scores = sorted((score_of(row, b, output, wanted[b], 0.2, 0.2) for output in outputs), reverse=True)
        assert [each.score for each in found[b]] == pytest.approx(scores[:4], abs=1e-4)
        assert not any(each.finished for each in found[b])


@pytest.mark.parametrize("beam", [1, 110])
def test_nothing_ends_before_its_least_length(beam: int):
    row, wanted = random_row(3, end=2.0), [[True] * 3] * 3
    rules = rules_of([4, 4, 2], [1, 3, 2])
    found = translate_all(row, wanted, rules, BeamSettings(beam, 0.2, 0.2, keep=beam))
    for b, (least, most) in enumerate([(1, 4), (3, 4), (2, 2)]):
        lengths = {len(output_of(each)) for each in found[b]}
        assert lengths <= set(range(least, most + 1))
        if beam > 1:
            assert len(found[b]) == sum(len(output) >= least for output in complete_outputs(most))


def test_another_way_to_choose():
    """Candidates may come from anywhere, such as a draw: here always the least probable word, and EOS at the end."""

    def least_probable(logits_KBV: Tensor, log_prob_KB: Tensor, rules: Rules, length: Tensor, _: Tensor) -> Candidates:
        log_probs_KBV = logits_KBV.log_softmax(2)
        words_KB = log_probs_KBV[..., NUM_SPECIAL:].argmin(2) + NUM_SPECIAL
        token_KB = torch.where(length == rules.max_length_B, EOS, words_KB)
        token_log_prob_KB = log_probs_KBV.gather(2, token_KB.unsqueeze(2)).squeeze(2)
        hypothesis_KB = torch.arange(len(token_KB))[:, None].expand_as(token_KB)
        return Candidates(log_prob_KB + token_log_prob_KB, token_log_prob_KB, hypothesis_KB, token_KB)

    row, wanted, max_lengths = random_row(4), [[True] * 3] * 2, [4, 2]
    found = translate_all(row, wanted, rules_of(max_lengths), BeamSettings(1, 0.2, 0.2), choose=least_probable)
    for b, (best,) in enumerate(found):
        output: Prefix = ()
        while len(output) < max_lengths[b] - 1:
            output = (*output, NUM_SPECIAL + int(np.argmin(row(b, (BOS, *output))[0][NUM_SPECIAL:])))
        assert output_of(best) == (*output, EOS)
        assert best.score == pytest.approx(score_of(row, b, output_of(best), wanted[b], 0.2, 0.2), abs=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_without_a_finite_output_there_is_no_hypothesis(value: float):
    def row(sentence: int, prefix: Prefix) -> tuple[np.ndarray, np.ndarray]:
        logits_V, attention_S = random_row(1)(sentence, prefix)
        return logits_V * (value if sentence == 1 else 1.0), attention_S

    found = translate_all(row, [[True] * 3] * 3, rules_of([3, 2, 3]), BeamSettings(4, 0.2, 0.2, keep=2))
    assert [bool(each) for each in found] == [True, False, True]


def test_a_sentence_whose_every_continuation_is_forbidden_ends_early():
    """Only EOS is possible, and it may not come yet."""

    def row(_sentence: int, prefix: Prefix) -> tuple[np.ndarray, np.ndarray]:
        assert len(prefix) == 1
        return np.where(np.arange(VOCAB) == EOS, 0.0, -math.inf), np.array([1.0])

    assert translate_all(row, [[True]], rules_of([9], [2]), BeamSettings(2, 0.2, 0.2)) == [[]]


@pytest.mark.parametrize("beam", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(5))
def test_the_score_is_that_of_the_translation_returned(seed: int, beam: int):
    """However hypotheses changed places: probability, length and coverage are those of their own history."""
    wanted, max_lengths = [[True, True, True]] * 4, [7, 3, 5, 1]
    row = random_row(seed)
    found = translate(row, wanted, max_lengths, beam, alpha=0.6, beta=1.0)
    for b, best in enumerate(found):
        output = output_of(best)
        assert len(output) <= max_lengths[b]
        assert best.score == pytest.approx(score_of(row, b, output, wanted[b], 0.6, 1.0), abs=1e-4)


def scripted_row(script: dict[Prefix, tuple[dict[int, float], list[float]]]) -> Row:
    """Probabilities of a few pieces and the attention, by what has been output so far."""

    def row(_sentence: int, prefix: Prefix) -> tuple[np.ndarray, np.ndarray]:
        probabilities, attention_S = script.get(prefix[1:], ({EOS: 1.0}, [0.5, 0.5]))
        logits_V = np.full(VOCAB, -1e9)
        logits_V[EOS] = -2e9  # the least likely of those left out: equal logits would put it first
        for token, probability in probabilities.items():
            logits_V[token] = math.log(probability)
        return logits_V, np.array(attention_S)

    return row


def test_coverage_follows_its_hypothesis():
    """B overtakes A at the second position, so both change places while A's and B's attention differ."""
    row = scripted_row(
        {
            (): ({A: 0.6, B: 0.4}, [0.0, 0.0]),
            (A,): ({A: 0.5, B: 0.5}, [0.9, 0.1]),
            (B,): ({A: 1.0}, [0.3, 0.7]),
            (B, A): ({EOS: 1.0}, [0.0, 0.0]),
            (A, A): ({EOS: 1.0}, [0.0, 0.0]),
        }
    )
    found = translate(row, [[True, True]], [4], beam=2, alpha=0.0, beta=0.2)
    assert found[0].tokens == [B, A]
    assert found[0].score == pytest.approx(math.log(0.4) + 0.2 * math.log(0.3 * 0.7))
    # Enough weight on coverage makes up for probability: only if it is counted for the right one.
    row_covering = scripted_row(
        {
            (): ({A: 0.6, B: 0.4}, [0.0, 0.0]),
            (A,): ({A: 0.6, B: 0.4}, [0.5, 0.5]),
            (B,): ({A: 1.0}, [0.99, 0.01]),
            (B, A): ({EOS: 1.0}, [0.0, 0.0]),
            (A, A): ({EOS: 1.0}, [0.0, 0.0]),
        }
    )
    found = translate(row_covering, [[True, True]], [4], beam=2, alpha=0.0, beta=1.0)
    assert found[0].tokens == [A, A]
    assert found[0].score == pytest.approx(math.log(0.36) + math.log(0.25))


@pytest.mark.parametrize("seed", range(6))
def test_a_beam_of_one_is_the_greedy_chain(seed: int):
    row, max_length = random_row(seed), 6
    found = translate(row, [[True] * 3] * 3, [max_length] * 3, beam=1)
    for b in range(3):
        output: Prefix = ()
        while len(output) < max_length and EOS not in output:
            logits_V, _ = row(b, (BOS, *output))
            output = (*output, EOS + int(np.argmax(logits_V[EOS:])))
        assert found[b].finished == (EOS in output)
        assert found[b].tokens == [token for token in output if token != EOS]


def finish_at_different_times(seed: int) -> tuple[Row, list[list[bool]], list[int]]:
    """Eight sentences; EOS gets likely after as many positions as the sentence's number."""

    @cache
    def row(sentence: int, prefix: Prefix) -> tuple[np.ndarray, np.ndarray]:
        return random_row(seed, end=4.0 if len(prefix) > sentence else -4.0)(sentence, prefix)

    wanted = [[True, b % 2 == 0, b % 3 > 0] for b in range(8)]
    return row, wanted, [12, 5, 12, 2, 12, 1, 9, 12]


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_a_batch_translates_as_its_sentences_alone(seed: int, beam: int):
    row, wanted, max_lengths = finish_at_different_times(seed)
    shrinks: list[int] = []
    found = translate(row, wanted, max_lengths, beam, log=shrinks)
    assert len(shrinks) >= 2  # otherwise this test has not seen a batch shrink
    assert shrinks == sorted(shrinks, reverse=True)
    for b in range(8):
        (alone,) = translate(row, wanted[b : b + 1], max_lengths[b : b + 1], beam, sentences=[b])
        assert found[b].tokens == alone.tokens
        assert found[b].finished == alone.finished
        assert found[b].score == pytest.approx(alone.score, abs=1e-5)


@pytest.mark.parametrize("look_every", [2, 4, 5, 100])
@pytest.mark.parametrize("beam", [1, 3])
def test_looking_seldom_changes_nothing(beam: int, look_every: int):
    """On a GPU the search looks only every few positions at what is done."""
    for seed in range(2):
        row, wanted, max_lengths = finish_at_different_times(seed)
        often, seldom = (translate(row, wanted, max_lengths, beam, look_every=each) for each in (1, look_every))
        assert [each._replace(score=0.0, token_log_probs=[]) for each in seldom] == [
            each._replace(score=0.0, token_log_probs=[]) for each in often
        ]
        assert [each.score for each in seldom] == pytest.approx([each.score for each in often], abs=1e-5)


@pytest.mark.parametrize("beam", [1, 2, 9, 60])
def test_without_an_end_the_best_unfinished_one_is_returned_at_the_greatest_length(beam: int):
    row = random_row(1, end=-math.inf)
    wanted, max_lengths = [[True] * 3] * 2, [3, 2]
    found = translate(row, wanted, max_lengths, beam)
    assert [best.finished for best in found] == [False, False]
    assert [len(best.tokens) for best in found] == max_lengths
    if beam >= WORDS**3:
        for b, length in enumerate(max_lengths):
            outputs = itertools.product(range(NUM_SPECIAL, VOCAB), repeat=length)
            best = max(score_of(row, b, output, wanted[b], 0.2, 0.2) for output in outputs)
            assert found[b].score == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("beam", [1, 4])
def test_an_end_at_once_is_an_empty_translation(beam: int):
    row = scripted_row({(): ({EOS: 0.9, A: 0.1}, [0.25, 0.5])})
    found = translate(row, [[True, True]], [5], beam, alpha=1.0, beta=0.2)
    assert found[0].tokens == []
    assert found[0].finished
    assert found[0].score == pytest.approx(math.log(0.9) + 0.2 * (math.log(0.25) + math.log(0.5)))


def test_a_finished_translation_is_preferred_to_a_better_unfinished_one():
    row = scripted_row({(): ({A: 0.8, EOS: 0.2}, [1.0, 1.0]), (A,): ({A: 1.0}, [1.0, 1.0])})
    found = translate(row, [[True, True]], [2], beam=2)
    log_prob = pytest.approx(math.log(0.2))
    assert found == [Hypothesis([], log_prob, [log_prob], None, True)]


def test_an_end_below_the_best_k_candidates_does_not_count():
    """Else a sentence could end on what its beam would never have kept."""
    row = scripted_row({(): ({A: 0.5, B: 0.3, EOS: 0.2}, [1.0, 1.0]), **{(w,): ({w: 1.0}, [1.0, 1.0]) for w in (A, B)}})
    assert translate(row, [[True, True]], [2], beam=2)[0].finished is False
    assert translate(row, [[True, True]], [2], beam=3)[0].finished is True


@pytest.mark.parametrize("beam", [1, 2, 6])
def test_forbidden_pieces_are_never_output(beam: int):
    found = translate(random_row(2, end=-3.0), [[True] * 3] * 5, [8] * 5, beam)
    assert all(token >= NUM_SPECIAL for best in found for token in best.tokens)
    assert any(best.tokens for best in found)


def test_the_search_stops_when_nothing_better_can_come():
    steps: list[int] = []

    def row(_sentence: int, prefix: Prefix) -> tuple[np.ndarray, np.ndarray]:
        steps.append(len(prefix))
        end = 0.9 if len(prefix) == 1 else 1e-9
        return np.log([1e-9, 1e-9, 1e-9, end, 0.04, 0.03, 0.03]), np.array([1.0])

    found = translate(row, [[True]], [50], beam=4)
    assert found[0].tokens == []
    assert max(steps) == 1


def test_the_search_goes_on_while_a_longer_translation_may_still_win():
    """0.45 is behind 0.55 now, but its length will be worth more in the end."""
    certain = {(A,) * length: ({A: 1.0}, [1.0, 1.0]) for length in range(1, 7)}
    row = scripted_row({(): ({EOS: 0.55, A: 0.45}, [1.0, 1.0]), **certain})
    found = translate(row, [[True, True]], [8], beam=2, alpha=1.0)
    assert found[0].tokens == [A] * 7
    assert found[0].score == pytest.approx(math.log(0.45) / (13 / 6))


def test_an_end_among_the_candidates_leaves_room_for_a_full_beam():
    """All come from one hypothesis at first: B must be kept besides A although EOS is ahead of both."""
    row = scripted_row(
        {
            (): ({EOS: 0.4, A: 0.35, B: 0.25}, [0.01, 0.99]),
            (A,): ({EOS: 0.1, A: 0.45, B: 0.45}, [0.99, 0.01]),
            (B,): ({EOS: 1.0}, [0.99, 0.01]),
        }
    )
    found = translate(row, [[True, True]], [4], beam=2, alpha=0.0, beta=1.0)
    assert found[0].tokens == [B]
    assert found[0].score == pytest.approx(math.log(0.25), abs=1e-6)


def test_length_penalty_is_gnmt_s():
    assert length_penalty(1, 0.2) == 1.0
    assert length_penalty(25, 0.2) == pytest.approx(5**0.2) == pytest.approx(1.3797, abs=1e-4)
    assert length_penalty(25, 0.0) == 1.0
    torch.testing.assert_close(length_penalty(torch.tensor([1, 7]), 1.0), torch.tensor([1.0, 2.0]))


def test_coverage_penalty_is_gnmt_s():
    coverage_KS = torch.tensor([[0.5, 2.0, 0.1], [1.0, 1.0, 0.0]])
    everything, first_two = torch.tensor([True, True, True]), torch.tensor([True, True, False])
    penalty_K = coverage_penalty(coverage_KS, everything, 0.2)
    assert penalty_K.tolist() == pytest.approx([0.2 * math.log(0.05), 0.2 * math.log(1e-6)])
    assert coverage_penalty(coverage_KS, first_two, 0.2).tolist() == pytest.approx([0.2 * math.log(0.5), 0.0])
    assert coverage_penalty(coverage_KS, everything, 0.0).tolist() == [0.0, 0.0]


@dataclass
class NetworkState:
    """The real network behind the search."""

    memory: Memory
    decoder: DecoderState

    def take_(self, after: DecoderState, columns_R: Tensor) -> None:
        self.decoder.take_(after, columns_R)

    def shrink(self, columns_R: Tensor, sentences_B: Tensor) -> "NetworkState":
        return NetworkState(self.memory.select(sentences_B), self.decoder.select(columns_R))


@pytest.mark.slow
@pytest.mark.parametrize("wiring", ["parallel", "feedback"])
def test_the_real_network_is_searched_exhaustively(tiny_config: Callable[..., ModelConfig], wiring: str):
    """Every translation is scored by one whole-sequence pass, which shares no state with the search."""
    model = Seq2Seq(tiny_config(wiring=wiring), VOCAB).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    sources = [np.array(ids) for ids in ([4, 5, 6, 4], [6], [5, 5])]
    max_lengths, alpha, beta = [4, 1, 3], 0.6, 0.3

    def step(previous_KB: Tensor, state: NetworkState) -> StepOutput:
        out = model.step(previous_KB.flatten(), state.memory, state.decoder)
        logits_RV = model.logits(out.x_RD)
        shape = previous_KB.shape
        return StepOutput(logits_RV.unflatten(0, shape), out.weights_RS.unflatten(0, shape), out.state)

    def row(sentence: int, prefix: Prefix) -> tuple[np.ndarray, np.ndarray]:
        encoded, _ = model.encode(*source_batch([sources[sentence]]))
        rows, _ = make_rows(np.array([len(prefix)]))
        x_ND, _ = model.decode(torch.tensor(prefix), rows, encoded)
        return model.logits(x_ND[-1]).numpy(), attention_to(sentence, prefix)[-1]

    def attention_to(sentence: int, prefix: Prefix) -> np.ndarray:
        memory, state = model.memory(model.encode(*source_batch([sources[sentence]]))[0]), model.start(1)
        weights = []
        for token in prefix:
            out = model.step(torch.tensor([token]), memory, state)
            state = out.state
            weights.append(out.weights_RS[0].numpy())
        return np.stack(weights)

    with torch.no_grad():
        source_N, rows = source_batch(sources)
        memory, length_B = model.memory(model.encode(source_N, rows)[0]), rows.length_B
        wanted_BS = torch.arange(rows.num_positions) < length_B[:, None]
        settings = BeamSettings(110, alpha, beta, keep=3, attention=True)
        state = NetworkState(memory, model.start(110 * len(sources)))
        found = beam_search(step, state, wanted_BS, rules_of(max_lengths), settings)
        for b, max_length in enumerate(max_lengths):
            row_b, wanted = cache(row), [True] * len(memory.padding_SB[: length_B[b]])
            scores = {o: score_of(row_b, b, o, wanted, alpha, beta) for o in complete_outputs(max_length)}
            best = sorted(scores, key=scores.__getitem__, reverse=True)[:3]
            assert [output_of(each) for each in found[b]] == best
            assert [each.score for each in found[b]] == pytest.approx([scores[o] for o in best], abs=1e-4)
            for each in found[b]:
                forced = score(model, make_batch(np.arange(1), [sources[b]], [np.array(each.tokens, dtype=np.int64)]))
                assert each.token_log_probs == pytest.approx(forced.log_prob_TB[:, 0].tolist(), abs=1e-5)
                assert each.log_prob == pytest.approx(float(forced.log_prob_TB.sum()), abs=1e-5)
                assert each.attention_TS is not None
                own_TS = each.attention_TS[:, : length_B[b]]
                given = (BOS, *each.tokens, EOS)[: len(own_TS)]
                assert own_TS == pytest.approx(attention_to(b, given), abs=1e-6)
                assert own_TS.sum(1) == pytest.approx(np.ones(len(own_TS)), abs=1e-6)
