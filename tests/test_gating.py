"""Gates against their definitions: noisy top-k (S17 section 2.1, 4, appendix A), strictly balanced (appendix F).

All gates with the layer behind them: test_gates.py.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from nmt.config import MoEConfig
from nmt.model.experts import LocalDispatcher, MoE
from nmt.model.gating import (
    THRESHOLD_SCALE,
    GateSums,
    NoisyTopKGate,
    StrictlyBalancedGate,
    balance_loss,
    batchwise_loss,
    batchwise_mask,
    cv_squared,
)
from nmt.model.kernels.gate import MIN_NOISE_STD, count_tokens, keep_top_k, prob_in_top_k

WIDTH = 5
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
    return x_TD @ gate.w_gate_DE, F.softplus(x_TD @ gate.w_noise_DE) + MIN_NOISE_STD


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
    gates, experts, _ = keep_top_k(torch.tensor([[1.0, 2.0, 3.0, 0.0]]), 2)
    assert experts.tolist() == [[2, 1]]
    expected = [math.exp(3) / (math.exp(3) + math.exp(2)), math.exp(2) / (math.exp(3) + math.exp(2))]
    assert gates[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("num_experts", "k"), [*SIZES, (4, 4)])
def test_keep_top_k_equals_a_softmax_with_the_rest_at_minus_infinity(num_experts: int, k: int):
    logits_TE = torch.randn(50, num_experts, dtype=torch.float64)
    gates_TK, expert_TK, _ = keep_top_k(logits_TE, k)
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
    torch.testing.assert_close(prob_in_top_k(clean_TE, std_TE, *noisy_TE.topk(k + 1)), expected_TE, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("num_experts", "k"), SIZES)
def test_load_of_the_gate_is_the_definition_with_the_noise_it_drew(num_experts: int, k: int):
    gate, x_TD = trained_gate(6, num_experts, k), torch.randn(30, 6, dtype=torch.float64)
    clean_TE, std_TE = clean_and_std(gate, x_TD)
    noisy_TE = clean_TE + std_TE * noise_of(7, 30, num_experts)
    torch.manual_seed(7)
    out = gate(x_TD)
    torch.testing.assert_close(out.sums.load_E, load_by_definition(clean_TE, noisy_TE, std_TE, k).sum(0))
    gates_TK, expert_TK, _ = keep_top_k(noisy_TE, k)
    assert torch.equal(out.expert_TK, expert_TK)
    dense_TE = torch.zeros_like(noisy_TE).scatter(1, expert_TK, gates_TK)
    torch.testing.assert_close(out.sums.importance_E, dense_TE.sum(0))
    torch.testing.assert_close(out.sums.count_E.double(), (dense_TE > 0).double().sum(0))
    torch.testing.assert_close(out.noise_std, std_TE.mean())
    assert out.num_routed == 30 * k
    assert out.own_loss == 0


def test_load_is_how_often_an_expert_is_chosen_when_its_own_noise_is_drawn_again():
    """Monte Carlo with the noise of the other experts held: what equation 8 says in words."""
    num_tokens, num_experts, k, redraws = 24, 8, 3, 4000
    gate, x_TD = trained_gate(6, num_experts, k), torch.randn(num_tokens, 6, dtype=torch.float64)
    clean_TE, std_TE = clean_and_std(gate, x_TD)
    noisy_TE = clean_TE + std_TE * noise_of(7, num_tokens, num_experts)
    torch.manual_seed(7)
    load_E = gate(x_TD).sums.load_E
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
    load_ME = torch.stack([out.sums.load_E for out in outs])
    count_ME = torch.stack([out.sums.count_E.double() for out in outs])
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


@pytest.mark.parametrize(("w_noise", "std"), [(0.0, math.log(2.0) + MIN_NOISE_STD), (-1000.0, MIN_NOISE_STD)])
def test_noise_starts_at_ln_2_and_never_falls_below_its_floor(w_noise: float, std: float):
    gate, x_TD = NoisyTopKGate(2, 5, 5).double(), torch.rand(20, 2, dtype=torch.float64) + 0.5
    torch.nn.init.constant_(gate.w_noise_DE, w_noise)
    noise_TE = std * noise_of(11, 20, 5)
    torch.testing.assert_close(noise_seen(gate, x_TD, 11), noise_TE - noise_TE.mean(1, keepdim=True))


def test_noise_that_was_learnt_away_can_come_back():
    gate, x_TD = trained_gate(2, 5, 2), torch.rand(20, 2, dtype=torch.float64) + 0.5
    torch.nn.init.constant_(gate.w_noise_DE, -4.0)  # softplus(x . w_noise) of 0.0003 to 0.02
    balance_loss(gate(x_TD).sums, 1.0, 1.0).backward()
    assert gate.w_noise_DE.grad.abs().max() > 1e-5


def test_a_gate_that_learnt_away_its_noise_has_a_finite_load_and_gradient():
    gate, x_TD = trained_gate(2, 5, 2), torch.rand(20, 2, dtype=torch.float64) + 0.5
    torch.nn.init.constant_(gate.w_noise_DE, -1000.0)
    out = gate(x_TD)
    balance_loss(out.sums, 1.0, 1.0).backward()
    assert out.sums.load_E.isfinite().all()
    assert gate.w_gate_DE.grad.isfinite().all()
    assert gate.w_noise_DE.grad.isfinite().all()


def test_evaluation_has_no_noise_and_counts_hard():
    gate, x_TD = trained_gate(6, 8, 3).eval(), torch.randn(40, 6, dtype=torch.float64)
    out = gate(x_TD)
    gates_TK, expert_TK, _ = keep_top_k(x_TD @ gate.w_gate_DE, 3)
    assert torch.equal(out.expert_TK, expert_TK)
    assert torch.equal(out.gates_TK, gates_TK)
    assert torch.equal(out.sums.load_E, out.sums.count_E)
    assert out.noise_std == 0
    gate.train()
    assert not torch.equal(gate(x_TD).gates_TK, gates_TK)


def test_with_k_equal_to_e_the_load_is_the_hard_count():
    out = trained_gate(6, 4, 4)(torch.randn(9, 6, dtype=torch.float64))
    assert out.sums.load_E.tolist() == [9.0] * 4
    assert not out.sums.load_E.requires_grad
    assert out.sums.importance_E.requires_grad


@pytest.mark.parametrize("field", ["importance_E", "load_E"])
def test_gradients_of_the_balance_terms_are_right_and_reach_both_weights(field: str):
    gate, x_TD = trained_gate(4, 5, 2), torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    direction_E = torch.randn(5, dtype=torch.float64)

    def value(w_gate_DE: Tensor, w_noise_DE: Tensor, x_TD: Tensor) -> Tensor:
        torch.manual_seed(5)  # the same noise at every evaluation
        weights = {"w_gate_DE": w_gate_DE, "w_noise_DE": w_noise_DE}
        return getattr(functional_call(gate, weights, x_TD).sums, field) @ direction_E

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
    sums = GateSums(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0]), torch.tensor([9.0, 0.0]))
    assert balance_loss(sums, 0.1, 0.0).item() == pytest.approx(0.1 * 0.25)
    assert balance_loss(sums, 0.0, 0.1).item() == pytest.approx(0.1 * 1.0)
    assert balance_loss(sums, 0.1, 0.3).item() == pytest.approx(0.025 + 0.3)


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
    assert all(w_EIO.grad.any() for w_EIO in moe.experts.weights)


def test_an_untrained_gate_is_balanced_by_its_noise_alone():
    """Without noise all logits tie and every token takes the same experts: no load to judge at step 0."""
    gate, x_TD = NoisyTopKGate(6, 16, 4), torch.randn(4096, 6)
    noisy = gate(x_TD).sums.count_E
    assert noisy.max() / noisy.mean() < 1.2
    tied = gate.eval()(x_TD)
    assert sorted(tied.sums.count_E.tolist()) == [0.0] * 12 + [4096.0] * 4


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
    noise_TE = torch.randn(20, 8, generator=torch.manual_seed(3)) * (math.log(2.0) + MIN_NOISE_STD)
    noisy_TE = x_TD @ gate.w_gate_DE + noise_TE
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gate(x_TD)
    gates_TK, expert_TK, _ = keep_top_k(noisy_TE, 2)
    assert torch.equal(out.expert_TK, expert_TK)
    torch.testing.assert_close(out.gates_TK, gates_TK)
    assert out.sums.load_E.dtype == out.sums.importance_E.dtype == torch.float32


# --------------------------------------------------------------------------------------------- strictly balanced


@pytest.mark.parametrize(("tokens", "experts", "m"), [(1, 1, 1), (6, 4, 3), (40, 8, 5), (5, 3, 5), (9, 2, 1)])
def test_batchwise_mask_is_the_m_largest_of_each_column(tokens: int, experts: int, m: int):
    x_TE = torch.rand(tokens, experts, dtype=torch.float64)
    mask_TE = batchwise_mask(x_TE, m)
    assert mask_TE.dtype == torch.bool
    for i in range(experts):
        column = x_TE[:, i].tolist()
        chosen = {j for j in range(tokens) if mask_TE[j, i]}
        assert len(chosen) == m
        assert chosen == set(sorted(range(tokens), key=lambda j, c=column: -c[j])[:m])


def test_batchwise_loss_is_its_definition():
    x_TE, threshold_E = torch.rand(30, 6, dtype=torch.float64), torch.rand(6, dtype=torch.float64, requires_grad=True)
    mask_TE = batchwise_mask(x_TE, 10)
    loss = batchwise_loss(x_TE, threshold_E, mask_TE)
    expected, difference_sums = 0.0, [0] * 6
    for j in range(30):
        for i in range(6):
            difference = int(x_TE[j, i] > threshold_E[i]) - int(mask_TE[j, i])
            expected += difference * (x_TE[j, i] - threshold_E[i]).item()
            difference_sums[i] += difference
    assert loss.item() == pytest.approx(expected)
    assert torch.autograd.grad(loss, threshold_E)[0].tolist() == [-total for total in difference_sums]
    # Zero iff thresholds lie between the m-th and the next value of each column.
    sorted_TE = x_TE.sort(0, descending=True).values
    assert batchwise_loss(x_TE, (sorted_TE[9] + sorted_TE[10]) / 2, mask_TE) == 0
    for i in range(6):
        for wrong in ((sorted_TE[10, i] + sorted_TE[11, i]) / 2, (sorted_TE[8, i] + sorted_TE[9, i]) / 2):
            threshold_E = (sorted_TE[9] + sorted_TE[10]) / 2
            threshold_E[i] = wrong
            assert batchwise_loss(x_TE, threshold_E, mask_TE) > 0


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k", "m"),
    [(1, 1, 1, 1), (6, 4, 2, 3), (12, 6, 1, 2), (10, 3, 3, 10), (5, 16, 2, 1), (3, 16, 1, 1), (31, 8, 4, 16)],
)
def test_every_expert_gets_exactly_m_tokens_and_only_thresholds_learn_of_it(
    num_tokens: int, num_experts: int, k: int, m: int
):
    config = MoEConfig(num_experts=num_experts, k=k, gating="strictly_balanced", hidden_sizes=[2])
    moe = MoE(WIDTH, num_experts, config).double()
    gate, x_TD = moe.gate, torch.randn(num_tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    torch.nn.init.normal_(gate.w_gate_DE)
    torch.nn.init.normal_(gate.threshold_E, mean=-2.0 / THRESHOLD_SCALE, std=1.0 / THRESHOLD_SCALE)
    out = gate(x_TD)
    assert out.sums.count_E.tolist() == [m] * num_experts
    assert out.num_routed == m * num_experts
    assert torch.equal(out.sums.load(), out.sums.count_E)
    assert isinstance(moe.dispatcher, LocalDispatcher)
    ends_E, _ = moe.dispatcher.sort(out)
    assert ends_E.tolist() == [m * (e + 1) for e in range(num_experts)]
    log_TE = (x_TD @ gate.w_gate_DE).log_softmax(1)
    by_threshold_TE = log_TE > THRESHOLD_SCALE * gate.threshold_E
    difference_TE = by_threshold_TE.double() - batchwise_mask(log_TE, m).double()
    assert out.own_loss >= 0
    assert (out.own_loss == 0) == (not difference_TE.any())
    of_x_TD, of_gate_DE, of_threshold_E = torch.autograd.grad(
        out.own_loss, (x_TD, gate.w_gate_DE, gate.threshold_E), allow_unused=True
    )
    assert of_x_TD is of_gate_DE is None
    torch.testing.assert_close(of_threshold_E, -THRESHOLD_SCALE * difference_TE.sum(0) / num_tokens)


def test_gates_too_small_for_float32_still_sum_to_one():
    """A token may go to experts alone that it hardly wants: their softmax values underflow, not their ratio."""
    gate = StrictlyBalancedGate(4, 4, 1)
    gate.w_gate_DE = torch.nn.Parameter(torch.eye(4))
    x_TD = torch.tensor([[0.0, -150.0, -150.5, 0.0], [0.0, -200.0, -200.0, 1.0], [1.0, -300.0, -300.0, 0.0]])
    out = gate(x_TD.requires_grad_())
    assert out.expert_TK.tolist() == [[1, 2], [3, 4], [0, 4]]
    expected = torch.tensor([0.5, 0.0]).softmax(0).tolist()
    assert out.gates_TK.flatten().tolist() == pytest.approx([*expected, 1.0, 0.0, 1.0, 0.0])
    out.gates_TK[0, 0].backward()
    slope = expected[0] * expected[1]
    assert x_TD.grad[0].tolist() == pytest.approx([0.0, slope, -slope, 0.0], abs=1e-6)


def test_an_expert_whose_gate_is_zero_still_gets_its_m_tokens():
    gate = StrictlyBalancedGate(3, 3, 1)
    gate.w_gate_DE = torch.nn.Parameter(torch.eye(3))
    out = gate(torch.tensor([[2.0, 1.0, -200.0], [0.0, 2.0, -300.0], [0.0, 0.0, -300.0]]))
    assert out.expert_TK.tolist() == [[0, 2], [1, 3], [3, 3]]
    assert out.gates_TK.tolist() == [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    assert out.num_routed == 3


def train_thresholds(gate: StrictlyBalancedGate, steps: int, gain: Callable[[int], float]) -> None:
    """Adam at the default rate, on the thresholds alone; w_gate grows by `gain` from its start."""
    start_DE = gate.w_gate_DE.detach().clone()
    adam = torch.optim.Adam([gate.threshold_E], lr=2e-3, betas=(0.9, 0.98), eps=1e-9)
    for step in range(steps):
        gate.w_gate_DE.data = gain(step) * start_DE
        adam.zero_grad()
        gate(tokens_of_a_kind(512)).own_loss.backward()
        adam.step()
    gate.w_gate_DE.data = gain(steps) * start_DE


def tokens_of_a_kind(count: int) -> Tensor:
    """Tokens that like some experts better than others."""
    return torch.randn(count, WIDTH) + torch.linspace(-1.0, 1.0, WIDTH)


def agreement(gate: StrictlyBalancedGate) -> tuple[float, float, float]:
    """On new tokens: (share of token-expert pairs, chosen by either mask, that both choose; experts per token;
    largest over mean load) with thresholds against the batchwise mask."""
    x_TD = tokens_of_a_kind(4096)
    out = gate.eval()(x_TD)
    gate.train()
    log_TE = (x_TD @ gate.w_gate_DE).log_softmax(1)
    mask_TE = batchwise_mask(log_TE, round(gate.k * 4096 / gate.num_experts))
    chosen_TE = torch.zeros(4096, gate.num_experts + 1, dtype=torch.bool).scatter(1, out.expert_TK, True)[:, :-1]
    both = (mask_TE & chosen_TE).sum() / (mask_TE | chosen_TE).sum()
    count_E = out.sums.count_E
    return both.item(), out.num_routed / 4096, (count_E.max() / count_E.mean()).item()


@pytest.mark.parametrize("sharpens", [False, True])
def test_thresholds_come_to_choose_as_the_batch_did(sharpens: bool):
    gate = StrictlyBalancedGate(WIDTH, 8, 2)
    torch.nn.init.normal_(gate.w_gate_DE, std=WIDTH**-0.5)
    torch.nn.init.constant_(gate.threshold_E, -math.log(8) / THRESHOLD_SCALE)
    assert agreement(gate)[0] < 0.7
    train_thresholds(gate, 500, lambda step: 1.0 + 3.0 * min(step / 300, 1.0) if sharpens else 1.0)
    both, per_token, most = agreement(gate)
    assert both > 0.93
    assert per_token == pytest.approx(2.0, rel=0.05)
    assert most < 1.15
