"""The dropout mask of `fedms_ext.philox_mask`, a tile at a time: regenerated wherever it is needed, never stored."""

import triton
import triton.language as tl


@triton.jit
def seed_of(seed, seed_ptr, SEED_IN_MEMORY: tl.constexpr):
    """The seed of the mask: the number that the launch gave, or what lies in memory when the kernel runs. In a CUDA graph only
    the latter differs from replay to replay."""
    if SEED_IN_MEMORY:
        seed = tl.load(seed_ptr)
    return seed


@triton.jit
def keep_tile(seed, threshold, first_row, first_column, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
              QUADS: tl.constexpr):
    """(ROWS, COLUMNS) int8, 1 where the value at (first_row + i, first_column + j) of a (., columns) matrix is kept.

    `first_column` must be a multiple of 4. QUADS says that `columns` is one too: then four neighbors share one
    call of Philox, otherwise each value makes its own.
    """
    rows = (first_row + tl.arange(0, ROWS)).to(tl.int64)
    if QUADS:
        quads = rows[:, None] * (columns // 4) + (first_column // 4 + tl.arange(0, COLUMNS // 4))[None, :]
        w0, w1, w2, w3 = _words(seed, quads)
        # The last axis of a join counts fastest: w0 w1 w2 w3 side by side.
        even = tl.join((w0 >= threshold).to(tl.int8), (w2 >= threshold).to(tl.int8))
        odd = tl.join((w1 >= threshold).to(tl.int8), (w3 >= threshold).to(tl.int8))
        return tl.reshape(tl.join(even, odd), (ROWS, COLUMNS))
    else:
        index = rows[:, None] * columns + (first_column + tl.arange(0, COLUMNS))[None, :]
        w0, w1, w2, w3 = _words(seed, index >> 2)
        place = index & 3
        word = tl.where(place == 0, w0, tl.where(place == 1, w1, tl.where(place == 2, w2, w3)))
        return (word >= threshold).to(tl.int8)


@triton.jit
def _words(seed, counter):
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    # A threshold of 32 bits is compared without a sign.
    return w0.to(tl.int64), w1.to(tl.int64), w2.to(tl.int64), w3.to(tl.int64)
