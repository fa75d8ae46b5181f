// Where a value lies: tiles in shared memory, fragments in registers, blocks in the output. Nothing but arithmetic, so
// that tests/kernels/cuda can go through all of it on a CPU.
#pragma once

#include "device.h"

namespace fedms::cuda {

FEDMS_HD int ceil_div(int64_t a, int b) { return int((a + b - 1) / b); }
FEDMS_HD int clamp(int value, int low, int high) { return value < low ? low : value > high ? high : value; }

// A tile in shared memory has rows of CHUNKS chunks, each 16 bytes or eight numbers. Chunks change places within 128
// bytes, so that eight rows of one column of chunks lie in different banks: they are what ldmatrix reads at a time,
// and what a warp writes at a time in the epilogue. Rows of 128 bytes come out as the tensor memory accelerator's
// 128-byte swizzle has them, if the tile starts at a multiple of 1024 bytes.
template <int CHUNKS>
FEDMS_HD int chunk_offset(int row, int chunk) {
  static_assert(CHUNKS == 4 || CHUNKS % 8 == 0);
  const int key = CHUNKS == 4 ? row >> 1 & 3 : row & 7;
  return (row * CHUNKS + (chunk ^ key)) * 16;
}

// The operands of mma.m16n8k16 through ldmatrix.x4, of 16 x 16 numbers at a time: which row and which of the two chunks
// of it a lane points at.
struct Place {
  int row, chunk;
};
// A stored as (m, k), and B stored as (k, n) and read with .trans
FEDMS_HD Place rows_first(int lane) { return {lane & 15, lane >> 4}; }
// B stored as (n, k), and A stored as (k, m) and read with .trans
FEDMS_HD Place chunks_first(int lane) { return {(lane & 7) + (lane >> 4) * 8, lane >> 3 & 1}; }

// The accumulator of mma.m16n8k16, and of each eight columns of wgmma.m64nNk16 in one warp: value i of a lane.
FEDMS_HD int accumulator_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
FEDMS_HD int accumulator_column(int lane, int i) { return 2 * (lane % 4) + i % 2; }

// Output tiles in the order of the grid: those that run at the same time lie in a band of `band` row blocks, walked
// column by column, so that they share their rows of x and columns of W in the L2 cache.
struct Tile2 {
  int row, column;
};
FEDMS_HD Tile2 place_tile(int tile, int row_blocks, int column_blocks, int band) {
  const int of_band = band * column_blocks, first = tile / of_band * band, inside = tile % of_band;
  const int left = row_blocks - first, height = left < band ? left : band;
  return {first + inside % height, inside / height};
}

// The descriptor of a tile in shared memory with the 128-byte swizzle, for wgmma; offsets in units of 16 bytes.
// `leading`: from one block of 64 columns to the next where the columns are along memory; it is not looked at where
// the reduction is, since the 16 numbers of a step lie within 128 bytes. Eight rows are 1024 bytes.
FEDMS_HD uint64_t matrix_descriptor(uint32_t address, int leading) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}

// The same of a tile with rows of 64 bytes and the 64-byte swizzle, whose columns, 32 of them, are along memory. Eight rows are
// 512 bytes. chunk_offset<4> says where its chunks lie.
FEDMS_HD uint64_t short_rows_descriptor(uint32_t address) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(512 >> 4) << 32 | uint64_t(2) << 62;
}

}  // namespace fedms::cuda
