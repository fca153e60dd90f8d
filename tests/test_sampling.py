"""Draws of subwords: their frequencies, what cuts them off, and that only the line and the seed decide them."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nmt.decoding.rules import NEVER, Rules
from nmt.decoding.sampling import Sampling, gumbel, stream_of
from nmt.tokens import BOS, EOS, NUM_SPECIAL, PAD, UNK

VOCAB = NUM_SPECIAL + 6
NO_HISTORY = torch.zeros(1, 1, 0, dtype=torch.int64)


def rules_for(streams: Tensor) -> Rules:
    count = len(streams)
    return Rules(
        torch.ones(count, dtype=torch.int64),
        torch.full((count,), 9),
        torch.tensor([PAD, UNK, BOS]),
        stream_B=streams,
    )


def streams_of(count: int, seed: int = 0) -> Tensor:
    source = np.array([5, 6, 7])
    return torch.tensor([stream_of(seed, draw, source) for draw in range(count)])


def weights_of(logits_V: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities of a draw, by sorting one list."""
    weights_V = np.exp(logits_V / sampling.temperature)
    weights_V[[PAD, UNK, BOS]] = 0.0
    order = sorted(range(VOCAB), key=lambda token: -weights_V[token])
    kept = order[: sampling.top_k or VOCAB]
    share_V = weights_V / weights_V[kept].sum()
    nucleus, total = [], 0.0
    for token in kept:
        if total >= sampling.top_p and sampling.top_p < 1.0:
            break
        nucleus.append(token)
        total += share_V[token]
    found_V = np.zeros(VOCAB)
    found_V[nucleus] = weights_V[nucleus]
    return found_V / found_V.sum()


WAYS = [
    Sampling(1.0, 0, 1.0),
    Sampling(0.5, 0, 1.0),
    Sampling(2.0, 0, 1.0),
    Sampling(1.0, 1, 1.0),
    Sampling(1.0, 3, 1.0),
    Sampling(1.0, 99, 1.0),
    Sampling(1.0, 0, 0.5),
    Sampling(1.5, 0, 1e-9),
    Sampling(0.7, 4, 0.8),
]


@pytest.mark.parametrize("sampling", WAYS)
def test_frequencies_are_the_probabilities(sampling: Sampling) -> None:
    count = 20_000
    logits_V = np.random.default_rng(2).standard_normal(VOCAB).astype(np.float32)
    logits_V[[PAD, UNK, BOS]] += 5.0
    logits_KBV = torch.tensor(logits_V).expand(1, count, VOCAB).clone()
    before_B = torch.full((1, count), -2.0)
    found = sampling.choose(logits_KBV, before_B, rules_for(streams_of(count)), torch.tensor(1), NO_HISTORY)
    expected_V = weights_of(logits_V, sampling)
    drawn_V = np.bincount(found.token_CB[0].numpy(), minlength=VOCAB)
    assert (drawn_V[expected_V == 0.0] == 0).all()
    error_V = np.sqrt(expected_V * (1.0 - expected_V) / count)
    assert (abs(drawn_V / count - expected_V) <= 4.0 * error_V + 1e-9).all()
    # The log-probability is that of the model: over all subwords, at temperature 1.
    log_probs_V = torch.tensor(logits_V).log_softmax(0)
    torch.testing.assert_close(found.token_log_prob_CB, log_probs_V[found.token_CB])
    torch.testing.assert_close(found.log_prob_CB, found.token_log_prob_CB - 2.0)
    assert not found.hypothesis_CB.any()


@pytest.mark.parametrize("sampling", WAYS)
def test_a_draw_is_the_same_alone_and_in_any_batch(sampling: Sampling) -> None:
    count = 7
    logits_BV = torch.tensor(np.random.default_rng(4).standard_normal((count, VOCAB)), dtype=torch.float32)
    streams_B, log_prob_1B = streams_of(count), torch.zeros(1, count)

    def draw(chosen: Tensor) -> list[int]:
        rules = rules_for(streams_B).select(chosen)
        logits_KBV = logits_BV[None, chosen].clone()
        found = sampling.choose(logits_KBV, log_prob_1B[:, chosen], rules, torch.tensor(3), NO_HISTORY)
        return found.token_CB[0].tolist()

    together = draw(torch.arange(count))
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    assert draw(order) == [together[place] for place in order]
    assert [draw(torch.tensor([place]))[0] for place in range(count)] == together


def test_what_is_forbidden_is_never_drawn() -> None:
    """Even if it is all that is likely; a forced prefix is drawn even if the cut would leave it out."""
    count = 50
    rules = rules_for(streams_of(count))
    logits_KBV = torch.zeros(1, count, VOCAB)
    logits_KBV[:, :, [PAD, UNK, BOS]] = 80.0
    for sampling in WAYS:
        found = sampling.choose(logits_KBV.clone(), torch.zeros(1, count), rules, torch.tensor(1), NO_HISTORY)
        assert (found.token_CB >= EOS).all()
        prefix = rules._replace(prefix_BP=torch.full((count, 1), 7))
        forced = sampling.choose(logits_KBV.clone(), torch.zeros(1, count), prefix, torch.tensor(1), NO_HISTORY)
        assert (forced.token_CB == 7).all()


def test_nothing_allowed_has_no_probability() -> None:
    for sampling in WAYS:
        logits_KBV = torch.full((1, 2, VOCAB), NEVER)
        found = sampling.choose(logits_KBV, torch.zeros(1, 2), rules_for(streams_of(2)), torch.tensor(1), NO_HISTORY)
        assert not (found.log_prob_CB > NEVER).any()


def test_the_noise_is_gumbel_s_and_differs_everywhere() -> None:
    """Mean and variance; and no two of streams, positions and subwords share their noise."""
    streams_B = streams_of(40)
    values = torch.stack(
        [gumbel(streams_B, torch.tensor(length), torch.arange(500)) for length in range(1, 6)]
    ).flatten()
    assert values.isfinite().all()
    error = math.sqrt(math.pi**2 / 6 / len(values))
    assert float(values.mean()) == pytest.approx(0.5772157, abs=4 * error)
    assert float(values.var()) == pytest.approx(math.pi**2 / 6, rel=0.03)
    # Of 100,000 draws of 32 bits, about one pair is equal by chance; the largest are told apart as exactly.
    assert len(values.unique()) > 0.98 * len(values)
    largest = values.topk(100).values
    assert len(largest.unique()) == 100
    # Neighbours are independent, whichever way they are neighbours.
    noise_LBV = values.view(5, 40, 500) - values.mean()
    for dim in range(3):
        size = noise_LBV.shape[dim] - 1
        products = noise_LBV.narrow(dim, 0, size) * noise_LBV.narrow(dim, 1, size)
        assert abs(float(products.mean())) < 4 * math.pi**2 / 6 / math.sqrt(products.numel())


def test_noise_belongs_to_the_subword_wherever_it_is() -> None:
    streams_B, length, token_BJ = streams_of(3), torch.tensor(2), torch.tensor([[5, 0, 7], [1, 2, 3], [7, 7, 0]])
    whole_BV = gumbel(streams_B, length, torch.arange(9))
    assert torch.equal(gumbel(streams_B, length, token_BJ), whole_BV.gather(1, token_BJ))


def test_a_large_vocabulary_is_cut_off_by_its_own_probabilities() -> None:
    """`top_p` counts the probability of all subwords, although it sorts only the most probable ones."""
    logits_BV = torch.tensor(np.random.default_rng(3).standard_normal((2, 5000)), dtype=torch.float32)
    log_weight_BJ, token_BJ = Sampling(0.8, 0, 0.2).log_weights(logits_BV)
    assert token_BJ.shape == (2, 1000)
    for b in range(2):
        share_V = (logits_BV[b] / 0.8).softmax(0)
        order = share_V.argsort(descending=True)
        count = int((share_V[order].cumsum(0) < 0.2).sum()) + 1
        assert set(token_BJ[b, log_weight_BJ[b] > NEVER].tolist()) == set(order[:count].tolist())


def test_streams() -> None:
    source = np.array([4, 5, 6], dtype=np.int32)
    known = stream_of(1, 0, source)
    assert known == stream_of(1, 0, source.astype(np.int64))
    assert 0 <= known < 2**32
    others = [stream_of(2, 0, source), stream_of(1, 1, source), stream_of(1, 0, source[:2]), stream_of(-1, 0, source)]
    assert len({known, *others}) == 5


def test_nothing_waits_for_the_host() -> None:
    """The meta device has shapes and no values."""
    rules = rules_for(streams_of(3))
    rules = Rules(*(each.to("meta") if isinstance(each, Tensor) else each for each in rules))
    for sampling in WAYS:
        logits_KBV, length = torch.zeros(1, 3, VOCAB, device="meta"), torch.tensor(1, device="meta")
        found = sampling.choose(logits_KBV, torch.zeros(1, 3, device="meta"), rules, length, NO_HISTORY.to("meta"))
        assert found.token_CB.shape == (1, 3)
