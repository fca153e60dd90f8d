"""Fused version of `plain_attend`, made of six kernels over blocks of positions of one sentence.

The weights of a target row are a row of an M x S float32 matrix, from the first source position of its sentence on.
With x and y for rows of either side, and w for such a matrix, the kernels compute

    _products              w[r, s] = x_r . y_s: product scores; the gradient of weights from that of contexts
    _additive_scores       w[r, s] = sum_a V_a tanh(q_ra + k_sa)
    _softmax, _softmax_gradient, in place
    _weighted_sums         y_r = sum_s w[r, s] x_s, or y_s = sum_r w[r, s] x_r: contexts; gradients of values, and of
                           queries and keys of the product function
    _additive_gradient     the same with (1 - tanh^2) V for x: gradients of queries and keys of the additive function

Nothing is added up in an order that changes from run to run. No size that changes between batches of equal shapes is
known to the host. It is imported only to run on a GPU, since Triton comes with PyTorch's CUDA builds.

Bounds on an H100, forward and backward in bf16:
- product, 32k rows per side, A = D = 512: 11 reads or writes of 33 MB, 0.13 ms. Measured: 0.23 ms for sentences of 28
  positions, where padded tensors take 0.73 ms; 0.32 against 1.4 ms for mixed lengths
- additive, 512 sentences of 15 to 50 positions, A = D = 1024: 0.57e9 values of tanh, computed three times with 16 per
  cycle and multiprocessor, 0.46 ms. Measured: 0.87 ms, where padded tensors take 14.5 ms
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from nmt.batch import Rows

Side = Sequence[Tensor]
"""begin_L, rank_B and length_B of `Rows`."""

# A row of the matrix has whole blocks of source positions. After a softmax, those after the sentence are zeros, so that
# tiles of weights, whose sizes divide a block, are read as vectors without masks.
_BLOCK = tl.constexpr(32)
# How each kernel is launched. In kernels with tanh, the 32 threads of a warp are side by side in columns. Each has all
# positions of a tile, so that it adds up over positions by itself.
_PRODUCTS = {"POSITIONS": 32, "num_warps": 4, "num_stages": 3}
_SUMS = {"POSITIONS": 16, "num_warps": 4, "num_stages": 2}
_PRODUCT_BYTES, _SUM_BYTES = 256, 512  # of a tile's row
_SCORES = {"POSITIONS": 4, "OTHERS": 4, "COLUMNS": 128, "STAGES": 2, "num_warps": 2}
_GRADIENT = {"POSITIONS": 8, "OTHERS": 4, "COLUMNS": 64, "STAGES": 2, "num_warps": 1}
_SOFTMAX = {"VALUES": 2048, "num_warps": 4}
# Arguments that differ from batch to batch: a kernel is compiled once for all their values.
_SIZES = ["blocks"]


@triton.jit
def _rows(begin, rank, length, sentence, positions):  # type: ignore[no-untyped-def]
    """(rows of these positions of a sentence, whether they exist)."""
    inside = positions < tl.load(length + sentence)
    rows = tl.load(begin + positions, mask=inside, other=0) + tl.load(rank + sentence)
    return rows.to(tl.int64), inside


@triton.jit
def _tanh(x, APPROXIMATE: tl.constexpr):  # type: ignore[no-untyped-def]
    if APPROXIMATE:
        # Relative error at most 2^-11, by the PTX manual: as much as float16 rounds, an eighth of what bf16 rounds.
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit(do_not_specialize=_SIZES)
def _products(  # type: ignore[no-untyped-def]
    x, y, out, x_begin, x_rank, x_length, y_begin, y_rank, y_length, width, blocks,
    POSITIONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sentence, start = tl.program_id(1), tl.program_id(0) * POSITIONS
    if start >= tl.load(x_length + sentence):
        return
    x_rows, x_inside = _rows(x_begin, x_rank, x_length, sentence, start + tl.arange(0, POSITIONS))
    for first in range(0, tl.load(y_length + sentence), POSITIONS):
        positions = first + tl.arange(0, POSITIONS)
        y_rows, y_inside = _rows(y_begin, y_rank, y_length, sentence, positions)
        total = tl.zeros([POSITIONS, POSITIONS], tl.float32)
        for column in range(0, width, COLUMNS):
            columns = column + tl.arange(0, COLUMNS)
            inside = columns < width
            x_tile = tl.load(
                x + x_rows[:, None] * width + columns[None, :], mask=x_inside[:, None] & inside[None, :], other=0.0
            )
            y_tile = tl.load(
                y + y_rows[:, None] * width + columns[None, :], mask=y_inside[:, None] & inside[None, :], other=0.0
            )
            total = tl.dot(x_tile, tl.trans(y_tile), total, input_precision="ieee")
        place = x_rows[:, None] * (blocks * _BLOCK) + positions[None, :]
        tl.store(out + place, total, mask=x_inside[:, None] & y_inside[None, :])


@triton.jit(do_not_specialize=_SIZES)
def _additive_scores(  # type: ignore[no-untyped-def]
    query, keys, v, out, q_begin, q_rank, q_length, k_begin, k_rank, k_length, width, blocks,
    APPROXIMATE: tl.constexpr,
    POSITIONS: tl.constexpr, OTHERS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    sentence, start = tl.program_id(1), tl.program_id(0) * POSITIONS
    if start >= tl.load(q_length + sentence):
        return
    q_rows, q_inside = _rows(q_begin, q_rank, q_length, sentence, start + tl.arange(0, POSITIONS))
    for first in range(0, tl.load(k_length + sentence), OTHERS):
        positions = first + tl.arange(0, OTHERS)
        k_rows, k_inside = _rows(k_begin, k_rank, k_length, sentence, positions)
        total = tl.zeros([POSITIONS, OTHERS, COLUMNS], tl.float32)
        for column in tl.range(0, width, COLUMNS, num_stages=STAGES):
            columns = column + tl.arange(0, COLUMNS)
            inside = columns < width
            q = tl.load(
                query + q_rows[:, None] * width + columns[None, :], mask=q_inside[:, None] & inside[None, :], other=0.0
            )
            k = tl.load(
                keys + k_rows[:, None] * width + columns[None, :], mask=k_inside[:, None] & inside[None, :], other=0.0
            )
            scale = tl.load(v + columns, mask=inside, other=0.0).to(tl.float32)
            hidden = _tanh(q.to(tl.float32)[:, None, :] + k.to(tl.float32)[None, :, :], APPROXIMATE)
            total += scale[None, None, :] * hidden
        place = q_rows[:, None] * (blocks * _BLOCK) + positions[None, :]
        tl.store(out + place, tl.sum(total, 2), mask=q_inside[:, None] & k_inside[None, :])


@triton.jit
def _matrix_tile(inside, positions, length, blocks):  # type: ignore[no-untyped-def]
    """(which places of a tile exist in the matrix, and which of them belong to source positions that exist)."""
    exists = inside[:, None] & (positions < blocks * _BLOCK)[None, :]
    return exists, exists & (positions < tl.load(length))[None, :]


@triton.jit(do_not_specialize=_SIZES)
def _softmax(score, t_begin, t_rank, t_length, s_length, blocks, ROWS: tl.constexpr, POSITIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    sentence, start = tl.program_id(1), tl.program_id(0) * ROWS
    if start >= tl.load(t_length + sentence):
        return
    rows, inside = _rows(t_begin, t_rank, t_length, sentence, start + tl.arange(0, ROWS))
    positions = tl.arange(0, POSITIONS)
    exists, real = _matrix_tile(inside, positions, s_length + sentence, blocks)
    place = score + rows[:, None] * (blocks * _BLOCK) + positions[None, :]
    x = tl.load(place, mask=real, other=float("-inf"))
    # Rows that do not exist have no score: no peak and no sum. Nothing is stored for them.
    mass = tl.exp(x - tl.where(inside, tl.max(x, 1), 0.0)[:, None])
    tl.store(place, mass / tl.where(inside, tl.sum(mass, 1), 1.0)[:, None], mask=exists)


@triton.jit(do_not_specialize=_SIZES)
def _softmax_gradient(  # type: ignore[no-untyped-def]
    weights, grad, t_begin, t_rank, t_length, s_length, blocks, ROWS: tl.constexpr, POSITIONS: tl.constexpr
):
    sentence, start = tl.program_id(1), tl.program_id(0) * ROWS
    if start >= tl.load(t_length + sentence):
        return
    rows, inside = _rows(t_begin, t_rank, t_length, sentence, start + tl.arange(0, ROWS))
    positions = tl.arange(0, POSITIONS)
    exists, real = _matrix_tile(inside, positions, s_length + sentence, blocks)
    place = rows[:, None] * (blocks * _BLOCK) + positions[None, :]
    w = tl.load(weights + place, mask=real, other=0.0)
    g = tl.load(grad + place, mask=real, other=0.0)
    tl.store(grad + place, w * (g - tl.sum(w * g, 1)[:, None]), mask=exists)


@triton.jit
def _load_weights(w, rows, inside, positions, blocks):  # type: ignore[no-untyped-def]
    """Tile of the matrix: target rows down, source positions across, zero for what does not exist."""
    return tl.load(w + rows[:, None] * (blocks * _BLOCK) + positions[None, :], mask=inside[:, None], other=0.0)


@triton.jit(do_not_specialize=_SIZES)
def _weighted_sums(  # type: ignore[no-untyped-def]
    w, x, out, own_begin, own_rank, own_length, begin, rank, length, width, blocks,
    BACK: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(width, COLUMNS)
    sentence, start = tl.program_id(1), tl.program_id(0) // parts * POSITIONS
    columns = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    if start >= tl.load(own_length + sentence):
        return
    own_positions = start + tl.arange(0, POSITIONS)
    own_rows, own_inside = _rows(own_begin, own_rank, own_length, sentence, own_positions)
    total = tl.zeros([POSITIONS, COLUMNS], tl.float32)
    for first in range(0, tl.load(length + sentence), POSITIONS):
        positions = first + tl.arange(0, POSITIONS)
        rows, real = _rows(begin, rank, length, sentence, positions)
        if BACK:
            w_tile = tl.trans(_load_weights(w, rows, real, own_positions, blocks))
        else:
            w_tile = _load_weights(w, own_rows, own_inside, positions, blocks)
        x_tile = tl.load(x + rows[:, None] * width + columns[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        total = tl.dot(w_tile.to(x.dtype.element_ty), x_tile, total, input_precision="ieee")
    place = out + own_rows[:, None] * width + columns[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=own_inside[:, None] & inside[None, :])


@triton.jit(do_not_specialize=_SIZES)
def _additive_gradient(  # type: ignore[no-untyped-def]
    w, own, other, v, out, v_parts, own_begin, own_rank, own_length, begin, rank, length, width, blocks,
    BACK: tl.constexpr, APPROXIMATE: tl.constexpr,
    POSITIONS: tl.constexpr, OTHERS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(width, COLUMNS)
    sentence, block = tl.program_id(1), tl.program_id(0) // parts
    columns = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    if block * POSITIONS >= tl.load(own_length + sentence):
        return
    own_positions = block * POSITIONS + tl.arange(0, POSITIONS)
    own_rows, own_inside = _rows(own_begin, own_rank, own_length, sentence, own_positions)
    place = own_rows[:, None] * width + columns[None, :]
    own_tile = tl.load(own + place, mask=own_inside[:, None] & inside[None, :], other=0.0).to(tl.float32)
    total = tl.zeros([POSITIONS, COLUMNS], tl.float32)
    v_total = tl.zeros([POSITIONS, COLUMNS], tl.float32)
    AXIS: tl.constexpr = 0 if BACK else 1  # of the other side: target positions are axis 0, source positions axis 1
    for first in tl.range(0, tl.load(length + sentence), OTHERS, num_stages=STAGES):
        positions = first + tl.arange(0, OTHERS)
        rows, real = _rows(begin, rank, length, sentence, positions)
        if BACK:
            w_tile = _load_weights(w, rows, real, own_positions, blocks)[:, :, None]
        else:
            w_tile = _load_weights(w, own_rows, own_inside, positions, blocks)[:, :, None]
        x_tile = tl.load(
            other + rows[:, None] * width + columns[None, :], mask=real[:, None] & inside[None, :], other=0.0
        )
        hidden = _tanh(tl.expand_dims(own_tile, AXIS) + tl.expand_dims(x_tile.to(tl.float32), 1 - AXIS), APPROXIMATE)
        weighted = w_tile * hidden
        total += tl.sum(w_tile - weighted * hidden, AXIS)
        if not BACK:
            v_total += tl.sum(weighted, AXIS)
    scale = tl.load(v + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (total * scale[None, :]).to(out.dtype.element_ty), mask=own_inside[:, None] & inside[None, :])
    if not BACK:
        part = sentence * (tl.num_programs(0) // parts) + block
        tl.store(v_parts + part.to(tl.int64) * width + columns, tl.sum(v_total, 0), mask=inside)


class _FusedAttention(Function):
    @staticmethod
    def forward(
        ctx: Any, query_MA: Tensor, keys_NA: Tensor, values_ND: Tensor, v_A: Tensor, function: str, *sides: Tensor
    ) -> Tensor:
        target, source = sides[:3], sides[3:]
        query_MA, keys_NA, values_ND = query_MA.contiguous(), keys_NA.contiguous(), values_ND.contiguous()
        if function == "product":
            weights_MS = _product_matrix(query_MA, keys_NA, target, source)
        else:
            weights_MS = _additive_matrix(query_MA, keys_NA, v_A, target, source)
        _over_rows(_softmax, (weights_MS,), target, source)
        ctx.save_for_backward(query_MA, keys_NA, values_ND, v_A, weights_MS, *sides)
        ctx.function = function
        return _sums(weights_MS, values_ND, target, source, len(query_MA), back=False)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        query_MA, keys_NA, values_ND, v_A, weights_MS, *sides = ctx.saved_tensors
        target, source = sides[:3], sides[3:]
        num_targets, num_sources = len(query_MA), len(keys_NA)
        grad_MD = grad_MD.contiguous()
        values_grad_ND = _sums(weights_MS, grad_MD, source, target, num_sources, back=True)
        score_MS = _product_matrix(grad_MD, values_ND, target, source)
        _over_rows(_softmax_gradient, (weights_MS, score_MS), target, source)
        v_grad_A = None
        if ctx.function == "product":
            query_grad_MA = _sums(score_MS, keys_NA, target, source, num_targets, back=False)
            keys_grad_NA = _sums(score_MS, query_MA, source, target, num_sources, back=True)
        else:
            query_grad_MA, v_grad_A = _additive_sums(score_MS, query_MA, keys_NA, v_A, target, source, back=False)
            keys_grad_NA, _ = _additive_sums(score_MS, keys_NA, query_MA, v_A, source, target, back=True)
        return query_grad_MA, keys_grad_NA, values_grad_ND, v_grad_A, None, *([None] * 6)


def fused_attend(
    query_MA: Tensor, keys_NA: Tensor, values_ND: Tensor, v_A: Tensor, target: Rows, source: Rows, function: str
) -> Tensor:
    """Return the same as `plain_attend`, for inputs in bf16, float16 or float32 and fewer than 65,536 sentences."""
    sides = [tensor for side in (target, source) for tensor in (side.begin_L, side.rank_B, side.length_B)]
    return _FusedAttention.apply(query_MA, keys_NA, values_ND, v_A, function, *sides)


def _num_positions(side: Side) -> int:
    return len(side[0]) - 1


def _approximate(x: Tensor) -> bool:
    """Whether to use the GPU's own tanh: not for float32, and not in Triton's interpreter, which has no assembly."""
    return x.dtype != torch.float32 and isinstance(_tanh, triton.JITFunction)


def _matrix(x_MA: Tensor, source: Side) -> Tensor:
    blocks = triton.cdiv(_num_positions(source), _BLOCK.value)
    return torch.empty(len(x_MA), blocks * _BLOCK.value, device=x_MA.device, dtype=torch.float32)


def _product_matrix(x_MA: Tensor, y_NA: Tensor, target: Side, source: Side) -> Tensor:
    out_MS = _matrix(x_MA, source)
    grid = triton.cdiv(_num_positions(target), _PRODUCTS["POSITIONS"]), len(target[1])
    columns = _PRODUCT_BYTES // x_MA.element_size()
    _products[grid](
        x_MA, y_NA, out_MS, *target, *source, x_MA.shape[1], out_MS.shape[1] // _BLOCK.value,
        COLUMNS=columns, **_PRODUCTS,
    )  # fmt: skip
    return out_MS


def _additive_matrix(query_MA: Tensor, keys_NA: Tensor, v_A: Tensor, target: Side, source: Side) -> Tensor:
    out_MS = _matrix(query_MA, source)
    grid = triton.cdiv(_num_positions(target), _SCORES["POSITIONS"]), len(target[1])
    _additive_scores[grid](
        query_MA, keys_NA, v_A, out_MS, *target, *source, query_MA.shape[1], out_MS.shape[1] // _BLOCK.value,
        APPROXIMATE=_approximate(query_MA), **_SCORES,
    )  # fmt: skip
    return out_MS


def _over_rows(kernel: Any, matrices: tuple[Tensor, ...], target: Side, source: Side) -> None:
    """Run a softmax kernel over all target rows, whose source positions one program holds at once."""
    columns = matrices[0].shape[1]
    positions = triton.next_power_of_2(columns)
    rows = max(1, _SOFTMAX["VALUES"] // positions)
    grid = triton.cdiv(_num_positions(target), rows), len(target[1])
    kernel[grid](
        *matrices, *target, source[2], columns // _BLOCK.value,
        ROWS=rows, POSITIONS=positions, num_warps=_SOFTMAX["num_warps"],
    )  # fmt: skip


def _sums(w_MS: Tensor, x_ND: Tensor, own: Side, other: Side, num_rows: int, back: bool) -> Tensor:
    """Return the weighted sums of the rows x of the `other` side for each row of the `own` one; back: the source."""
    width, columns = x_ND.shape[1], _SUM_BYTES // x_ND.element_size()
    # Rows of padding, which belong to no sentence, stay zero.
    out = torch.zeros(num_rows, width, device=x_ND.device, dtype=x_ND.dtype)
    grid = triton.cdiv(_num_positions(own), _SUMS["POSITIONS"]) * triton.cdiv(width, columns), len(own[1])
    _weighted_sums[grid](
        w_MS, x_ND, out, *own, *other, width, w_MS.shape[1] // _BLOCK.value,
        BACK=back, COLUMNS=columns, **_SUMS,
    )  # fmt: skip
    return out


def _additive_sums(
    w_MS: Tensor, own_MA: Tensor, other_NA: Tensor, v_A: Tensor, own: Side, other: Side, back: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the rows of `own` and, unless it is the source side (`back`), of V."""
    width = own_MA.shape[1]
    out, source_blocks = torch.zeros_like(own_MA), w_MS.shape[1] // _BLOCK.value
    blocks, sentences = triton.cdiv(_num_positions(own), _GRADIENT["POSITIONS"]), len(own[1])
    # Programs without positions store nothing.
    v_parts = torch.zeros(0 if back else sentences * blocks, width, device=own_MA.device)
    _additive_gradient[(blocks * triton.cdiv(width, _GRADIENT["COLUMNS"]), sentences)](
        w_MS, own_MA, other_NA, v_A, out, v_parts, *own, *other, width, source_blocks,
        BACK=back, APPROXIMATE=_approximate(own_MA), **_GRADIENT,
    )  # fmt: skip
    return out, None if back else v_parts.sum(0).to(v_A.dtype)
