// AVX-512 with BF16: two products of bfloat16 a lane, at twice the rate of float. No templates of the standard library: what is
// compiled here must not be shared with files for other CPUs.
#include <immintrin.h>

#include "rounded_products.h"

#define FEDMS_UNROLL _Pragma("GCC unroll 16")

namespace fedms {
namespace {

constexpr int ROWS = 6, VECTORS = 4;   // of a register tile
constexpr int64_t COLUMNS = 16 * VECTORS;
constexpr int64_t PAIRS = ROUNDED_PAIRS;  // of tokens, whose values lie side by side
constexpr int64_t TOKENS = 2 * PAIRS;     // at a time: their part of the weight, 12 KiB, stays in the L1 cache

// The first `count` of 16 lanes; none where count is below 1.
inline __mmask16 lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0);
}

// Rows of e as pairs, zeros behind the last token; `to` has PAIRS pairs a row.
void pair_rows(int64_t rows, int64_t tokens, const float* e, int64_t stride, uint32_t* to) {
  for (int64_t i = 0; i < rows; ++i, e += stride, to += PAIRS) {
    for (int64_t t = 0; t < TOKENS; t += 32) {
      const __m512 low = _mm512_maskz_loadu_ps(lanes(tokens - t), e + t);
      const __m512 high = _mm512_maskz_loadu_ps(lanes(tokens - t - 16), e + t + 16);
      _mm512_storeu_si512(to + t / 2, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
  }
}

// One panel of the weight as pairs, [PAIRS][COLUMNS], zeros where there is no token or column.
void pair_panel(int64_t tokens, const __mmask16* mask, const float* weight, int64_t stride, uint32_t* to) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                         19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t t = 0; t < tokens; t += 2, weight += 2 * stride, to += COLUMNS) {
    FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) {
      const __m512 first = _mm512_maskz_loadu_ps(mask[v], weight + 16 * v);
      const __m512 second = _mm512_maskz_loadu_ps(t + 1 < tokens ? mask[v] : 0, weight + stride + 16 * v);
      const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
      _mm512_storeu_si512(to + 16 * v, _mm512_permutexvar_epi16(order, both));
    }
  }
}

// sum += both products of each lane. As an instruction, see avx512vnni.cpp.
inline void dot(__m512& sum, __m512i x, __m512i w) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w)); }

// Not inlined: GCC 12 would keep the sums in memory.
template <int M>
__attribute__((noinline)) void tile(int64_t pairs, const __mmask16* mask, const uint32_t* e, const uint32_t* panel, float* y, int64_t y_stride) {
  __m512 sum[M][VECTORS];
  FEDMS_UNROLL for (int i = 0; i < M; ++i)
    FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) sum[i][v] = _mm512_maskz_loadu_ps(mask[v], y + i * y_stride + 16 * v);
  for (int64_t p = 0; p < pairs; ++p, panel += COLUMNS) {
    __m512i w[VECTORS];
    FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) w[v] = _mm512_loadu_si512(panel + 16 * v);
    FEDMS_UNROLL for (int i = 0; i < M; ++i) {
      const __m512i x = _mm512_set1_epi32(static_cast<int32_t>(e[i * PAIRS + p]));
      FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) dot(sum[i][v], x, w[v]);
    }
  }
  FEDMS_UNROLL for (int i = 0; i < M; ++i)
    FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) _mm512_mask_storeu_ps(y + i * y_stride + 16 * v, mask[v], sum[i][v]);
}

// Meanwhile the next panel's part of the weight is fetched, `tokens` rows from `next` on: the hardware does not foresee the step from
// one short row to the next. The loss with its gradient was expected to gain the 15 ms that 113 MB take from memory, and gained 26
// of 270 (508 positions, 49,152 tokens, Zen 4). To read the weight as it lies, 96 rows at a time, gained nothing.
void multiply(int64_t rows, int64_t tokens, const __mmask16* mask, const uint32_t* e, const uint32_t* panel, float* y,
              int64_t y_stride, const float* next, int64_t stride) {
  const int64_t pairs = (tokens + 1) / 2, each = (tokens * ROWS + rows - 1) / rows;
  int64_t i = 0, fetched = 0;
  for (; i + ROWS <= rows; i += ROWS) {
    for (const int64_t end = fetched + each < tokens ? fetched + each : tokens; fetched < end; ++fetched)
      FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) __builtin_prefetch(next + fetched * stride + 16 * v);
    tile<ROWS>(pairs, mask, e + i * PAIRS, panel, y + i * y_stride, y_stride);
  }
  for (; i < rows; ++i) tile<1>(pairs, mask, e + i * PAIRS, panel, y + i * y_stride, y_stride);
}

}  // namespace

void rounded_products_avx512bf16(int64_t rows, int64_t tokens, int64_t columns, const float* e, int64_t e_stride,
                                 const float* weight, int64_t weight_stride, float* y, int64_t y_stride, uint32_t* work) {
  alignas(64) uint32_t panel[PAIRS * COLUMNS];
  for (int64_t first = 0; first < tokens; first += TOKENS) {
    const int64_t some = tokens - first < TOKENS ? tokens - first : TOKENS;
    pair_rows(rows, some, e + first, e_stride, work);
    for (int64_t c = 0; c < columns; c += COLUMNS) {
      __mmask16 mask[VECTORS];
      for (int v = 0; v < VECTORS; ++v) mask[v] = lanes(columns - c - 16 * v);
      const bool last = c + COLUMNS >= columns;
      const float* const from = weight + first * weight_stride + c;
      // Behind the last token it is memory that is fetched in vain, which an instruction that only fetches may be given.
      const float* const next = last ? from - c + TOKENS * weight_stride : from + COLUMNS;
      pair_panel(some, mask, from, weight_stride, panel);
      multiply(rows, some, mask, work, panel, y + c, y_stride, next, weight_stride);
    }
  }
}

}  // namespace fedms
