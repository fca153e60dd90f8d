"""Attention over packed rows: the plain and the fused form against loops over sentences."""

import pytest
import torch
from torch import Tensor

from nmt.model.kernels.attention import Side, attend, attention_weights
from tests.kernels import DEVICE, SHARED_BYTES, compile_launches, needs_triton

FUNCTIONS = ["product", "additive"]
# Lengths of the sentences on the target and on the source side: absent ones among them, all of one position, and more
# positions than a block of any kernel has.
BATCHES = {
    "mixed": ([3, 0, 9, 1, 33], [5, 0, 1, 20, 40]),
    "short": ([1, 1], [1, 1]),
    "one long": ([2], [70]),
}


def make_side(lengths: list[int], more_positions: int = 0) -> Side:
    """The packed layout of sentences of these lengths."""
    order = sorted(range(len(lengths)), key=lambda b: -lengths[b])
    active = [sum(t < length for length in lengths) for t in range(max(lengths) + more_positions)]
    begin_L = torch.tensor([0, *active]).cumsum(0)
    return begin_L.int(), torch.tensor(order).argsort().int(), torch.tensor(lengths).int()


def rows_of(side: Side, sentence: int) -> Tensor:
    """The rows of a sentence, in the order of its positions."""
    begin_L, rank_B, length_B = side
    return begin_L[: length_B[sentence]].long() + rank_B[sentence].long()


def looped(
    query_MA: Tensor, keys_NA: Tensor, values_ND: Tensor, v_A: Tensor, target: Side, source: Side, function: str
) -> Tensor:
    """The formula, one target row at a time."""
    context_MD = [values_ND.new_zeros(values_ND.shape[1])] * len(query_MA)
    for sentence in range(len(target[1])):
        sources_S = rows_of(source, sentence)
        for row in rows_of(target, sentence).tolist():
            keys_SA = keys_NA[sources_S]
            score_S = keys_SA @ query_MA[row] if function == "product" else (query_MA[row] + keys_SA).tanh() @ v_A
            context_MD[row] = score_S.softmax(0) @ values_ND[sources_S]
    return torch.stack(context_MD)


def results(form, inputs: list[Tensor], sides: tuple[Side, Side], function: str, direction_MD: Tensor) -> list[Tensor]:
    """Output and gradients of the inputs, V last."""
    inputs = [each.clone().requires_grad_() for each in inputs]
    context_MD = form(*inputs, *sides, function)
    used = inputs[:3] if function == "product" else inputs
    return [context_MD.detach(), *torch.autograd.grad(context_MD, used, direction_MD)]


def random_inputs(sides: tuple[Side, Side], size: int, width: int, padding: int) -> tuple[list[Tensor], Tensor]:
    """(query, keys, values, V; a direction), in float64 that float16 and bf16 can nearly hold."""
    num_targets, num_sources = (int(begin_L[-1]) + padding for begin_L, *_ in sides)
    shapes = (num_targets, size), (num_sources, size), (num_sources, width), (size,)
    *inputs, direction_MD = [torch.randn(shape).bfloat16().double() for shape in (*shapes, (num_targets, width))]
    inputs[0] *= size**-0.5
    return inputs, direction_MD


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("padding", [0, 3])
def test_the_plain_form_is_the_loop(batch: str, function: str, padding: int):
    sides = tuple(make_side(lengths, padding) for lengths in BATCHES[batch])
    inputs, direction_MD = random_inputs(sides, 5, 3, padding)
    expected = results(looped, inputs, sides, function, direction_MD)
    for exact, found in zip(expected, results(attend, inputs, sides, function, direction_MD), strict=True):
        torch.testing.assert_close(found, exact)


def test_weights_are_padded_and_add_up_to_one():
    sides = target, source = tuple(make_side(lengths) for lengths in BATCHES["mixed"])
    (query_MA, keys_NA, values_ND, v_A), _ = random_inputs(sides, 5, 3, 2)
    weights_TBS = attention_weights(query_MA, keys_NA, v_A, target, source, "additive")
    context_MD = attend(query_MA, keys_NA, values_ND, v_A, target, source, "additive")
    assert weights_TBS.shape == (33, 5, 40)
    for sentence in range(5):
        weights_TS = weights_TBS[: target[2][sentence], sentence]
        sources_S = rows_of(source, sentence)
        torch.testing.assert_close(weights_TS.sum(1), torch.ones(len(weights_TS)).double())
        expected_TD = weights_TS[:, : len(sources_S)] @ values_ND[sources_S]
        torch.testing.assert_close(context_MD[rows_of(target, sentence)], expected_TD)


def test_what_rows_of_padding_hold_does_not_matter():
    sides = tuple(make_side(lengths) for lengths in BATCHES["mixed"])
    inputs, direction_MD = random_inputs(sides, 5, 3, 4)
    expected = results(attend, inputs, sides, "additive", direction_MD)
    for each in (*inputs[:3], direction_MD):
        each[-4:] = 1e3
    for first, second in zip(expected, results(attend, inputs, sides, "additive", direction_MD), strict=True):
        assert torch.equal(first, second)


@needs_triton
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("dtype", "size", "width", "padding"),
    [(torch.float32, 32, 16, 0), (torch.float32, 150, 140, 5), (torch.bfloat16, 64, 64, 3), (torch.float16, 40, 16, 1)],
)
def test_the_fused_form_is_the_loop(
    batch: str, function: str, dtype: torch.dtype, size: int, width: int, padding: int, monkeypatch
):
    from nmt.model.kernels.attention_triton import fused_attend

    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies the bits of bf16 numbers")
    poison(monkeypatch)
    sides = tuple(make_side(lengths, padding) for lengths in BATCHES[batch])
    inputs, direction_MD = random_inputs(sides, size, width, padding)
    expected = results(looped, inputs, sides, function, direction_MD)
    inputs = [each.to(DEVICE, dtype) for each in inputs]
    for each in inputs[:3]:
        each[len(each) - padding :] = torch.nan
    sides = tuple(tuple(each.to(DEVICE) for each in side) for side in sides)
    found = results(fused_attend, inputs, sides, function, direction_MD.to(DEVICE, dtype))
    again = results(fused_attend, inputs, sides, function, direction_MD.to(DEVICE, dtype))
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for exact, fused, second in zip(expected, found, again, strict=True):
        assert fused.dtype == dtype
        assert torch.equal(fused, second)
        assert torch.equal(fused.cpu() == 0, exact == 0) or dtype != torch.float32
        assert (fused.double().cpu() - exact).norm() <= tolerance * exact.norm() + 1e-6


def poison(monkeypatch) -> None:
    """Make uninitialised tensors NaN, so that what a kernel forgets to write is seen."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))


def launch_all() -> None:
    """Launch every kernel as training does, in the forward and the backward pass."""
    from nmt.model.kernels.attention_triton import fused_attend

    sides = make_side([40, 3]), make_side([50, 2])
    for dtype, function in ((torch.bfloat16, "product"), (torch.bfloat16, "additive"), (torch.float32, "additive")):
        inputs = [torch.empty(shape, dtype=dtype) for shape in ((43, 512), (52, 512), (52, 512), (512,))]
        results(fused_attend, inputs, sides, function, torch.empty(43, 512, dtype=dtype))


@needs_triton
def test_kernels_compile_for_every_supported_card():
    compiled = compile_launches(launch_all)
    assert {each.capability for each in compiled} == set(SHARED_BYTES)
    assert len({each.kernel for each in compiled}) == 6
    assert [each for each in compiled if each.spilled] == []
