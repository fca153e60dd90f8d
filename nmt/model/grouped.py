"""Matrix products over consecutive groups of rows, with one weight matrix per group: the arithmetic of the experts.

Only `grouped_matmul` and `grouped_outer` choose the implementation. For bf16 on a GPU, it is torch's grouped product,
which needs no wait of the host. Elsewhere, it is a loop. A faster kernel would be added here.

Letters: R rows sorted by group, E groups, I and O input and output features. `ends_E` (int32) has the row after the
last one of each group. Groups may be empty. Rows past the last end belong to no group, and their results are
unspecified.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nmt.config import ModelConfig
from nmt.errors import UserError

# torch's grouped product allows fewer than 1024 groups per call (CUDA, torch 2.11).
_MAX_GROUPS = 1023


# It needs rows of a multiple of 16 bytes, so every width must be a multiple of this.
_MULTIPLE = 8


def has_fast_path(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch's grouped product is used. Otherwise, every call of the loop waits for the device."""
    return device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] >= 9


def check_widths(config: ModelConfig, device: torch.device, dtype: torch.dtype, key: str) -> None:
    """Raise UserError if the grouped product cannot compute the model's experts; `key` is the setting of `dtype`."""
    if not (config.moe_layer_names() and has_fast_path(device, dtype)):
        return
    widths = {f"model.hidden_size={config.hidden_size}": [config.hidden_size]}
    widths[f"model.moe.hidden_sizes={config.moe.hidden_sizes}"] = config.moe.hidden_sizes
    wrong = [setting for setting, sizes in widths.items() if any(size % _MULTIPLE for size in sizes)]
    if wrong:
        raise UserError(
            f"{' and '.join(wrong)}: on this GPU, experts in bf16 need multiples of {_MULTIPLE}; choose others, or set "
            f"{key}=fp32"
        )


def _bounds(ends_E: Tensor) -> list[tuple[int, int]]:
    ends = ends_E.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def grouped_matmul(a_RI: Tensor, w_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Return the rows of group e times w[e]: (R, I) x (E, I, O) -> (R, O)."""
    if not len(a_RI):
        # A process may receive no rows at all.
        return a_RI.new_zeros(0, w_EIO.shape[2])
    if not has_fast_path(a_RI.device, a_RI.dtype):
        out_RO = a_RI.new_zeros(a_RI.shape[0], w_EIO.shape[2])
        for expert, (first, last) in enumerate(_bounds(ends_E)):
            if last > first:
                torch.mm(a_RI[first:last], w_EIO[expert], out=out_RO[first:last])
        return out_RO
    chunks = _chunks(w_EIO.shape[0])
    out_RO = F.grouped_mm(a_RI, w_EIO[chunks[0]], offs=ends_E[chunks[0]])
    row_R = torch.arange(a_RI.shape[0], device=a_RI.device)
    for chunk in chunks[1:]:
        start = ends_E[chunk.start - 1]
        rotated_RO = F.grouped_mm(_rotate(a_RI, start), w_EIO[chunk], offs=ends_E[chunk] - start)
        out_RO = torch.where((row_R >= start)[:, None], _rotate(rotated_RO, -start), out_RO)
    return out_RO


def grouped_outer(a_RI: Tensor, b_RO: Tensor, ends_E: Tensor) -> Tensor:
    """Return the sum of a^T b over the rows of each group: (R, I), (R, O) -> (E, I, O). Zero for an empty group."""
    num_groups = ends_E.numel()
    if not has_fast_path(a_RI.device, a_RI.dtype):
        out_EIO = a_RI.new_zeros(num_groups, a_RI.shape[1], b_RO.shape[1])
        for expert, (first, last) in enumerate(_bounds(ends_E)):
            if last > first:
                torch.mm(a_RI[first:last].T, b_RO[first:last], out=out_EIO[expert])
        return out_EIO
    chunks = _chunks(num_groups)
    parts = [F.grouped_mm(a_RI.T, b_RO, offs=ends_E[chunks[0]])]
    for chunk in chunks[1:]:
        start = ends_E[chunk.start - 1]
        parts.append(F.grouped_mm(_rotate(a_RI, start).T, _rotate(b_RO, start), offs=ends_E[chunk] - start))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _chunks(num_groups: int) -> list[slice]:
    """Return all groups as slices: as few chunks as calls need, of equal size except the last."""
    size = -(-num_groups // -(-num_groups // _MAX_GROUPS))
    return [slice(first, min(first + size, num_groups)) for first in range(0, num_groups, size)]


def _rotate(x_RD: Tensor, start: Tensor) -> Tensor:
    """Return rows of which row r is row (r + start) mod R of `x_RD`.

    The groups of one call must begin at row 0. This moves a later chunk's rows there without waiting for the GPU.
    """
    rows = x_RD.shape[0]
    return x_RD.index_select(0, (torch.arange(rows, device=x_RD.device) + start) % rows)
