"""Beam search against the enumeration of every translation, and against what its documentation promises."""

import inspect
import itertools
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nmt.batch import BOS, EOS, NUM_SPECIAL, PAD, UNK, source_batch
from nmt.config import ModelConfig
from nmt.decoding import search
from nmt.decoding.search import Hypotheses, StepOutput, beam_search, coverage_penalty, length_penalty
from nmt.model.attention import Memory
from nmt.model.seq2seq import DecoderState, Seq2Seq

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

    def select(self, columns_R: Tensor) -> "FakeState":
        return FakeState([self.columns[column] for column in columns_R.tolist()], self.sentences, self.log)

    def shrink(self, sentences_B: Tensor) -> "FakeState":
        self.log.append(len(sentences_B))
        return FakeState(self.columns, [self.sentences[b] for b in sentences_B.tolist()], self.log)


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


def translate(
    row: Row,
    wanted: Sequence[Sequence[bool]],
    max_lengths: Sequence[int],
    beam: int,
    alpha: float = 0.2,
    beta: float = 0.2,
    sentences: Sequence[int] | None = None,
    log: list[int] | None = None,
    module: Any = search,
) -> Hypotheses:
    ids = list(range(len(wanted))) if sentences is None else list(sentences)
    state = FakeState([(sentence, ()) for sentence in ids] * beam, ids, [] if log is None else log)
    arguments = (torch.tensor(wanted), torch.tensor(max_lengths), torch.tensor(FORBIDDEN), beam, alpha, beta)
    return module.beam_search(fake_step(row), state, *arguments)


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
        assert (*found.tokens[b], EOS) == best
        assert found.scores[b] == pytest.approx(scores[best], abs=1e-4)
        assert found.finished[b]


@pytest.mark.parametrize("beam", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(5))
def test_the_score_is_that_of_the_translation_returned(seed: int, beam: int):
    """However hypotheses changed places: probability, length and coverage are those of their own history."""
    wanted, max_lengths = [[True, True, True]] * 4, [7, 3, 5, 1]
    row = random_row(seed)
    found = translate(row, wanted, max_lengths, beam, alpha=0.6, beta=1.0)
    for b, tokens in enumerate(found.tokens):
        output = (*tokens, EOS) if found.finished[b] else tuple(tokens)
        assert len(output) <= max_lengths[b]
        assert found.scores[b] == pytest.approx(score_of(row, b, output, wanted[b], 0.6, 1.0), abs=1e-4)


def scripted_row(script: dict[Prefix, tuple[dict[int, float], list[float]]]) -> Row:
    """Probabilities of a few pieces and the attention, by what has been output so far."""

    def row(_sentence: int, prefix: Prefix) -> tuple[np.ndarray, np.ndarray]:
        probabilities, attention_S = script.get(prefix[1:], ({EOS: 1.0}, [0.5, 0.5]))
        logits_V = np.full(VOCAB, -1e9)
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
    assert found.tokens == [[B, A]]
    assert found.scores[0] == pytest.approx(math.log(0.4) + 0.2 * math.log(0.3 * 0.7))
    # Enough weight on coverage makes up for probability: only if it is counted for the right one.
    row_covering = scripted_row(
        {
            (): ({A: 0.6, B: 0.4}, [0.0, 0.0]),
            (A,): ({A: 0.5, B: 0.5}, [0.5, 0.5]),
            (B,): ({A: 1.0}, [0.99, 0.01]),
            (B, A): ({EOS: 1.0}, [0.0, 0.0]),
            (A, A): ({EOS: 1.0}, [0.0, 0.0]),
        }
    )
    found = translate(row_covering, [[True, True]], [4], beam=2, alpha=0.0, beta=1.0)
    assert found.tokens == [[A, A]]
    assert found.scores[0] == pytest.approx(math.log(0.3) + math.log(0.25))


@pytest.mark.parametrize("seed", range(6))
def test_a_beam_of_one_is_the_greedy_chain(seed: int):
    row, max_length = random_row(seed), 6
    found = translate(row, [[True] * 3] * 3, [max_length] * 3, beam=1)
    for b in range(3):
        output: Prefix = ()
        while len(output) < max_length and EOS not in output:
            logits_V, _ = row(b, (BOS, *output))
            output = (*output, EOS + int(np.argmax(logits_V[EOS:])))
        assert found.finished[b] == (EOS in output)
        assert found.tokens[b] == [token for token in output if token != EOS]


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
        alone = translate(row, wanted[b : b + 1], max_lengths[b : b + 1], beam, sentences=[b])
        assert found.tokens[b] == alone.tokens[0]
        assert found.finished[b] == alone.finished[0]
        assert found.scores[b] == pytest.approx(alone.scores[0], abs=1e-5)


@pytest.mark.parametrize("beam", [1, 3])
def test_looking_seldom_changes_nothing(beam: int):
    """On a GPU the search looks only every few positions at what is done: here the same code on a CPU."""
    source = inspect.getsource(search)
    every_position = 'look_every = 1 if wanted_BS.device.type == "cpu" else _LOOK_EVERY'
    assert every_position in source
    rare = types.ModuleType("rare_search")
    exec(
        compile(source.replace(every_position, "look_every = _LOOK_EVERY"), search.__file__, "exec"),
        vars(rare),
    )
    for look_every in (2, 4, 5, 100):
        rare._LOOK_EVERY = look_every
        for seed in range(2):
            row, wanted, max_lengths = finish_at_different_times(seed)
            often = translate(row, wanted, max_lengths, beam)
            seldom = translate(row, wanted, max_lengths, beam, module=rare)
            assert seldom.tokens == often.tokens
            assert seldom.finished == often.finished
            assert seldom.scores == pytest.approx(often.scores, abs=1e-5)


@pytest.mark.parametrize("beam", [1, 2, 9, 60])
def test_without_an_end_the_best_unfinished_one_is_returned_at_the_greatest_length(beam: int):
    row = random_row(1, end=-math.inf)
    wanted, max_lengths = [[True] * 3] * 2, [3, 2]
    found = translate(row, wanted, max_lengths, beam)
    assert found.finished == [False, False]
    assert [len(tokens) for tokens in found.tokens] == max_lengths
    if beam >= WORDS**3:
        for b, length in enumerate(max_lengths):
            outputs = itertools.product(range(NUM_SPECIAL, VOCAB), repeat=length)
            best = max(score_of(row, b, output, wanted[b], 0.2, 0.2) for output in outputs)
            assert found.scores[b] == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("beam", [1, 4])
def test_an_end_at_once_is_an_empty_translation(beam: int):
    row = scripted_row({(): ({EOS: 0.9, A: 0.1}, [0.25, 0.5])})
    found = translate(row, [[True, True]], [5], beam, alpha=1.0, beta=0.2)
    assert found.tokens == [[]]
    assert found.finished == [True]
    assert found.scores[0] == pytest.approx(math.log(0.9) + 0.2 * (math.log(0.25) + math.log(0.5)))


def test_a_finished_translation_is_preferred_to_a_better_unfinished_one():
    row = scripted_row({(): ({A: 0.8, EOS: 0.2}, [1.0, 1.0]), (A,): ({A: 1.0}, [1.0, 1.0])})
    found = translate(row, [[True, True]], [2], beam=2)
    assert found == Hypotheses([[]], [pytest.approx(math.log(0.2))], [pytest.approx(math.log(0.2))], [True])


def test_an_end_below_the_best_k_candidates_does_not_count():
    """Else a sentence could end on what its beam would never have kept."""
    row = scripted_row({(): ({A: 0.5, B: 0.3, EOS: 0.2}, [1.0, 1.0]), **{(w,): ({w: 1.0}, [1.0, 1.0]) for w in (A, B)}})
    assert translate(row, [[True, True]], [2], beam=2).finished == [False]
    assert translate(row, [[True, True]], [2], beam=3).finished == [True]


@pytest.mark.parametrize("beam", [1, 2, 6])
def test_forbidden_pieces_are_never_output(beam: int):
    found = translate(random_row(2, end=-3.0), [[True] * 3] * 5, [8] * 5, beam)
    assert all(token >= NUM_SPECIAL for tokens in found.tokens for token in tokens)
    assert any(found.tokens)


def test_the_search_stops_when_nothing_better_can_come():
    steps: list[int] = []

    def row(_sentence: int, prefix: Prefix) -> tuple[np.ndarray, np.ndarray]:
        steps.append(len(prefix))
        end = 0.9 if len(prefix) == 1 else 1e-9
        return np.log([1e-9, 1e-9, 1e-9, end, 0.04, 0.03, 0.03]), np.array([1.0])

    found = translate(row, [[True]], [50], beam=4)
    assert found.tokens == [[]]
    assert max(steps) == 1


def test_the_search_goes_on_while_a_longer_translation_may_still_win():
    """0.45 is behind 0.55 now, but its length will be worth more in the end."""
    certain = {(A,) * length: ({A: 1.0}, [1.0, 1.0]) for length in range(1, 7)}
    row = scripted_row({(): ({EOS: 0.55, A: 0.45}, [1.0, 1.0]), **certain})
    found = translate(row, [[True, True]], [8], beam=2, alpha=1.0)
    assert found.tokens == [[A] * 7]
    assert found.scores[0] == pytest.approx(math.log(0.45) / (13 / 6))


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
    assert found.tokens == [[B]]
    assert found.scores[0] == pytest.approx(math.log(0.25), abs=1e-6)


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
    decoder: DecoderState | None

    def select(self, columns_R: Tensor) -> "NetworkState":
        assert self.decoder is not None
        return NetworkState(self.memory, self.decoder.select(columns_R))

    def shrink(self, sentences_B: Tensor) -> "NetworkState":
        return NetworkState(self.memory.select(sentences_B), self.decoder)


@pytest.mark.parametrize("wiring", ["parallel", "feedback"])
def test_the_real_network_is_searched_exhaustively(tiny_config: Callable[..., ModelConfig], wiring: str):
    """Every translation is scored by one whole-sequence pass, which shares no state with the search."""
    model = Seq2Seq(tiny_config(wiring=wiring), VOCAB).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    sources = [np.array(ids) for ids in ([4, 5, 6, 4], [6], [5, 5])]
    max_lengths, alpha, beta = [4, 1, 3], 0.6, 0.3

    def step(previous_KB: Tensor, state: NetworkState) -> StepOutput:
        out = model.decode(previous_KB.flatten()[None], state.memory, state.decoder)
        logits_RV = model.logits(out.x_TRD[0])
        shape = previous_KB.shape
        after = NetworkState(state.memory, out.state)
        return StepOutput(logits_RV.unflatten(0, shape), out.weights_TRS[0].unflatten(0, shape), after)

    def row(sentence: int, prefix: Prefix) -> tuple[np.ndarray, np.ndarray]:
        memory, _ = model.encode(*source_batch([sources[sentence]]))
        out = model.decode(torch.tensor(prefix)[:, None], memory)
        return model.logits(out.x_TRD[-1, 0]).numpy(), out.weights_TRS[-1, 0].numpy()

    with torch.no_grad():
        source_SB, length_B, rows_N = source_batch(sources)
        memory, _ = model.encode(source_SB, length_B, rows_N)
        wanted_BS = torch.arange(len(source_SB)) < length_B[:, None]
        state = NetworkState(memory, None)
        found = beam_search(
            step, state, wanted_BS, torch.tensor(max_lengths), torch.tensor(FORBIDDEN), 110, alpha, beta
        )
        for b, max_length in enumerate(max_lengths):
            row_b, wanted = cache(row), [True] * len(memory.padding_SB[: length_B[b]])
            scores = {o: score_of(row_b, b, o, wanted, alpha, beta) for o in complete_outputs(max_length)}
            best = max(scores, key=scores.__getitem__)
            assert (*found.tokens[b], EOS) == best
            assert found.scores[b] == pytest.approx(scores[best], abs=1e-4)
