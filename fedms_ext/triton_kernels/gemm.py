"""The frozen GEMM, joined by the ranks: y = x W^T + T F + bias in one fp32 accumulator, rounded once.

T (M, R) is S with scale and gate, and F (R, N) is B^T: the K dimension of the GEMM goes on into the ranks. The same
kernels compute dx = dy W + dS A, with W read along its other side. `x`, `K`, `N` are the input, the reduction and
the output of the GEMM at hand, so in dx `x` is dy and `K` is the layer's output width.
"""

import triton
import triton.language as tl

from .dropout import keep_tile


@triton.jit
def _place(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    # Tiles that run at the same time lie in a band of GROUP row blocks, so that they share W in L2.
    blocks_m, blocks_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    band = tile // (GROUP * blocks_n)
    height = min(blocks_m - band * GROUP, GROUP)
    inside = tile % (GROUP * blocks_n)
    return band * GROUP + inside % height, inside // height


@triton.jit
def _drop(acc, seed, threshold, kept_scale, row, column, columns, BM: tl.constexpr, BN: tl.constexpr,
          QUADS: tl.constexpr):
    keep = keep_tile(seed, threshold, row, column, columns, BM, BN, QUADS)
    return tl.where(keep != 0, acc * kept_scale, 0.0)


@triton.jit
def _add_ranks(acc, t_ptr, f_ptr, rows, columns, M, N, R, t_stride, f_stride_r, f_stride_n, BR: tl.constexpr):
    t_rows = t_ptr + rows.to(tl.int64)[:, None] * t_stride
    # One or two steps: a pipeline would only take shared memory from that of the main loop.
    for first in tl.range(0, R, BR, num_stages=1):
        ranks = first + tl.arange(0, BR)
        t = tl.load(t_rows + ranks[None, :], mask=(rows[:, None] < M) & (ranks[None, :] < R), other=0.0)
        f = tl.load(f_ptr + ranks[:, None] * f_stride_r + columns[None, :] * f_stride_n,
                    mask=(ranks[:, None] < R) & (columns[None, :] < N), other=0.0)
        acc = tl.dot(t, f, acc)
    return acc


@triton.jit(do_not_specialize=["seed", "threshold"])
def gemm_pointer(x_ptr, w_ptr, w_scale_ptr, bias_ptr, t_ptr, f_ptr, y_ptr, M, N, K, R,
                 x_stride, w_stride_k, w_stride_n, t_stride, f_stride_r, f_stride_n,
                 seed: tl.int64, threshold: tl.int64, kept_scale: tl.float32,
                 BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
                 EVEN_K: tl.constexpr, BIAS: tl.constexpr, INT8: tl.constexpr, DROP: tl.constexpr,
                 QUADS: tl.constexpr):
    """One output tile a program. y is dense.

    INT8: W is int8 with one scale a column of the output. DROP: the part of the ranks is masked, as dx wants it.
    """
    block_m, block_n = _place(tl.program_id(0), M, N, BM, BN, GROUP)
    rows = block_m * BM + tl.arange(0, BM)
    columns = block_n * BN + tl.arange(0, BN)
    steps = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    if DROP and not INT8:
        # The mask covers the ranks alone, so they come first while nothing else is in the accumulator.
        acc = _add_ranks(acc, t_ptr, f_ptr, rows, columns, M, N, R, t_stride, f_stride_r, f_stride_n, BR)
        acc = _drop(acc, seed, threshold, kept_scale, block_m * BM, block_n * BN, N, BM, BN, QUADS)

    x_tile = x_ptr + rows.to(tl.int64)[:, None] * x_stride + steps[None, :]
    w_tile = w_ptr + steps.to(tl.int64)[:, None] * w_stride_k + columns.to(tl.int64)[None, :] * w_stride_n
    x_mask, w_mask = rows[:, None] < M, columns[None, :] < N
    for first in tl.range(0, K, BK):
        if EVEN_K:
            x = tl.load(x_tile, mask=x_mask, other=0.0)
            w = tl.load(w_tile, mask=w_mask, other=0)
        else:
            x = tl.load(x_tile, mask=x_mask & (steps[None, :] < K - first), other=0.0)
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
            part = _add_ranks(part, t_ptr, f_ptr, rows, columns, M, N, R, t_stride, f_stride_r, f_stride_n, BR)
            acc += _drop(part, seed, threshold, kept_scale, block_m * BM, block_n * BN, N, BM, BN, QUADS)

    if not DROP:
        acc = _add_ranks(acc, t_ptr, f_ptr, rows, columns, M, N, R, t_stride, f_stride_r, f_stride_n, BR)
    if BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    y_tile = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < N))


@triton.jit
def gemm_inline(x_ptr, w_ptr, bias_ptr, a_ptr, f_ptr, scale_ptr, expert_ptr, gate_ptr, s_ptr, y_ptr, M, N, K, R,
                x_stride, w_stride, a_stride, f_stride, gate_stride_m, gate_stride_e,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
                EVEN_K: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr):
    """The forward pass of a narrow layer: every tile computes its own rows of S, so that x is read in one pass.

    BR >= R. Writes y and s (M, R), both dense.
    """
    block_m, block_n = _place(tl.program_id(0), M, N, BM, BN, GROUP)
    rows = block_m * BM + tl.arange(0, BM)
    columns = block_n * BN + tl.arange(0, BN)
    steps = tl.arange(0, BK)
    ranks = tl.arange(0, BR)
    x_tile = x_ptr + rows.to(tl.int64)[:, None] * x_stride + steps[None, :]
    w_tile = w_ptr + columns.to(tl.int64)[None, :] * w_stride + steps[:, None]
    a_tile = a_ptr + ranks[None, :] * a_stride + steps[:, None]
    x_mask, w_mask, a_mask = rows[:, None] < M, columns[None, :] < N, ranks[None, :] < R
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

    if block_n == 0:
        s_tile = s_ptr + rows.to(tl.int64)[:, None] * R + ranks[None, :]
        tl.store(s_tile, s.to(s_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (ranks[None, :] < R))
    expert = tl.load(expert_ptr + ranks, mask=ranks < R, other=0)
    s *= tl.load(scale_ptr + expert).to(tl.float32)[None, :]
    if GATE:
        gate = gate_ptr + rows.to(tl.int64)[:, None] * gate_stride_m + expert[None, :] * gate_stride_e
        s *= tl.load(gate, mask=rows[:, None] < M, other=0.0).to(tl.float32)
    f = tl.load(f_ptr + ranks[:, None] + columns.to(tl.int64)[None, :] * f_stride,
                mask=(ranks[:, None] < R) & (columns[None, :] < N), other=0.0)
    acc = tl.dot(s.to(f.dtype), f, acc)
    if BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    y_tile = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < N))


@triton.jit(do_not_specialize=["seed", "threshold"])
def gemm_descriptor(x_desc, w_desc, bias_ptr, t_desc, f_desc, y_desc, M, N, K,
                    seed: tl.int64, threshold: tl.int64, kept_scale: tl.float32,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
                    RANKS: tl.constexpr, ACROSS: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr, QUADS: tl.constexpr,
                    HALVES: tl.constexpr):
    """A persistent grid of as many programs as multiprocessors; tiles travel through tensor descriptors (TMA).

    ACROSS: W and F hold the output's columns along their contiguous side (dx); otherwise the reduction (forward).
    HALVES: the tile is written in two halves, which saves shared memory.
    """
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        block_m, block_n = _place(tile, M, N, BM, BN, GROUP)
        row, column = block_m * BM, block_n * BN
        acc = tl.zeros((BM, BN), tl.float32)
        if DROP:
            acc = _add_described_ranks(acc, t_desc, f_desc, row, column, RANKS, BR, ACROSS)
            acc = _drop(acc, seed, threshold, kept_scale, row, column, N, BM, BN, QUADS)
        for first in tl.range(0, K, BK):
            x = x_desc.load([row, first])
            if ACROSS:
                acc = tl.dot(x, w_desc.load([first, column]), acc)
            else:
                acc = tl.dot(x, w_desc.load([column, first]).T, acc)
        if not DROP:
            acc = _add_described_ranks(acc, t_desc, f_desc, row, column, RANKS, BR, ACROSS)
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
def _add_described_ranks(acc, t_desc, f_desc, row, column, RANKS: tl.constexpr, BR: tl.constexpr, ACROSS: tl.constexpr):
    # Unrolled: with a second loop inside, the loop over tiles would not be merged with that over K.
    for first in tl.static_range(0, RANKS, BR):
        t = t_desc.load([row, first])
        if ACROSS:
            acc = tl.dot(t, f_desc.load([first, column]), acc)
        else:
            acc = tl.dot(t, f_desc.load([column, first]).T, acc)
    return acc
