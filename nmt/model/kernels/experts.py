"""Products of rows and the matrices of their experts.

`group_rows` chooses between a plain and a fused implementation, and the products follow it. The fused one runs on a GPU
of compute capability 8.0 or higher: it takes any number of experts, and the host never waits. The plain one is a loop
over the experts that have rows. It does all that it does with the rows of one expert while they are in the cache. The
threads of a CPU share the experts, see `share_groups`.

Letters: R rows sorted by expert, M rows to gather them from, E experts, I and O inputs and outputs of the matrices.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from nmt.model.kernels.threads import share_groups

_FUSED_TYPES = (torch.bfloat16, torch.float16, torch.float32)


class Groups(NamedTuple):
    """Which of R sorted rows belong to which expert. Rows past the last expert's belong to none."""

    ends_E: Tensor  # int32, the row after the last one of each expert
    num_rows: int
    sizes: dict[int, int]  # plain: number of rows of each expert that has any
    tiles_N2: Tensor | None  # fused: int32, (expert, first row) of each tile of rows


def group_rows(ends_E: Tensor, num_rows: int, dtype: torch.dtype) -> Groups:
    """Return the groups of rows of type `dtype`, of which those of expert e end before row ends_E[e] (int32)."""
    if _is_fused(ends_E.device, dtype) and num_rows:
        from nmt.model.kernels.experts_triton import list_tiles

        return Groups(ends_E, num_rows, {}, list_tiles(ends_E, num_rows, dtype))
    # Without rows, a GPU need not be asked.
    bounds = pairwise([0, *ends_E.tolist()] if num_rows else [])
    sizes = {expert: end - begin for expert, (begin, end) in enumerate(bounds) if end > begin}
    return Groups(ends_E, num_rows, sizes, None)


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
    It may have another type than the rows: then it is cast, by the plain form only for experts that have rows.
    """
    if groups.tiles_N2 is not None:
        from nmt.model.kernels.experts_triton import fused_matmul

        return fused_matmul(a_MI, w_EIO.to(a_MI.dtype), groups, token_R, relu, relu_output_RO)
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
    out_RO = a_MI.new_empty(groups.num_rows, w_EIO.shape[2])
    *outs_RO, rest_RO = _by_expert(out_RO, groups)
    rest_RO.zero_()
    rows_RI = _by_expert(a_MI if token_R is None else token_R, groups)
    masks_RO = None if relu_output_RO is None else _by_expert(relu_output_RO, groups)
    # Only of these experts: the weights of others may not even be in memory.
    matrices_IO = [w_EIO[expert] for expert in groups.sizes]

    def multiply(share: slice) -> None:
        for place in range(share.start, share.stop):
            a_RI = rows_RI[place] if token_R is None else a_MI.index_select(0, rows_RI[place])
            part_RO = torch.mm(a_RI, matrices_IO[place].to(a_RI.dtype), out=outs_RO[place])
            if relu:
                part_RO.relu_()
            if masks_RO:
                torch.ops.aten.threshold_backward(part_RO, masks_RO[place], 0, grad_input=part_RO)

    share_groups(multiply, list(groups.sizes.values()), groups.num_rows * w_EIO[0].numel(), a_MI.device)
    return out_RO


def _by_expert(x_RD: Tensor, groups: Groups) -> tuple[Tensor, ...]:
    """Return views of the rows of each expert that has any, and of the rows of none."""
    sizes = list(groups.sizes.values())
    return x_RD.split([*sizes, groups.num_rows - sum(sizes)])


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
    size = len(groups.ends_E), a_MI.shape[1], b_RO.shape[1]
    if not groups.sizes:
        return a_MI.new_zeros(size, dtype=dtype or a_MI.dtype)
    out_EIO = a_MI.new_empty(size, dtype=dtype or a_MI.dtype)
    outs_IO = out_EIO.unbind()
    for expert in groups.sizes.keys() ^ range(len(outs_IO)):
        outs_IO[expert].zero_()
    filled_IO = [outs_IO[expert] for expert in groups.sizes]
    rows_RI, rows_RO = _by_expert(a_MI if token_R is None else token_R, groups), _by_expert(b_RO, groups)

    def multiply(share: slice) -> None:
        for place in range(share.start, share.stop):
            a_RI = rows_RI[place] if token_R is None else a_MI.index_select(0, rows_RI[place])
            if out_EIO.dtype == a_RI.dtype:
                torch.mm(a_RI.T, rows_RO[place], out=filled_IO[place])
            else:
                filled_IO[place].copy_(a_RI.T @ rows_RO[place])

    share_groups(multiply, list(groups.sizes.values()), groups.num_rows * out_EIO[0].numel(), a_MI.device)
    return out_EIO
