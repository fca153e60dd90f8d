"""Forced decoding: what a model gives to each piece of translations that are given."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from nmt.batch import Batch, make_batch
from nmt.config import ModelConfig
from nmt.decoding.scoring import score
from nmt.model.seq2seq import Seq2Seq
from nmt.tokens import NUM_SPECIAL

VOCAB = 11
LENGTHS = [(3, 5), (1, 0), (6, 2), (2, 4)]

Configs = Callable[..., ModelConfig]


def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(3)
    return [(rng.integers(NUM_SPECIAL, VOCAB, s), rng.integers(NUM_SPECIAL, VOCAB, t)) for s, t in LENGTHS]


def batch_of(chosen: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
    sources, targets = zip(*chosen, strict=True)
    return make_batch(np.arange(len(chosen)), sources, targets)


def model_of(config: ModelConfig) -> Seq2Seq:
    model = Seq2Seq(config, VOCAB).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return model


@pytest.mark.parametrize("wiring", ["parallel", "gnmt_v2", "gnmt"])
@pytest.mark.parametrize("experts_per_token", [0, 1, 3])
def test_a_batch_is_scored_as_its_pairs_alone(tiny_config: Configs, wiring: str, experts_per_token: int) -> None:
    """The sum is what training minimises; gates are those of one pass over everything."""
    model, batch = model_of(tiny_config(wiring=wiring)), batch_of(pairs())
    with torch.no_grad():
        found = score(model, batch, experts_per_token)
        whole = model(batch, experts_per_token=experts_per_token)
    assert float(found.log_prob_TB.sum()) == pytest.approx(-float(whole.nll), abs=1e-9)
    assert list(found.gates) == list(whole.gates)
    for layer, gate in whole.gates.items():
        assert torch.equal(found.gates[layer].expert_TK, gate.expert_TK)
    for column, pair in enumerate(pairs()):
        with torch.no_grad():
            alone = score(model, batch_of([pair]), experts_per_token)
        num_target = len(pair[1]) + 1
        torch.testing.assert_close(found.log_prob_TB[:num_target, column], alone.log_prob_TB[:, 0])
        assert not found.log_prob_TB[num_target:, column].any()


def test_the_number_of_experts_matters(tiny_config: Configs) -> None:
    model, batch = model_of(tiny_config()), batch_of(pairs())
    with torch.no_grad():
        sums = {float(score(model, batch, count).log_prob_TB.sum()) for count in (0, 1, 3)}
    assert len(sums) == 3
