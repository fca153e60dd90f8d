"""Fused version of `plain_lstm`: all positions of a pass in one launch, whose programs wait for each other on the GPU.

A block of sentences (one tile of rows) depends on no other block. At each position, the programs divide into one group
per block that is still alive, and each group's members divide the tiles of that block among them. They wait for their
own group only, except where the number of members changes: there all programs wait for all, and then form larger
(backward: smaller) groups. All sizes that depend on the batch are read from `begin_L` on the GPU, so that one launch
in a CUDA graph serves any batch of the same N, L and `most`.

The cell is the epilogue of the recurrent product: a tile holds all four gates of its cells. The running cell and its
gradient are float32; the backward pass reads cells rounded to the type of the products, which adds a relative error of
2^-9 in bf16 to tanh(c) and to the forget gate's gradient: as much as the rounding of the activations.

It is imported only to run on a GPU, since Triton comes with PyTorch's CUDA builds.

Letters: G LSTMs side by side, N rows, L positions, D input width, P output width, C cells, R = 4 C gates.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from nmt.model.kernels.lstm_tiles_triton import (
    barrier,
    cells_gradient_tile,
    cells_tile,
    clear,
    count_parts,
    count_positions,
    product_tiles,
)


class Tiles(NamedTuple):
    """Shape of the tiles of one pass, and how they run."""

    rows: int
    """Sentences of a block."""
    cells: int
    depth: int
    """Values of a sum that are multiplied at once."""
    outputs: int
    """Outputs in a tile of the projection (backward: of the gradient of the outputs)."""
    output_depth: int
    warps: int
    stages: int
    programs: int
    """Programs per processor of the GPU."""
    early: bool = False
    """Whether what the epilogue of a product needs is loaded before the product: it is faster if registers suffice."""


class _Sizes(NamedTuple):
    """What a launch needs besides tensors and tiles."""

    rows: int
    positions: int
    most: int
    """Limit of the number of sentences."""
    groups: int
    """LSTMs side by side."""
    cells: int
    outputs: int


_MAX_PARTS = 8
# Parts of sums per member of a group. More than 1 lets a test split sums with one program.
_PARTS = 1
# Counters apart from each other, in int32: no two share a sector of the cache.
_APART = 8


@triton.jit(do_not_specialize=["N", "L", "most", "width", "SPREAD"])
def _forward(  # type: ignore[no-untyped-def]
    gates, recurrent, projection, y, hidden, cells, running, parts, counters, barriers, begin,
    N, L, most, width, SPREAD,
    G: tl.constexpr, C: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PN: tl.constexpr, PK: tl.constexpr, L2: tl.constexpr, MAX_PARTS: tl.constexpr, APART: tl.constexpr,
    EARLY: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Positions 0, 1, .. of all groups. Blocks are numbered so that the groups of the same sentences are neighbours."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    real = tl.load(begin + L)
    for g in range(G):
        # Each group has one more row of outputs: zeros, in the place of outputs before the first.
        clear(y + tl.cast(g, tl.int64) * (N + 1) * P, real, N + 1, P)
        if KEEP and C != P:
            clear(hidden + tl.cast(g, tl.int64) * N * C, real, N, C)
    positions = count_positions(begin, L, L2)
    first = tl.load(begin)
    after = tl.load(begin + 1)
    # Not `= first`: Triton takes a name for constant in the loop if it starts as, and becomes, the same other name.
    earlier = tl.load(begin)
    for t in range(positions):
        following = tl.load(begin + tl.minimum(t + 2, L))
        alive = after - first
        blocks = tl.cdiv(alive, BM) * G
        members = tl.maximum(programs // blocks, 1)
        slots = programs // members
        slot = pid // members
        member = pid % members
        step = barriers + t * (2 * width)
        for block in range(slot, blocks, slots):
            group = tl.cast(block % G, tl.int64)
            row = group * N + first
            outputs = y + (group * (N + 1)) * P
            for tile in range(member, C // BN, members):
                cells_tile(
                    t, alive, block // G * BM, tile, most, gates + row * (4 * C), recurrent + group * (4 * C * P),
                    outputs + tl.cast(earlier, tl.int64) * P,
                    outputs + tl.cast(first, tl.int64) * P if C == P else hidden + row * C,
                    cells + row * C, running + group * most * C, C, P, BM, BN, BK, EARLY, KEEP,
                )  # fmt: skip
        if C != P:
            if slot < blocks:
                barrier(step + slot * APART, members)
            for block in range(slot, blocks, slots):
                group = tl.cast(block % G, tl.int64)
                h = hidden + (group * N + first) * C
                product_tiles(
                    h, projection + group * (P * C), y + (group * (N + 1) + first) * P, y, alive, alive,
                    block // G * BM, slot, member, members, parts, counters, SPREAD, C, P, 1, C, False,
                    BM, PN, PK, MAX_PARTS,
                )  # fmt: skip
        if t + 1 < positions:
            same = tl.maximum(programs // (tl.cdiv(following - after, BM) * G), 1) == members
            if not same:
                barrier(step + width, programs)
            elif slot < blocks:
                barrier(step + width + slot * APART, members)
        earlier = first
        first = after
        after = following


@triton.jit(do_not_specialize=["N", "L", "most", "width", "SPREAD"])
def _backward(  # type: ignore[no-untyped-def]
    grad_y, recurrent, projection, gates, cells, grad_gates, grad_h, running, parts, counters, barriers, begin,
    N, L, most, width, SPREAD,
    G: tl.constexpr, C: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PN: tl.constexpr, PK: tl.constexpr, L2: tl.constexpr, MAX_PARTS: tl.constexpr, APART: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Positions from the last to 0. `grad_h` are the gradients of the projected outputs with those from t + 1."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    real = tl.load(begin + L)
    for g in range(G):
        clear(grad_gates + tl.cast(g, tl.int64) * N * (4 * C), real, N, 4 * C)
        if C != P:
            clear(grad_h + tl.cast(g, tl.int64) * N * P, real, N, P)
    positions = count_positions(begin, L, L2)
    first = tl.load(begin + tl.maximum(positions - 1, 0))
    after = real
    alive_after = 0
    for back in range(positions):
        t = positions - 1 - back
        earlier = tl.load(begin + tl.maximum(t - 1, 0))
        alive = after - first
        blocks = tl.cdiv(alive, BM) * G
        members = tl.maximum(programs // blocks, 1)
        slots = programs // members
        slot = pid // members
        member = pid % members
        step = barriers + t * (2 * width)
        if C != P:
            for block in range(slot, blocks, slots):
                group = tl.cast(block % G, tl.int64)
                to = (group * N + first) * P
                product_tiles(
                    grad_gates + (group * N + after) * (4 * C), recurrent + group * (4 * C * P), grad_h + to,
                    grad_y + to, alive_after, alive, block // G * BM, slot, member, members, parts, counters, SPREAD,
                    4 * C, P, P, 1, True, BM, PN, PK, MAX_PARTS,
                )  # fmt: skip
            if slot < blocks:
                barrier(step + slot * APART, members)
        split = 1
        if C == P:
            split = count_parts(members, SPREAD, C // BN, 4 * C // BK, MAX_PARTS)
        for block in range(slot, blocks, slots):
            group = tl.cast(block % G, tl.int64)
            row = group * N + first
            for unit in range(member, C // BN * split, members):
                tile = unit // split
                cells_gradient_tile(
                    t, alive, alive_after, block // G * BM, tile, unit % split, split, grad_y + row * P,
                    grad_gates + (group * N + after) * (4 * C) if C == P else grad_h + row * P,
                    recurrent + group * (4 * C * P) if C == P else projection + group * (P * C),
                    gates + row * (4 * C), cells + row * C, cells + (group * N + earlier) * C,
                    running + group * most * C, grad_gates + row * (4 * C),
                    parts + (slot * members * SPREAD + tile * split) * (BM * BN), counters + slot * (C // BN) + tile,
                    C, P, BM, BN, BK, EARLY,
                )  # fmt: skip
        if t > 0:
            same = tl.maximum(programs // (tl.cdiv(first - earlier, BM) * G), 1) == members
            if not same:
                barrier(step + width, programs)
            elif slot < blocks:
                barrier(step + width + slot * APART, members)
        alive_after = alive
        after = first
        first = earlier


@cache
def _processors_and_memory(device: torch.device) -> tuple[int, int]:
    """Return how many processors the GPU has, and the bytes of shared memory that a program on one of them can have."""
    if device.type != "cuda":
        return 1, 0  # Triton's interpreter runs one program after the other.
    found = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return found["multiprocessor_count"], found["max_shared_mem"]


def tiles(sizes: _Sizes, memory: int) -> tuple[Tiles, Tiles]:
    """Return the tiles of the forward and the backward pass for that many bytes of shared memory per processor.

    They were chosen by time on an H100. With few sentences, the latency of a step counts, and all processors should
    have a tile. With many, large tiles reread the weights less often.
    """
    if memory < 150_000:  # compute capability 8.6 and 8.9
        return Tiles(64, 16, 32, 32, 64, 4, 3, 1), Tiles(64, 32, 32, 32, 64, 4, 3, 1)
    if sizes.outputs < sizes.cells:
        return Tiles(64, 32, 64, 64, 64, 4, 3, 2), Tiles(64, 32, 64, 64, 64, 4, 4, 2)
    if sizes.most * sizes.groups <= 320:
        return Tiles(64, 16, 64, 64, 64, 8, 4, 1, early=True), Tiles(64, 32, 128, 32, 64, 8, 4, 1, early=True)
    return Tiles(128, 32, 64, 64, 64, 8, 3, 1, early=True), Tiles(64, 64, 64, 64, 64, 8, 4, 1, early=True)


def _launch(kernel: Any, tensors: Sequence[Tensor], begin_L: Tensor, sizes: _Sizes, tile: Tiles, **flags: bool) -> None:
    """Run a kernel with its work space, counters and sizes."""
    device = begin_L.device
    # All programs of a launch must be on the GPU at once: they wait for each other.
    programs = _processors_and_memory(device)[0] * tile.programs
    registers = 65536 // (32 * tile.warps * tile.programs)
    running = torch.empty(sizes.groups * sizes.most * sizes.cells, device=device)
    parts = torch.empty(_PARTS * programs * tile.rows * max(tile.outputs, tile.cells), device=device)
    counters = programs * max(sizes.outputs // tile.outputs, sizes.cells // tile.cells)
    width = min(programs, triton.cdiv(sizes.most, tile.rows) * sizes.groups) * _APART
    zeros = torch.zeros(counters * 4 + 2 * sizes.positions * width, dtype=torch.int32, device=device)
    kernel[(programs,)](
        *tensors, running, parts, zeros, zeros[counters * 4 :], begin_L, sizes.rows, sizes.positions, sizes.most, width,
        _PARTS, G=sizes.groups, C=sizes.cells, P=sizes.outputs, BM=tile.rows, BN=tile.cells, BK=tile.depth,
        PN=tile.outputs, PK=tile.output_depth, L2=max(128, triton.next_power_of_2(sizes.positions)),
        MAX_PARTS=_MAX_PARTS, APART=_APART, EARLY=tile.early, **flags, num_warps=tile.warps,
        num_stages=tile.stages, launch_cooperative_grid=True, maxnreg=registers if registers < 256 else None,
    )  # fmt: skip


class _FusedLSTMs(Function):
    @staticmethod
    def forward(
        ctx: Any, keep: bool, begin_L: Tensor, previous_N: Tensor, most: int, groups: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        x, weights = tensors[:groups], _divide(tensors[groups:], groups)
        recurrent_GRP, projection_GPC = _stack(weights, 1), _stack(weights, -1)
        (num_rows, _), (_, four_cells, outputs) = x[0].shape, recurrent_GRP.shape
        sizes = _Sizes(num_rows, len(begin_L) - 1, most, groups, four_cells // 4, outputs)
        projected = outputs < sizes.cells
        gates_GNR = x[0].new_empty(groups, num_rows, four_cells)
        for x_ND, own, gates_NR in zip(x, weights, gates_GNR, strict=True):
            torch.addmm(own[2] + own[3], x_ND, own[0].t(), out=gates_NR)
        # One more row: the zeros before the first position.
        y_GNP = x[0].new_empty(groups, num_rows + 1, outputs)
        hidden_GNC = x[0].new_empty(groups, num_rows, sizes.cells) if projected else y_GNP
        cells_GNC = x[0].new_empty(groups, num_rows, sizes.cells) if keep else y_GNP
        tile, ctx.tile = tiles(sizes, _processors_and_memory(begin_L.device)[1])
        ctx.sizes = sizes
        written = (gates_GNR, recurrent_GRP, projection_GPC, y_GNP, hidden_GNC, cells_GNC)
        _launch(_forward, written, begin_L, sizes, tile, KEEP=keep)
        if keep:
            saved = (gates_GNR, cells_GNC, y_GNP, hidden_GNC, recurrent_GRP, projection_GPC, begin_L, previous_N)
            ctx.save_for_backward(*saved, *x, *(own[0] for own in weights))
        return tuple(y_NP[:-1] for y_NP in y_GNP)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sizes: _Sizes = ctx.sizes
        gates_GNR, cells_GNC, y_GNP, hidden_GNC, recurrent_GRP, projection_GPC, begin_L, previous_N, *rest = (
            ctx.saved_tensors
        )
        x, inputs = rest[: sizes.groups], rest[sizes.groups :]
        grad_y_GNP = torch.stack(grads) if len(grads) > 1 else grads[0].contiguous()[None]
        grad_gates_GNR = torch.empty_like(gates_GNR)
        projected = sizes.outputs < sizes.cells
        grad_h_GNP = torch.empty_like(grad_y_GNP) if projected else grad_y_GNP
        written = (grad_y_GNP, recurrent_GRP, projection_GPC, gates_GNR, cells_GNC, grad_gates_GNR, grad_h_GNP)
        _launch(_backward, written, begin_L, sizes, ctx.tile)
        grad_x: list[Tensor | None] = []
        grad_weights: list[Tensor | None] = []
        for group, grad_NR in enumerate(grad_gates_GNR):
            grad_x.append(grad_NR @ inputs[group] if ctx.needs_input_grad[5 + group] else None)
            before_NP = y_GNP[group].index_select(0, previous_N)
            grad_R = grad_NR.sum(0)
            grad_weights += [grad_NR.t() @ x[group], grad_NR.t() @ before_NP, grad_R, grad_R]
            if projected:
                grad_weights.append(grad_h_GNP[group].t() @ hidden_GNC[group])
        return None, None, None, None, None, *grad_x, *grad_weights


def _divide(weights: Sequence[Tensor], groups: int) -> list[Sequence[Tensor]]:
    size = len(weights) // groups
    return [weights[group * size : (group + 1) * size] for group in range(groups)]


def _stack(weights: Sequence[Sequence[Tensor]], index: int) -> Tensor:
    if len(weights) == 1:
        return weights[0][index].contiguous()[None]
    return torch.stack([own[index] for own in weights])


def fused_lstms(
    x: Sequence[Tensor], weights: Sequence[Sequence[Tensor]], begin_L: Tensor, previous_N: Tensor, most: int
) -> list[Tensor]:
    """Return what `plain_lstm` returns for each of the LSTMs, whose sizes are equal."""
    tensors = (*x, *(weight for own in weights for weight in own))
    return list(_FusedLSTMs.apply(torch.is_grad_enabled(), begin_L, previous_N, most, len(x), *tensors))
