"""Every gate and the layer behind it against loops over tokens, groups and experts (S17 appendices A, B and F).

The noisy top-k gate alone: test_gating.py. Letters as in nmt/model/gating.py; X stands for softmax(x . w_gate).
"""

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nmt.config import MoEConfig
from nmt.model.experts import MoE
from nmt.model.gating import (
    THRESHOLD_SCALE,
    Gate,
    GateSums,
    HierarchicalGate,
    StrictlyBalancedGate,
    balance_loss,
)
from nmt.model.kernels.gate import MIN_NOISE_STD
from nmt.model.rows import sum_by_group, take_groups
from nmt.model.seq2seq import Seq2Seq
from tests.test_experts import Largest, expert_by_loops

WIDTH = 5
HIERARCHIES = [  # tokens, experts, groups, groups per token, experts per group
    (1, 1, 1, 1, 1),
    (7, 6, 1, 1, 2),
    (7, 6, 6, 2, 1),
    (9, 8, 4, 2, 2),
    (9, 8, 2, 2, 2),
    (6, 6, 3, 3, 2),
    (8, 12, 3, 2, 3),
    (3, 16, 4, 1, 2),
]
FLAT = [(1, 1, 1), (6, 4, 2), (12, 6, 1), (10, 3, 3), (5, 16, 2), (3, 16, 1), (31, 8, 4)]
"""Tokens, experts, experts per token."""


def moe_config(gating: str, num_experts: int, k: int, *levels: int, **settings: Any) -> MoEConfig:
    """`levels`: branching and primary_k, for the hierarchical gate."""
    settings |= dict(zip(("branching", "primary_k"), levels, strict=bool(levels)))
    return MoEConfig(num_experts=num_experts, k=k, gating=gating, **{"hidden_sizes": [4], **settings})


def normal_layer(config: MoEConfig) -> MoE:
    """A float64 layer of which every weight is drawn; thresholds lie among the values they cut."""
    moe = MoE(WIDTH, config.num_experts, config).double()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    if isinstance(moe.gate, StrictlyBalancedGate):
        torch.nn.init.normal_(moe.gate.threshold_E, mean=-2.0 / THRESHOLD_SCALE, std=1.0 / THRESHOLD_SCALE)
    return moe


def normal_gate(config: MoEConfig) -> Any:
    return normal_layer(config).gate


def randn(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, requires_grad=True)


# ---------------------------------------------------------------------------------------------------- the loops


class Decision(NamedTuple):
    """What a gate should have decided."""

    gates: list[dict[int, Tensor]]  # of each token: its experts and their values
    importance_E: Tensor
    load_E: Tensor
    own_loss: Tensor


def softmax(logits: list[Tensor], kept: list[int]) -> dict[int, Tensor]:
    total = sum(logits[i].exp() for i in kept)
    return {i: logits[i].exp() / total for i in kept}


def largest(values: list[Tensor], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i].item())[:count]


def noisy_top_k(
    x_D: Tensor, w_gate_DN: Tensor, w_noise_DN: Tensor, noise_N: Tensor | None, k: int
) -> tuple[dict[int, Tensor], list[Tensor]]:
    """(gates, P(x, i) of every i) of one token (S17 eq. 3-5, 8-9); without noise, P says who was chosen."""
    clean = [x_D @ w_D for w_D in w_gate_DN.T]
    if noise_N is None:
        gates = softmax(clean, largest(clean, k))
        return gates, [torch.tensor(float(i in gates)) for i in range(len(clean))]
    stds = [F.softplus(x_D @ w_D) + MIN_NOISE_STD for w_D in w_noise_DN.T]
    noisy = [mean + noise * std for mean, noise, std in zip(clean, noise_N, stds, strict=True)]
    probs = []
    for i, (mean, std) in enumerate(zip(clean, stds, strict=True)):
        others = noisy[:i] + noisy[i + 1 :]
        if len(others) < k:
            probs.append(torch.ones(()))  # always among the k largest
        else:
            kth = others[largest(others, k)[-1]]
            probs.append(0.5 * (1.0 + torch.erf((mean - kth) / std / math.sqrt(2.0))))
    return softmax(noisy, largest(noisy, k)), probs


def sum_of_gates(gates: list[dict[int, Tensor]], num_experts: int) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64)
    return torch.stack([sum((of_token.get(e, zero) for of_token in gates), zero) for e in range(num_experts)])


def hierarchical_by_loops(
    gate: HierarchicalGate, x_TD: Tensor, noise_TA: Tensor | None, noise_TPB: Tensor | None, *choices: int
) -> Decision:
    """S17 eq. 12-14. `choices`: (groups, experts per group) if not those of training."""
    primary_k, k = choices or (gate.primary_k, gate.k)
    size = gate.num_experts // gate.branching
    primary_load = [torch.zeros((), dtype=torch.float64) for _ in range(gate.branching)]
    load = [torch.zeros((), dtype=torch.float64) for _ in range(gate.num_experts)]
    members = [0] * gate.branching
    decided = []
    for t, x_D in enumerate(x_TD):
        noise_A = None if noise_TA is None else noise_TA[t]
        primary, probs = noisy_top_k(x_D, gate.primary_w_gate_DA, gate.primary_w_noise_DA, noise_A, primary_k)
        primary_load = [a + b for a, b in zip(primary_load, probs, strict=True)]
        of_token = {}
        for place, (i, primary_gate) in enumerate(primary.items()):
            members[i] += 1
            group = slice(i * size, (i + 1) * size)
            noise_B = None if noise_TPB is None else noise_TPB[t, place]
            inner, probs = noisy_top_k(x_D, gate.w_gate_DE[:, group], gate.w_noise_DE[:, group], noise_B, k)
            load[group] = [a + b for a, b in zip(load[group], probs, strict=True)]
            of_token |= {i * size + j: primary_gate * value for j, value in inner.items()}
        decided.append(of_token)
    load_h = [primary_load[e // size] * load[e] / max(members[e // size], 1) for e in range(gate.num_experts)]
    return Decision(decided, sum_of_gates(decided, gate.num_experts), torch.stack(load_h), torch.zeros(()))


def softmax_rows(w_gate_DE: Tensor, x_TD: Tensor) -> list[list[Tensor]]:
    """X: G_sigma of every token (S17 eq. 2 and 15)."""
    rows = [[x_D @ w_D for w_D in w_gate_DE.T] for x_D in x_TD]
    return [list(softmax(row, list(range(len(row)))).values()) for row in rows]


def masked_by_loops(x_TE: list[list[Tensor]], masks: list[list[bool]], own_loss: Tensor) -> Decision:
    """S17 eq. 16: G_i = X_i M_i / sum_j X_j M_j."""
    num_experts = len(masks[0])
    decided = []
    for values, mask in zip(x_TE, masks, strict=True):
        kept = [i for i in range(num_experts) if mask[i]]
        total = sum(values[i] for i in kept)
        decided.append({i: values[i] / total for i in kept})
    counts_E = torch.tensor([sum(mask[i] for mask in masks) for i in range(num_experts)], dtype=torch.float64)
    return Decision(decided, sum_of_gates(decided, num_experts), counts_E, own_loss)


def top_k_masks(x_TE: list[list[Tensor]], k: int) -> list[list[bool]]:
    """M = TopK(X, k) (S17 eq. 17)."""
    return [[i in largest(row, k) for i in range(len(row))] for row in x_TE]


def strictly_balanced_by_loops(gate: StrictlyBalancedGate, x_TD: Tensor, training: bool) -> Decision:
    """S17 eq. 15-20, with logarithms in eq. 20 as documented, per token."""
    x_TE = softmax_rows(gate.w_gate_DE, x_TD)
    tokens, experts = len(x_TE), range(gate.num_experts)
    thresholds = [(THRESHOLD_SCALE * value).exp() for value in gate.threshold_E]
    by_threshold = [[bool(row[i] > thresholds[i]) for i in experts] for row in x_TE]
    if not training:
        return masked_by_loops(x_TE, by_threshold, torch.zeros(()))
    m = max(1, round(gate.k * tokens / gate.num_experts))
    wanted_by = [largest([row[i] for row in x_TE], m) for i in experts]
    masks = [[j in wanted_by[i] for i in experts] for j in range(tokens)]
    own_loss = torch.zeros((), dtype=torch.float64)
    for j in range(tokens):
        for i in experts:
            difference = int(by_threshold[j][i]) - int(masks[j][i])
            own_loss = own_loss + difference * (x_TE[j][i].detach().log() - thresholds[i].log())
    return masked_by_loops(x_TE, masks, own_loss / tokens)


def decision_by_loops(gate: Gate, x_TD: Tensor, seed: int) -> Decision:
    """What `gate` should decide after this seed."""
    if isinstance(gate, StrictlyBalancedGate):
        return strictly_balanced_by_loops(gate, x_TD, gate.training)
    if isinstance(gate, HierarchicalGate):
        noises = hierarchical_noise(gate, len(x_TD), seed) if gate.training else (None, None)
        return hierarchical_by_loops(gate, x_TD, *noises)
    x_TE = softmax_rows(gate.w_gate_DE, x_TD)
    return masked_by_loops(x_TE, top_k_masks(x_TE, gate.k), torch.zeros(()))


def hierarchical_noise(gate: HierarchicalGate, num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """The noise of both levels that a float64 gate draws after this seed."""
    generator = torch.manual_seed(seed)
    sizes = (gate.branching,), (gate.primary_k, gate.num_experts // gate.branching)
    first_TA, second_TPB = (torch.randn(num_tokens, *size, dtype=torch.float64, generator=generator) for size in sizes)
    return first_TA, second_TPB


def layer_by_loops(moe: MoE, x_TD: Tensor, gates: list[dict[int, Tensor]]) -> Tensor:
    """S17 eq. 1 with the given gates."""
    outputs = []
    for x_D, of_token in zip(x_TD, gates, strict=True):
        y_D = torch.zeros_like(x_D)
        for e, value in of_token.items():
            y_D = y_D + value * expert_by_loops(moe.experts, e, x_D)
        outputs.append(y_D.sigmoid() if moe.sigmoid_output else y_D)
    return torch.stack(outputs)


def dense(gates: list[dict[int, Tensor]], num_experts: int = 12) -> Tensor:
    gates_TE = torch.zeros(len(gates), num_experts, dtype=torch.float64)
    for t, of_token in enumerate(gates):
        for e, value in of_token.items():
            gates_TE[t, e] = value
    return gates_TE


def gradients(value: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every leaf; zeros where there is none."""
    found = torch.autograd.grad(value, leaves.values(), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}"
        )


# ------------------------------------------------------------------------------------------------ all the gates

LAYERS = [
    *(
        ("hierarchical", tokens, (experts, k, groups, primary_k))
        for tokens, experts, groups, primary_k, k in HIERARCHIES
    ),
    *(
        (gating, tokens, (experts, k))
        for gating in ("softmax_top_k", "strictly_balanced")
        for tokens, experts, k in FLAT
    ),
]
SMALL = {
    "noisy_top_k": (6, 2),
    "softmax_top_k": (6, 2),
    "hierarchical": (6, 1, 3, 2),
    "strictly_balanced": (6, 2),
}
"""A layer of each gating that wakes two of six experts."""


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("gating", "num_tokens", "choice"), LAYERS)
def test_layer_and_every_gradient_equal_a_loop(gating: str, num_tokens: int, choice: tuple[int, ...], training: bool):
    output = "sigmoid" if num_tokens % 2 else "none"
    moe = normal_layer(moe_config(gating, *choice, hidden_sizes=[4, 3], output=output)).train(training)
    x_TD, y_direction_TD = randn(num_tokens, WIDTH), randn(num_tokens, WIDTH).detach()
    directions_E = torch.randn(2, moe.num_experts, dtype=torch.float64)
    torch.manual_seed(5)
    y_TD, gate = moe(x_TD)
    expected = decision_by_loops(moe.gate, x_TD, 5)
    expected_TD = layer_by_loops(moe, x_TD, expected.gates)
    torch.testing.assert_close(y_TD, expected_TD, rtol=0, atol=1e-10)
    torch.testing.assert_close(gate.sums.importance_E, expected.importance_E, rtol=0, atol=1e-12)
    torch.testing.assert_close(gate.sums.load().double(), expected.load_E, rtol=0, atol=1e-10)
    if gating != "hierarchical" or not training or gate.expert_TK.shape[1] == moe.num_experts:
        assert torch.equal(gate.sums.load(), gate.sums.count_E)
        assert not gate.sums.load().requires_grad
    torch.testing.assert_close(gate.own_loss.double(), expected.own_loss.double(), rtol=0, atol=1e-10)
    chosen_TE = dense(expected.gates, moe.num_experts)
    assert gate.sums.count_E.tolist() == (chosen_TE > 0).sum(0).tolist()
    assert gate.num_routed == (chosen_TE > 0).sum()
    slots_TE = torch.zeros(num_tokens, moe.num_experts + 1, dtype=torch.float64)
    slots_TE.scatter_(1, gate.expert_TK, gate.gates_TK.detach())
    torch.testing.assert_close(slots_TE[:, :-1], chosen_TE)
    assert not slots_TE[:, -1].any()

    leaves = {"x": x_TD, **dict(moe.named_parameters())}
    total = (y_TD * y_direction_TD).sum() + gate.own_loss
    oracle = (expected_TD * y_direction_TD).sum() + expected.own_loss
    for direction_E, field in zip(directions_E, ("importance_E", "load_E"), strict=True):
        found_E = gate.sums.load() if field == "load_E" else gate.sums.importance_E
        total, oracle = total + found_E @ direction_E.to(found_E), oracle + getattr(expected, field) @ direction_E
    assert_all_close(gradients(total, leaves), gradients(oracle, leaves))


@pytest.mark.parametrize("gating", SMALL)
def test_the_dial_sets_the_experts_of_a_token_outside_training_alone(gating: str):
    config = moe_config(gating, 12, *((2, 3, 2) if gating == "hierarchical" else (4,)))
    gate, x_TD = normal_gate(config), randn(20, WIDTH)

    def decide(count: int = 0, training: bool = False) -> list[Tensor]:
        torch.manual_seed(3)
        return list(gate.train(training)(x_TD, count)[:2])

    trained, evaluated = decide(training=True), decide()
    for count in [1, 2, 4, 6, 8] if gating == "hierarchical" else [1, 2, 3, 4, 11, 12]:
        gate.check_experts_per_token(count)
        expert_TK, gates_TK = decide(count)
        assert expert_TK.shape == (20, count)
        if gating == "hierarchical":
            levels = (1, 1) if count == 1 else (2, count // 2)
            expected = hierarchical_by_loops(gate, x_TD, None, None, *levels)
        else:
            x_TE = softmax_rows(gate.w_gate_DE, x_TD)
            expected = masked_by_loops(x_TE, top_k_masks(x_TE, count), torch.zeros(()))
        slots_TE = torch.zeros(20, 12, dtype=torch.float64).scatter(1, expert_TK, gates_TK)
        torch.testing.assert_close(slots_TE, dense(expected.gates))
        assert all(map(torch.equal, decide(count, training=True), trained))
        # A pass asks for itself alone.
        assert all(map(torch.equal, decide(), evaluated))
    for bad in [3, 5, 7, 10, 12, -1, 13] if gating == "hierarchical" else [-1, 13]:
        with pytest.raises(ValueError, match=f"decoding.experts_per_token={bad} "):
            gate.check_experts_per_token(bad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gating", SMALL)
def test_no_tokens_are_a_batch_too(gating: str, training: bool):
    moe = normal_layer(moe_config(gating, *SMALL[gating])).train(training)
    y_TD, gate = moe(randn(0, WIDTH))
    assert y_TD.shape == (0, WIDTH)
    assert gate.num_routed == 0
    assert not any(part.any() for part in gate.sums.parts())
    (y_TD.sum() + balance_loss(gate.sums, 1.0, 1.0) + gate.own_loss).backward()
    assert all(p.grad is None or not p.grad.any() for p in moe.parameters())


@pytest.mark.parametrize("gating", SMALL)
def test_the_gates_are_computed_in_float32_under_autocast(gating: str):
    gate, x_TD = normal_gate(moe_config(gating, *SMALL[gating])).float(), torch.randn(20, WIDTH).bfloat16()
    torch.manual_seed(3)
    expected = gate(x_TD.float())
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gate(x_TD)
    assert torch.equal(out.expert_TK, expected.expert_TK)
    assert torch.equal(out.gates_TK, expected.gates_TK)
    assert {part.dtype for part in (out.gates_TK, out.own_loss, out.noise_std, *out.sums.parts())} == {torch.float32}


# ------------------------------------------------------------------------------------------------- hierarchical


@pytest.mark.parametrize("field", ["importance", "load"])
def test_gradients_of_the_hierarchical_balance_terms_reach_all_four_matrices(field: str):
    gate, x_TD = normal_gate(moe_config("hierarchical", 12, 2, 3, 2)), randn(9, WIDTH)
    torch.manual_seed(7)
    sums = gate(x_TD).sums
    expected = hierarchical_by_loops(gate, x_TD, *hierarchical_noise(gate, 9, 7))
    pair = (sums.load(), expected.load_E) if field == "load" else (sums.importance_E, expected.importance_E)
    direction_E = torch.randn(12, dtype=torch.float64)
    leaves = {"x": x_TD, **dict(gate.named_parameters())}
    actual, oracle = (gradients(value_E @ direction_E, leaves) for value_E in pair)
    assert_all_close(actual, oracle)
    assert len(actual) == 5
    assert all(gradient.abs().max() > 1e-3 for gradient in actual.values())


def test_hierarchical_load_agrees_with_the_counts_in_expectation():
    num_tokens, draws = 512, 60
    gate, x_TD = normal_gate(moe_config("hierarchical", 12, 2, 3, 2)), torch.randn(512, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        all_sums = [gate(x_TD).sums for _ in range(draws)]
    load_ME = torch.stack([sums.load() for sums in all_sums])
    count_ME = torch.stack([sums.count_E.double() for sums in all_sums])
    assert (count_ME.sum(1) == 4 * num_tokens).all()
    assert load_ME.sum(1).mean() == pytest.approx(4 * num_tokens, rel=0.01)
    difference_ME = load_ME - count_ME
    assert (difference_ME.mean(0).abs() < 5 * difference_ME.std(0) / draws**0.5 + 0.5).all()
    primary_MA = torch.stack([sums.primary_load_A - sums.group_count_A for sums in all_sums])
    assert (primary_MA.mean(0).abs() < 5 * primary_MA.std(0) / draws**0.5).all()


def halves_and_whole(config: MoEConfig) -> tuple[Gate, list[GateSums], Decision]:
    """The sums of two halves of a batch, and what loops say of the batch with the same noise."""
    gate = normal_gate(config)
    halves, seeds = [randn(7, WIDTH), randn(5, WIDTH)], [3, 4]
    parts = []
    for x_TD, seed in zip(halves, seeds, strict=True):
        torch.manual_seed(seed)
        parts.append(gate(x_TD).sums)
    noises = [hierarchical_noise(gate, len(x_TD), seed) for x_TD, seed in zip(halves, seeds, strict=True)]
    joined_noise = [torch.cat(each) for each in zip(*noises, strict=True)]
    return gate, parts, hierarchical_by_loops(gate, torch.cat(halves), *joined_noise)


def test_sums_of_two_halves_are_those_of_the_batch():
    gate, (first, second), whole = halves_and_whole(moe_config("hierarchical", 12, 2, 3, 2))
    joined = first.plus(second)
    torch.testing.assert_close(joined.load(), whole.load_E, rtol=0, atol=1e-12)
    torch.testing.assert_close(joined.importance_E, whole.importance_E, rtol=0, atol=1e-12)
    # Not so for Load_H itself, which is a product: this is why it is computed from sums.
    assert (first.load() + second.load() - whole.load_E).abs().max() > 1e-3
    numbers = joined.detach()
    assert not any(part.requires_grad for part in numbers.parts())
    weights = dict(gate.named_parameters())
    wanted = gradients(balance_loss(GateSums(whole.importance_E, whole.load_E, whole.load_E), 0.3, 0.7), weights)
    found = []
    for part in (first, second):
        loss = balance_loss(numbers.with_gradient_of(part), 0.3, 0.7)
        torch.testing.assert_close(loss, balance_loss(joined, 0.3, 0.7))
        found.append(gradients(loss, weights))
    assert_all_close({name: found[0][name] + found[1][name] for name in weights}, wanted)


# --------------------------------------------------------------------------------------------- strictly balanced


@pytest.mark.parametrize("output", ["none", "sigmoid"])
@pytest.mark.parametrize("training", [True, False])
def test_tokens_with_many_experts_and_with_none(training: bool, output: str):
    """The gradient of Importance, here larger than in training, touches every token: 0/0 must not come of it."""
    moe = normal_layer(moe_config("strictly_balanced", 6, 1, output=output)).train(training)
    torch.nn.init.constant_(moe.gate.threshold_E, -math.log(4.0) / THRESHOLD_SCALE)
    x_TD = (3.0 * torch.randn(40, WIDTH, dtype=torch.float64)).requires_grad_()
    if not training:
        with torch.no_grad():
            x_TD[:10] *= 0.01  # nearly equal gates of 1/6, all below the threshold
    y_TD, gate = moe(x_TD)
    experts_T = (gate.expert_TK < 6).sum(1)
    assert (experts_T == 0).any()
    assert (experts_T > 1).any()
    empty_TD = y_TD[experts_T == 0]
    assert (empty_TD == (0.5 if output == "sigmoid" else 0.0)).all()
    assert (gate.gates_TK[experts_T == 0] == 0).all()
    torch.testing.assert_close(gate.gates_TK.sum(1), (experts_T > 0).double())
    (y_TD.square().sum() + gate.sums.importance_E @ torch.linspace(-100, 100, 6).double() + gate.own_loss).backward()
    assert not x_TD.grad[experts_T == 0].any()
    assert x_TD.grad[experts_T > 1].any()
    for name, parameter in [*moe.named_parameters(), ("x", x_TD)]:
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_groups_are_taken_and_given_back_exactly():
    group_TP = torch.tensor([[2, 0], [1, 2], [0, 1], [3, 1]])
    x_TAB = randn(4, 4, 3).requires_grad_()
    taken_TPB = take_groups(x_TAB, group_TP)
    assert all(torch.equal(taken_TPB[t, p], x_TAB[t, group_TP[t, p]]) for t in range(4) for p in range(2))
    assert torch.autograd.gradcheck(lambda x_TAB: take_groups(x_TAB, group_TP), (x_TAB,))


def test_values_are_summed_by_group():
    group_S, values_SB = torch.tensor([3, 0, 3, 1, 0, 3]), randn(6, 2)
    found_AB = sum_by_group(values_SB, group_S, 4)
    assert torch.equal(found_AB[1:3], torch.stack([values_SB[3], torch.zeros(2)]))
    torch.testing.assert_close(found_AB[0], values_SB[1] + values_SB[4])
    torch.testing.assert_close(found_AB[3], values_SB[0] + values_SB[2] + values_SB[5])
    assert torch.autograd.gradcheck(lambda values_SB: sum_by_group(values_SB, group_S, 4), (values_SB,))


def test_a_hierarchical_gate_makes_nothing_of_all_tokens_and_all_experts():
    gate, x_TD = normal_gate(moe_config("hierarchical", 400, 1, 20, 1)), randn(60, WIDTH)
    with Largest() as largest:
        out = gate(x_TD)
        (out.gates_TK.sum() + out.sums.importance_E.sum() + out.sums.load().sum()).backward()
    # The largest are the joint weights, and both logits of a token's group.
    assert largest.numbers == max(2 * WIDTH * 400, 2 * 60 * 20) < 60 * 400


@pytest.mark.parametrize("gating", SMALL)
def test_no_gradient_is_added_up_in_place(tiny_config: Any, tiny_batch: Any, gating: str):
    """A GPU would do that with atomics, slowly and in another order every time; embeddings have a way of their own."""
    sizes = {"num_experts": 6, "branching": 3, "primary_k": 2, "k": 1} if gating == "hierarchical" else {}
    model = Seq2Seq(tiny_config(gating=gating, **sizes), 13).train()
    with Called() as called:
        model(tiny_batch((4, 2), (1, 6), (6, 3))).loss.backward()
    adding = {"scatter_add", "scatter_add_", "index_add", "index_add_"}
    assert not {name for name, dtype in called.found if name in adding and dtype.is_floating_point}


class Called(TorchDispatchMode):
    """Names of the operations that were called, and the type of what they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.found.add((function.overloadpacket.__name__, out.dtype))
        return out
