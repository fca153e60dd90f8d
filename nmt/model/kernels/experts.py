"""Products of rows and the matrices of their experts.

`group_rows` chooses between a plain and a fused implementation, and the products follow it. The fused one runs on a GPU
of compute capability 8.0 or higher: it takes any number of experts, and the host never waits. The plain one is a loop
over the experts that have rows.

Letters: R rows sorted by expert, M rows to gather them from, E experts, I and O inputs and outputs of the matrices.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_FUSED_TYPES = (torch.bfloat16, torch.float16, torch.float32)


class Groups(NamedTuple):
    """Which of R sorted rows belong to which expert. Rows past the last expert's belong to none."""

    ends_E: Tensor  # int32, the row after the last one of each expert
    num_rows: int
    parts: list[tuple[int, int, int]]  # plain: (expert, first row, row after the last) of each expert that has rows
    tiles_N2: Tensor | None  # fused: int32, (expert, first row) of each tile of rows


def group_rows(ends_E: Tensor, num_rows: int, dtype: torch.dtype) -> Groups:
    """Return the groups of rows of type `dtype`, of which those of expert e end before row ends_E[e] (int32)."""
    if _is_fused(ends_E.device, dtype) and num_rows:
        from nmt.model.kernels.experts_triton import list_tiles

        return Groups(ends_E, num_rows, [], list_tiles(ends_E, num_rows, dtype))
    ends = ends_E.tolist()
    parts = [(e, begin, end) for e, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > begin]
    return Groups(ends_E, num_rows, parts, None)


def _is_fused(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in _FUSED_TYPES and torch.cuda.get_device_capability(device) >= (8, 0)


def grouped_matmul(
    a_MI: Tensor,
    w_EIO: Tensor,
    groups: Groups,
    token_R: Tensor | None = None,
    relu: bool = False,
    relu_output_RO: Tensor | None = None,
) -> Tensor:
    """Return the rows of expert e times w[e], shape (R, O), in the type of the rows; zeros for rows of no expert.

    Row r is a[token[r]], or a[r] without `token_R` (int64). With `relu`, negative results become 0. So do results where
    `relu_output_RO` is not positive: the backward pass of the ReLU that computed it. `w_EIO` may be a transposed view.
    """
    if groups.tiles_N2 is not None:
        from nmt.model.kernels.experts_triton import fused_matmul

        return fused_matmul(a_MI, w_EIO, groups, token_R, relu, relu_output_RO)
    return plain_matmul(a_MI, w_EIO, groups, token_R, relu, relu_output_RO)


def plain_matmul(
    a_MI: Tensor,
    w_EIO: Tensor,
    groups: Groups,
    token_R: Tensor | None = None,
    relu: bool = False,
    relu_output_RO: Tensor | None = None,
) -> Tensor:
    """Return `grouped_matmul` computed with one product per expert."""
    a_RI = a_MI if token_R is None else a_MI.index_select(0, token_R)
    out_RO = a_RI.new_zeros(groups.num_rows, w_EIO.shape[2])
    for expert, first, last in groups.parts:
        torch.mm(a_RI[first:last], w_EIO[expert], out=out_RO[first:last])
    if relu:
        out_RO.relu_()
    return out_RO if relu_output_RO is None else out_RO.masked_fill_(relu_output_RO <= 0, 0)


def grouped_outer(
    a_MI: Tensor, b_RO: Tensor, groups: Groups, token_R: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the sum of a^T b over the rows of each expert, shape (E, I, O); zeros for an expert without rows.

    Row r of a is a[token[r]], or a[r] without `token_R`. The result has type `dtype`, or that of the rows.
    """
    if groups.tiles_N2 is not None:
        from nmt.model.kernels.experts_triton import fused_outer

        return fused_outer(a_MI, b_RO, groups, token_R, dtype)
    return plain_outer(a_MI, b_RO, groups, token_R, dtype)


def plain_outer(
    a_MI: Tensor, b_RO: Tensor, groups: Groups, token_R: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return `grouped_outer` computed with one product per expert."""
    a_RI = a_MI if token_R is None else a_MI.index_select(0, token_R)
    out_EIO = a_RI.new_zeros(len(groups.ends_E), a_RI.shape[1], b_RO.shape[1], dtype=dtype or a_MI.dtype)
    for expert, first, last in groups.parts:
        if out_EIO.dtype == a_RI.dtype:
            torch.mm(a_RI[first:last].T, b_RO[first:last], out=out_EIO[expert])
        else:
            out_EIO[expert] = a_RI[first:last].T @ b_RO[first:last]
    return out_EIO
