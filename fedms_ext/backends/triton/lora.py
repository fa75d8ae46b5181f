"""Compute the narrow products: those with the ranks on one side, and the rows or a side of W on the other.

All of them are limited by one pass over x or dy. Sums over the rows, or over the columns of dy, are split into partial sums in a
workspace, and another kernel adds those in a fixed order. There are no atomic additions, so the bits repeat. The number of partial
sums follows from the number of multiprocessors, so the last bits may differ between kinds of GPUs.

`expert_ptr` (R,) int32 holds the expert of each rank, `scale_ptr` (E,) holds the scales, and the gate is (M, E).

With segments (SEGMENTS) a row has only the ranks of its own expert, which are the first of R columns. A program finds its rows and
their expert in `blocks_ptr`. The experts lie one after the other, `pitch` ranks apart, and the gate is (M, 1). After an expert's own
ranks, A, B, S and dS are zero up to R, so that loads need no mask whose value the compiler cannot know.
"""

import triton
import triton.language as tl

from .dropout import keep_tile, seed_of


@triton.jit
def row_block(blocks_ptr, number, M, R, SIZE, SEGMENTS: tl.constexpr):
    """Return the first row of a block, the row where it ends, the expert that owns it, and that expert's ranks.

    With segments `blocks_ptr` (., 4) int32 holds these numbers for each block. Otherwise they follow from SIZE, the rows of a block.
    """
    if SEGMENTS:
        block = blocks_ptr + number * 4
        return tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    else:
        return number * SIZE, min((number + 1) * SIZE, M), 0, R


@triton.jit
def gate_of(gate_ptr, gate_stride_m, gate_stride_e, rows, expert, end):
    """Load gate_e for each row and rank, (rows, ranks) in fp32; `expert` holds the number of each rank's expert."""
    gate = gate_ptr + rows.to(tl.int64)[:, None] * gate_stride_m + expert[None, :] * gate_stride_e
    return tl.load(gate, mask=rows[:, None] < end, other=0.0).to(tl.float32)


@triton.jit
def factor_of(scale_ptr, expert_ptr, gate_ptr, gate_stride_m, gate_stride_e, rows, ranks, end, R, GATE: tl.constexpr):
    """Load scale_e * gate_e for each row and rank, (rows, ranks) in fp32; without a gate (1, ranks).

    The scales may be fp64, where a compiler has turned Python numbers into a tensor. They are converted to fp32 here, since
    everything computed with them would be fp64 otherwise.
    """
    expert = tl.load(expert_ptr + ranks, mask=ranks < R, other=0)
    factor = tl.load(scale_ptr + expert).to(tl.float32)[None, :]
    if GATE:
        factor = factor * gate_of(gate_ptr, gate_stride_m, gate_stride_e, rows, expert, end)
    return factor


@triton.jit(do_not_specialize=["seed", "threshold"])
def shrink(x_ptr, a_ptr, scale_ptr, expert_ptr, gate_ptr, blocks_ptr, seed_ptr, s_ptr, t_ptr, M, K, R, pitch,
           x_stride, a_stride_k, a_stride_r, t_stride, gate_stride_m, gate_stride_e,
           seed: tl.int64, threshold: tl.int64, kept_scale: tl.float32,
           BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, EVEN_K: tl.constexpr, GATE: tl.constexpr,
           DROP: tl.constexpr, SEED_IN_MEMORY: tl.constexpr, OCTETS: tl.constexpr, KEEP_S: tl.constexpr,
           SEGMENTS: tl.constexpr):
    """Compute s = drop(x) A^T (M, R), dense, and t, which is s with scale and gate applied, for the GEMM.

    With dy in the place of x and B in the place of A^T, t is dS.
    """
    row, end, owner, rank = row_block(blocks_ptr, tl.program_id(0), M, R, BM, SEGMENTS)
    a_ptr += owner * tl.cast(pitch, tl.int64) * a_stride_r
    rows = row + tl.arange(0, BM)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    steps = tl.arange(0, BK)
    x_tile = x_ptr + rows.to(tl.int64)[:, None] * x_stride + steps[None, :]
    a_tile = a_ptr + steps.to(tl.int64)[:, None] * a_stride_k + ranks[None, :] * a_stride_r
    x_mask, a_mask = rows[:, None] < end, ranks[None, :] < R
    s = tl.zeros((BM, BR), tl.float32)
    seed = seed_of(seed, seed_ptr, SEED_IN_MEMORY)
    for first in tl.range(0, K, BK):
        if EVEN_K:
            x = tl.load(x_tile, mask=x_mask, other=0.0)
            a = tl.load(a_tile, mask=a_mask, other=0.0)
        else:
            x = tl.load(x_tile, mask=x_mask & (steps[None, :] < K - first), other=0.0)
            a = tl.load(a_tile, mask=a_mask & (steps[:, None] < K - first), other=0.0)
        if DROP:
            keep = keep_tile(seed, threshold, row, first, K, BM, BK, OCTETS)
            x = tl.where(keep != 0, x, 0.0)
        s = tl.dot(x, a, s)
        x_tile += BK
        a_tile += BK * a_stride_k
    if DROP:
        s *= kept_scale
    if SEGMENTS:  # an infinity in x would leave NaN where the expert has no rank
        s = tl.where(ranks[None, :] < rank, s, 0.0)
    if KEEP_S:
        s_tile = s_ptr + rows.to(tl.int64)[:, None] * R + ranks[None, :]
        tl.store(s_tile, s.to(s_ptr.dtype.element_ty), mask=x_mask & a_mask)
    s *= factor_of(scale_ptr, expert_ptr + owner * pitch, gate_ptr, gate_stride_m, gate_stride_e, rows, ranks, end, R, GATE)
    t_tile = t_ptr + rows.to(tl.int64)[:, None] * t_stride + ranks[None, :]
    tl.store(t_tile, s.to(t_ptr.dtype.element_ty), mask=x_mask & (ranks[None, :] < t_stride))  # zeros behind R


@triton.jit(do_not_specialize=["seed", "threshold"])
def lora_grad_partials(z_ptr, t_ptr, b_ptr, scale_ptr, expert_ptr, gate_ptr, blocks_ptr, seed_ptr, u_ptr, g_ptr,
                       M, C, R, pitch, rows_a_split,
          z_stride, t_stride, b_stride, gate_stride_m, gate_stride_e,
          seed: tl.int64, threshold: tl.int64, kept_scale: tl.float32,
          BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, PROJECT: tl.constexpr, OUTER: tl.constexpr,
          FACTOR: tl.constexpr, GATE: tl.constexpr, DROP: tl.constexpr, SEED_IN_MEMORY: tl.constexpr,
          OCTETS: tl.constexpr, SEGMENTS: tl.constexpr):
    """Compute partial sums of gradients in one pass over z (M, C), which is dy or x. A program holds BC of the columns and walks down its
    split of the rows.

    OUTER: write partial sums g (splits, C, R) of z^T t. t (M, R) is used as it is given, or multiplied by the scale (FACTOR) and by the
    gate (GATE). From dy and S this is dB, and from x, with dropout, and dS it is dA^T.
    PROJECT: write partial sums u (ceil(C / BC), M, R) of z b over the columns, from the same tiles. This is U = dy B.
    """
    column = tl.program_id(0) * BC
    columns = column + tl.arange(0, BC)
    split = tl.program_id(1)
    start, end, owner, _ = row_block(blocks_ptr, split, M, R, rows_a_split, SEGMENTS)
    ranks = tl.program_id(2) * BR + tl.arange(0, BR)
    if PROJECT:
        b = tl.load(b_ptr + columns.to(tl.int64)[:, None] * b_stride + owner * pitch + ranks[None, :],
                    mask=(columns[:, None] < C) & (ranks[None, :] < R), other=0.0)
    if FACTOR:
        expert = tl.load(expert_ptr + owner * pitch + ranks, mask=ranks < R, other=0)
    g = tl.zeros((BC, BR), tl.float32)
    seed = seed_of(seed, seed_ptr, SEED_IN_MEMORY)
    for row in tl.range(start, end, BM):
        rows = row + tl.arange(0, BM)
        mask = (rows[:, None] < end) & (ranks[None, :] < R)
        z = tl.load(z_ptr + rows.to(tl.int64)[:, None] * z_stride + columns[None, :],
                    mask=(rows[:, None] < end) & (columns[None, :] < C), other=0.0)
        if DROP:
            keep = keep_tile(seed, threshold, row, column, C, BM, BC, OCTETS)
            z = tl.where(keep != 0, z, 0.0)
        if OUTER:
            t = tl.load(t_ptr + rows.to(tl.int64)[:, None] * t_stride + ranks[None, :], mask=mask, other=0.0)
            if GATE:
                t = (t.to(tl.float32) * gate_of(gate_ptr, gate_stride_m, gate_stride_e, rows, expert, end)).to(z.dtype)
            # Before the product of PROJECT: after it, Hopper's matrix instructions would each be waited for.
            g = tl.dot(tl.trans(z), t, g)
        if PROJECT:
            u = tl.dot(z, b)
            place = tl.program_id(0).to(tl.int64) * M + rows
            tl.store(u_ptr + place[:, None] * R + ranks[None, :], u, mask=mask)
    if OUTER:
        if DROP:
            g *= kept_scale
        if FACTOR:  # the same for all rows: here once, and t goes from memory into the product as it is
            g *= tl.load(scale_ptr + expert).to(tl.float32)[None, :]
        place = split.to(tl.int64) * C + columns
        tl.store(g_ptr + place[:, None] * R + ranks[None, :], g,
                 mask=(columns[:, None] < C) & (ranks[None, :] < R))


@triton.jit
def sum_of_parts(tile, mask, parts, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr):
    """Return the sum of `parts` fp32 tiles (ROWS, COLUMNS) that lie `stride` values apart.

    TOGETHER tiles are read by one load, because the compiler lets each load of an unrolled loop wait for the addition before it. The
    order of the additions is fixed by the machine code.
    """
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    numbers = tl.arange(0, TOGETHER)[:, None, None]
    for part in range(0, parts, TOGETHER):
        tiles = tile[None, :, :] + (part + numbers).to(tl.int64) * stride
        total += tl.sum(tl.load(tiles, mask=mask[None, :, :] & (part + numbers < parts), other=0.0), axis=0)
    return total


@triton.jit
def finalize_row_grads(u_ptr, s_ptr, scale_ptr, expert_ptr, gate_ptr, blocks_ptr, ds_ptr, dgate_ptr, M, R, E, parts, pitch,
                s_stride, ds_stride, gate_stride_m, gate_stride_e,
                BM: tl.constexpr, BR: tl.constexpr, TOGETHER: tl.constexpr,
                GATE: tl.constexpr, DGATE: tl.constexpr, DS: tl.constexpr, SEGMENTS: tl.constexpr):
    """Add the partial sums of U, and compute from them dS (M, R), with scale and gate applied, and dgate (M, E), dense, or (M, 1) with
    segments.
    """
    row, end, owner, rank = row_block(blocks_ptr, tl.program_id(0), M, R, BM, SEGMENTS)
    expert_ptr += owner * pitch
    rows = row + tl.arange(0, BM)
    ranks = tl.arange(0, BR)
    mask = (rows[:, None] < end) & (ranks[None, :] < rank)
    u = sum_of_parts(u_ptr + rows.to(tl.int64)[:, None] * R + ranks[None, :], mask, parts, tl.cast(M, tl.int64) * R,
                     BM, BR, TOGETHER)
    if DS:
        ds = u * factor_of(scale_ptr, expert_ptr, gate_ptr, gate_stride_m, gate_stride_e, rows, ranks, end, R, GATE)
        ds_tile = ds_ptr + rows.to(tl.int64)[:, None] * ds_stride + ranks[None, :]
        inside = (rows[:, None] < end) & (ranks[None, :] < ds_stride)
        tl.store(ds_tile, ds.to(ds_ptr.dtype.element_ty), mask=inside)  # zeros behind R
    if DGATE:
        s = tl.load(s_ptr + rows.to(tl.int64)[:, None] * s_stride + ranks[None, :], mask=mask, other=0.0)
        product = u * s.to(tl.float32)
        expert = tl.load(expert_ptr + ranks, mask=ranks < R, other=-1)
        if SEGMENTS:
            dgate = tl.sum(product, axis=1) * tl.load(scale_ptr + owner).to(tl.float32)
            tl.store(dgate_ptr + rows.to(tl.int64), dgate.to(dgate_ptr.dtype.element_ty), mask=rows < end)
        else:
            for e in range(0, E):
                dgate = tl.sum(tl.where(expert[None, :] == e, product, 0.0), axis=1)
                dgate *= tl.load(scale_ptr + e).to(tl.float32)
                place = dgate_ptr + rows.to(tl.int64) * E + e
                tl.store(place, dgate.to(dgate_ptr.dtype.element_ty), mask=rows < end)


@triton.jit
def reduce_partials(g_ptr, out_ptr, C, R, parts, first, rank, out_stride_c, out_stride_r,
              BC: tl.constexpr, BR: tl.constexpr, TOGETHER: tl.constexpr):
    """Write out (C, rank): the sum over the parts of g (parts, C, R), in its columns from `first` to `first + rank`."""
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    mask = (columns[:, None] < C) & (ranks[None, :] < rank)
    total = sum_of_parts(g_ptr + columns.to(tl.int64)[:, None] * R + first + ranks[None, :], mask, parts,
                         tl.cast(C, tl.int64) * R, BC, BR, TOGETHER)
    out = out_ptr + columns.to(tl.int64)[:, None] * out_stride_c + ranks[None, :] * out_stride_r
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)
