"""Fused twins against their plain forms, on a GPU or in Triton's interpreter; see tests/kernels.py."""

import copy

import pytest
import torch

from nmt.config import MoEConfig
from nmt.device import set_float32_products
from nmt.model.experts import MoE
from nmt.model.kernels.cross_entropy import plain_softmax_gradient, plain_two_softmax_gradients
from nmt.model.kernels.row_sums import plain_sum_rows, sum_rows
from tests.kernels import DEVICE, SHARED_BYTES, compile_launches, needs_triton

needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="there is no CUDA GPU")


@needs_triton
@pytest.mark.parametrize("vocabulary", [7, 1504, 2048, 32001])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_fused_softmax_gradient_is_the_plain_one(vocabulary: int, smoothing: float):
    from nmt.model.kernels.cross_entropy_triton import fused_softmax_gradient

    logits_MV = (3 * torch.randn(5, vocabulary, device=DEVICE)).bfloat16()
    target_M = torch.randint(vocabulary, (5,), device=DEVICE)
    expected = plain_softmax_gradient(logits_MV.clone(), target_M, smoothing)
    found = fused_softmax_gradient(logits_MV.clone(), target_M, smoothing)
    for plain, fused in zip(expected, found, strict=True):
        difference = (plain.float() - fused.float()).norm() / plain.float().norm()
        assert difference < 1e-2 if plain.dtype == torch.bfloat16 else difference < 1e-5


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("vocabulary", [7, 1504, 2048, 32001])
@pytest.mark.parametrize(("smoothing", "alpha"), [(0.0, 1.0), (0.1, 5.0)])
def test_the_fused_gradients_of_two_passes_are_the_plain_ones(vocabulary: int, smoothing: float, alpha: float):
    from nmt.model.kernels.cross_entropy_triton import fused_two_softmax_gradients

    first_MV = (3 * torch.randn(5, vocabulary, device=DEVICE)).bfloat16()
    second_MV = first_MV + (0.5 * torch.randn(5, vocabulary, device=DEVICE)).bfloat16()
    target_M = torch.randint(vocabulary, (5,), device=DEVICE)
    expected = plain_two_softmax_gradients(first_MV.clone(), second_MV.clone(), target_M, smoothing, alpha)
    found = fused_two_softmax_gradients(first_MV.clone(), second_MV.clone(), target_M, smoothing, alpha)
    for plain, fused in zip(expected, found, strict=True):
        assert fused.dtype == plain.dtype
        difference = (plain.float() - fused.float()).norm() / plain.float().norm()
        assert difference < 1e-2 if plain.dtype == torch.bfloat16 else difference < 1e-5


# Rows of each token: as many for all, very different numbers, none at all.
SHARES = [[4] * 9, [0, 1, 17, 0, 3, 7, 0], [0, 0, 0], [5]]


def random_rows(counts: list[int], width: int, device: str) -> tuple[torch.Tensor, ...]:
    """(rows_RD, row_R, begin_T, weight_R) for tokens that have so many rows."""
    row_R = torch.randperm(sum(counts), device=device)
    begin_T = torch.tensor([sum(counts[:token]) for token in range(len(counts))], device=device)
    return torch.randn(sum(counts), width, device=device), row_R, begin_T, torch.rand(sum(counts), device=device)


@pytest.mark.parametrize("counts", SHARES)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_sum_of_rows_is_that_of_a_loop(counts: list[int], weighted: bool):
    rows_RD, row_R, begin_T, weight_R = random_rows(counts, 3, "cpu")
    found_TD = sum_rows(rows_RD, row_R, begin_T, weight_R if weighted else None)
    place = iter(range(len(row_R)))
    for token, count in enumerate(counts):
        expected_D = torch.zeros(3)
        for index in (next(place) for _ in range(count)):
            expected_D += rows_RD[row_R[index]] * (weight_R[index] if weighted else 1.0)
        torch.testing.assert_close(found_TD[token], expected_D)


@needs_triton
@pytest.mark.parametrize("width", [8, 100, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", SHARES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_fused_sum_of_rows_is_the_plain_one(counts: list[int], dtype: torch.dtype, width: int, weighted: bool):
    from nmt.model.kernels.row_sums_triton import fused_sum_rows

    rows_RD, row_R, begin_T, weight_R = random_rows(counts, width, DEVICE)
    rows_RD, weight_R = rows_RD.to(dtype), weight_R.to(dtype) if weighted else None
    found_TD = fused_sum_rows(rows_RD, row_R, begin_T, weight_R)
    exact_R = weight_R.double() if weighted else None
    exact_TD = plain_sum_rows(rows_RD.double(), row_R, begin_T, exact_R)
    assert found_TD.dtype == dtype
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found_TD.double(), exact_TD, rtol=tolerance, atol=tolerance)
    assert torch.equal(found_TD, fused_sum_rows(rows_RD, row_R, begin_T, weight_R))


def launch_all() -> None:
    """Launch every fused function as training does."""
    from nmt.model.kernels.cross_entropy_triton import fused_softmax_gradient, fused_two_softmax_gradients
    from nmt.model.kernels.row_sums_triton import fused_sum_rows

    logits_MV, target_M = torch.empty(64, 32000, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.int64)
    fused_softmax_gradient(logits_MV, target_M, 0.1)
    fused_two_softmax_gradients(logits_MV, logits_MV, target_M, 0.1, 2.0)
    rows_RD, row_R, begin_T, weight_R = random_rows([4] * 8, 512, "cpu")
    fused_sum_rows(rows_RD.bfloat16(), row_R, begin_T, weight_R.bfloat16())
    fused_sum_rows(rows_RD, row_R, begin_T, None)


@pytest.mark.slow
@needs_triton
def test_kernels_compile_for_every_supported_card():
    compiled = compile_launches(launch_all)
    assert {each.capability for each in compiled} == set(SHARED_BYTES)
    assert {each.kernel for each in compiled} == {"_softmax_gradient", "_two_softmax_gradients", "_sum_rows"}
    assert [each for each in compiled if each.spilled] == []


def launch_a_broken_kernel() -> None:
    from nmt.model.kernels import cross_entropy_triton

    cross_entropy_triton._BLOCK = 100  # no power of two
    cross_entropy_triton.fused_softmax_gradient(torch.empty(2, 9).bfloat16(), torch.zeros(2, dtype=torch.int64), 0.1)


@pytest.mark.slow
@needs_triton
def test_a_kernel_that_does_not_compile_is_an_error():
    with pytest.raises(AssertionError, match="power of 2"):
        compile_launches(launch_a_broken_kernel)


@needs_gpu
@pytest.mark.parametrize(
    ("gating", "training"),
    # In training the first and the third add noise, which a GPU draws otherwise.
    [
        ("noisy_top_k", False),
        ("softmax_top_k", True),
        ("hierarchical", False),
        ("strictly_balanced", False),
        ("strictly_balanced", True),
    ],
)
def test_the_layer_on_a_gpu_is_that_of_the_cpu(gating: str, training: bool):
    """Outputs and gradients, float32 against float64."""
    set_float32_products(torch.device("cuda"), "fp32")
    groups = {"branching": 4, "primary_k": 2, "k": 2} if gating == "hierarchical" else {"k": 4}
    moe = MoE(32, 16, MoEConfig(16, hidden_sizes=[64], gating=gating, **groups)).train(training)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_TD, direction_TD = torch.randn(2, 77, 32)
    results = []
    for layer, device, dtype in (
        (copy.deepcopy(moe).double(), "cpu", torch.float64),
        (moe.cuda(), "cuda", torch.float32),
    ):
        own_TD = x_TD.to(device, dtype).requires_grad_()
        y_TD, _ = layer(own_TD)
        y_TD.backward(direction_TD.to(device, dtype))
        results.append([y_TD, own_TD.grad, layer.gate.w_gate_DE.grad, *(w_EIO.grad for w_EIO in layer.experts.weights)])
    for exact, found in zip(*results, strict=True):
        torch.testing.assert_close(found.double().cpu(), exact, rtol=1e-4, atol=1e-4)
