"""Parts of the fused LSTM that run on one program: tiles of cells, of products and of gradients, and waiting.

Letters: N rows, P output width, C cells; in tiles, BM rows, BN columns and BK values of a sum; t a position.
"""

import triton
import triton.language as tl


@triton.jit
def barrier(counter, programs):  # type: ignore[no-untyped-def]
    """Wait until `programs` programs have come here; what they wrote before can be read after.

    Each barrier has a counter of its own, zero at launch.
    """
    tl.debug_barrier()
    seen = tl.atomic_add(counter, 1, sem="release", scope="gpu") + 1
    while seen < programs:
        seen = tl.atomic_add(counter, 0, sem="relaxed", scope="gpu")
    tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    # The square is 1 / (1 + e^-x), in fewer instructions than a division.
    root = tl.rsqrt(1.0 + tl.exp(-x))
    return root * root


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    return 2.0 * _sigmoid(2.0 * x) - 1.0


@triton.jit
def clear(x, begin, end, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write zeros to the rows begin .. end - 1 of x, divided among all programs."""
    columns = tl.arange(0, 128)
    for row in range(begin + tl.program_id(0), end, tl.num_programs(0)):
        to = x + tl.cast(row, tl.int64) * WIDTH
        for column in range(0, WIDTH, 128):
            zeros = tl.zeros([128], x.dtype.element_ty)
            tl.store(to + column + columns, zeros, mask=column + columns < WIDTH)


@triton.jit
def count_positions(begin, L, L2: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the number of positions that have rows."""
    t = tl.arange(0, L2)
    alive = tl.load(begin + t + 1, mask=t < L, other=0) - tl.load(begin + t, mask=t < L, other=0)
    return tl.sum((alive > 0).to(tl.int32))


@triton.jit
def count_parts(members, SPREAD, TILES: tl.constexpr, STEPS: tl.constexpr, MAX_PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return in how many parts the sum of each tile is split, so that no more members of a group are idle than busy."""
    LIMIT: tl.constexpr = MAX_PARTS if MAX_PARTS < STEPS else STEPS
    return tl.minimum(tl.maximum(SPREAD * members // TILES, 1), LIMIT)


@triton.jit
def add_parts(acc, part, split, parts, counter, BM: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return (sum, whether this program has it) of the `split` programs that each have a part of one tile.

    The last of them to come adds up all parts, in order.
    """
    last = split == 1
    if split > 1:
        within = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        tl.store(parts + part * (BM * BN) + within, acc)
        tl.debug_barrier()
        last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == split - 1
        if last:
            tl.debug_barrier()
            tl.atomic_xchg(counter, 0, sem="relaxed", scope="gpu")
            acc = tl.zeros((BM, BN), tl.float32)
            for other in tl.range(0, split, loop_unroll_factor=4):
                acc += tl.load(parts + other * (BM * BN) + within, cache_modifier=".cg")
    return acc, last


@triton.jit
def product_tiles(  # type: ignore[no-untyped-def]
    a, weight, out, bias, num_a, num_rows, row0, slot, member, members, parts, counters,
    SPREAD, K: tl.constexpr, N: tl.constexpr, SK: tl.constexpr, SN: tl.constexpr, ADD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MAX_PARTS: tl.constexpr,
):  # fmt: skip
    """out (num_rows, N) = a (num_a, K) weight + bias, for the BM rows from row0 on; a has zeros after num_a rows.

    The weight is read as weight[k * SK + n * SN]. The tiles are divided among the members of a group.
    """
    TILES: tl.constexpr = N // BN
    STEPS: tl.constexpr = K // BK
    split = count_parts(members, SPREAD, TILES, STEPS, MAX_PARTS)
    steps = tl.cdiv(STEPS, split)
    rows = row0 + tl.arange(0, BM)
    k = tl.arange(0, BK)
    for unit in range(member, TILES * split, members):
        tile = unit // split
        part = unit % split
        columns = tile * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        if row0 < num_a:
            filled = (rows < num_a)[:, None]
            begin = part * steps
            a_tile = a + begin * BK + rows[:, None] * K + k[None, :]
            w_tile = weight + (begin * BK + k[:, None]) * SK + columns[None, :] * SN
            for _ in range(begin, tl.minimum(begin + steps, STEPS)):
                acc = tl.dot(tl.load(a_tile, mask=filled, other=0.0, cache_modifier=".cg"), tl.load(w_tile), acc)
                a_tile += BK
                w_tile += BK * SK
        mine = parts + (slot * members * SPREAD + tile * split) * (BM * BN)
        acc, last = add_parts(acc, part, split, mine, counters + slot * TILES + tile, BM, BN)
        if last:
            at = rows[:, None] * N + columns[None, :]
            inside = (rows < num_rows)[:, None]
            if ADD:
                acc += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _load_gates(gates, old, mask, mask_old, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return (i, f, g, o, cell before) of a tile."""
    i = tl.load(gates, mask=mask, other=0.0)
    f = tl.load(gates + C, mask=mask, other=0.0)
    g = tl.load(gates + 2 * C, mask=mask, other=0.0)
    o = tl.load(gates + 3 * C, mask=mask, other=0.0)
    # A tile may come from another program, which this one's nearest cache does not know of.
    return i, f, g, o, tl.load(old, mask=mask_old, other=0.0, cache_modifier=".cg")


@triton.jit
def cells_tile(  # type: ignore[no-untyped-def]
    t, alive, row0, tile, most, gates, recurrent, before, out, cells, running,
    C: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EARLY: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Gates and cells of one tile at position t. `before` are the outputs at t - 1, `out` gets o tanh(c).

    The activations overwrite the gates. EARLY: what is needed besides the product is loaded before it.
    """
    rows = row0 + tl.arange(0, BM)
    cell = tile * BN + tl.arange(0, BN)
    inside = (rows < alive)[:, None]
    gates += rows[:, None] * (4 * C) + cell[None, :]
    cell_at = rows[:, None] * C + cell[None, :]
    if EARLY:
        x_i, x_f, x_g, x_o, old = _load_gates(gates, running + cell_at, inside, inside & (t > 0), C)
    n = tl.arange(0, 4 * BN)
    weight_row = (n % 4) * C + tile * BN + n // 4
    acc = tl.zeros((BM, 4 * BN), tl.float32)
    k = tl.arange(0, BK)
    y_tile = before + rows[:, None] * P + k[None, :]
    w_tile = recurrent + weight_row[None, :] * P + k[:, None]
    for _ in range(0, tl.where(t > 0, P, 0), BK):
        acc = tl.dot(tl.load(y_tile, mask=inside, other=0.0, cache_modifier=".cg"), tl.load(w_tile), acc)
        y_tile += BK
        w_tile += BK
    if not EARLY:
        x_i, x_f, x_g, x_o, old = _load_gates(gates, running + cell_at, inside, inside & (t > 0), C)
    even, odd = tl.split(tl.reshape(acc, (BM, BN, 2, 2)))
    i, g = tl.split(even)
    f, o = tl.split(odd)
    i = _sigmoid(i + x_i.to(tl.float32))
    f = _sigmoid(f + x_f.to(tl.float32))
    g = _tanh(g + x_g.to(tl.float32))
    o = _sigmoid(o + x_o.to(tl.float32))
    new = i * g + f * old
    dtype = gates.dtype.element_ty
    tl.store(out + cell_at, (o * _tanh(new)).to(dtype), mask=inside)
    tl.store(running + cell_at, new, mask=inside)
    if KEEP:
        tl.store(cells + cell_at, new.to(dtype), mask=inside)
        tl.store(gates, i.to(dtype), mask=inside)
        tl.store(gates + C, f.to(dtype), mask=inside)
        tl.store(gates + 2 * C, g.to(dtype), mask=inside)
        tl.store(gates + 3 * C, o.to(dtype), mask=inside)


@triton.jit
def _load_cells(new, old, mask, mask_old):  # type: ignore[no-untyped-def]
    return tl.load(new, mask=mask, other=0.0), tl.load(old, mask=mask_old, other=0.0)


@triton.jit
def cells_gradient_tile(  # type: ignore[no-untyped-def]
    t, alive, alive_later, row0, tile, part, split, grad_out, source, weight, gates, cells, before, running,
    grad_gates, parts, counter,
    C: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates of one tile at position t.

    Without a projection, dh = grad_out[t] + source R, where `source` are the gates' gradients at t + 1, and the weight
    R is (4 C, C). With one, dh = source W, where `source` are the outputs' gradients at t, and W is (P, C).
    EARLY: as in `cells_tile`.
    """
    WIDE: tl.constexpr = 4 * C if C == P else P
    STEPS: tl.constexpr = WIDE // BK
    rows = row0 + tl.arange(0, BM)
    cell = tile * BN + tl.arange(0, BN)
    inside = (rows < alive)[:, None]
    stays = (rows < alive_later)[:, None]
    gates += rows[:, None] * (4 * C) + cell[None, :]
    grad_gates += rows[:, None] * (4 * C) + cell[None, :]
    cell_at = rows[:, None] * C + cell[None, :]
    if EARLY:
        kept_i, kept_f, kept_g, kept_o, later = _load_gates(gates, running + cell_at, inside, stays, C)
        new, old = _load_cells(cells + cell_at, before + cell_at, inside, inside & (t > 0))
    dh = tl.zeros((BM, BN), tl.float32)
    filled = stays if C == P else inside
    if C != P or row0 < alive_later:
        k = tl.arange(0, BK)
        steps = tl.cdiv(STEPS, split)
        begin = part * steps
        a_tile = source + begin * BK + rows[:, None] * WIDE + k[None, :]
        w_tile = weight + (begin * BK + k[:, None]) * C + cell[None, :]
        for _ in range(begin, tl.minimum(begin + steps, STEPS)):
            dh = tl.dot(tl.load(a_tile, mask=filled, other=0.0, cache_modifier=".cg"), tl.load(w_tile), dh)
            a_tile += BK
            w_tile += BK * C
    dh, last = add_parts(dh, part, split, parts, counter, BM, BN)
    if last:
        if not EARLY:
            kept_i, kept_f, kept_g, kept_o, later = _load_gates(gates, running + cell_at, inside, stays, C)
            new, old = _load_cells(cells + cell_at, before + cell_at, inside, inside & (t > 0))
        if C == P:
            dh += tl.load(grad_out + cell_at, mask=inside, other=0.0).to(tl.float32)
        i = kept_i.to(tl.float32)
        f = kept_f.to(tl.float32)
        g = kept_g.to(tl.float32)
        o = kept_o.to(tl.float32)
        tanh = _tanh(new.to(tl.float32))
        dc = later + dh * o * (1.0 - tanh * tanh)
        dtype = grad_gates.dtype.element_ty
        tl.store(grad_gates, (dc * g * i * (1.0 - i)).to(dtype), mask=inside)
        tl.store(grad_gates + C, (dc * old.to(tl.float32) * f * (1.0 - f)).to(dtype), mask=inside)
        tl.store(grad_gates + 2 * C, (dc * i * (1.0 - g * g)).to(dtype), mask=inside)
        tl.store(grad_gates + 3 * C, (dh * tanh * o * (1.0 - o)).to(dtype), mask=inside)
        tl.store(running + cell_at, dc * f, mask=inside)
