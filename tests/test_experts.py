"""The mixture of experts and its parts against loops over tokens and experts."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from nmt.config import MoEConfig
from nmt.model.experts import Experts, LocalDispatcher, MoE
from nmt.model.gating import MIN_NOISE_STD, GateOutput, GateSums
from nmt.model.kernels.experts import group_rows, grouped_matmul, grouped_outer
from nmt.model.routes import Route
from nmt.model.rows import add_rows, combine_rows, inverse_permutation, put_rows, route_rows, take_rows

WIDTH, HIDDEN = 5, 6


def randn(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, requires_grad=True)


def moe_layer(num_experts: int, k: int, output: str = "none", hidden_sizes: Sequence[int] = (HIDDEN,)) -> MoE:
    config = MoEConfig(num_experts=num_experts, k=k, hidden_sizes=list(hidden_sizes), output=output)
    moe = MoE(WIDTH, num_experts, config).double()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    return moe


def expert_by_loops(experts: Experts, e: int, x_D: Tensor) -> Tensor:
    *hidden, last = (w_EIO[e] for w_EIO in experts.weights)
    for w_IO in hidden:
        x_D = (x_D @ w_IO).relu()
    return x_D @ last


def moe_by_loops(moe: MoE, x_TD: Tensor, noise_TE: Tensor | None) -> Tensor:
    """S17 eq. 1 and 3-5, one token and one expert at a time; plain operations that autograd knows."""
    outputs = []
    for t, x_D in enumerate(x_TD):
        logits = [x_D @ w_D for w_D in moe.gate.w_gate_DE.T]
        if noise_TE is not None:
            for i, w_D in enumerate(moe.gate.w_noise_DE.T):
                logits[i] = logits[i] + noise_TE[t, i] * (F.softplus(x_D @ w_D) + MIN_NOISE_STD)
        kept = sorted(range(len(logits)), key=lambda i: -logits[i].item())[: moe.gate.k]
        total = sum(logits[i].exp() for i in kept)
        y_D = torch.zeros_like(x_D)
        for i in kept:
            y_D = y_D + logits[i].exp() / total * expert_by_loops(moe.experts, i, x_D)
        outputs.append(y_D.sigmoid() if moe.sigmoid_output else y_D)
    return torch.stack(outputs)


@pytest.mark.parametrize("output", ["none", "sigmoid"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k", "hidden_sizes"),
    [
        (1, 1, 1, [6]),
        (6, 1, 1, [9, 4]),  # one expert: MoE-1-Wide and MoE-1-Deep of S17 appendix C
        (1, 4, 2, [4, 7, 3]),
        (5, 3, 3, [6]),  # all active
        (3, 16, 2, [6, 6]),
        (20, 4, 1, [3, 6, 2, 7]),
        (31, 8, 4, [6]),
    ],
)
def test_output_and_every_gradient_equal_a_loop(
    num_tokens: int, num_experts: int, k: int, hidden_sizes: list[int], training: bool, output: str
):
    moe = moe_layer(num_experts, k, output, hidden_sizes).train(training)
    x_TD, direction_TD = randn(num_tokens, WIDTH), randn(num_tokens, WIDTH).detach()
    leaves = {"x": x_TD, **dict(moe.named_parameters())}
    torch.manual_seed(5)
    noise_TE = torch.randn(num_tokens, num_experts, dtype=torch.float64) if training else None
    torch.manual_seed(5)
    y_TD, gate = moe(x_TD)
    expected_TD = moe_by_loops(moe, x_TD, noise_TE)
    torch.testing.assert_close(y_TD, expected_TD, rtol=0, atol=1e-10)
    gradients = torch.autograd.grad(y_TD, leaves.values(), direction_TD, allow_unused=True)
    expected = torch.autograd.grad(expected_TD, leaves.values(), direction_TD, allow_unused=True)
    for name, gradient, oracle in zip(leaves, gradients, expected, strict=True):
        if gradient is None or oracle is None:
            assert name == "gate.w_noise_DE"
            assert not training
            continue
        torch.testing.assert_close(gradient, oracle, rtol=0, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
    if num_tokens * k < num_experts:
        assert (gate.sums.count_E == 0).any()


@pytest.mark.parametrize("hidden_sizes", [[6], [4, 3], [3, 7, 2], [2, 6, 3, 4]], ids=len)
@pytest.mark.parametrize("ends", [[0, 0, 4], [4, 4, 4], [0, 3, 3], [1, 2, 4], [0, 0, 0]])
def test_experts_of_any_depth_may_go_without_rows(ends: list[int], hidden_sizes: list[int]):
    experts = Experts(3, WIDTH, hidden_sizes).double()
    sizes = [WIDTH, *hidden_sizes, WIDTH]
    assert [tuple(w_EIO.shape) for w_EIO in experts.weights] == [(3, a, b) for a, b in pairwise(sizes)]
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    rows_RD, ends_E = randn(ends[-1], WIDTH), torch.tensor(ends, dtype=torch.int32)
    y_RD = experts(rows_RD, ends_E)
    assert y_RD.shape == rows_RD.shape
    owners = [sum(end <= row for end in ends) for row in range(ends[-1])]
    expected = [expert_by_loops(experts, e, row_D) for e, row_D in zip(owners, rows_RD, strict=True)]
    direction_RD, leaves = torch.randn_like(y_RD), [rows_RD, *experts.weights]
    gradients = torch.autograd.grad(y_RD, leaves, direction_RD)
    if not expected:
        assert not any(gradient.any() for gradient in gradients)
        return
    torch.testing.assert_close(y_RD, torch.stack(expected))
    for gradient, oracle in zip(
        gradients, torch.autograd.grad(torch.stack(expected), leaves, direction_RD), strict=True
    ):
        torch.testing.assert_close(gradient, oracle)
    for gradient in gradients[1:]:
        assert not any(gradient[e].any() for e in range(3) if e not in owners)


@pytest.mark.parametrize("hidden_sizes", [[4], [4, 3], [3, 2, 4], [2, 4, 3, 2]], ids=len)
def test_gradcheck_of_the_experts(hidden_sizes: list[int]):
    ends_E = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    experts = Experts(4, 3, hidden_sizes)

    def outputs(rows_RD: Tensor, *weights_EIO: Tensor) -> Tensor:
        named = {f"weights.{layer}": w_EIO for layer, w_EIO in enumerate(weights_EIO)}
        return torch.func.functional_call(experts, named, (rows_RD, ends_E))

    assert gradcheck(outputs, (randn(6, 3), *(randn(*w_EIO.shape) for w_EIO in experts.weights)))


def test_float32_experts_follow_the_precision_of_their_rows():
    moe = moe_layer(4, 2).float().eval()
    x_TD = torch.randn(50, WIDTH).bfloat16().requires_grad_()
    y_TD, gate = moe(x_TD)
    expected_TD, _ = moe(x_TD.float())
    assert y_TD.dtype == torch.bfloat16
    assert gate.gates_TK.dtype == torch.float32
    torch.testing.assert_close(y_TD.float(), expected_TD, rtol=0.1, atol=0.2)
    y_TD.sum().backward()
    assert x_TD.grad.dtype == torch.bfloat16
    assert all(w_EIO.grad.dtype == torch.float32 for w_EIO in moe.experts.weights)


def test_no_copy_of_the_weights_is_kept_for_the_backward_pass():
    moe = moe_layer(4, 2).float().train()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        moe(torch.randn(50, WIDTH).bfloat16().requires_grad_())
    weights = {w_EIO.data_ptr(): w_EIO.shape for w_EIO in moe.experts.weights}
    as_large = [tensor for tensor in kept if tensor.shape in weights.values()]
    assert len(as_large) == len(weights)
    assert {tensor.data_ptr() for tensor in as_large} == weights.keys()


def matmul_by_loops(a_RI: Tensor, w_EIO: Tensor, ends: list[int]) -> Tensor:
    rows = [a_RI[row] @ w_EIO[sum(end <= row for end in ends)] for row in range(ends[-1])]
    return torch.stack(rows) if rows else a_RI.new_zeros(0, w_EIO.shape[2])


def outer_by_loops(a_RI: Tensor, b_RO: Tensor, ends: list[int]) -> Tensor:
    out_EIO = a_RI.new_zeros(len(ends), a_RI.shape[1], b_RO.shape[1])
    for row in range(ends[-1]):
        out_EIO[sum(end <= row for end in ends)] += torch.outer(a_RI[row], b_RO[row])
    return out_EIO


GROUPS = [
    [4],
    [0, 2, 5],
    [1, 3, 4, 6],
    [0, 0, 0, 3, 3, 7],
    [2, 4, 6, 6, 6, 6, 9],
    [0, 0, 0, 0, 0, 0, 0, 5],
    [5, 5, 5, 5, 5, 5, 5],
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
]


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("ends", GROUPS)
def test_grouped_products_equal_loops(ends: list[int], extra: int):
    """Rows past the last end belong to no expert: they get zeros, and add nothing to a sum."""
    num_rows = ends[-1] + extra
    a_RI, b_RO = (torch.randn(num_rows, width, dtype=torch.float64) for width in (3, 4))
    w_EIO, ends_E = torch.randn(len(ends), 3, 4, dtype=torch.float64), torch.tensor(ends, dtype=torch.int32)
    groups = group_rows(ends_E, num_rows, torch.float64)
    out_RO = grouped_matmul(a_RI, w_EIO, groups)
    assert out_RO.shape == b_RO.shape
    torch.testing.assert_close(out_RO[: ends[-1]], matmul_by_loops(a_RI, w_EIO, ends))
    assert not out_RO[ends[-1] :].any()
    torch.testing.assert_close(grouped_outer(a_RI, b_RO, groups), outer_by_loops(a_RI, b_RO, ends))
    # Rows of a longer tensor, and a ReLU.
    x_MI, token_R = torch.randn(5, 3, dtype=torch.float64), torch.randint(5, (num_rows,))
    torch.testing.assert_close(
        grouped_matmul(x_MI, w_EIO, groups, token_R, relu=True),
        grouped_matmul(x_MI[token_R], w_EIO, groups).relu(),
    )
    torch.testing.assert_close(grouped_outer(x_MI, b_RO, groups, token_R), grouped_outer(x_MI[token_R], b_RO, groups))


def gate_output(expert_TK: Tensor, gates_TK: Tensor, num_experts: int) -> GateOutput:
    """What a gate that chose so returns, as far as a dispatcher looks."""
    zero, zero_E = torch.zeros(()), torch.zeros(num_experts)
    num_routed = int((expert_TK < num_experts).sum())
    return GateOutput(expert_TK, gates_TK, num_routed, GateSums(zero_E, zero_E, zero_E), zero, zero)


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from([0, 0.3, 1]))
def test_dispatch_groups_by_expert_and_combine_brings_back(
    num_tokens: int, num_experts: int, k: int, seed: int, empty: float
):
    k = min(k, num_experts)
    generator = torch.Generator().manual_seed(seed)
    expert_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(k, dim=1).indices
    empty_TK = torch.rand(num_tokens, k, generator=generator) < empty
    expert_TK = expert_TK.masked_fill(empty_TK, num_experts)
    gates_TK = torch.rand(num_tokens, k, generator=generator, dtype=torch.float64).masked_fill(empty_TK, 0.0)
    # Column 0 tells tokens apart.
    x_TD = torch.arange(num_tokens, dtype=torch.float64)[:, None] + torch.tensor([[0.0, 0.5]])
    dispatcher = LocalDispatcher()
    gate = gate_output(expert_TK, gates_TK, num_experts)
    ends_E, route = dispatcher.sort(gate)
    rows_RD = route_rows(x_TD, route.token_R, route.row_R, route.begin_T)
    assert ends_E.dtype == torch.int32
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        wanted = [float(t) for t in range(num_tokens) if expert in expert_TK[t]]
        assert rows_RD[start:end, 0].tolist() == wanted
        start = end
    assert start == len(rows_RD) == gate.num_routed
    # Experts that multiply by their number + 1: each token must get the gates of its own choices.
    factor_R = 1.0 + torch.repeat_interleave(torch.arange(num_experts), ends_E.diff(prepend=ends_E.new_zeros(1)))
    y_TD = dispatcher.combine(rows_RD * factor_R[:, None], gates_TK, route)
    torch.testing.assert_close(y_TD, x_TD * (gates_TK * (1.0 + expert_TK)).sum(1, keepdim=True))


EMPTY_SLOTS = [  # 4 stands for a slot that stays empty
    [[0, 1], [4, 4], [2, 4], [4, 0], [3, 0]],
    [[4, 4], [4, 4], [4, 4]],
    [[4, 4]],
    [[4, 1]],
    [[2, 4]],
    [[0, 4, 1, 4], [4, 4, 4, 4]],
]


@pytest.mark.parametrize("known", [True, False], ids=["counted", "uncounted"])
@pytest.mark.parametrize("choices", EMPTY_SLOTS)
def test_empty_slots_give_nothing_and_get_no_gradient(known: bool, choices: list[list[int]]):
    expert_TK = torch.tensor(choices)
    empty_TK, (tokens, slots) = expert_TK == 4, expert_TK.shape
    x_TD, experts = randn(tokens, WIDTH), moe_layer(4, 2, hidden_sizes=[3, 6]).experts
    gates_TK = torch.rand(tokens, slots, dtype=torch.float64).masked_fill(empty_TK, 0.0).requires_grad_()
    gate = gate_output(expert_TK, gates_TK, 4)
    ends_E, route = LocalDispatcher().sort(gate)
    assert len(route.order_R) == ends_E[-1] == (~empty_TK).sum()
    y_TD = LocalDispatcher().run(experts, x_TD, gate if known else gate._replace(num_routed=None))
    expected_TD = torch.zeros_like(y_TD)
    for t, of_token in enumerate(choices):
        for place, e in enumerate(of_token):
            if e < 4:
                one_D = gates_TK[t, place] * expert_by_loops(experts, e, x_TD[t])
                expected_TD = expected_TD + F.pad(one_D[None], (0, 0, t, tokens - 1 - t))
    torch.testing.assert_close(y_TD, expected_TD)
    assert not y_TD[empty_TK.all(1)].any()
    direction_TD, leaves = torch.randn_like(y_TD), (x_TD, gates_TK, *experts.weights)
    found = torch.autograd.grad(y_TD, leaves, direction_TD)
    assert not found[1][empty_TK].any()
    if empty_TK.all():
        assert not any(gradient.any() for gradient in found)
        return
    wanted = torch.autograd.grad(expected_TD, leaves, direction_TD)
    for gradient, oracle in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, oracle)


# The slots of six that are filled, for three tokens of two slots each, by sorted row.
FILLED = [[5, 2, 0, 1, 4, 3], [3, 0, 5, 1], [2], []]


def way_back(order: list[int]) -> Route:
    """The route of sorted rows, for three tokens of two slots each."""
    by_slot = sorted(range(len(order)), key=order.__getitem__)
    begins = [sum(slot < 2 * token for slot in order) for token in range(3)]
    order_R = torch.tensor(order, dtype=torch.long)
    return Route(order_R // 2, order_R, torch.tensor(by_slot, dtype=torch.long), torch.tensor(begins))


@pytest.mark.parametrize("order", FILLED, ids=len)
def test_gradients_of_the_row_functions(order: list[int]):
    index_N = torch.tensor([4, 0, 3])
    assert gradcheck(lambda x: take_rows(x, index_N), randn(5, 2))
    assert gradcheck(lambda x: put_rows(x, index_N, 5), randn(3, 2))
    route = way_back(order)
    assert gradcheck(lambda x: route_rows(x, route.token_R, route.row_R, route.begin_T), randn(3, 2))
    assert gradcheck(lambda x: add_rows(x, route.token_R, route.row_R, route.begin_T), randn(len(order), 2))
    assert gradcheck(lambda x, g: combine_rows(x, g, *route), (randn(len(order), 2), randn(3, 2)))


@pytest.mark.parametrize("order", FILLED, ids=len)
def test_the_row_functions_say_what_they_do(order: list[int]):
    x_MD, index_N = torch.randn(5, 2), torch.tensor([4, 0, 3])
    taken_ND = take_rows(x_MD, index_N)
    assert torch.equal(taken_ND, x_MD[index_N])
    put_MD = put_rows(taken_ND, index_N, 5)
    assert torch.equal(put_MD[index_N], taken_ND)
    assert not put_MD[[1, 2]].any()
    token_R, order_R, row_R, begin_T = way_back(order)
    x_TD, rows_RD, gates_TK = torch.randn(3, 2), torch.randn(len(order), 2), torch.rand(3, 2)
    assert torch.equal(route_rows(x_TD, token_R, row_R, begin_T), x_TD[token_R])
    added_TD, combined_TD = torch.zeros(2, 3, 2)
    for row, slot in enumerate(order):
        added_TD[slot // 2] += rows_RD[row]
        combined_TD[slot // 2] += gates_TK[slot // 2, slot % 2] * rows_RD[row]
    torch.testing.assert_close(add_rows(rows_RD, token_R, row_R, begin_T), added_TD)
    torch.testing.assert_close(combine_rows(rows_RD, gates_TK, token_R, order_R, row_R, begin_T), combined_TD)


def test_an_inverse_permutation_undoes_one():
    order_R = torch.randperm(6)
    assert torch.equal(order_R[inverse_permutation(order_R)], torch.arange(6))


def test_bf16_rows_of_a_token_are_summed_in_float32():
    """In bf16 a sum of ones would stay at 256."""
    token_R, row_R, begin_T = torch.zeros(1000, dtype=torch.int64), torch.arange(1000), torch.tensor([0])
    rows_RD, gates_TK = torch.ones(1000, 2, dtype=torch.bfloat16), torch.ones(1, 1000)
    assert (combine_rows(rows_RD, gates_TK, token_R, row_R, row_R, begin_T) == 1000).all()
    assert (add_rows(rows_RD, token_R, row_R, begin_T) == 1000).all()
    x_TD = torch.zeros(1, 2, dtype=torch.bfloat16, requires_grad=True)
    route_rows(x_TD, token_R, row_R, begin_T).sum().backward()
    assert (x_TD.grad == 1000).all()


class Largest(TorchDispatchMode):
    """The most numbers in one floating-point tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype.is_floating_point:
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("slots", [1, 40])
def test_what_is_kept_and_made_grows_with_rows_and_not_with_empty_slots(slots: int):
    """Of 50 tokens with one expert each, but for one with all 40, slots would hold 2000 rows; there are 89."""
    expert_TK = torch.full((50, slots), 40)
    expert_TK[:, 0] = torch.arange(50) % 40
    expert_TK[0] = torch.arange(slots)
    gates_TK = torch.where(expert_TK < 40, 0.5, 0.0).requires_grad_()
    x_TD, experts = torch.randn(50, WIDTH, requires_grad=True), moe_layer(40, 1).float().experts
    gate, leaves = gate_output(expert_TK, gates_TK, 40), [gates_TK, x_TD, *experts.weights]
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Largest() as largest:
        LocalDispatcher().run(experts, x_TD, gate).sum().backward()
    rows, of_leaves = 49 + slots, {leaf.data_ptr() for leaf in leaves}
    # Hidden units and outputs of the experts; the token and the slot of each row, and the row of each slot; where the
    # slots of a token begin. The rows that the experts read are gathered again.
    expected = rows * ((HIDDEN + WIDTH) * 4 + 3 * 8) + 50 * 8
    assert sum(storage.nbytes() for place, storage in kept.items() if place not in of_leaves) == expected
    # The gradients of gates and of weights are larger than rows, and there is nothing larger than they.
    assert largest.numbers <= max(50 * slots, 40 * WIDTH * HIDDEN)
