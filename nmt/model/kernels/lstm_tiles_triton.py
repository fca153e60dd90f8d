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
    seen = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") + 1
    while seen < programs:
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    # exp of a negative number cannot overflow.
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


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
def product_tiles(  # type: ignore[no-untyped-def]
    a, weight, out, bias, num_a, num_rows, row0, slot, member, members, parts, counters,
    SPREAD, K: tl.constexpr, N: tl.constexpr, SK: tl.constexpr, SN: tl.constexpr, ADD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MAX_PARTS: tl.constexpr,
):  # fmt: skip
    """out (num_rows, N) = a (num_a, K) weight + bias, for the BM rows from row0 on; a has zeros after num_a rows.

    The weight is read as weight[k * SK + n * SN]. If there are few tiles, members of a group share each: they write
    partial sums, and the last of them to come adds these up in order.
    """
    TILES: tl.constexpr = N // BN
    STEPS: tl.constexpr = K // BK
    LIMIT: tl.constexpr = MAX_PARTS if MAX_PARTS < STEPS else STEPS
    split = tl.minimum(tl.maximum(SPREAD * members // TILES, 1), LIMIT)
    steps = tl.cdiv(STEPS, split)
    rows = row0 + tl.arange(0, BM)
    k = tl.arange(0, BK)
    for unit in range(member, TILES * split, members):
        tile = unit // split
        part = unit % split
        columns = tile * BN + tl.arange(0, BN)
        at = rows[:, None] * N + columns[None, :]
        inside = (rows < num_rows)[:, None]
        filled = (rows < num_a)[:, None]
        acc = tl.zeros((BM, BN), tl.float32)
        begin = part * steps
        end = tl.minimum(begin + steps, STEPS)
        if row0 < num_a:
            a_tile = a + begin * BK + rows[:, None] * K + k[None, :]
            w_tile = weight + (begin * BK + k[:, None]) * SK + columns[None, :] * SN
            for _ in range(begin, end):
                acc = tl.dot(tl.load(a_tile, mask=filled, other=0.0, cache_modifier=".cg"), tl.load(w_tile), acc)
                a_tile += BK
                w_tile += BK * SK
        last = split == 1
        if split > 1:
            mine = parts + (slot * members * SPREAD + tile * split) * (BM * BN)
            within = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
            tl.store(mine + part * (BM * BN) + within, acc)
            tl.debug_barrier()
            counter = counters + slot * TILES + tile
            last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == split - 1
            if last:
                tl.debug_barrier()
                tl.atomic_xchg(counter, 0, sem="relaxed", scope="gpu")
                acc = tl.zeros((BM, BN), tl.float32)
                for other in range(split):
                    acc += tl.load(mine + other * (BM * BN) + within, cache_modifier=".cg")
        if last:
            if ADD:
                acc += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def cells_tile(  # type: ignore[no-untyped-def]
    t, alive, row0, tile, most, gates, recurrent, before, out, cells, running,
    C: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Gates and cells of one tile at position t. `before` are the outputs at t - 1, `out` gets o tanh(c).

    The activations overwrite the gates.
    """
    rows = row0 + tl.arange(0, BM)
    cell = tile * BN + tl.arange(0, BN)
    inside = (rows < alive)[:, None]
    at = rows[:, None] * (4 * C) + cell[None, :]
    cell_at = rows[:, None] * C + cell[None, :]
    # Loads that need no product come first, so that the product hides them.
    x_i = tl.load(gates + at, mask=inside, other=0.0)
    x_f = tl.load(gates + at + C, mask=inside, other=0.0)
    x_g = tl.load(gates + at + 2 * C, mask=inside, other=0.0)
    x_o = tl.load(gates + at + 3 * C, mask=inside, other=0.0)
    # A tile may move to another program, whose nearest cache holds old values.
    old = tl.load(running + cell_at, mask=inside & (t > 0), other=0.0, cache_modifier=".cg")
    n = tl.arange(0, 4 * BN)
    weight_row = (n % 4) * C + tile * BN + n // 4
    acc = tl.zeros((BM, 4 * BN), tl.float32)
    if t > 0:
        k = tl.arange(0, BK)
        y_tile = before + rows[:, None] * P + k[None, :]
        w_tile = recurrent + weight_row[None, :] * P + k[:, None]
        for _ in range(0, P, BK):
            acc = tl.dot(tl.load(y_tile, mask=inside, other=0.0, cache_modifier=".cg"), tl.load(w_tile), acc)
            y_tile += BK
            w_tile += BK
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
        tl.store(gates + at, i.to(dtype), mask=inside)
        tl.store(gates + at + C, f.to(dtype), mask=inside)
        tl.store(gates + at + 2 * C, g.to(dtype), mask=inside)
        tl.store(gates + at + 3 * C, o.to(dtype), mask=inside)


@triton.jit
def cells_gradient_tile(  # type: ignore[no-untyped-def]
    t, alive, alive_after, row0, tile, grad_out, source, weight, gates, cells, before, running, grad_gates,
    C: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates of one tile at position t.

    Without a projection, dh = grad_out[t] + source R, where `source` are the gates' gradients at t + 1, and the weight
    R is (4 C, C). With one, dh = source W, where `source` are the outputs' gradients at t, and W is (P, C).
    """
    WIDE: tl.constexpr = 4 * C if C == P else P
    rows = row0 + tl.arange(0, BM)
    cell = tile * BN + tl.arange(0, BN)
    inside = (rows < alive)[:, None]
    going_on = (rows < alive_after)[:, None]
    at = rows[:, None] * (4 * C) + cell[None, :]
    cell_at = rows[:, None] * C + cell[None, :]
    dh = tl.zeros((BM, BN), tl.float32)
    filled = going_on if C == P else inside
    if C != P or row0 < alive_after:
        k = tl.arange(0, BK)
        a_tile = source + rows[:, None] * WIDE + k[None, :]
        w_tile = weight + k[:, None] * C + cell[None, :]
        for _ in range(0, WIDE, BK):
            dh = tl.dot(tl.load(a_tile, mask=filled, other=0.0, cache_modifier=".cg"), tl.load(w_tile), dh)
            a_tile += BK
            w_tile += BK * C
    if C == P:
        dh += tl.load(grad_out + cell_at, mask=inside, other=0.0).to(tl.float32)
    # One gate after the other, so that few of these tiles are held at once.
    dtype = grad_gates.dtype.element_ty
    o = tl.load(gates + at + 3 * C, mask=inside, other=0.0).to(tl.float32)
    tanh = _tanh(tl.load(cells + cell_at, mask=inside, other=0.0).to(tl.float32))
    tl.store(grad_gates + at + 3 * C, (dh * tanh * o * (1.0 - o)).to(dtype), mask=inside)
    dc = dh * o * (1.0 - tanh * tanh)
    dc += tl.load(running + cell_at, mask=going_on, other=0.0, cache_modifier=".cg")
    f = tl.load(gates + at + C, mask=inside, other=0.0).to(tl.float32)
    tl.store(running + cell_at, dc * f, mask=inside)
    old = tl.load(before + cell_at, mask=inside & (t > 0), other=0.0).to(tl.float32)
    tl.store(grad_gates + at + C, (dc * old * f * (1.0 - f)).to(dtype), mask=inside)
    i = tl.load(gates + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gates + at + 2 * C, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_gates + at, (dc * g * i * (1.0 - i)).to(dtype), mask=inside)
    tl.store(grad_gates + at + 2 * C, (dc * i * (1.0 - g * g)).to(dtype), mask=inside)
