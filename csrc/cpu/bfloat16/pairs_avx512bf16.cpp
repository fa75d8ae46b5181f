// AVX-512 with BF16: two products of bfloat16 a lane, at twice the rate of float. No templates of the standard library: what is
// compiled here must not be shared with files for other CPUs.
#include <immintrin.h>

#include "pairs.h"

#define FEDMS_UNROLL _Pragma("GCC unroll 16")

namespace fedms {
namespace {

constexpr int ROWS = PAIRED_ROWS, VECTORS = PAIRED_COLUMNS / 16;  // of a register tile

// The first `count` of 16 lanes; none where count is below 1.
inline __mmask16 lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0);
}

// 32 values of x as 16 pairs: of the first 16 values those that `low` selects, of the others those that `high` selects. The rest
// are 0 and are not read.
inline __m512i pairs_of(const float* x, __mmask16 low = 0xffff, __mmask16 high = 0xffff) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high, x + 16), _mm512_maskz_loadu_ps(low, x)));
}

void pair_columns(int64_t rows, int64_t columns, const float* x, int64_t x_stride, Pair* to, int64_t to_stride) {
  const int64_t whole = columns / 32 * 32, rest = columns - whole;
  const __mmask16 low = lanes(rest), high = lanes(rest - 16), stored = lanes((rest + 1) / 2);
  for (int64_t i = 0; i < rows; ++i, x += x_stride, to += to_stride) {
    for (int64_t c = 0; c < whole; c += 32) _mm512_storeu_si512(to + c / 2, pairs_of(x + c));
    if (rest) _mm512_mask_storeu_epi32(to + whole / 2, stored, pairs_of(x + whole, low, high));
  }
}

// The transpose of 16 rows of 16 words.
inline void transpose(__m512i (&row)[16]) {
  __m512i two[16], four[16], eight[16];
  FEDMS_UNROLL for (int i = 0; i < 16; i += 2) {
    two[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    two[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  FEDMS_UNROLL for (int i = 0; i < 16; i += 4) {
    FEDMS_UNROLL for (int j = 0; j < 2; ++j) {
      four[i + 2 * j] = _mm512_unpacklo_epi64(two[i + j], two[i + j + 2]);
      four[i + 2 * j + 1] = _mm512_unpackhi_epi64(two[i + j], two[i + j + 2]);
    }
  }
  FEDMS_UNROLL for (int i = 0; i < 16; i += 8) {
    FEDMS_UNROLL for (int j = 0; j < 4; ++j) {
      eight[i + j] = _mm512_shuffle_i32x4(four[i + j], four[i + j + 4], 0x88);
      eight[i + j + 4] = _mm512_shuffle_i32x4(four[i + j], four[i + j + 4], 0xdd);
    }
  }
  FEDMS_UNROLL for (int j = 0; j < 8; ++j) {
    row[j] = _mm512_shuffle_i32x4(eight[j], eight[j + 8], 0x88);
    row[j + 8] = _mm512_shuffle_i32x4(eight[j], eight[j + 8], 0xdd);
  }
}

void pair_columns_transposed(int64_t rows, int64_t columns, const float* x, int64_t x_stride, Pair* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; i += 16) {
    for (int64_t c = 0; c < columns; c += 32) {
      const __mmask16 low = lanes(columns - c), high = lanes(columns - c - 16);
      const int64_t last = rows - 1;  // is read again in place of the rows behind it, which are not there
      __m512i row[16];
      FEDMS_UNROLL for (int j = 0; j < 16; ++j) {
        row[j] = pairs_of(x + (i + j < last ? i + j : last) * x_stride + c, low, high);
      }
      transpose(row);
      FEDMS_UNROLL for (int j = 0; j < 16; ++j)
        if (c + 2 * j < columns) _mm512_storeu_si512(to + (c / 2 + j) * to_stride + i, row[j]);
    }
  }
}

// 16 pairs, each of a value of one row and the value of the next row in the same column.
inline __m512i pairs_of(__m512 first, __m512 second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                         19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
}

void pair_rows(int64_t rows, int64_t columns, const float* x, int64_t x_stride, Pair* to, int64_t to_stride) {
  const int64_t whole = columns / 16 * 16;
  const __mmask16 rest = lanes(columns - whole);
  for (int64_t i = 0; i < rows; i += 2, x += 2 * x_stride, to += to_stride) {
    const bool paired = i + 1 < rows;
    const float* const next = paired ? x + x_stride : x;
    const __mmask16 all = paired ? 0xffff : 0;
    for (int64_t c = 0; c < whole; c += 16)
      _mm512_storeu_si512(to + c, pairs_of(_mm512_loadu_ps(x + c), _mm512_maskz_loadu_ps(all, next + c)));
    if (rest) {
      const __m512i pairs = pairs_of(_mm512_maskz_loadu_ps(rest, x + whole), _mm512_maskz_loadu_ps(rest & all, next + whole));
      _mm512_mask_storeu_epi32(to + whole, rest, pairs);
    }
  }
}

// sum += both products of each lane. As an instruction, see avx512vnni.cpp.
inline void dot(__m512& sum, __m512i x, __m512i w) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w)); }

// M rows and N vectors of y, of whose last vector `mask` has the columns. Not inlined: GCC 12 would keep the sums in memory.
template <int M, int N>
__attribute__((noinline)) void tile(int64_t pairs, const Pair* x, int64_t x_row, int64_t x_pair, const Pair* w, int64_t w_stride,
                                    __mmask16 mask, float* y, int64_t y_stride, bool add) {
  const auto mask_of = [=](int v) { return v + 1 < N ? static_cast<__mmask16>(0xffff) : mask; };
  __m512 sum[M][N];
  FEDMS_UNROLL for (int i = 0; i < M; ++i)
    FEDMS_UNROLL for (int v = 0; v < N; ++v)
      sum[i][v] = add ? _mm512_maskz_loadu_ps(mask_of(v), y + i * y_stride + 16 * v) : _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p, x += x_pair, w += w_stride) {
    __m512i of_w[N];
    FEDMS_UNROLL for (int v = 0; v < N; ++v) of_w[v] = _mm512_maskz_loadu_epi32(mask_of(v), w + 16 * v);
    FEDMS_UNROLL for (int i = 0; i < M; ++i) {
      const __m512i of_x = _mm512_set1_epi32(static_cast<int32_t>(x[i * x_row]));
      FEDMS_UNROLL for (int v = 0; v < N; ++v) dot(sum[i][v], of_x, of_w[v]);
    }
  }
  FEDMS_UNROLL for (int i = 0; i < M; ++i)
    FEDMS_UNROLL for (int v = 0; v < N; ++v) _mm512_mask_storeu_ps(y + i * y_stride + 16 * v, mask_of(v), sum[i][v]);
}

using Tile = void (*)(int64_t, const Pair*, int64_t, int64_t, const Pair*, int64_t, __mmask16, float*, int64_t, bool);
#define FEDMS_TILES(M) {tile<M, 1>, tile<M, 2>, tile<M, 3>, tile<M, 4>}
constexpr Tile TILES[ROWS][VECTORS] = {FEDMS_TILES(1), FEDMS_TILES(2), FEDMS_TILES(3),
                                       FEDMS_TILES(4), FEDMS_TILES(5), FEDMS_TILES(6)};

void multiply(int64_t rows, int64_t pairs, int64_t columns, const Pair* x, int64_t x_row, int64_t x_pair, const Pair* w,
              int64_t w_stride, float* y, int64_t y_stride, bool add) {
  for (int64_t c = 0; c < columns; c += PAIRED_COLUMNS) {
    const int64_t vectors = columns - c < PAIRED_COLUMNS ? (columns - c + 15) / 16 : VECTORS;
    const __mmask16 mask = lanes(columns - c - 16 * (vectors - 1));
    for (int64_t i = 0; i < rows; i += ROWS) {
      const int64_t some = rows - i < ROWS ? rows - i : ROWS;
      TILES[some - 1][vectors - 1](pairs, x + i * x_row, x_row, x_pair, w + c, w_stride, mask, y + i * y_stride + c, y_stride,
                                   add);
    }
  }
}

}  // namespace

const PairKernels pair_kernels_avx512bf16 = {pair_columns, pair_columns_transposed, pair_rows, multiply};

}  // namespace fedms
