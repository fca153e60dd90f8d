"""Attention over packed rows: the plain and the fused form against loops over sentences."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nmt.batch import Rows, Shape, fit, make_batch
from nmt.model.kernels.attention import attend
from tests.kernels import DEVICE, SHARED_BYTES, compile_launches, needs_triton

FUNCTIONS = ["product", "additive"]
# Lengths of the sentences on the target and on the source side: all of one position, and more positions than a block of
# any kernel has. Padding adds that many rows and positions, and an absent sentence.
BATCHES = {
    "mixed": ([3, 9, 1, 33], [5, 1, 20, 7]),
    "short": ([1, 1], [1, 1]),
    "one long": ([2], [70]),
}


def make_sides(batch: str, padding: int) -> tuple[Rows, Rows]:
    """The target and the source rows of a batch, padded by `fit`."""
    target, source = ([np.zeros(length - 1, dtype=np.int64) for length in side] for side in BATCHES[batch])
    made = make_batch(np.arange(len(target)), source, target)
    if padding:
        sides = (tuple(count + padding for count in (*side, 0)) for side in made.shape[1:])
        made = fit(made, Shape(made.num_sentences + padding, *sides))
    return made.target, made.source


def rows_of(side: Rows, sentence: int) -> Tensor:
    """The rows of a sentence, in the order of its positions."""
    return side.begin_L[: side.length_B[sentence]].long() + side.rank_B[sentence].long()


def looped(
    query_MA: Tensor, keys_NA: Tensor, values_ND: Tensor, v_A: Tensor, target: Rows, source: Rows, function: str
) -> Tensor:
    """The formula, one target row at a time."""
    context_MD = [values_ND.new_zeros(values_ND.shape[1])] * len(query_MA)
    for sentence in range(target.num_sentences):
        sources_S = rows_of(source, sentence)
        for row in rows_of(target, sentence).tolist():
            keys_SA = keys_NA[sources_S]
            score_S = keys_SA @ query_MA[row] if function == "product" else (query_MA[row] + keys_SA).tanh() @ v_A
            context_MD[row] = score_S.softmax(0) @ values_ND[sources_S]
    return torch.stack(context_MD)


def results(form, inputs: list[Tensor], sides: tuple[Rows, Rows], function: str, direction_MD: Tensor) -> list[Tensor]:
    """Output and gradients of the inputs, V last."""
    inputs = [each.clone().requires_grad_() for each in inputs]
    context_MD = form(*inputs, *sides, function)
    used = inputs[:3] if function == "product" else inputs
    return [context_MD.detach(), *torch.autograd.grad(context_MD, used, direction_MD)]


def random_inputs(sides: tuple[Rows, Rows], size: int, width: int) -> tuple[list[Tensor], Tensor]:
    """(query, keys, values, V; a direction), in float64 that float16 and bf16 can nearly hold."""
    num_targets, num_sources = (side.num_rows for side in sides)
    shapes = (num_targets, size), (num_sources, size), (num_sources, width), (size,)
    *inputs, direction_MD = [torch.randn(shape).bfloat16().double() for shape in (*shapes, (num_targets, width))]
    inputs[0] *= size**-0.5
    return inputs, direction_MD


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("padding", [0, 3])
def test_the_plain_form_is_the_loop(batch: str, function: str, padding: int):
    sides = make_sides(batch, padding)
    inputs, direction_MD = random_inputs(sides, 5, 3)
    expected = results(looped, inputs, sides, function, direction_MD)
    for exact, found in zip(expected, results(attend, inputs, sides, function, direction_MD), strict=True):
        torch.testing.assert_close(found, exact)


def test_what_rows_of_padding_hold_does_not_matter():
    sides = make_sides("mixed", 4)
    inputs, direction_MD = random_inputs(sides, 5, 3)
    expected = results(attend, inputs, sides, "additive", direction_MD)
    for each in (*inputs[:3], direction_MD):
        each[-4:] = 1e3
    for first, second in zip(expected, results(attend, inputs, sides, "additive", direction_MD), strict=True):
        assert torch.equal(first, second)


@pytest.mark.slow
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
    sides = make_sides(batch, padding)
    inputs, direction_MD = random_inputs(sides, size, width)
    expected = results(looped, inputs, sides, function, direction_MD)
    inputs = [each.to(DEVICE, dtype) for each in inputs]
    if padding:
        for each, side in zip(inputs[:3], (sides[0], sides[1], sides[1]), strict=True):
            each[~side.real_N] = torch.nan
    sides = tuple(side.map(lambda tensor: tensor.to(DEVICE)) for side in sides)
    found = results(fused_attend, inputs, sides, function, direction_MD.to(DEVICE, dtype))
    # In the interpreter, programs follow each other in one order anyway.
    again = (
        results(fused_attend, inputs, sides, function, direction_MD.to(DEVICE, dtype)) if DEVICE == "cuda" else found
    )
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
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

    sides = make_sides("mixed", 0)
    for dtype, function in ((torch.bfloat16, "product"), (torch.bfloat16, "additive"), (torch.float32, "additive")):
        shapes = ((46, 512), (33, 512), (33, 512), (512,))
        inputs = [torch.empty(shape, dtype=dtype) for shape in shapes]
        results(fused_attend, inputs, sides, function, torch.empty(46, 512, dtype=dtype))


@pytest.mark.slow
@needs_triton
def test_kernels_compile_for_every_supported_card():
    compiled = compile_launches(launch_all)
    assert {each.capability for each in compiled} == set(SHARED_BYTES)
    assert len({each.kernel for each in compiled}) == 6
    assert [each for each in compiled if each.spilled] == []
