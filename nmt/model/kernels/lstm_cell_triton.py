"""Fused versions of the plain functions of `lstm_cell.py`: one program per block of rows and cells.

The file is imported only to run on a GPU, since Triton comes with PyTorch's CUDA builds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows and cells of a program.
_ROWS, _CELLS = 2, 512


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def _places(rows, C: tl.constexpr, ROWS: tl.constexpr, CELLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return (row numbers, places in tensors of C columns, in tensors of 4 C columns, which are inside)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * CELLS + tl.arange(0, CELLS))[None, :]
    wide = row.to(tl.int64) * C
    return row, wide + column, 4 * wide + column, (row < rows) & (column < C)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    gates,
    recurrent,
    running,
    kept,
    output,
    rows,
    C: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
):
    _, own, at, inside = _places(rows, C, ROWS, CELLS)
    i = tl.load(gates + at, inside, 0.0).to(tl.float32)
    f = tl.load(gates + at + C, inside, 0.0).to(tl.float32)
    g = tl.load(gates + at + 2 * C, inside, 0.0).to(tl.float32)
    o = tl.load(gates + at + 3 * C, inside, 0.0).to(tl.float32)
    if not FIRST:
        i += tl.load(recurrent + at, inside, 0.0).to(tl.float32)
        f += tl.load(recurrent + at + C, inside, 0.0).to(tl.float32)
        g += tl.load(recurrent + at + 2 * C, inside, 0.0).to(tl.float32)
        o += tl.load(recurrent + at + 3 * C, inside, 0.0).to(tl.float32)
    i, f, g, o = _sigmoid(i), _sigmoid(f), _tanh(g), _sigmoid(o)
    c = i * g
    if not FIRST:
        c += f * tl.load(running + own, inside, 0.0)
    tl.store(running + own, c, inside)
    narrow = gates.dtype.element_ty
    tl.store(gates + at, i.to(narrow), inside)
    tl.store(gates + at + C, f.to(narrow), inside)
    tl.store(gates + at + 2 * C, g.to(narrow), inside)
    tl.store(gates + at + 3 * C, o.to(narrow), inside)
    tl.store(kept + own, c.to(narrow), inside)
    tl.store(output + own, (o * _tanh(c)).to(narrow), inside)


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    sums,
    recurrent,
    before,
    after,
    output,
    rows,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
):
    _, own, at, inside = _places(rows, C, ROWS, CELLS)
    i = tl.load(sums + at, inside, 0.0).to(tl.float32) + tl.load(recurrent + at, inside, 0.0)
    f = tl.load(sums + at + C, inside, 0.0).to(tl.float32) + tl.load(recurrent + at + C, inside, 0.0)
    g = tl.load(sums + at + 2 * C, inside, 0.0).to(tl.float32) + tl.load(recurrent + at + 2 * C, inside, 0.0)
    o = tl.load(sums + at + 3 * C, inside, 0.0).to(tl.float32) + tl.load(recurrent + at + 3 * C, inside, 0.0)
    c = _sigmoid(f) * tl.load(before + own, inside, 0.0) + _sigmoid(i) * _tanh(g)
    tl.store(after + own, c, inside)
    tl.store(output + own, (_sigmoid(o) * _tanh(c)).to(output.dtype.element_ty), inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad_output,
    gates,
    kept,
    before,
    grad_running,
    grad_gates,
    rows,
    later,
    C: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
):
    row, own, at, inside = _places(rows, C, ROWS, CELLS)
    i = tl.load(gates + at, inside, 0.0).to(tl.float32)
    f = tl.load(gates + at + C, inside, 0.0).to(tl.float32)
    g = tl.load(gates + at + 2 * C, inside, 0.0).to(tl.float32)
    o = tl.load(gates + at + 3 * C, inside, 0.0).to(tl.float32)
    grad = tl.load(grad_output + own, inside, 0.0).to(tl.float32)
    bent = _tanh(tl.load(kept + own, inside, 0.0).to(tl.float32))
    grad_cell = grad * o * (1.0 - bent * bent) + tl.load(grad_running + own, inside & (row < later), 0.0)
    if FIRST:
        cell = tl.zeros_like(grad_cell)
    else:
        cell = tl.load(before + own, inside, 0.0).to(tl.float32)
    tl.store(grad_running + own, grad_cell * f, inside)
    narrow = grad_gates.dtype.element_ty
    tl.store(grad_gates + at, (grad_cell * g * i * (1.0 - i)).to(narrow), inside)
    tl.store(grad_gates + at + C, (grad_cell * cell * f * (1.0 - f)).to(narrow), inside)
    tl.store(grad_gates + at + 2 * C, (grad_cell * i * (1.0 - g * g)).to(narrow), inside)
    tl.store(grad_gates + at + 3 * C, (grad * bent * o * (1.0 - o)).to(narrow), inside)


def _grid(running_BC: Tensor) -> tuple[int, int]:
    return triton.cdiv(running_BC.shape[0], _ROWS), triton.cdiv(running_BC.shape[1], _CELLS)


def fused_cell_forward(
    gates_BG: Tensor, recurrent_BG: Tensor | None, running_BC: Tensor, kept_BC: Tensor, output_BC: Tensor
) -> None:
    """Do the same as `plain_cell_forward`, for contiguous rows."""
    rows, cells = kept_BC.shape
    recurrent = gates_BG if recurrent_BG is None else recurrent_BG
    first = recurrent_BG is None
    arguments = (gates_BG, recurrent, running_BC, kept_BC, output_BC, rows, cells, first)
    _forward[_grid(kept_BC)](*arguments, ROWS=_ROWS, CELLS=_CELLS)


def fused_cell_step(input_BG: Tensor, recurrent_BG: Tensor, cell_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same as `plain_cell_step`, for contiguous rows."""
    rows, cells = cell_BC.shape
    output_BC, after_BC = input_BG.new_empty(rows, cells), torch.empty_like(cell_BC)
    _step[_grid(cell_BC)](input_BG, recurrent_BG, cell_BC, after_BC, output_BC, rows, cells, ROWS=_ROWS, CELLS=_CELLS)
    return output_BC, after_BC


def fused_cell_backward(
    grad_output_BC: Tensor,
    gates_BG: Tensor,
    kept_BC: Tensor,
    before_BC: Tensor | None,
    grad_running_BC: Tensor,
    later: int,
    grad_gates_BG: Tensor,
) -> None:
    """Do the same as `plain_cell_backward`, for contiguous rows."""
    rows, cells = kept_BC.shape
    before = kept_BC if before_BC is None else before_BC
    first = before_BC is None
    arguments = (grad_output_BC, gates_BG, kept_BC, before, grad_running_BC, grad_gates_BG, rows, later, cells, first)
    _backward[_grid(kept_BC)](*arguments, ROWS=_ROWS, CELLS=_CELLS)
