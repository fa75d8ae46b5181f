// Tiles for mma.sync: asynchronous copies into shared memory, and fragments out of it (layout.h says where).
#pragma once

#include "layout.h"

namespace fedms::cuda {

constexpr int STEP = 64;  // numbers of the reduction in one stage: rows of 128 bytes

// A tile of ROWS x CHUNKS chunks from (first_row, first_column) of a matrix (rows, columns) on; zeros outside of it. Rows
// of the matrix start at multiples of 16 bytes. A chunk has eight numbers, or 16 int8. The chunks of one thread lie below
// each other, at the same place of the swizzle: that leaves an addition for each.
template <int ROWS, int CHUNKS, int THREADS, class T>
FEDMS_DEVICE void copy_tile(uint32_t tile, const T* from, int64_t stride, int first_row, int rows, int first_column,
                            int columns) {
  constexpr int LENGTH = 16 / sizeof(T), AT_ONCE = THREADS / CHUNKS;
  static_assert(THREADS % CHUNKS == 0 && AT_ONCE % 8 == 0);
  static_assert(ROWS % AT_ONCE == 0 || (ROWS < AT_ONCE && ROWS * CHUNKS % 32 == 0));
  const int row = ptx::thread() / CHUNKS, chunk = ptx::thread() % CHUNKS, column = first_column + chunk * LENGTH;
  if (ROWS < AT_ONCE && row >= ROWS) return;
  const int bytes = clamp(columns - column, 0, LENGTH) * int(sizeof(T)), left = bytes > 0 ? rows - first_row - row : 0;
  const int64_t first = (first_row + row) * stride + column;
  const uint32_t to = tile + chunk_offset<CHUNKS>(row, chunk);
#pragma unroll
  for (int below = 0; below < ROWS; below += AT_ONCE) {
    const bool inside = below < left;
    ptx::cp_async_16(to + below * CHUNKS * 16, from + (inside ? first + below * stride : 0), inside ? bytes : 0);
  }
}

FEDMS_DEVICE int lane() { return ptx::thread() % 32; }
FEDMS_DEVICE int warp() { return ptx::thread() / 32; }

// 16 x 16 numbers through ldmatrix; `row` and `chunk` are their first. TRANS: each 8 x 8 of them turned over.
template <int CHUNKS, bool TRANS>
FEDMS_DEVICE void load_matrices(uint32_t (&to)[4], uint32_t tile, int row, int chunk, Place place) {
  const uint32_t from = tile + chunk_offset<CHUNKS>(row + place.row, chunk + place.chunk);
  TRANS ? ptx::ldmatrix_x4_trans(to, from) : ptx::ldmatrix_x4(to, from);
}
// A for mma_16x8x16, from a tile that is stored (m, k).
template <int CHUNKS>
FEDMS_DEVICE void load_a(uint32_t (&a)[4], uint32_t tile, int row, int chunk) {
  load_matrices<CHUNKS, false>(a, tile, row, chunk, rows_first(lane()));
}
// The same from a tile that is stored (k, m).
template <int CHUNKS>
FEDMS_DEVICE void load_a_across(uint32_t (&a)[4], uint32_t tile, int row, int chunk) {
  load_matrices<CHUNKS, true>(a, tile, row, chunk, chunks_first(lane()));
}
// B for two mma_16x8x16 side by side, from a tile that is stored (n, k).
template <int CHUNKS>
FEDMS_DEVICE void load_b(uint32_t (&b)[4], uint32_t tile, int row, int chunk) {
  load_matrices<CHUNKS, false>(b, tile, row, chunk, chunks_first(lane()));
}
// The same from a tile that is stored (k, n).
template <int CHUNKS>
FEDMS_DEVICE void load_b_across(uint32_t (&b)[4], uint32_t tile, int row, int chunk) {
  load_matrices<CHUNKS, true>(b, tile, row, chunk, rows_first(lane()));
}
// The same from a tile of int8 that is stored (n, k), made wide here; `chunk` has all of its 16 k.
template <class T>
FEDMS_DEVICE void load_b_int8(uint32_t (&b)[4], uint32_t tile, int row, int chunk) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t place = tile + chunk_offset<4>(row + i / 2 * 8 + lane() / 4, chunk) + i % 2 * 8 + 2 * (lane() % 4);
    b[i] = widen_int8<T>(ptx::load_shared_u16(place));
  }
}

}  // namespace fedms::cuda
