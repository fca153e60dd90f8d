"""An LSTM layer over packed rows against PyTorch's LSTM on one sentence after the other."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nmt.batch import Rows, make_rows
from nmt.model.kernels import lstm_cell
from nmt.model.kernels.lstm import group_sentences, grouped_lstm, lstm, stepwise_lstm
from tests.kernels import DEVICE, compile_launches, needs_triton

Layer = Callable[[Tensor, list[Tensor], Rows], Tensor]


def rows_of(*lengths: int) -> Rows:
    return make_rows(np.array(lengths))[0]


def weights_of(inputs: int, cells: int, outputs: int) -> list[Tensor]:
    module = nn.LSTM(inputs, cells, proj_size=outputs if outputs < cells else 0)
    return [parameter.detach() for parameter in module.parameters()]


def stepwise(x_ND: Tensor, weights: list[Tensor], rows: Rows) -> Tensor:
    return stepwise_lstm(x_ND, lambda: weights, rows)


def sentence_by_sentence(x_ND: Tensor, weights: list[Tensor], rows: Rows) -> Tensor:
    """The oracle: PyTorch's LSTM on each sentence."""
    outputs = (weights[4] if len(weights) == 5 else weights[1].T).shape[0]
    y_NP = x_ND.new_zeros(len(x_ND), outputs)
    for rank_, length in zip(rows.rank_B.tolist(), rows.length_B.tolist(), strict=True):
        places = rows.begin_L[:length].long() + rank_
        state = x_ND.new_zeros(1, 1, outputs), x_ND.new_zeros(1, 1, len(weights[0]) // 4)
        y_TP = torch.lstm(x_ND[places, None], state, weights, True, 1, 0.0, True, False, False)[0][:, 0]
        y_NP = y_NP.index_copy(0, places, y_TP)
    return y_NP


LENGTHS = [(5, 5, 4, 2, 1), (3, 1, 9, 8, 8, 1, 8, 3), (1,), (1, 1, 1), (4,), (6, 6)]
SIZES = [(3, 5, 5), (3, 7, 4)]


def results(layer: Layer, x_ND: Tensor, weights: list[Tensor], rows: Rows, grad_NP: Tensor) -> list[Tensor]:
    """Outputs and the gradients of inputs and weights, as float64 on the CPU."""
    x_ND = x_ND.detach().clone().requires_grad_()
    weights = [weight.detach().clone().requires_grad_() for weight in weights]
    y_NP = layer(x_ND, weights, rows)
    y_NP.backward(grad_NP)
    found = [y_NP.detach(), x_ND.grad, *(weight.grad for weight in weights)]
    return [torch.zeros(()) if value is None else value.cpu().double() for value in found]


@pytest.mark.parametrize("layer", [grouped_lstm, stepwise])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_each_form_is_one_lstm_per_sentence(layer: Layer, sizes: tuple[int, int, int], lengths: tuple[int, ...]):
    rows, weights = rows_of(*lengths), [weight.double() for weight in weights_of(*sizes)]
    x_ND, grad_NP = (torch.randn(rows.num_rows, size).double() for size in (sizes[0], sizes[2]))
    expected = results(sentence_by_sentence, x_ND, weights, rows, grad_NP)
    for own, wanted in zip(results(layer, x_ND, weights, rows, grad_NP), expected, strict=True):
        torch.testing.assert_close(own, wanted)


def test_gradients_are_right_twice():
    """A backward pass changes nothing that another one needs."""
    rows, weights = rows_of(3, 2), [weight.double().requires_grad_() for weight in weights_of(3, 7, 4)]
    y_NP = stepwise(torch.randn(5, 3).double(), weights, rows)
    first, second = (torch.autograd.grad(y_NP.square().sum(), weights, retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_products_have_the_type_of_the_weights():
    rows, weights = rows_of(3, 1), [weight.double() for weight in weights_of(3, 7, 4)]
    x_ND = torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y_NP = lstm(x_ND, lambda: weights, rows)
    torch.testing.assert_close(y_NP, sentence_by_sentence(x_ND.double(), weights, rows))


@pytest.mark.parametrize("lengths", [[7], [30] * 40, [120, *[28] * 30], list(range(60, 0, -1)), [50] + [1] * 900])
def test_groups_hold_every_sentence_once_and_little_padding(lengths: list[int]):
    groups = group_sentences(rows_of(*lengths).begin_L)
    assert [sentence for first, after, _ in groups for sentence in range(first, after)] == list(range(len(lengths)))
    assert [positions for *_, positions in groups] == [lengths[first] for first, *_ in groups]
    padding = sum(positions * (after - first) for first, after, positions in groups) - sum(lengths)
    assert padding <= 8 * sum(positions for *_, positions in groups)
    assert len(groups) == 1 or len(set(lengths)) > 1


# ------------------------------------------------------------------------------------------------------ the cell


def forward_cell(name: str, rows: int, cells: int, dtype: torch.dtype, first: bool) -> list[Tensor]:
    """What a form of the cell's forward pass writes: gates, running and kept cell, output."""
    generator = torch.Generator().manual_seed(3)
    gates_BG, recurrent_BG = (torch.randn(rows, 4 * cells, generator=generator).to(DEVICE, dtype) for _ in range(2))
    running_BC = torch.full((rows, cells), torch.nan) if first else torch.randn(rows, cells, generator=generator)
    running_BC = running_BC.to(DEVICE)
    kept_BC, output_BC = (torch.full((rows, cells), torch.nan, device=DEVICE, dtype=dtype) for _ in range(2))
    form(name)(gates_BG, None if first else recurrent_BG, running_BC, kept_BC, output_BC)
    return [gates_BG, running_BC, kept_BC, output_BC]


def backward_cell(name: str, rows: int, cells: int, dtype: torch.dtype, first: bool) -> list[Tensor]:
    """What a form of the cell's backward pass writes: gradients of the running cell and of the sums of gates."""
    generator = torch.Generator().manual_seed(3)
    later = rows // 2
    gates_BG = torch.rand(rows, 4 * cells, generator=generator).to(DEVICE, dtype)
    grad_BC, kept_BC, before_BC = (torch.randn(rows, cells, generator=generator).to(DEVICE, dtype) for _ in range(3))
    running_BC = torch.randn(rows, cells, generator=generator)
    running_BC[later:] = torch.nan  # never written by the next position
    running_BC = running_BC.to(DEVICE)
    grad_gates_BG = torch.full((rows, 4 * cells), torch.nan, device=DEVICE, dtype=dtype)
    form(name)(grad_BC, gates_BG, kept_BC, None if first else before_BC, running_BC, later, grad_gates_BG)
    return [running_BC, grad_gates_BG]


def form(name: str) -> Callable[..., None]:
    if name.startswith("plain"):
        return getattr(lstm_cell, name)
    from nmt.model.kernels import lstm_cell_triton

    return getattr(lstm_cell_triton, name)


@needs_triton
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("rows", "cells"), [(1, 3), (5, 600), (4, 512)])
@pytest.mark.parametrize(("pass_", "name"), [(forward_cell, "cell_forward"), (backward_cell, "cell_backward")])
def test_the_fused_cell_is_the_plain_one(
    pass_: Callable[..., list[Tensor]], name: str, rows: int, cells: int, first: bool
):
    plain, fused = (pass_(f"{kind}_{name}", rows, cells, torch.float32, first) for kind in ("plain", "fused"))
    for expected, own in zip(plain, fused, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)


def launch_cells() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for first in (True, False):
            forward_cell("fused_cell_forward", 3, 64, dtype, first)
            backward_cell("fused_cell_backward", 3, 64, dtype, first)


@pytest.mark.slow
@needs_triton
def test_the_fused_cell_compiles_for_four_generations():
    assert all(not each.spilled for each in compile_launches(launch_cells))
