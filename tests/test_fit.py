"""A batch that was padded to a larger shape computes what the batch itself computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nmt.batch import Batch, Shape, covering, fit
from nmt.config import Config, TrainingConfig
from nmt.model.gate_statistics import LayerTally
from nmt.model.gating import balance_loss
from nmt.model.rows import pack, unpack
from nmt.model.seq2seq import LossOutput, Seq2Seq
from nmt.parallel.mesh import World
from nmt.tokens import PAD
from nmt.training.optim import make_optimizer
from nmt.training.update import UpdateOutput, Updater
from tests.test_seq2seq import GATING, Batches, Configs, randomised

LENGTHS = ((3, 2), (1, 6), (5, 5), (4, 1))


def larger(batch: Batch) -> Shape:
    """A shape that pads everything: sentences, both lengths, and the rows at every position."""
    sentences, source, target = batch.shape
    return Shape(sentences + 2, (*(n + 2 for n in source), 2), (*(n + 1 for n in target), 1, 1, 1))


@pytest.fixture(autouse=True)
def _noise_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is a function of the token that it is drawn for."""
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.sin(1e3 * x.detach()))


def model_of(tiny_config: Configs, gating: str, training: bool, **settings: Any) -> Seq2Seq:
    torch.manual_seed(7)
    config = tiny_config(gating=gating, **GATING[gating], encoder_moe_after=[1], decoder_moe_after=[1], **settings)
    return randomised(config).train(training)


def gradients(model: Seq2Seq, output: LossOutput) -> dict[str, Tensor]:
    total = output.loss
    for gate in output.gates.values():
        total = total + gate.own_loss + balance_loss(gate.sums, 0.5, 0.25)
    model.zero_grad()
    total.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def assert_same(model: Seq2Seq, plain: Batch, fitted: Batch) -> None:
    """Losses, gradients, sums and statistics."""
    outputs = [model(batch, label_smoothing=0.1) for batch in (plain, fitted)]
    expected, actual = outputs
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.nll, expected.nll)
    for layer, gate in expected.gates.items():
        own = actual.gates[layer]
        torch.testing.assert_close(own.sums.parts(), gate.sums.parts())
        torch.testing.assert_close((own.noise_std, own.own_loss), (gate.noise_std, gate.own_loss))
        assert own.real_T is not None
        filled = own.expert_TK < gate.sums.count_E.numel()
        assert not filled[~own.real_T].any()
        assert not own.gates_TK[~own.real_T].any()
        tallies = [LayerTally(each.sums, each).measure() for each in (own, gate)]
        torch.testing.assert_close(*tallies)
    torch.testing.assert_close(*(gradients(model, output) for output in reversed(outputs)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gating", GATING)
def test_a_fitted_batch_computes_the_same(
    tiny_config: Configs, tiny_batch: Batches, gating: str, training: bool
) -> None:
    model, batch = model_of(tiny_config, gating, training), tiny_batch(*LENGTHS)
    assert_same(model, batch, fit(batch, larger(batch)))


@pytest.mark.parametrize("gating", GATING)
@pytest.mark.parametrize("lengths", [((0, 0),), ((3, 0), (2, 0)), ((0, 4),)])
def test_one_position_on_a_side(
    tiny_config: Configs, tiny_batch: Batches, gating: str, lengths: tuple[tuple[int, int], ...]
) -> None:
    """Sixteen experts: most of them get no token."""
    model, batch = model_of(tiny_config, gating, True, num_experts=16, output="sigmoid"), tiny_batch(*lengths)
    assert_same(model, batch, fit(batch, larger(batch)))


@pytest.mark.parametrize("wiring", ["feedback", "gnmt_v2"])
def test_other_networks(tiny_config: Configs, tiny_batch: Batches, wiring: str) -> None:
    settings = {"wiring": wiring, "function": "normalised", "bottom_layer": "bidirectional_half"}
    model, batch = model_of(tiny_config, "noisy_top_k", True, **settings), tiny_batch(*LENGTHS)
    assert_same(model, batch, fit(batch, larger(batch)))


@pytest.mark.parametrize("gating", GATING)
def test_an_update_is_the_same(tiny_config: Configs, tiny_batch: Batches, gating: str) -> None:
    """Two micro-batches, whose balance losses are joint."""
    batches = tiny_batch(*LENGTHS), tiny_batch((2, 2), (1, 3))

    def updated(change: Callable[[Batch], Batch]) -> tuple[UpdateOutput, dict[str, Tensor]]:
        model = model_of(tiny_config, gating, True)
        config = Config(model=model.config, training=TrainingConfig(precision="fp32", adam_epsilon=1e-3))
        updater = Updater(model, make_optimizer(model, config.training), config, World(torch.device("cpu")))
        done = updater.update([change(batch) for batch in batches], 1, 0.1)
        return done, {name: each.detach() for name, each in model.named_parameters()}

    (plain, expected), (fitted, actual) = updated(lambda batch: batch), updated(lambda batch: fit(batch, larger(batch)))
    assert fitted.target_tokens == plain.target_tokens == sum(target + 1 for _, target in (*LENGTHS, (2, 2), (1, 3)))
    torch.testing.assert_close(fitted.gradient_norm, plain.gradient_norm)
    torch.testing.assert_close(actual, expected)


def test_what_a_fitted_batch_holds(tiny_batch: Batches) -> None:
    batch = tiny_batch(*LENGTHS)
    shape = larger(batch)
    fitted = fit(batch, shape)
    assert fitted.shape == shape
    assert fitted.num_sentences == 4
    assert fitted.pairs_B.tolist() == [0, 1, 2, 3, -1, -1]
    assert (fitted.num_source_tokens, fitted.num_target_tokens) == (batch.num_source_tokens, batch.num_target_tokens)
    for name, side in (("source_N", "source"), ("target_in_N", "target"), ("target_out_N", "target")):
        plain_N, own_N = getattr(batch, name), getattr(fitted, name)
        rows, own = getattr(batch, side), getattr(fitted, side)
        assert own_N[own.real_N].tolist() == plain_N.tolist()
        assert (own_N[~own.real_N] == PAD).all()
        assert own.begin_L.diff().tolist() == list(own.alive) == list(getattr(shape, side))
        for row in range(own.alive[0], own.num_rows):
            position = int((own.begin_L <= row).sum()) - 1
            assert own.previous_N[row] == own.begin_L[position - 1] + row - own.begin_L[position]
        assert (own.previous_N[: own.alive[0]] == own.num_rows).all()
        assert own.turn_N[own.turn_N.long()].tolist() == list(range(own.num_rows))
        assert own.length_B.tolist() == [*rows.length_B.tolist(), 0, 0]
        padded_LBD = unpack(own_N[:, None].double(), own)
        torch.testing.assert_close(padded_LBD[: rows.num_positions, :4], unpack(plain_N[:, None].double(), rows))
        assert padded_LBD.sum() == plain_N.sum()
        assert pack(padded_LBD, own).flatten().tolist() == own_N.tolist()


def test_a_batch_fits_its_own_shape(tiny_batch: Batches) -> None:
    batch = tiny_batch(*LENGTHS)
    fitted = fit(batch, batch.shape)
    assert fitted.source.real_N is not None
    assert fitted.source.real_N.all()
    for one, other in ((fitted.source, batch.source), (fitted.target, batch.target)):
        assert one.alive == other.alive
        assert all(map(torch.equal, one[1:7], other[1:7]))


def test_a_shape_that_is_too_small_is_refused(tiny_batch: Batches) -> None:
    batch = tiny_batch(*LENGTHS)
    sentences, source, target = batch.shape
    for shape in (
        Shape(sentences - 1, source, target),
        Shape(sentences, source[:-1], target),
        Shape(sentences, source, (*target[:-1], target[-1] - 1)),
    ):
        with pytest.raises(ValueError, match="cannot be padded to"):
            fit(batch, shape)


def test_the_shape_that_covers_others() -> None:
    one, other = Shape(3, (3, 1), (2, 2, 2)), Shape(4, (2, 2, 1), (4,))
    both = covering(one, other)
    assert both == Shape(4, (3, 2, 1), (4, 2, 2))
    assert both.holds(one)
    assert both.holds(other)
    assert both.with_room(2) == Shape(6, (5, 4, 3), (6, 4, 4))
