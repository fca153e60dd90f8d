"""The cell of an LSTM at one position, forward and backward: everything but the matrix products.

`cell_forward`, `cell_backward` and `cell_step` choose between a plain and a fused implementation. The fused ones run on
a GPU and touch each number once. Bound, in bytes per cell of a row, for 2-byte numbers: forward 8 (gates) + 8
(recurrent part) + 8 (gates back) + 4 (kept cell, output) + 8 (running cell); backward 8 + 8 (gates and their gradient)
+ 6 + 8.

Letters: B sentences at this position, C cells; G = 4 C gates in PyTorch's order: input, forget, cell, output.
"""

import torch
from torch import Tensor


def cell_forward(
    gates_BG: Tensor, recurrent_BG: Tensor | None, running_BC: Tensor, kept_BC: Tensor, output_BC: Tensor
) -> None:
    """Compute c' = f c + i g and the output o tanh(c'), where i, f, o are sigmoids and g is a tanh of sums.

    `gates_BG` has the input's part of the sums, and gets the gates. `recurrent_BG` has the recurrent part; None at the
    first position, where c = 0. `running_BC` (float32 or better) has c, and gets c'. `kept_BC` gets c' for the backward
    pass, in the type of the gates.
    """
    if gates_BG.is_cuda:
        from nmt.model.kernels.lstm_cell_triton import fused_cell_forward

        fused_cell_forward(gates_BG, recurrent_BG, running_BC, kept_BC, output_BC)
    else:
        plain_cell_forward(gates_BG, recurrent_BG, running_BC, kept_BC, output_BC)


def plain_cell_forward(
    gates_BG: Tensor, recurrent_BG: Tensor | None, running_BC: Tensor, kept_BC: Tensor, output_BC: Tensor
) -> None:
    """Do the work of `cell_forward` with PyTorch operations."""
    sums_BG = gates_BG.to(running_BC.dtype)
    if recurrent_BG is not None:
        sums_BG = sums_BG + recurrent_BG
    i, f, g, o = sums_BG.chunk(4, dim=1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    running_BC.copy_(i * g if recurrent_BG is None else f * running_BC + i * g)
    gates_BG.copy_(torch.cat([i, f, g, o], dim=1))
    kept_BC.copy_(running_BC)
    output_BC.copy_(o * running_BC.tanh())


def cell_step(input_BG: Tensor, recurrent_BG: Tensor, cell_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Return (output_BC, c'_BC) of `cell_forward` from the two parts of the sums and c, for a pass without gradient.

    c and c' have the type of `cell_BC`, and the output that of the sums. Bound: 16 bytes per cell of a row for sums of
    2-byte numbers, 2 for the output and 8 for a float32 cell.
    """
    if input_BG.is_cuda:
        from nmt.model.kernels.lstm_cell_triton import fused_cell_step

        return fused_cell_step(input_BG, recurrent_BG, cell_BC)
    return plain_cell_step(input_BG, recurrent_BG, cell_BC)


def plain_cell_step(input_BG: Tensor, recurrent_BG: Tensor, cell_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Return `cell_step` computed with PyTorch operations."""
    sums_BG = input_BG.to(cell_BC.dtype) + recurrent_BG
    i, f, g, o = sums_BG.chunk(4, dim=1)
    sums_BG[:, : 2 * cell_BC.shape[1]].sigmoid_()  # i and f
    after_BC = torch.addcmul(f.mul_(cell_BC), i, g.tanh_())
    return o.sigmoid_().mul(after_BC.tanh()).to(input_BG.dtype), after_BC


def cell_backward(
    grad_output_BC: Tensor,
    gates_BG: Tensor,
    kept_BC: Tensor,
    before_BC: Tensor | None,
    grad_running_BC: Tensor,
    later: int,
    grad_gates_BG: Tensor,
) -> None:
    """Compute the gradient of the sums of gates, given that of the output.

    `gates_BG` and `kept_BC` are from `cell_forward`; `before_BC` is the kept c of the previous position, None at the
    first. `grad_running_BC` (float32 or better) has the gradient of c' from the next position in its first `later`
    rows, and gets that of c.
    """
    arguments = grad_output_BC, gates_BG, kept_BC, before_BC, grad_running_BC, later, grad_gates_BG
    if gates_BG.is_cuda:
        from nmt.model.kernels.lstm_cell_triton import fused_cell_backward

        fused_cell_backward(*arguments)
    else:
        plain_cell_backward(*arguments)


def plain_cell_backward(
    grad_output_BC: Tensor,
    gates_BG: Tensor,
    kept_BC: Tensor,
    before_BC: Tensor | None,
    grad_running_BC: Tensor,
    later: int,
    grad_gates_BG: Tensor,
) -> None:
    """Do the work of `cell_backward` with PyTorch operations."""
    exact = grad_running_BC.dtype
    i, f, g, o = gates_BG.to(exact).chunk(4, dim=1)
    tanh_BC, grad_BC = kept_BC.to(exact).tanh(), grad_output_BC.to(exact)
    grad_running_BC[later:] = 0.0
    grad_cell_BC = grad_running_BC + grad_BC * o * (1.0 - tanh_BC.square())
    before = 0.0 if before_BC is None else before_BC.to(exact)
    parts = (
        grad_cell_BC * g * i * (1.0 - i),
        grad_cell_BC * before * f * (1.0 - f),
        grad_cell_BC * i * (1.0 - g.square()),
        grad_BC * tanh_BC * o * (1.0 - o),
    )
    grad_running_BC.copy_(grad_cell_BC * f)
    grad_gates_BG.copy_(torch.cat(parts, dim=1))
