// Products of matrices whose values are rounded to bfloat16, to nearest and ties to even, so that each keeps 8 significant bits
// whatever its size. The products of two such values are exact; sums are in float, and every sum is one chain of additions in the
// order of the values that are summed over, whatever the sizes.
//
// A CPU multiplies two values at a time, which lie side by side in one word, the first of them in the lower half.
#pragma once

#include <cstdint>

namespace fedms {

using Pair = uint32_t;

constexpr int64_t PAIRED_ROWS = 6;      // of a register tile: fewer rows at a time take as long
constexpr int64_t PAIRED_COLUMNS = 64;  // of a register tile

// All strides are from one row to the next. Where the number of paired values is odd, the last one is paired with 0.
struct PairKernels {
  // to[i][c] = x[i][2c] and x[i][2c + 1]
  void (*pair_columns)(int64_t rows, int64_t columns, const float* x, int64_t x_stride, Pair* to, int64_t to_stride);
  // to[c][i] = x[i][2c] and x[i][2c + 1]. Written: as many columns of `to` as there are rows, rounded up to 16.
  void (*pair_columns_transposed)(int64_t rows, int64_t columns, const float* x, int64_t x_stride, Pair* to, int64_t to_stride);
  // to[i][c] = x[2i][c] and x[2i + 1][c]
  void (*pair_rows)(int64_t rows, int64_t columns, const float* x, int64_t x_stride, Pair* to, int64_t to_stride);
  // y (rows, columns) = x (rows, pairs) w (pairs, columns), added to what y holds where `add` is true. x[i][p] is at
  // x[i * x_row + p * x_pair].
  void (*multiply)(int64_t rows, int64_t pairs, int64_t columns, const Pair* x, int64_t x_row, int64_t x_pair, const Pair* w,
                   int64_t w_stride, float* y, int64_t y_stride, bool add);
};

// Null where the CPU has no such instruction, or FEDMS_CPU_ISA chose another instruction set.
const PairKernels* pair_kernels();

#ifdef FEDMS_X86
extern const PairKernels pair_kernels_avx512bf16;
#endif

}  // namespace fedms
