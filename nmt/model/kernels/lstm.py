"""An LSTM layer over packed rows: the sentences of a batch without padding, position by position.

Sentences are sorted by falling length. Position t has the rows begin[t] .. begin[t + 1] - 1; the sentences alive there
are the first B_t = begin[t + 1] - begin[t] of the batch, and row begin[t] + j belongs to sentence j. `begin` may be
longer than needed: its tail then repeats the number of real rows. Rows after the last real one are padding: their
outputs are zeros, and so are the gradients that they pass on.

`lstm` chooses between a plain and a fused implementation. The plain one unpacks groups of sentences of similar
lengths, and runs PyTorch's LSTM on each. The fused one runs all positions in one launch.

Bound of the fused one on N rows: the products, 2 N (4 C (D + P) + C P') operations forward and twice as many backward
(P' = P with a projection, else 0), and at least one exchange between the processors of the GPU per position. Memory
traffic: gates written, read and overwritten by their activations, the latter read and the gates' gradients written and
read three times, N 4 C values each.

Letters: N rows, L positions, D input width, P output width, C cells, M rows of padded groups; T positions of B
sentences within a group.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Weights = Sequence[Tensor]
"""w_ih (4 C, D), w_hh (4 C, P), b_ih, b_hh (4 C) and, if P < C, w_hr (P, C): PyTorch's order, gates i, f, g, o."""

_STEP = 8
"""On a CPU, one more step of a group takes about as long as that many more sentences in a step."""


def lstm(x_ND: Tensor, weights: Weights, begin_L: Tensor, previous_N: Tensor, most: int) -> Tensor:
    """Return y_NP of one LSTM layer that starts at a zero state.

    `begin_L` (L + 1 values) and `previous_N` are int32. previous[r] is the row of the same sentence one position
    earlier, or N where there is none. `most` is at least the number of sentences. Products have the type of `weights`.
    """
    return lstms([x_ND], [weights], begin_L, previous_N, most)[0]


def lstms(
    x: Sequence[Tensor], weights: Sequence[Weights], begin_L: Tensor, previous_N: Tensor, most: int
) -> list[Tensor]:
    """Return the outputs of independent LSTMs of equal sizes on the same sentences, as `lstm` does for one.

    The fused form runs them at the same time. Short steps then take little longer than those of one LSTM.
    """
    recurrent_GP = weights[0][1]
    dtype, outputs = recurrent_GP.dtype, recurrent_GP.shape[1]
    x = [x_ND.to(dtype) for x_ND in x]
    with torch.autocast(x[0].device.type, enabled=False):
        if has_kernel(x[0].device, dtype, recurrent_GP.shape[0] // 4, outputs):
            from nmt.model.kernels.lstm_triton import fused_lstms

            return fused_lstms(x, weights, begin_L, previous_N, most)
        return [plain_lstm(x_ND, own, begin_L, most) for x_ND, own in zip(x, weights, strict=True)]


def has_kernel(device: torch.device, dtype: torch.dtype, cells: int, outputs: int) -> bool:
    """Return whether the fused form runs a layer of these sizes."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or find_spec("triton") is None:
        return False
    return cells % 128 == 0 and outputs % 128 == 0 and torch.cuda.get_device_capability(device) >= (8, 0)


def plain_lstm(x_ND: Tensor, weights: Weights, begin_L: Tensor, most: int) -> Tensor:
    """Return `lstm` computed by PyTorch's LSTM on padded groups of sentences.

    Padding follows each sentence, so it cannot affect real positions.
    """
    if x_ND.is_cuda:
        groups = [(0, most, len(begin_L) - 1)]  # The host does not know the lengths.
    else:
        groups = group_sentences(begin_L)
    rows = [_padded_rows(begin_L, len(x_ND), *group).flatten() for group in groups]
    row_M, place_N = _places(rows, len(x_ND))
    x_MD = _Move.apply(x_ND, row_M, place_N)
    outputs = []
    cells, width = len(weights[0]) // 4, weights[1].shape[1]
    for x_TBD, (first, after, positions) in zip(x_MD.split([len(row) for row in rows]), groups, strict=True):
        batch = after - first
        state = x_ND.new_zeros(1, batch, width), x_ND.new_zeros(1, batch, cells)
        x_TBD = x_TBD.view(positions, batch, -1)
        y_TBP = torch.lstm(x_TBD, state, list(weights), True, 1, 0.0, torch.is_grad_enabled(), False, False)[0]
        outputs.append(y_TBP.flatten(0, 1))
    return _Move.apply(torch.cat(outputs), place_N, row_M)


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
    empty_M = index_M == rows
    if taken_MD.is_cuda:
        return taken_MD.masked_fill_(empty_M[:, None], 0.0)
    # A CPU fills few rows faster than it passes over all. A GPU would wait for their number.
    return taken_MD.index_fill_(0, empty_M.nonzero().flatten(), 0.0)
