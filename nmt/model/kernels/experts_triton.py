"""Fused versions of `plain_matmul` and `plain_outer`: products of any number of experts, without a wait of the host.

A list made on the device gives each program of `_matmul` its expert and first row. An expert has as many tiles as its
rows fill. The number of programs depends only on shapes, so that a CUDA graph can hold the launches. A program of
`_outer` adds up one tile of one expert's gradient over the rows of the expert, in order.

Bound of a product: 2 R I O operations; every matrix, row and result passes through memory once. The programs of one
expert follow each other, so that later reads come from the cache. The file is imported only to run on a GPU, since
Triton comes with PyTorch's CUDA builds.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmt.model.kernels.experts import Groups

_LANES = 1024


class Tile(NamedTuple):
    """Size of the results of one program and of one step of its sum, and how a program runs."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def within(self, *sizes: int) -> "Tile":
        """Return the tile cut to these numbers of rows, columns and steps; all stay powers of two of at least 16."""
        cut = [min(own, max(16, triton.next_power_of_2(size))) for own, size in zip(self, sizes, strict=False)]
        return Tile(*cut, *self[len(cut) :])


@triton.jit(do_not_specialize=["num_experts", "num_rows", "num_tiles"])
def _list_tiles(ends, tiles, num_experts, num_rows, num_tiles, ROWS: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program e writes (e, first row) of each tile of expert e; program E those of the rows that belong to no expert.

    The remaining tiles get expert -1.
    """
    group = tl.program_id(0)
    lane = tl.arange(0, LANES)
    before = tl.zeros([LANES], tl.int32)
    for start in range(0, group, LANES):
        other = start + lane
        end = tl.load(ends + other, mask=other < group, other=0)
        begin = tl.load(ends + other - 1, mask=(other < group) & (other > 0), other=0)
        before += (end - begin + ROWS - 1) // ROWS
    tile = tl.sum(before, 0)
    first = tl.load(ends + group - 1, mask=group > 0, other=0)
    last = tl.load(ends + group, mask=group < num_experts, other=num_rows)
    count = (last - first + ROWS - 1) // ROWS
    for start in range(0, count, LANES):
        place = start + lane
        tl.store(tiles + 2 * (tile + place), tl.zeros_like(place) + group, mask=place < count)
        tl.store(tiles + 2 * (tile + place) + 1, first + place * ROWS, mask=place < count)
    if group == num_experts:
        for start in range(tile + count, num_tiles, LANES):
            tl.store(tiles + 2 * (start + lane), tl.zeros_like(lane) - 1, mask=start + lane < num_tiles)


@triton.jit(do_not_specialize=["num_experts", "num_rows"])
def _matmul(  # type: ignore[no-untyped-def]
    a, token, w, relu_output, out, ends, tiles, num_experts, num_rows,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, TRANSPOSED: tl.constexpr, GATHER: tl.constexpr, RELU: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    side: tl.constexpr = (OUTPUTS + COLUMNS - 1) // COLUMNS
    # Programs go through squares of tiles, so that the rows and columns which they share are read from the cache.
    square = tl.program_id(0) // (side * side)
    height = tl.minimum(tl.num_programs(0) // side - square * side, side)
    tile = square * side + tl.program_id(0) % (side * side) % height
    group = tl.load(tiles + 2 * tile)
    if group < 0:
        return
    first = tl.load(tiles + 2 * tile + 1)
    last = tl.load(ends + group, mask=group < num_experts, other=num_rows)
    row = first + tl.arange(0, ROWS)
    # Lanes past the last row repeat it, which needs no mask. They are not stored.
    source = tl.minimum(row, last - 1)
    if GATHER:
        source = tl.load(token + source)
    column = (tl.program_id(0) % (side * side) // height) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    # Strides of w[group], which is (INPUTS, OUTPUTS), or (OUTPUTS, INPUTS) to be read transposed.
    by_k: tl.constexpr = 1 if TRANSPOSED else OUTPUTS
    by_column: tl.constexpr = INPUTS if TRANSPOSED else 1
    a_at = a + source.to(tl.int64)[:, None] * INPUTS + k[None, :]
    w_at = w + group.to(tl.int64) * (INPUTS * OUTPUTS) + k[:, None] * by_k + column[None, :] * by_column
    inside = (row[:, None] < last) & (column[None, :] < OUTPUTS)
    place = row.to(tl.int64)[:, None] * OUTPUTS + column[None, :]
    if MASKED:
        # Read before the sum, which hides the time that this takes.
        kept = tl.load(relu_output + place, mask=inside, other=0.0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    # Rows of no expert get zeros.
    for start in range(0, tl.where(group < num_experts, INPUTS, 0), DEPTH):
        if INPUTS % DEPTH == 0 and OUTPUTS % COLUMNS == 0:
            x = tl.load(a_at + start)
            y = tl.load(w_at + start * by_k)
        else:
            x = tl.load(a_at + start, mask=(start + k < INPUTS)[None, :], other=0.0)
            wanted = (start + k < INPUTS)[:, None] & (column < OUTPUTS)[None, :]
            y = tl.load(w_at + start * by_k, mask=wanted, other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # keeps NaN
    if MASKED:
        total = tl.where(kept <= 0, 0.0, total)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _outer(  # type: ignore[no-untyped-def]
    a, token, b, out, ends,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    side: tl.constexpr = (OUTPUTS + COLUMNS - 1) // COLUMNS
    tiles: tl.constexpr = side * ((INPUTS + ROWS - 1) // ROWS)
    group = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    i = (tile // side) * ROWS + tl.arange(0, ROWS)
    o = (tile % side) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(ends + group - 1, mask=group > 0, other=0)
    last = tl.load(ends + group)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    r = tl.arange(0, DEPTH)
    if GATHER:
        following = tl.load(token + first + r, mask=first + r < last, other=0)
    for start in range(first, last, DEPTH):
        row = start + r
        inside = row < last
        source = row
        if GATHER:
            # The indices of the next step are read in this one: otherwise no row could be read ahead.
            source = following
            following = tl.load(token + row + DEPTH, mask=row + DEPTH < last, other=0)
        x_mask = inside[:, None] if INPUTS % ROWS == 0 else inside[:, None] & (i < INPUTS)[None, :]
        y_mask = inside[:, None] if OUTPUTS % COLUMNS == 0 else inside[:, None] & (o < OUTPUTS)[None, :]
        x = tl.load(a + source.to(tl.int64)[:, None] * INPUTS + i[None, :], mask=x_mask, other=0.0)
        y = tl.load(b + row.to(tl.int64)[:, None] * OUTPUTS + o[None, :], mask=y_mask, other=0.0)
        total = tl.dot(tl.trans(x), y, total, input_precision=PRECISION)
    place = group.to(tl.int64) * (INPUTS * OUTPUTS) + i[:, None] * OUTPUTS + o[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(i[:, None] < INPUTS) & (o[None, :] < OUTPUTS))


class _Tiles(NamedTuple):
    matmul: Tile
    outer: Tile


# Small tiles where matrices dominate the time, since experts have few rows, and large ones where products do.
_FLOAT32 = _Tiles(Tile(64, 128, 16, 4, 3), Tile(64, 128, 16, 4, 3))
_AMPERE_FEW_ROWS = _Tiles(Tile(32, 128, 64, 4, 3), Tile(128, 128, 32, 8, 3))
_AMPERE_MANY_ROWS = _Tiles(Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 8, 3))
_HOPPER_FEW_ROWS = _Tiles(Tile(32, 128, 128, 4, 3), Tile(128, 128, 32, 4, 4))
_HOPPER_SOME_ROWS = _Tiles(Tile(128, 256, 64, 8, 4), Tile(128, 128, 32, 4, 4))
_HOPPER_MANY_ROWS = _Tiles(Tile(128, 256, 64, 8, 4), Tile(128, 256, 64, 8, 4))


def _tiles_of(num_rows: int, num_experts: int, dtype: torch.dtype, device: torch.device) -> _Tiles:
    """Return the tiles that were the fastest on an H100 for such numbers; those of other cards are not measured."""
    if dtype == torch.float32:
        return _FLOAT32
    mean = num_rows / num_experts
    # Without a GPU, kernels are interpreted, or compiled for all.
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return _HOPPER_FEW_ROWS if mean < 48 else _HOPPER_SOME_ROWS if mean < 1024 else _HOPPER_MANY_ROWS
    return _AMPERE_FEW_ROWS if mean < 48 else _AMPERE_MANY_ROWS


def list_tiles(ends_E: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Return the tiles of rows for `fused_matmul` as int32 (expert, first row); the expert is -1 in unused ones.

    They cover each expert's rows, and the rows of no expert as those of expert E.
    """
    num_experts = len(ends_E)
    tile = _tiles_of(num_rows, num_experts, dtype, ends_E.device).matmul
    # Each group of rows may fill its last tile partly.
    num_tiles = num_rows // tile.rows + min(num_rows, num_experts + 1)
    tiles_N2 = torch.empty(num_tiles, 2, dtype=torch.int32, device=ends_E.device)
    arguments = (ends_E, tiles_N2, num_experts, num_rows, num_tiles)
    _list_tiles[(num_experts + 1,)](*arguments, ROWS=tile.rows, LANES=_LANES)
    return tiles_N2


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def fused_matmul(
    a_MI: Tensor,
    w_EIO: Tensor,
    groups: Groups,
    token_R: Tensor | None = None,
    relu: bool = False,
    relu_output_RO: Tensor | None = None,
) -> Tensor:
    """Return the same as `plain_matmul`, for at least one contiguous row, and contiguous or transposed matrices."""
    ends_E, num_rows, _, tiles_N2 = groups
    assert tiles_N2 is not None
    num_experts, inputs, outputs = w_EIO.shape
    tile = _tiles_of(num_rows, num_experts, a_MI.dtype, a_MI.device).matmul
    tile = tile.within(tile.rows, outputs, inputs)
    out_RO = a_MI.new_empty(num_rows, outputs)
    # A pointer that is not used must be some tensor all the same.
    token = a_MI if token_R is None else token_R
    relu_output = a_MI if relu_output_RO is None else relu_output_RO
    _matmul[(len(tiles_N2) * triton.cdiv(outputs, tile.columns),)](
        a_MI, token, w_EIO, relu_output, out_RO, ends_E, tiles_N2, num_experts, num_rows,
        INPUTS=inputs, OUTPUTS=outputs, TRANSPOSED=not w_EIO.is_contiguous(), GATHER=token_R is not None, RELU=relu,
        MASKED=relu_output_RO is not None, PRECISION=_precision(a_MI.dtype),
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out_RO


def fused_outer(
    a_MI: Tensor, b_RO: Tensor, groups: Groups, token_R: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the same as `plain_outer`, for at least one contiguous row."""
    num_experts, inputs, outputs = len(groups.ends_E), a_MI.shape[1], b_RO.shape[1]
    tile = _tiles_of(groups.num_rows, num_experts, a_MI.dtype, a_MI.device).outer.within(inputs, outputs)
    out_EIO = a_MI.new_empty(num_experts, inputs, outputs, dtype=dtype or a_MI.dtype)
    _outer[(num_experts * triton.cdiv(inputs, tile.rows) * triton.cdiv(outputs, tile.columns),)](
        a_MI, a_MI if token_R is None else token_R, b_RO, out_EIO, groups.ends_E,
        INPUTS=inputs, OUTPUTS=outputs, GATHER=token_R is not None, PRECISION=_precision(a_MI.dtype),
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out_EIO
