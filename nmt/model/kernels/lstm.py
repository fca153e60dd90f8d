"""An LSTM layer over the sentences of a packed batch, which start from a state of zeros.

`lstm` chooses between two implementations. On a CPU, PyTorch's LSTM runs on padded groups of sentences of similar
lengths. On a GPU, a loop over the positions alternates matrix products of the library and a fused cell
(`lstm_cell.py`): the rows of a position are one matrix, so that nothing is padded. The input product of all positions
is one product, and so are the gradients of the weights. Recorded in a CUDA graph, the loop costs the host nothing.

Bound of a layer on N rows: 6 N (4 C (D + P) + C P') operations, with P' = P if there is a projection, else 0; and the
traffic of the cells. At few sentences, it is the time of one product and one cell per position.

Letters: N rows, D input width, P output width, C cells, G = 4 C gates; T positions of B sentences of a group, M rows
of padded groups.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from nmt.batch import Rows
from nmt.model.kernels.lstm_cell import cell_backward, cell_forward, cell_step
from nmt.model.side_by_side import Later

Weights = Sequence[Tensor]
"""w_ih (G, D), w_hh (G, P), b_ih (G), b_hh (G) and, if P < C, w_hr (P, C): PyTorch's order, gates i, f, g, o."""

_STEP = 8
"""On a CPU, one more step of a group takes about as long as that many more sentences in a step."""


def lstm(x_ND: Tensor, cast: Callable[[], list[Tensor]], rows: Rows) -> Tensor:
    """Return y_NP. `cast` returns the weights, whose type products have."""
    if x_ND.is_cuda:
        return stepwise_lstm(x_ND, cast, rows)
    weights = cast()
    with torch.autocast(x_ND.device.type, enabled=False):
        return grouped_lstm(x_ND.to(weights[0].dtype), weights, rows)


def lstm_step(x_BD: Tensor, state: tuple[Tensor, Tensor], weights: Weights) -> tuple[Tensor, Tensor]:
    """Return (output_BP, cell_BC) after one position, given those before it; for passes without gradient.

    Two products, a fused cell, and the product of a projection: three or four launches.
    """
    w_ih, w_hh, b_ih, b_hh, *projection = weights
    output_BP, cell_BC = state
    input_BG, recurrent_BG = torch.addmm(b_ih, x_BD, w_ih.T), torch.addmm(b_hh, output_BP, w_hh.T)
    output_BC, cell_BC = cell_step(input_BG, recurrent_BG, cell_BC)
    return (output_BC @ projection[0].T if projection else output_BC), cell_BC


def stepwise_lstm(x_ND: Tensor, cast: Callable[[], list[Tensor]], rows: Rows) -> Tensor:
    """Return `lstm` computed position by position; gradients of the weights are computed aside (`Later`)."""
    later = Later()
    weights = later.through(cast)
    with torch.autocast(x_ND.device.type, enabled=False):
        y_NP: Tensor = StepwiseLSTM.apply(x_ND.to(weights[0].dtype), rows, later, *weights)
    return y_NP


def grouped_lstm(x_ND: Tensor, weights: Weights, rows: Rows) -> Tensor:
    """Return `lstm` computed by PyTorch's LSTM on padded groups of sentences.

    Padding follows each sentence, so it cannot affect real positions.
    """
    groups = group_sentences(rows.begin_L)
    if len(groups) == 1 and len(set(rows.alive)) == 1:
        return _padded_lstm(x_ND.view(len(rows.alive), rows.alive[0], -1), weights).flatten(0, 1)
    places = [_padded_rows(rows.begin_L, len(x_ND), *group).flatten() for group in groups]
    row_M, place_N = _places(places, len(x_ND))
    x_MD = _Move.apply(x_ND, row_M, place_N)
    outputs = [
        _padded_lstm(part_MD.view(positions, after - first, -1), weights).flatten(0, 1)
        for part_MD, (first, after, positions) in zip(x_MD.split([len(place) for place in places]), groups, strict=True)
    ]
    return _Move.apply(torch.cat(outputs), place_N, row_M)


def _padded_lstm(x_TBD: Tensor, weights: Weights) -> Tensor:
    batch, cells, width = x_TBD.shape[1], len(weights[0]) // 4, weights[1].shape[1]
    state = x_TBD.new_zeros(1, batch, width), x_TBD.new_zeros(1, batch, cells)
    return torch.lstm(x_TBD, state, list(weights), True, 1, 0.0, torch.is_grad_enabled(), False, False)[0]


class StepwiseLSTM(Function):
    """The loop over positions. Kept for the backward pass: x, gates (N G), cells (N C), outputs, and their projection.

    Cells are kept in the type of the products; the running cell has at least float32.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, rows: Rows, later: Later, *weights: Tensor) -> Tensor:
        w_ih, w_hh, b_ih, b_hh, *projection = weights
        most, cells = rows.alive[0], len(w_hh) // 4
        gates_NG = torch.addmm(b_ih + b_hh, x_ND, w_ih.T)
        exact = torch.promote_types(x_ND.dtype, torch.float32)
        running_BC = x_ND.new_empty(most, cells, dtype=exact)
        recurrent_BG = x_ND.new_empty(most, 4 * cells)
        kept_NC, y_NP = x_ND.new_empty(len(x_ND), cells), x_ND.new_empty(len(x_ND), w_hh.shape[1])
        output_NC = x_ND.new_empty(len(x_ND), cells) if projection else y_NP
        before = _Position(0, 0)
        for here in _positions(rows.alive):
            recurrent = recurrent_BG[: here.count] if before.count else None
            if recurrent is not None:
                torch.mm(y_NP[before.first : before.first + here.count], w_hh.T, out=recurrent)
            output_BC = output_NC[here.rows]
            cell_forward(gates_NG[here.rows], recurrent, running_BC[: here.count], kept_NC[here.rows], output_BC)
            if projection:
                torch.mm(output_BC, projection[0].T, out=y_NP[here.rows])
            before = here
        ctx.save_for_backward(x_ND, gates_NG, kept_NC, output_NC, y_NP, rows.previous_N, *weights)
        ctx.alive, ctx.later = rows.alive, later
        return y_NP

    @staticmethod
    def backward(ctx: Any, grad_NP: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gates_NG, kept_NC, output_NC, y_NP, previous_N, *weights = ctx.saved_tensors
        w_ih, w_hh, _, _, *projection = weights
        alive, grad_gates_NG = ctx.alive, torch.empty_like(gates_NG)
        # Of the projected output: what comes from above, to which the loop adds what comes from the next position.
        grad_NP = grad_NP.clone()
        exact = torch.promote_types(x_ND.dtype, torch.float32)
        grad_running_BC = kept_NC.new_empty(alive[0], kept_NC.shape[1], dtype=exact)
        grad_output_BC = kept_NC.new_empty(alive[0], kept_NC.shape[1])
        positions = _positions(alive)
        later = _Position(0, 0)
        for place in reversed(range(len(positions))):
            here = positions[place]
            if later.count:
                grad_NP[here.first : here.first + later.count].addmm_(grad_gates_NG[later.rows], w_hh)
            grad_output = grad_NP[here.rows]
            if projection:
                grad_output = torch.mm(grad_output, projection[0], out=grad_output_BC[: here.count])
            before_BC = None
            if place:
                first = positions[place - 1].first
                before_BC = kept_NC[first : first + here.count]
            own = gates_NG[here.rows], kept_NC[here.rows], before_BC, grad_running_BC[: here.count]
            cell_backward(grad_output, *own, later.count, grad_gates_NG[here.rows])
            later = here
        outputs = (output_NC, grad_NP) if projection else None
        ctx.later.leave(lambda: _weight_gradients(x_ND, y_NP, previous_N[alive[0] :], grad_gates_NG, outputs))
        return grad_gates_NG @ w_ih, None, None, *weights


class _Position:
    """The rows of one position."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count
        self.rows = slice(first, first + count)


def _positions(alive: Sequence[int]) -> list[_Position]:
    found, first = [], 0
    for count in alive:
        found.append(_Position(first, count))
        first += count
    return found


def _weight_gradients(
    x_ND: Tensor,
    y_NP: Tensor,
    previous_M: Tensor,
    grad_gates_NG: Tensor,
    outputs: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, ...]:
    """Return the gradients of all weights.

    `previous_M` has the previous row of each row after the first position, whose recurrent input is zero. `outputs` are
    the cells' outputs and the gradient of their projection; None without one.
    """
    exact = torch.promote_types(x_ND.dtype, torch.float32)
    grad_bias = grad_gates_NG.sum(0, dtype=exact).to(x_ND.dtype)
    grad_hh = grad_gates_NG[len(x_ND) - len(previous_M) :].T @ y_NP.index_select(0, previous_M)
    gradients = grad_gates_NG.T @ x_ND, grad_hh, grad_bias, grad_bias
    return gradients if outputs is None else (*gradients, outputs[1].T @ outputs[0])


def group_sentences(begin_L: Tensor) -> list[tuple[int, int, int]]:
    """Return (first, after, positions) of groups of neighbouring sentences: first .. after - 1, by falling length.

    A group ends where its padding would cost more than the steps of another group.
    """
    alive_L1 = begin_L.diff()[:, None]
    length_B = (torch.arange(int(alive_L1[0]), device=begin_L.device) < alive_L1).sum(0).tolist()
    groups, first, padding = [], 0, 0
    for sentence, length in enumerate(length_B):
        padding += length_B[first] - length
        if padding > _STEP * length:
            groups.append((first, sentence, length_B[first]))
            first, padding = sentence, 0
    return [*groups, (first, len(length_B), length_B[first])]


def _padded_rows(begin_L: Tensor, num_rows: int, first: int, after: int, positions: int) -> Tensor:
    """Return row_TB of the sentences first .. after - 1; `num_rows` at padding."""
    row_TB = begin_L[:positions, None] + torch.arange(first, after, dtype=begin_L.dtype, device=begin_L.device)
    return torch.where(row_TB < begin_L[1 : positions + 1, None], row_TB, num_rows)


def _places(rows: list[Tensor], num_rows: int) -> tuple[Tensor, Tensor]:
    """Return (row_M, place_N): the row at each place of all groups, and the place of each row; M if it has none."""
    row_M = torch.cat(rows).long()
    place_N = row_M.new_full((num_rows + 1,), len(row_M))
    # All padding is written to one more place, which is dropped.
    place_N.scatter_(0, row_M, torch.arange(len(row_M), device=row_M.device))
    return row_M, place_N[:-1]


class _Move(Function):
    """Rows moved to other places. Both passes gather, so that their order is fixed."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, row_M: Tensor, place_N: Tensor) -> Tensor:
        ctx.save_for_backward(place_N)
        return _take_or_zero(x_ND, row_M)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        (place_N,) = ctx.saved_tensors
        return _take_or_zero(grad_MD, place_N), None, None


def _take_or_zero(x_ND: Tensor, index_M: Tensor) -> Tensor:
    """Return x[index], with zeros where the index is the number of rows."""
    rows = len(x_ND)
    taken_MD = x_ND.index_select(0, index_M.clamp(max=rows - 1))
    # A CPU fills few rows faster than it passes over all.
    return taken_MD.index_fill_(0, (index_M == rows).nonzero().flatten(), 0.0)
