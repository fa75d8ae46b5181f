"""Compute the frozen product and the experts' part in one GEMM: y = x W^T + T F + bias, in one fp32 accumulator that is rounded once.

T (M, R) is S with scale and gate applied, and F (R, N) is B^T. The reduction over K is continued over the ranks. The same kernels
compute dx = dy W + dS A, reading W along its other side. The names `x`, `K` and `N` stand for the input, the reduction length and
the output width of the GEMM at hand: for dx, `x` is dy and `K` is the output width of the layer.

With segments (SEGMENTS) all rows of a tile lie in one segment, and F holds the experts one after the other, `pitch` ranks apart;
see `row_block` in lora.py.
"""

import triton
import triton.language as tl

from .dropout import keep_tile, seed_of
from .lora import factor_of, row_block


@triton.jit
def _place(tile, blocks_m, N, BN: tl.constexpr, BAND: tl.constexpr):
    """Return the row block and the column block of a tile."""
    # Tiles that run at the same time lie in a band of BAND row blocks, so that they share W in L2.
    blocks_n = tl.cdiv(N, BN)
    band = tile // (BAND * blocks_n)
    height = min(blocks_m - band * BAND, BAND)
    inside = tile % (BAND * blocks_n)
    return band * BAND + inside % height, inside // height


@triton.jit
def _drop(acc, seed, threshold, kept_scale, row, column, columns, BM: tl.constexpr, BN: tl.constexpr,
          OCTETS: tl.constexpr):
    """Apply dropout to an accumulator (BM, BN) whose first value lies at (row, column) of a matrix with `columns` columns."""
    keep = keep_tile(seed, threshold, row, column, columns, BM, BN, OCTETS)
    return tl.where(keep != 0, acc * kept_scale, 0.0)


@triton.jit
def _add_ranks(acc, t_ptr, f_ptr, rows, columns, end, N, rank, R, t_stride, f_stride_r, f_stride_n, BR: tl.constexpr):
    """Add T F to an accumulator (BM, BN), BR ranks at a time."""
    t_rows = t_ptr + rows.to(tl.int64)[:, None] * t_stride
    # One or two steps: a pipeline would only take shared memory from that of the main loop.
    for first in tl.range(0, rank, BR, num_stages=1):
        ranks = first + tl.arange(0, BR)
        t = tl.load(t_rows + ranks[None, :], mask=(rows[:, None] < end) & (ranks[None, :] < R), other=0.0)
        f = tl.load(f_ptr + ranks[:, None] * f_stride_r + columns[None, :] * f_stride_n,
                    mask=(ranks[:, None] < R) & (columns[None, :] < N), other=0.0)
        acc = tl.dot(t, f, acc)
    return acc


@triton.jit
def _load_nibbles(w_ptr, scale_ptr, levels, rows, column, ROWS, COLUMNS, w_stride, scale_stride,
                  BROWS: tl.constexpr, BCOLUMNS: tl.constexpr, PER_SCALE: tl.constexpr):
    """Load a tile (BROWS, BCOLUMNS) of a 4-bit weight (ROWS, COLUMNS) as fp32.

    A byte holds two codes of neighboring columns, the even one in the low nibble, and PER_SCALE columns share a scale. `column` must be
    a multiple of BCOLUMNS, and the larger of BCOLUMNS and PER_SCALE a multiple of the smaller.
    """
    SCALES: tl.constexpr = BCOLUMNS // PER_SCALE if BCOLUMNS > PER_SCALE else 1
    places = column // 2 + tl.arange(0, BCOLUMNS // 2)
    row_mask = rows[:, None] < ROWS
    packed = tl.load(w_ptr + rows.to(tl.int64)[:, None] * w_stride + places[None, :],
                     mask=row_mask & (places[None, :] < (COLUMNS + 1) // 2), other=0)
    groups = column // PER_SCALE + tl.arange(0, SCALES)
    scale = tl.load(scale_ptr + rows.to(tl.int64)[:, None] * scale_stride + groups[None, :],
                    mask=row_mask & (groups[None, :] < tl.cdiv(COLUMNS, PER_SCALE)), other=0.0)
    # The last axis of a join counts fastest: low, high side by side. The 16 levels are looked up in shared memory, each
    # in a bank of its own; a load from global memory would be taken into the pipeline, value by value.
    codes = tl.reshape(tl.join(packed & 15, packed >> 4), (BROWS * BCOLUMNS,)).to(tl.int32)
    level = tl.reshape(tl.gather(levels, codes, 0), (BROWS, SCALES, BCOLUMNS // SCALES))
    return tl.reshape(level * scale[:, :, None], (BROWS, BCOLUMNS))


@triton.jit(do_not_specialize=["seed", "threshold", "blocks_m"])
def gemm_pointer(x_ptr, w_ptr, w_scale_ptr, levels_ptr, bias_ptr, t_ptr, f_ptr, blocks_ptr, seed_ptr, y_ptr,
                 M, N, K, R, blocks_m, pitch,
                 x_stride, w_stride_k, w_stride_n, w_scale_stride, t_stride, f_stride_r, f_stride_n,
                 seed: tl.int64, threshold: tl.int64, kept_scale: tl.float32,
                 BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BAND: tl.constexpr,
                 EVEN_K: tl.constexpr, BIAS: tl.constexpr, INT8: tl.constexpr, PER_SCALE: tl.constexpr,
                 TRANSPOSED: tl.constexpr, SEGMENTS: tl.constexpr, DROP: tl.constexpr, SEED_IN_MEMORY: tl.constexpr,
                 OCTETS: tl.constexpr):
    """Compute one output tile in each program, with operands that are read through pointers. y is dense.

    INT8: W is int8 with one scale for each column of the output. PER_SCALE > 0: W has 4 bits, and so many values share a scale; it is
    packed along the reduction, or with TRANSPOSED along the columns of the output. DROP: dropout is applied to the experts' part, as
    dx requires.
    """
    block_m, block_n = _place(tl.program_id(0), blocks_m, N, BN, BAND)
    row, end, owner, rank = row_block(blocks_ptr, block_m, M, R, BM, SEGMENTS)
    f_ptr += owner * tl.cast(pitch, tl.int64) * f_stride_r
    rows = row + tl.arange(0, BM)
    columns = block_n * BN + tl.arange(0, BN)
    steps = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    seed = seed_of(seed, seed_ptr, SEED_IN_MEMORY)
    if DROP and not INT8:
        # The mask covers the ranks alone, so they come first while nothing else is in the accumulator.
        acc = _add_ranks(acc, t_ptr, f_ptr, rows, columns, end, N, rank, R, t_stride, f_stride_r, f_stride_n, BR)
        acc = _drop(acc, seed, threshold, kept_scale, row, block_n * BN, N, BM, BN, OCTETS)

    x_tile = x_ptr + rows.to(tl.int64)[:, None] * x_stride + steps[None, :]
    w_tile = w_ptr + steps.to(tl.int64)[:, None] * w_stride_k + columns.to(tl.int64)[None, :] * w_stride_n
    x_mask, w_mask = rows[:, None] < end, columns[None, :] < N
    if PER_SCALE > 0:
        levels = tl.load(levels_ptr + tl.arange(0, 16))
    for first in tl.range(0, K, BK):
        if EVEN_K:
            x = tl.load(x_tile, mask=x_mask, other=0.0)
        else:
            x = tl.load(x_tile, mask=x_mask & (steps[None, :] < K - first), other=0.0)
        if PER_SCALE > 0:
            if TRANSPOSED:
                w = _load_nibbles(w_ptr, w_scale_ptr, levels, first + steps, block_n * BN, K, N, w_stride_k,
                                  w_scale_stride, BK, BN, PER_SCALE).to(x.dtype)
            else:
                w = _load_nibbles(w_ptr, w_scale_ptr, levels, columns, first, N, K, w_stride_n,
                                  w_scale_stride, BN, BK, PER_SCALE).to(x.dtype).T
        elif EVEN_K:
            w = tl.load(w_tile, mask=w_mask, other=0)
        else:
            w = tl.load(w_tile, mask=w_mask & (steps[:, None] < K - first), other=0)
        if INT8:
            w = w.to(x.dtype)  # exact: 8 bits fit into the significand
        acc = tl.dot(x, w, acc)
        x_tile += BK
        w_tile += BK * w_stride_k
    if INT8:
        acc *= tl.load(w_scale_ptr + columns, mask=columns < N, other=0.0)[None, :]
        if DROP:  # nor does the scale of W cover them: an accumulator of their own
            part = tl.zeros((BM, BN), tl.float32)
            part = _add_ranks(part, t_ptr, f_ptr, rows, columns, end, N, rank, R, t_stride, f_stride_r, f_stride_n, BR)
            acc += _drop(part, seed, threshold, kept_scale, row, block_n * BN, N, BM, BN, OCTETS)

    if not DROP:
        acc = _add_ranks(acc, t_ptr, f_ptr, rows, columns, end, N, rank, R, t_stride, f_stride_r, f_stride_n, BR)
    if BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    y_tile = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=(rows[:, None] < end) & (columns[None, :] < N))


@triton.jit(do_not_specialize=["blocks_m"])
def gemm_inline(x_ptr, w_ptr, bias_ptr, a_ptr, f_ptr, scale_ptr, expert_ptr, gate_ptr, blocks_ptr, s_ptr, y_ptr,
                M, N, K, R, blocks_m, pitch,
                x_stride, w_stride, a_stride, f_stride, gate_stride_m, gate_stride_e,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BAND: tl.constexpr,
                EVEN_K: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, SEGMENTS: tl.constexpr):
    """Compute the forward pass of a narrow layer. Every tile computes its own rows of S, so that x is read only once.

    BR must be at least R. The kernel writes y and s (M, R), both dense.
    """
    block_m, block_n = _place(tl.program_id(0), blocks_m, N, BN, BAND)
    row, end, owner, rank = row_block(blocks_ptr, block_m, M, R, BM, SEGMENTS)
    a_ptr += owner * tl.cast(pitch, tl.int64) * a_stride
    f_ptr += owner * pitch
    rows = row + tl.arange(0, BM)
    columns = block_n * BN + tl.arange(0, BN)
    steps = tl.arange(0, BK)
    ranks = tl.arange(0, BR)
    x_tile = x_ptr + rows.to(tl.int64)[:, None] * x_stride + steps[None, :]
    w_tile = w_ptr + columns.to(tl.int64)[None, :] * w_stride + steps[:, None]
    a_tile = a_ptr + ranks[None, :] * a_stride + steps[:, None]
    x_mask, w_mask, a_mask = rows[:, None] < end, columns[None, :] < N, ranks[None, :] < R
    acc = tl.zeros((BM, BN), tl.float32)
    s = tl.zeros((BM, BR), tl.float32)
    for first in tl.range(0, K, BK):
        if EVEN_K:
            x = tl.load(x_tile, mask=x_mask, other=0.0)
            w = tl.load(w_tile, mask=w_mask, other=0.0)
            a = tl.load(a_tile, mask=a_mask, other=0.0)
        else:
            x = tl.load(x_tile, mask=x_mask & (steps[None, :] < K - first), other=0.0)
            w = tl.load(w_tile, mask=w_mask & (steps[:, None] < K - first), other=0.0)
            a = tl.load(a_tile, mask=a_mask & (steps[:, None] < K - first), other=0.0)
        acc = tl.dot(x, w, acc)
        s = tl.dot(x, a, s)
        x_tile += BK
        w_tile += BK
        a_tile += BK

    if SEGMENTS:  # an infinity in x would leave NaN where the expert has no rank
        s = tl.where(ranks[None, :] < rank, s, 0.0)
    if block_n == 0:
        s_tile = s_ptr + rows.to(tl.int64)[:, None] * R + ranks[None, :]
        tl.store(s_tile, s.to(s_ptr.dtype.element_ty), mask=(rows[:, None] < end) & a_mask)
    s *= factor_of(scale_ptr, expert_ptr + owner * pitch, gate_ptr, gate_stride_m, gate_stride_e, rows, ranks, end, R, GATE)
    f = tl.load(f_ptr + ranks[:, None] + columns.to(tl.int64)[None, :] * f_stride,
                mask=(ranks[:, None] < R) & (columns[None, :] < N), other=0.0)
    acc = tl.dot(s.to(f.dtype), f, acc)
    if BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    y_tile = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=(rows[:, None] < end) & (columns[None, :] < N))


@triton.jit(do_not_specialize=["seed", "threshold", "blocks_m"])
def gemm_descriptor(x_desc, w_desc, bias_ptr, t_desc, f_desc, blocks_ptr, seed_ptr, y_desc, M, N, K, blocks_m, pitch,
                    seed: tl.int64, threshold: tl.int64, kept_scale: tl.float32,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BAND: tl.constexpr,
                    RANKS: tl.constexpr, TRANSPOSED: tl.constexpr, BIAS: tl.constexpr, SEGMENTS: tl.constexpr,
                    DROP: tl.constexpr, SEED_IN_MEMORY: tl.constexpr, OCTETS: tl.constexpr, HALVES: tl.constexpr):
    """Compute the output tiles in a persistent grid, one program for each multiprocessor, and move tiles by tensor descriptors (TMA).

    TRANSPOSED: W and F are contiguous along the columns of the output, as for dx; otherwise they are contiguous along the reduction.
    SEGMENTS: a segment has at least BM rows, and its last tile ends where the segment ends. That tile may begin inside the one before,
    whose rows are then computed twice, with the same bits. HALVES: the tile is written in two halves, which saves shared memory.
    """
    tiles = blocks_m * tl.cdiv(N, BN)
    seed = seed_of(seed, seed_ptr, SEED_IN_MEMORY)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        block_m, block_n = _place(tile, blocks_m, N, BN, BAND)
        row, _, owner, _ = row_block(blocks_ptr, block_m, M, RANKS, BM, SEGMENTS)
        column, rank = block_n * BN, owner * pitch
        acc = tl.zeros((BM, BN), tl.float32)
        if DROP:
            acc = _add_described_ranks(acc, t_desc, f_desc, row, column, rank, RANKS, BR, TRANSPOSED)
            acc = _drop(acc, seed, threshold, kept_scale, row, column, N, BM, BN, OCTETS)
        for first in tl.range(0, K, BK):
            x = x_desc.load([row, first])
            if TRANSPOSED:
                acc = tl.dot(x, w_desc.load([first, column]), acc)
            else:
                acc = tl.dot(x, w_desc.load([column, first]).T, acc)
        if not DROP:
            acc = _add_described_ranks(acc, t_desc, f_desc, row, column, rank, RANKS, BR, TRANSPOSED)
        if BIAS:
            columns = column + tl.arange(0, BN)
            acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        if HALVES:
            left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
            y_desc.store([row, column], left.to(y_desc.dtype))
            y_desc.store([row, column + BN // 2], right.to(y_desc.dtype))
        else:
            y_desc.store([row, column], acc.to(y_desc.dtype))


@triton.jit
def _add_described_ranks(acc, t_desc, f_desc, row, column, rank, RANKS: tl.constexpr, BR: tl.constexpr,
                         TRANSPOSED: tl.constexpr):
    """Add T F to an accumulator as `_add_ranks` does, with operands that are read through descriptors."""
    # Unrolled: with a second loop inside, the loop over tiles would not be merged with that over K.
    for first in tl.static_range(0, RANKS, BR):
        t = t_desc.load([row, first])
        if TRANSPOSED:
            acc = tl.dot(t, f_desc.load([rank + first, column]), acc)
        else:
            acc = tl.dot(t, f_desc.load([column, rank + first]).T, acc)
    return acc
