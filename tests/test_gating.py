"""The noisy top-k gate against its definitions (S17 section 2.1, 4 and appendix A)."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from nmt.config import MoEConfig
from nmt.model.experts import MoE
from nmt.model.gating import (
    MIN_NOISE_STD,
    GateOutput,
    NoisyTopKGate,
    balance_loss,
    count_tokens,
    cv_squared,
    keep_top_k,
    prob_in_top_k,
)

SIZES = [(2, 1), (3, 2), (5, 1), (8, 3), (16, 4), (16, 15)]


def trained_gate(width: int, num_experts: int, k: int) -> NoisyTopKGate:
    """A float64 gate in training mode with preferences and with noise that depends on the token."""
    gate = NoisyTopKGate(width, num_experts, k).double()
    torch.nn.init.normal_(gate.w_gate_DE, std=0.5)
    torch.nn.init.normal_(gate.w_noise_DE, std=0.5)
    return gate


def noise_of(seed: int, num_tokens: int, num_experts: int) -> Tensor:
    """The noise that a float64 gate draws after this seed."""
    return torch.randn(num_tokens, num_experts, dtype=torch.float64, generator=torch.manual_seed(seed))


def clean_and_std(gate: NoisyTopKGate, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    return x_TD @ gate.w_gate_DE, F.softplus(x_TD @ gate.w_noise_DE).clamp_min(MIN_NOISE_STD)


def kth_excluding(values: list[float], k: int, i: int) -> float:
    """The k-th largest of the values without the i-th (S17 appendix A)."""
    return sorted(values[:i] + values[i + 1 :], reverse=True)[k - 1]


def load_by_definition(clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, k: int) -> Tensor:
    """S17 eq. 8-9, one token and expert at a time."""
    prob_TE = torch.zeros_like(clean_TE)
    for t, (clean, noisy, std) in enumerate(zip(clean_TE.tolist(), noisy_TE.tolist(), std_TE.tolist(), strict=True)):
        for i in range(len(clean)):
            z = (clean[i] - kth_excluding(noisy, k, i)) / std[i]
            prob_TE[t, i] = 0.5 * (1.0 + math.erf(z / math.sqrt(2.0)))
    return prob_TE


def test_softmax_is_taken_over_the_kept_logits_only():
    gates, experts = keep_top_k(torch.tensor([[1.0, 2.0, 3.0, 0.0]]), 2)
    assert experts.tolist() == [[2, 1]]
    expected = [math.exp(3) / (math.exp(3) + math.exp(2)), math.exp(2) / (math.exp(3) + math.exp(2))]
    assert gates[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("num_experts", "k"), [*SIZES, (4, 4)])
def test_keep_top_k_equals_a_softmax_with_the_rest_at_minus_infinity(num_experts: int, k: int):
    logits_TE = torch.randn(50, num_experts, dtype=torch.float64)
    gates_TK, expert_TK = keep_top_k(logits_TE, k)
    kth_T1 = logits_TE.sort(dim=1, descending=True).values[:, k - 1 : k]
    expected_TE = logits_TE.masked_fill(logits_TE < kth_T1, -math.inf).softmax(dim=1)
    torch.testing.assert_close(torch.zeros_like(logits_TE).scatter(1, expert_TK, gates_TK), expected_TE)
    assert (gates_TK.diff(dim=1) <= 0).all()


@pytest.mark.parametrize(("num_experts", "k"), SIZES)
def test_prob_in_top_k_is_its_definition(num_experts: int, k: int):
    clean_TE = torch.randn(40, num_experts, dtype=torch.float64)
    std_TE = torch.rand_like(clean_TE) + 0.1
    noisy_TE = clean_TE + std_TE * torch.randn_like(clean_TE)
    expected_TE = load_by_definition(clean_TE, noisy_TE, std_TE, k)
    torch.testing.assert_close(prob_in_top_k(clean_TE, noisy_TE, std_TE, k), expected_TE, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("num_experts", "k"), SIZES)
def test_load_of_the_gate_is_the_definition_with_the_noise_it_drew(num_experts: int, k: int):
    gate, x_TD = trained_gate(6, num_experts, k), torch.randn(30, 6, dtype=torch.float64)
    clean_TE, std_TE = clean_and_std(gate, x_TD)
    noisy_TE = clean_TE + std_TE * noise_of(7, 30, num_experts)
    torch.manual_seed(7)
    out = gate(x_TD)
    torch.testing.assert_close(out.load_E, load_by_definition(clean_TE, noisy_TE, std_TE, k).sum(0))
    gates_TK, expert_TK = keep_top_k(noisy_TE, k)
    assert torch.equal(out.expert_TK, expert_TK)
    dense_TE = torch.zeros_like(noisy_TE).scatter(1, expert_TK, gates_TK)
    torch.testing.assert_close(out.importance_E, dense_TE.sum(0))
    torch.testing.assert_close(out.count_E.double(), (dense_TE > 0).double().sum(0))


def test_load_is_how_often_an_expert_is_chosen_when_its_own_noise_is_drawn_again():
    """Monte Carlo with the noise of the other experts held: what equation 8 says in words."""
    num_tokens, num_experts, k, redraws = 24, 8, 3, 4000
    gate, x_TD = trained_gate(6, num_experts, k), torch.randn(num_tokens, 6, dtype=torch.float64)
    clean_TE, std_TE = clean_and_std(gate, x_TD)
    noisy_TE = clean_TE + std_TE * noise_of(7, num_tokens, num_experts)
    torch.manual_seed(7)
    load_E = gate(x_TD).load_E
    for i in range(num_experts):
        redrawn_MTE = noisy_TE.expand(redraws, -1, -1).clone()
        redrawn_MTE[:, :, i] = clean_TE[:, i] + std_TE[:, i] * torch.randn(redraws, num_tokens)
        chosen_T = (redrawn_MTE.topk(k, dim=2).indices == i).any(2).double().mean(0)
        error = (chosen_T * (1 - chosen_T) / redraws).sum().sqrt()
        assert abs(load_E[i] - chosen_T.sum()) < 5 * error + 1e-3


@pytest.mark.parametrize("trained", [False, True])
def test_load_sums_to_k_per_token_and_agrees_with_the_counts(trained: bool):
    num_tokens, num_experts, k, draws = 1024, 16, 4, 30
    gate = trained_gate(6, num_experts, k)
    if not trained:
        torch.nn.init.zeros_(gate.w_gate_DE)
        torch.nn.init.zeros_(gate.w_noise_DE)
    x_TD = torch.randn(num_tokens, 6, dtype=torch.float64)
    with torch.no_grad():
        outs = [gate(x_TD) for _ in range(draws)]
    load_ME = torch.stack([out.load_E for out in outs])
    count_ME = torch.stack([out.count_E.double() for out in outs])
    assert (count_ME.sum(1) == k * num_tokens).all()
    sums_M = load_ME.sum(1)
    assert sums_M.mean() == pytest.approx(k * num_tokens, abs=5 * sums_M.std().item() / draws**0.5)
    assert sums_M.mean() == pytest.approx(k * num_tokens, rel=0.01)
    difference_ME = load_ME - count_ME
    assert (difference_ME.mean(0).abs() < 5 * difference_ME.std(0) / draws**0.5).all()
    # The estimate is there because it varies less than what it estimates.
    assert load_ME.var(0).mean() < count_ME.var(0).mean()


def noise_seen(gate: NoisyTopKGate, x_TD: Tensor, seed: int) -> Tensor:
    """Noisy logits less their mean over the experts, read off the gates: needs k = E."""
    torch.manual_seed(seed)
    out = gate(x_TD)
    logits_TE = torch.zeros_like(out.gates_TK).scatter(1, out.expert_TK, out.gates_TK.log())
    return logits_TE - logits_TE.mean(1, keepdim=True)


@pytest.mark.parametrize(("w_noise", "std"), [(0.0, math.log(2.0)), (-1000.0, MIN_NOISE_STD)])
def test_noise_starts_at_ln_2_and_never_falls_below_its_floor(w_noise: float, std: float):
    gate, x_TD = NoisyTopKGate(2, 5, 5).double(), torch.rand(20, 2, dtype=torch.float64) + 0.5
    torch.nn.init.constant_(gate.w_noise_DE, w_noise)
    noise_TE = std * noise_of(11, 20, 5)
    torch.testing.assert_close(noise_seen(gate, x_TD, 11), noise_TE - noise_TE.mean(1, keepdim=True))


def test_a_gate_that_learnt_away_its_noise_has_a_finite_load_and_gradient():
    gate, x_TD = trained_gate(2, 5, 2), torch.rand(20, 2, dtype=torch.float64) + 0.5
    torch.nn.init.constant_(gate.w_noise_DE, -1000.0)
    out = gate(x_TD)
    balance_loss(out, 1.0, 1.0).backward()
    assert out.load_E.isfinite().all()
    assert gate.w_gate_DE.grad.isfinite().all()
    assert gate.w_noise_DE.grad.isfinite().all()


def test_evaluation_has_no_noise_and_counts_hard():
    gate, x_TD = trained_gate(6, 8, 3).eval(), torch.randn(40, 6, dtype=torch.float64)
    out = gate(x_TD)
    gates_TK, expert_TK = keep_top_k(x_TD @ gate.w_gate_DE, 3)
    assert torch.equal(out.expert_TK, expert_TK)
    assert torch.equal(out.gates_TK, gates_TK)
    assert torch.equal(out.load_E, out.count_E)
    gate.train()
    assert not torch.equal(gate(x_TD).gates_TK, gates_TK)


def test_with_k_equal_to_e_the_load_is_the_hard_count():
    out = trained_gate(6, 4, 4)(torch.randn(9, 6, dtype=torch.float64))
    assert out.load_E.tolist() == [9.0] * 4
    assert not out.load_E.requires_grad
    assert out.importance_E.requires_grad


@pytest.mark.parametrize("field", ["importance_E", "load_E"])
def test_gradients_of_the_balance_terms_are_right_and_reach_both_weights(field: str):
    gate, x_TD = trained_gate(4, 5, 2), torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    direction_E = torch.randn(5, dtype=torch.float64)

    def value(w_gate_DE: Tensor, w_noise_DE: Tensor, x_TD: Tensor) -> Tensor:
        torch.manual_seed(5)  # the same noise at every evaluation
        weights = {"w_gate_DE": w_gate_DE, "w_noise_DE": w_noise_DE}
        return getattr(functional_call(gate, weights, x_TD), field) @ direction_E

    inputs = (gate.w_gate_DE, gate.w_noise_DE, x_TD)
    assert torch.autograd.gradcheck(value, inputs)
    for gradient in torch.autograd.grad(value(*inputs), inputs):
        assert gradient.abs().max() > 1e-3


def test_cv_squared_is_population_variance_over_squared_mean():
    assert cv_squared(torch.tensor([1.0, 3.0])).item() == pytest.approx(0.25)
    assert cv_squared(torch.tensor([5.0] * 7)).item() == 0.0
    x_E = torch.rand(16)
    assert cv_squared(x_E).item() == pytest.approx(cv_squared(100 * x_E).item(), rel=1e-5)
    assert cv_squared(torch.zeros(4)).item() == 0.0


def test_balance_loss_weighs_importance_and_load():
    unused = torch.zeros(0)
    gate = GateOutput(unused, unused, torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0]), torch.tensor([9.0, 0.0]))
    assert balance_loss(gate, 0.1, 0.0).item() == pytest.approx(0.1 * 0.25)
    assert balance_loss(gate, 0.0, 0.1).item() == pytest.approx(0.1 * 1.0)
    assert balance_loss(gate, 0.1, 0.3).item() == pytest.approx(0.025 + 0.3)


@pytest.mark.parametrize("k", [1, 2])
def test_the_task_teaches_the_gate_only_with_two_experts_or_more(k: int):
    moe = MoE(6, 4, MoEConfig(num_experts=4, k=k, hidden_sizes=[5])).double()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    y_TD, gate = moe(torch.randn(10, 6, dtype=torch.float64))
    y_TD.square().sum().backward()
    if k == 1:
        assert (gate.gates_TK == 1).all()
        assert not moe.gate.w_gate_DE.grad.any()
        assert not moe.gate.w_noise_DE.grad.any()
    else:
        assert moe.gate.w_gate_DE.grad.any()
        assert moe.gate.w_noise_DE.grad.any()
    assert moe.experts.w1_EDH.grad.any()


def test_an_untrained_gate_is_balanced_by_its_noise_alone():
    """Without noise all logits tie and every token takes the same experts: no load to judge at step 0."""
    gate, x_TD = NoisyTopKGate(6, 16, 4), torch.randn(4096, 6)
    noisy = gate(x_TD).count_E
    assert noisy.max() / noisy.mean() < 1.2
    tied = gate.eval()(x_TD)
    assert sorted(tied.count_E.tolist()) == [0.0] * 12 + [4096.0] * 4


@pytest.mark.parametrize(("num_tokens", "num_experts", "k"), [(1, 1, 1), (1, 6, 2), (30, 4, 2), (5, 40, 3)])
def test_count_tokens_counts(num_tokens: int, num_experts: int, k: int):
    expert_TK = torch.stack([torch.randperm(num_experts)[:k] for _ in range(num_tokens)])
    count_E = count_tokens(expert_TK, num_experts)
    flat = expert_TK.flatten().tolist()
    assert count_E.tolist() == [flat.count(i) for i in range(num_experts)]
    assert count_E.dtype == torch.float32


def test_the_gate_stays_in_float32_under_autocast():
    gate, x_TD = NoisyTopKGate(32, 8, 2), torch.randn(20, 32)
    torch.nn.init.normal_(gate.w_gate_DE)
    noisy_TE = x_TD @ gate.w_gate_DE + math.log(2.0) * torch.randn(20, 8, generator=torch.manual_seed(3))
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gate(x_TD)
    gates_TK, expert_TK = keep_top_k(noisy_TE, 2)
    assert torch.equal(out.expert_TK, expert_TK)
    torch.testing.assert_close(out.gates_TK, gates_TK)
    assert out.load_E.dtype == out.importance_E.dtype == torch.float32
