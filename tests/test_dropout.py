"""Dropout for small corpora: of words, of experts' outputs and of their hidden units."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmt.batch import Batch
from nmt.config import ModelConfig, MoEConfig
from nmt.model.dropout import drop_hidden, drop_tokens, mask_outputs
from nmt.model.experts import MoE
from nmt.model.gating import GateOutput
from nmt.model.seq2seq import Seq2Seq
from tests.conftest import TINY_VOCAB

Configs = Callable[..., ModelConfig]
Batches = Callable[..., Batch]

P = 0.3
ALL = {"word_dropout": P, "output_masking": P, "expert_dropout": P}
"""Every switch on."""


def model_of(config: ModelConfig) -> Seq2Seq:
    """A float64 model of fixed parameters whose gates have preferences."""
    torch.manual_seed(4)
    model = Seq2Seq(config, TINY_VOCAB).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def assert_share(dropped: Tensor, p: float) -> None:
    """The share of what was dropped is `p`, up to five standard deviations."""
    assert dropped.double().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / dropped.numel()) ** 0.5)


# --------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_a_token_is_dropped_as_a_whole_and_the_mean_stays(p: float) -> None:
    x_ND = torch.rand(20000, 3) + 1.0
    y_ND = drop_tokens(x_ND, p)
    dropped_N = (y_ND == 0).all(1)
    assert_share(dropped_N, p)
    torch.testing.assert_close(y_ND[~dropped_N], x_ND[~dropped_N] / (1 - p))
    torch.testing.assert_close(y_ND.mean(0), x_ND.mean(0), rtol=0.05, atol=0.0)


def inputs_of(model: Seq2Seq, batch: Batch) -> list[Tensor]:
    """The embedded source and target of a pass, as the first LSTMs get them."""
    found: list[Tensor] = []
    hooks = [
        lstm.register_forward_pre_hook(lambda _, given: found.append(given[0]))
        for lstm in (model.encoder.bottom, model.decoder.bottom)
    ]
    model(batch)
    for hook in hooks:
        hook.remove()
    return found


def test_tokens_of_both_sides_are_dropped_in_training_alone(tiny_config: Configs, tiny_batch: Batches) -> None:
    batch = tiny_batch(*[(9, 8)] * 200)
    model = model_of(tiny_config(word_dropout=P))
    whole = inputs_of(model.eval(), batch)
    for x_ND, whole_ND in zip(inputs_of(model.train(), batch), whole, strict=True):
        assert (whole_ND != 0).all()
        dropped_N = (x_ND == 0).all(1)
        assert_share(dropped_N, P)
        torch.testing.assert_close(x_ND[~dropped_N], whole_ND[~dropped_N] / (1 - P))


# ------------------------------------------------------------------------------------------------- hidden units


def moe_of(hidden_sizes: Sequence[int] = (6,), **settings: Any) -> MoE:
    moe = MoE(5, 4, MoEConfig(num_experts=4, k=2, hidden_sizes=list(hidden_sizes), **settings)).double()
    for parameter in moe.parameters():
        nn.init.normal_(parameter)
    return moe


def with_masks(moe: MoE, x_TD: Tensor, gate: GateOutput) -> Tensor:
    """The layer's output, expert by expert, with masks drawn in the order of the layers, for rows sorted by expert."""
    count = gate.expert_TK.numel()
    masks = [F.dropout(x_TD.new_ones(count, w_EIO.shape[2]), P) for w_EIO in list(moe.experts.weights)[:-1]]
    y_TD, row = torch.zeros_like(x_TD), 0
    for e in range(moe.num_experts):
        for t, k in (gate.expert_TK == e).nonzero().tolist():
            h_D = x_TD[t]
            for w_EIO, mask_RH in zip(moe.experts.weights, masks, strict=False):
                h_D = (h_D @ w_EIO[e]).relu() * mask_RH[row]
            one_D = h_D @ moe.experts.weights[-1][e]
            y_TD = y_TD.index_add(0, torch.tensor([t]), (gate.gates_TK[t, k] * one_D)[None])
            row += 1
    assert row == count
    return y_TD


@pytest.mark.parametrize("hidden_sizes", [[6], [4, 7], [3, 7, 8]], ids=len)
def test_experts_with_dropped_units_and_their_gradients_equal_a_loop_with_masks(hidden_sizes: list[int]) -> None:
    moe = moe_of(hidden_sizes, expert_dropout=P, gating="softmax_top_k").train()
    x_TD = torch.randn(30, 5, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(7)
    y_TD, gate = moe(x_TD)
    torch.manual_seed(7)
    expected_TD = with_masks(moe, x_TD, gate)
    torch.testing.assert_close(y_TD, expected_TD)
    leaves, direction_TD = [x_TD, *moe.parameters()], torch.randn_like(y_TD)
    gradients = torch.autograd.grad(y_TD, leaves, direction_TD, retain_graph=True)
    for gradient, oracle in zip(gradients, torch.autograd.grad(expected_TD, leaves, direction_TD), strict=True):
        assert oracle.any()
        torch.testing.assert_close(gradient, oracle)


def test_the_share_of_units_dropped_and_their_mean() -> None:
    h_RH = torch.rand(500, 40) + 1.0
    y_RH = drop_hidden(h_RH, P)
    assert_share(y_RH == 0, P)
    torch.testing.assert_close(y_RH[y_RH != 0], h_RH[y_RH != 0] / (1 - P))


def test_experts_without_rows_drop_nothing() -> None:
    moe = moe_of(expert_dropout=P).train()
    x_TD = torch.zeros(0, 5, dtype=torch.float64, requires_grad=True)
    y_TD, _ = moe(x_TD)
    assert y_TD.shape == (0, 5)
    y_TD.sum().backward()
    assert not any(w_EIO.grad.any() for w_EIO in moe.experts.weights)


# ---------------------------------------------------------------------------------------------- experts' outputs


def test_the_share_of_outputs_left_out_and_no_scale_of_the_others() -> None:
    gates_TK = torch.rand(8000, 3) + 0.1
    masked_TK = mask_outputs(gates_TK, P)
    assert_share(masked_TK == 0, P)
    assert torch.equal(masked_TK[masked_TK != 0], gates_TK[masked_TK != 0])
    # Slot by slot: all three of a token with P^3.
    assert_share((masked_TK == 0).all(1), P**3)


GATINGS: dict[str, dict[str, Any]] = {
    "noisy_top_k": {},
    "softmax_top_k": {},
    "hierarchical": {"branching": 2, "k": 1},
    "strictly_balanced": {},
}


@pytest.mark.parametrize("output", ["none", "sigmoid"])
@pytest.mark.parametrize("gating", GATINGS)
def test_masking_leaves_all_that_a_gate_decides_and_drops_terms_of_the_sum(gating: str, output: str) -> None:
    settings = {"num_experts": 4, "k": 2, "gating": gating, "output": output, "hidden_sizes": [6]} | GATINGS[gating]
    moe = MoE(5, 4, MoEConfig(**settings, output_masking=P)).double().train()
    for parameter in moe.parameters():
        nn.init.normal_(parameter)
    x_TD = torch.randn(40, 5, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(7)
    y_TD, gate = moe(x_TD)
    # The gate draws its noise first, so that it would draw the same without a mask.
    torch.manual_seed(7)
    expected = moe.gate(x_TD)
    mask_TK = torch.empty_like(gate.gates_TK).bernoulli_(1 - P)
    for found, own in zip(
        [*gate[:2], *gate.sums.parts(), gate.own_loss],
        [*expected[:2], *expected.sums.parts(), expected.own_loss],
        strict=True,
    ):
        assert torch.equal(found, own)
    outputs_ETD = torch.stack([(x_TD @ a).relu() @ b for a, b in zip(*moe.experts.weights, strict=True)])
    padded_ETD = F.pad(outputs_ETD, (0, 0, 0, 0, 0, 1))
    terms_TKD = padded_ETD[expected.expert_TK, torch.arange(40)[:, None]]
    oracle_TD = ((expected.gates_TK * mask_TK)[:, :, None] * terms_TKD).sum(1)
    oracle_TD = oracle_TD.sigmoid() if output == "sigmoid" else oracle_TD
    torch.testing.assert_close(y_TD, oracle_TD)
    balance = gate.sums.importance_E.square().sum() + gate.own_loss
    own_balance = expected.sums.importance_E.square().sum() + expected.own_loss
    leaves, direction_TD = [x_TD, *moe.parameters()], torch.randn_like(y_TD)
    gradients = torch.autograd.grad((y_TD * direction_TD).sum() + balance, leaves, allow_unused=True)
    oracles = torch.autograd.grad((oracle_TD * direction_TD).sum() + own_balance, leaves, allow_unused=True)
    for gradient, oracle in zip(gradients, oracles, strict=True):
        torch.testing.assert_close(gradient, oracle)


# -------------------------------------------------------------------------------------------------------- all


def test_outside_training_every_switch_is_off(tiny_config: Configs, tiny_batch: Batches) -> None:
    batch = tiny_batch((4, 2), (1, 6))
    plain, switched = (model_of(tiny_config(**changes)) for changes in ({}, ALL))
    state = torch.get_rng_state()
    assert torch.equal(switched.eval()(batch).loss, plain.eval()(batch).loss)
    assert torch.equal(torch.get_rng_state(), state)
    for switch in ALL:
        one = model_of(tiny_config(**{switch: ALL[switch]})).train()
        torch.manual_seed(5)
        changed = one(batch).loss
        torch.manual_seed(5)
        assert not torch.equal(changed, plain.train()(batch).loss), switch


@pytest.mark.parametrize("value", [-0.1, 1.0])
@pytest.mark.parametrize("key", ["model.word_dropout", "model.moe.output_masking", "model.moe.expert_dropout"])
def test_a_probability_lies_below_1(key: str, value: float) -> None:
    kind = MoEConfig if "moe" in key else ModelConfig
    with pytest.raises(ValueError, match=rf"^{key}={value} must lie in 0 <= value < 1"):
        kind(**{key.rpartition(".")[2]: value})
