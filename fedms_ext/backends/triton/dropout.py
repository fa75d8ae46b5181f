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
    threshold = tl.to_tensor(threshold).to(tl.uint32)
    if OCTETS:
        first = tl.to_tensor(first_row).to(tl.int64) * (columns // 8) + first_column // 8
        octets = tl.arange(0, ROWS)[:, None] * (columns // 8) + tl.arange(0, COLUMNS // 8)[None, :]
        w0, w1, w2, w3 = _words(seed, (first & 0xFFFFFFFF).to(tl.uint32), (first >> 32).to(tl.uint32), octets.to(tl.uint32))
        # The last axis of a join counts fastest: w0 w1 w2 w3 side by side, and of each word the lower half first.
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, COLUMNS // 2))
        return tl.reshape(tl.join(_lower(words, threshold), _upper(words, threshold)), (ROWS, COLUMNS))
    else:
        rows = (first_row + tl.arange(0, ROWS)).to(tl.int64)
        index = rows[:, None] * columns + (first_column + tl.arange(0, COLUMNS))[None, :]
        octet = index >> 3
        low = (octet & 0xFFFFFFFF).to(tl.uint32)
        w0, w1, w2, w3 = _words(seed, low, (octet >> 32).to(tl.uint32), tl.zeros_like(low))
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
def _words(seed, low, high, offset):
    """Four random words for each counter, which is high * 2^32 + low + offset."""
    counter = low + offset
    zero = tl.zeros_like(counter)
    return tl.philox(seed, counter, high + (counter < offset).to(tl.uint32), zero, zero, 7)
