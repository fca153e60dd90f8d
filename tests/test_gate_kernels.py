"""The fused gate and the fused sort of slots against their plain forms: on a GPU, or else in Triton's interpreter."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nmt.model import gating
from nmt.model.gating import NoisyTopKGate, balance_loss
from nmt.model.kernels.dispatch import plain_sort_slots
from nmt.model.kernels.gate import Choice, plain_noisy_top_k, plain_top_k_gate
from tests.kernels import DEVICE, SHARED_BYTES, compile_launches, needs_triton

SIZES = [  # tokens, experts, k
    (1, 1, 1),
    (7, 5, 1),
    (33, 8, 2),
    (5, 4, 4),
    (37, 70, 4),
    (3, 2048, 4),
    (300, 16, 8),
    (2, 600, 15),
]


def fused_noisy_top_k(logits_T2E: Tensor, noise_TE: Tensor, k: int, real_T: Tensor | None) -> Choice:
    from nmt.model.kernels.gate_triton import fused_noisy_top_k

    return fused_noisy_top_k(logits_T2E, noise_TE, k, real_T)


def random_logits(num_tokens: int, num_experts: int, padded: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logits, noise, real_T), float32."""
    real_T = torch.rand(num_tokens, device=DEVICE) > 0.3 if padded else None
    logits_T2E = torch.randn(num_tokens, 2 * num_experts, device=DEVICE)
    return logits_T2E, torch.randn(num_tokens, num_experts, device=DEVICE), real_T


def losses_of(choice: Choice) -> Tensor:
    """A number on which every differentiable result has an effect of its own."""
    generator = torch.Generator().manual_seed(2)
    parts = [part for part in (choice.gates_TK, choice.importance_E, choice.load_E) if part.requires_grad]
    return sum((part * torch.randn(part.shape, generator=generator).to(part)).sum() for part in parts)


@needs_triton
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_experts", "k"), SIZES)
def test_the_fused_gate_without_noise_is_the_plain_one(num_tokens: int, num_experts: int, k: int, padded: bool):
    from nmt.model.kernels.gate_triton import fused_top_k_gate

    logits_T2E, _, real_T = random_logits(num_tokens, num_experts, padded)
    logits_TE = logits_T2E[:, :num_experts].contiguous()
    found, exact = (choose(logits_TE, k, real_T) for choose in (fused_top_k_gate, plain_top_k_gate))
    for fused, plain in zip(found, exact, strict=True):
        torch.testing.assert_close(fused, plain)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_experts", "k"), SIZES)
def test_the_fused_gate_and_its_gradients_are_those_of_the_plain_one(
    num_tokens: int, num_experts: int, k: int, padded: bool
):
    logits_T2E, noise_TE, real_T = random_logits(num_tokens, num_experts, padded)
    own_T2E, exact_T2E = logits_T2E.clone().requires_grad_(), logits_T2E.double().requires_grad_()
    found = fused_noisy_top_k(own_T2E, noise_TE, k, real_T)
    exact = plain_noisy_top_k(exact_T2E, noise_TE.double(), k, real_T)
    assert torch.equal(found.expert_TK, exact.expert_TK)
    assert torch.equal(found.count_E, exact.count_E)
    for fused, plain in zip(found, exact, strict=True):
        torch.testing.assert_close(fused.double(), plain.double(), rtol=1e-5, atol=1e-5, equal_nan=True)
        assert fused.requires_grad == plain.requires_grad
    losses_of(found).backward()
    losses_of(exact).backward()
    torch.testing.assert_close(own_T2E.grad.double(), exact_T2E.grad, rtol=1e-4, atol=1e-5)
    assert real_T is None or not own_T2E.grad[~real_T].any()


@needs_triton
def test_equal_logits_give_distinct_experts_and_the_plain_sums():
    """Noise of 0 and logits of few values: ties within the top k, across its border and behind it."""
    num_experts, k = 12, 3
    logits_T2E = torch.randint(3, (50, 2 * num_experts), device=DEVICE).float()
    noise_TE = torch.zeros(50, num_experts, device=DEVICE)
    found, plain = (choose(logits_T2E, noise_TE, k, None) for choose in (fused_noisy_top_k, plain_noisy_top_k))
    assert all(len(set(of_token)) == k for of_token in found.expert_TK.tolist())
    own_TK = logits_T2E.gather(1, found.expert_TK)
    torch.testing.assert_close(own_TK, logits_T2E[:, :num_experts].topk(k).values)
    torch.testing.assert_close(found.gates_TK, plain.gates_TK)
    torch.testing.assert_close(found.load_E, plain.load_E)
    assert found.count_E.tolist() == [(found.expert_TK == e).sum().item() for e in range(num_experts)]


@needs_triton
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_not_a_number_makes_the_gates_of_its_token_so(bad: float):
    logits_T2E, noise_TE, _ = random_logits(6, 10, False)
    logits_T2E[4, 7] = bad
    found = fused_noisy_top_k(logits_T2E, noise_TE, 2, None)
    assert found.gates_TK.isnan().any(1).tolist() == [False] * 4 + [True, False]
    assert not found.importance_E.isfinite().all()
    assert found.expert_TK[4, 0] == 7
    # Experts that do not exist would be read from memory of others.
    logits_T2E[:, :10] = -float("inf")
    lowest = fused_noisy_top_k(logits_T2E, noise_TE, 2, None)
    assert all(len(set(of_token)) == 2 and max(of_token) < 10 for of_token in lowest.expert_TK.tolist())


@needs_triton
def test_the_fused_gate_gives_both_weights_and_the_input_their_gradients(monkeypatch: pytest.MonkeyPatch):
    gate = NoisyTopKGate(6, 10, 3)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x_TD, noise_TE = torch.randn(40, 6), torch.randn(40, 10)

    def gradients(choose: Callable[..., Choice], dtype: torch.dtype) -> list[Tensor]:
        # The same noise for both.
        own_noise_TE = noise_TE.to(DEVICE, dtype)
        monkeypatch.setattr(
            gating, "noisy_top_k", lambda logits, _noise, k, real_T, _rule: choose(logits, own_noise_TE, k, real_T)
        )
        own, own_TD = copy.deepcopy(gate).to(DEVICE, dtype), x_TD.to(DEVICE, dtype).requires_grad_()
        out = own(own_TD)
        loss = balance_loss(out.sums, 0.5, 0.7) + (out.gates_TK * out.gates_TK[:, :1].detach()).sum()
        return list(torch.autograd.grad(loss, [own_TD, own.w_gate_DE, own.w_noise_DE]))

    exact = gradients(plain_noisy_top_k, torch.float64)
    for found, plain in zip(gradients(fused_noisy_top_k, torch.float32), exact, strict=True):
        assert plain.abs().max() > 1e-3
        torch.testing.assert_close(found.double(), plain, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    ("num_slots", "num_experts"), [(1, 1), (7, 3), (513, 40), (600, 5), (300, 2048), (512, 1), (100, 1000)]
)
def test_the_fused_sort_of_slots_is_the_plain_one(num_slots: int, num_experts: int):
    from nmt.model.kernels.dispatch_triton import fused_sort_slots

    # With empty slots; the second has one expert for all.
    expert_S = torch.randint(num_experts + 1, (num_slots,), device=DEVICE)
    for choice_S in (expert_S, torch.full_like(expert_S, num_experts - 1)):
        for fused, plain in zip(
            fused_sort_slots(choice_S, num_experts), plain_sort_slots(choice_S, num_experts), strict=True
        ):
            assert fused.dtype == plain.dtype
            assert torch.equal(fused, plain)


def test_sorted_slots_are_those_of_a_loop():
    expert_S = torch.tensor([2, 0, 4, 2, 1, 0, 4, 2])
    order_S, row_S, ends_E = plain_sort_slots(expert_S, 4)
    assert order_S.tolist() == [1, 5, 4, 0, 3, 7, 2, 6]
    assert row_S.tolist() == [3, 0, 6, 4, 2, 1, 7, 5]
    assert ends_E.tolist() == [2, 3, 6, 6]


def launch_all() -> None:
    """Launch the fused gate, forward and backward, and the fused sort as training does."""
    from nmt.model.kernels.dispatch_triton import fused_sort_slots

    logits_T2E = torch.zeros(64, 2 * 512, requires_grad=True)
    choice = fused_noisy_top_k(logits_T2E, torch.zeros(64, 512), 4, torch.ones(64, dtype=torch.bool))
    (choice.gates_TK.sum() + choice.importance_E.sum() + choice.load_E.sum()).backward()
    fused_sort_slots(torch.zeros(4096, dtype=torch.int64), 64)


@pytest.mark.slow
@needs_triton
def test_kernels_compile_for_every_supported_card():
    compiled = compile_launches(launch_all)
    assert {each.capability for each in compiled} == set(SHARED_BYTES)
    assert {each.kernel for each in compiled} == {"_choose", "_gradient", "_rank", "_scan", "_place"}
    assert [each for each in compiled if each.spilled] == []
