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
              OCTETS: tl.constexpr):
    """(ROWS, COLUMNS) int8, 1 where the value at (first_row + i, first_column + j) of a (., columns) matrix is kept.

    `first_column` must be a multiple of 8. OCTETS says that `columns` is one too: then eight neighbors share one
    call of Philox, otherwise each value makes its own.
    """
    threshold = threshold.to(tl.uint32)
    rows = (first_row + tl.arange(0, ROWS)).to(tl.int64)
    if OCTETS:
        octets = rows[:, None] * (columns // 8) + (first_column // 8 + tl.arange(0, COLUMNS // 8))[None, :]
        w0, w1, w2, w3 = _words(seed, octets)
        # The last axis of a join counts fastest: the lower and the upper half of w0, then those of w1, w2 and w3.
        lower = tl.join(tl.join(_lower(w0, threshold), _lower(w2, threshold)), tl.join(_lower(w1, threshold), _lower(w3, threshold)))
        upper = tl.join(tl.join(_upper(w0, threshold), _upper(w2, threshold)), tl.join(_upper(w1, threshold), _upper(w3, threshold)))
        return tl.reshape(tl.join(lower, upper), (ROWS, COLUMNS))
    else:
        index = rows[:, None] * columns + (first_column + tl.arange(0, COLUMNS))[None, :]
        w0, w1, w2, w3 = _words(seed, index >> 3)
        place = (index >> 1) & 3
        word = tl.where(place == 0, w0, tl.where(place == 1, w1, tl.where(place == 2, w2, w3)))
        return tl.where((index & 1) == 0, _lower(word, threshold), _upper(word, threshold))


@triton.jit
def _lower(word, threshold):
    return ((word & 0xFFFF) >= threshold).to(tl.int8)


@triton.jit
def _upper(word, threshold):
    return (word >= threshold << 16).to(tl.int8)


@triton.jit
def _words(seed, counter):
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(seed, low, high, zero, zero, 7)
