// AVX-512 with VNNI: vpdpbusd multiplies unsigned bytes of x by signed bytes of the weight.
#include <immintrin.h>

#include <cstring>

#include "fedms/half.h"
#include "kernels.h"

namespace fedms {
namespace {

#include "../lora/avx512.inc"
#include "../lora/dots.inc"

constexpr int ROWS = 6, VECTORS = 4;  // of a tile: 24 sums, 4 vectors of the weight and one of x fill 29 of 32 registers
constexpr int PANEL = 16 * VECTORS, GROUP = 4;

// `expand` of int8_kernels.h, 64 codes at a time: twice as many as with 256 bits, and a group's factors are spread over their
// values by a permutation each (at 768 -> 768 and one row the layer was expected to lose 20 of its 40 us of expansion).
void expand(int64_t count, const uint8_t* nibbles, const int16_t* levels, const int16_t* factors, int8_t* to) {
  constexpr int BLOCKS = PANEL * GROUP / 64;  // after so many blocks of 64 values the columns come again
  // Unpacking bytes makes words of the first and the last half of every 128 bits; packing undoes it. So the factors of
  // values 16 l .. 16 l + 7 and of the eight behind them belong to the halves of lane l.
  alignas(64) static constexpr int16_t COLUMN_OF[2][32] = {
      {0, 0, 0, 0, 1, 1, 1, 1, 4, 4, 4, 4, 5, 5, 5, 5, 8, 8, 8, 8, 9, 9, 9, 9, 12, 12, 12, 12, 13, 13, 13, 13},
      {2, 2, 2, 2, 3, 3, 3, 3, 6, 6, 6, 6, 7, 7, 7, 7, 10, 10, 10, 10, 11, 11, 11, 11, 14, 14, 14, 14, 15, 15, 15, 15}};
  __m512i factor[BLOCKS][2];
  for (int b = 0; b < BLOCKS; ++b) {
    const __m512i columns =
        _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(factors + 64 / GROUP * b)));
    for (int half = 0; half < 2; ++half) {
      factor[b][half] = _mm512_permutexvar_epi16(_mm512_load_si512(COLUMN_OF[half]), columns);
    }
  }
  alignas(16) uint8_t bytes[2][16];
  for (int i = 0; i < 16; ++i) {
    bytes[0][i] = static_cast<uint8_t>(levels[i]);
    bytes[1][i] = static_cast<uint8_t>(levels[i] >> 8);
  }
  const __m512i low = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[0])));
  const __m512i high = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[1])));
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int64_t i = 0; i < count; i += 64 * BLOCKS) {
    FEDMS_UNROLL for (int b = 0; b < BLOCKS; ++b, nibbles += 32, to += 64) {
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(nibbles));
      const __m512i pairs = _mm512_inserti64x4(_mm512_castsi256_si512(both), _mm256_srli_epi16(both, 4), 1);
      const __m512i codes = _mm512_and_si512(pairs, nibble);
      const __m512i l = _mm512_shuffle_epi8(low, codes), h = _mm512_shuffle_epi8(high, codes);
      const __m512i first = _mm512_mulhrs_epi16(_mm512_unpacklo_epi8(l, h), factor[b][0]);
      const __m512i last = _mm512_mulhrs_epi16(_mm512_unpackhi_epi8(l, h), factor[b][1]);
      _mm512_storeu_si512(to, _mm512_packs_epi16(first, last));
    }
  }
}

constexpr int LANES = WIDTH, FOLDED_ROWS = 8;

struct Table {
  __m512 levels;
  explicit Table(const float* from) : levels(_mm512_loadu_ps(from)) {}
};

template <int SHIFT>
inline Vec levels_of(const uint8_t* bytes, const Table& table) {
  __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  if constexpr (SHIFT > 0) codes = _mm512_srli_epi32(codes, SHIFT);
  return _mm512_permutexvar_ps(codes, table.levels);  // looks at the low four bits alone
}

#include "levels.inc"
#include "rotate.inc"

inline __mmask16 lanes(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1); }

// The levels of COUNT rows. Several rows in one loop hide one another's latencies.
template <int COUNT>
void find_levels(int64_t k, int32_t steps, const float* x, Int8Levels* levels) {
  __m512i high[COUNT], low[COUNT];
  FEDMS_UNROLL for (int i = 0; i < COUNT; ++i) high[i] = low[i] = _mm512_setzero_si512();
  int64_t c = 0;
  for (; c + 16 <= k; c += 16) {
    FEDMS_UNROLL for (int i = 0; i < COUNT; ++i) {
      const __m512i v = _mm512_loadu_si512(x + i * k + c);
      high[i] = _mm512_max_epi32(high[i], v);
      low[i] = _mm512_max_epu32(low[i], v);
    }
  }
  if (c < k) {
    FEDMS_UNROLL for (int i = 0; i < COUNT; ++i) {
      const __m512i v = _mm512_maskz_loadu_epi32(lanes(k - c), x + i * k + c);
      high[i] = _mm512_max_epi32(high[i], v);
      low[i] = _mm512_max_epu32(low[i], v);
    }
  }
  FEDMS_UNROLL for (int i = 0; i < COUNT; ++i) {
    levels[i] = Int8Levels(_mm512_reduce_max_epi32(high[i]), _mm512_reduce_max_epu32(low[i]), steps);
  }
}

// Prefetches the row that is quantized PREPARED_ROWS rows later: x usually comes from the L3 cache, and a block of rows is
// too short for the hardware prefetcher. At 2048 rows, 384 -> 384 (Zen 4, one thread), the layer's forward pass was
// expected to gain the 230 us that reading x took, and went from 2230 us to 2040 us.
void quantize_row(int64_t k, const Int8Levels& levels, const float* x, uint8_t* to) {
  const __m512 inverse = _mm512_set1_ps(levels.inverse);
  const __m512i zero = _mm512_set1_epi32(levels.zero);
  const auto quantized = [&](__m512 v) {
    return _mm512_add_epi32(zero, _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse)));
  };
  // Packing saturates at 255. It works within lanes of 128 bits, so the groups of four bytes are put in order afterwards.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  int64_t c = 0;
  for (; c + 64 <= k; c += 64) {
    FEDMS_UNROLL for (int line = 0; line < 4; ++line) _mm_prefetch(x + PREPARED_ROWS * k + c + 16 * line, _MM_HINT_T1);
    const __m512i words0 = _mm512_packus_epi32(quantized(_mm512_loadu_ps(x + c)), quantized(_mm512_loadu_ps(x + c + 16)));
    const __m512i words1 =
        _mm512_packus_epi32(quantized(_mm512_loadu_ps(x + c + 32)), quantized(_mm512_loadu_ps(x + c + 48)));
    _mm512_storeu_si512(to + c, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(words0, words1)));
  }
  for (; c < k; c += 16) {
    const __mmask16 mask = lanes(k - c);
    _mm512_mask_cvtusepi32_storeu_epi8(to + c, mask, quantized(_mm512_maskz_loadu_ps(mask, x + c)));
  }
}

template <int COUNT>
void quantize_rows(int64_t k, int32_t steps, const float* x, uint8_t* to, int64_t q_stride, float* q_scale,
                   int32_t* q_zero) {
  Int8Levels levels[COUNT];
  find_levels<COUNT>(k, steps, x, levels);
  for (int i = 0; i < COUNT; ++i) {
    q_scale[i] = levels[i].scale;
    q_zero[i] = levels[i].zero;
    quantize_row(k, levels[i], x + i * k, to + i * q_stride);
  }
}

void quantize(int64_t rows, int64_t k, int32_t steps, const float* x, void* q, int64_t q_stride, float* q_scale,
              int32_t* q_zero) {
  uint8_t* const to = static_cast<uint8_t*>(q);
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    quantize_rows<4>(k, steps, x + i * k, to + i * q_stride, q_stride, q_scale + i, q_zero + i);
  }
  for (; i < rows; ++i) quantize_rows<1>(k, steps, x + i * k, to + i * q_stride, q_stride, q_scale + i, q_zero + i);
}

// Rows of x are quantized as soon as their S is made, while the products of the next rows are under way: finding their extremes
// costs no load, and what waits for a row's scale is hidden. At 2048 rows, 384 -> 384, rank 8 (Zen 4, one thread) the layer's
// forward pass was expected to gain the 45 us of `find_levels`; of 1850 us it gained 30. If all rows of `prepare` come first and
// their quantization afterwards it gains nothing, because x has left the L1 cache by then. Two rows at a time: the sums and the
// extremes of three are more than the registers hold.
template <int M, int R>
void quantize_along_rows(int64_t k, int32_t steps, const float* x, uint8_t* to, int64_t q_stride, float* q_scale,
                         int32_t* q_zero, const float* const* shrink, float* s, int64_t s_stride) {
  __m512i high[M], low[M];
  FEDMS_UNROLL for (int i = 0; i < M; ++i) high[i] = low[i] = _mm512_setzero_si512();
  dots_tile<M, R>(k, x, k, shrink, s, s_stride, [&](int i, Vec part) {
    high[i] = _mm512_max_epi32(high[i], _mm512_castps_si512(part));
    low[i] = _mm512_max_epu32(low[i], _mm512_castps_si512(part));
  });
  FEDMS_UNROLL for (int i = 0; i < M; ++i) {
    const Int8Levels levels(_mm512_reduce_max_epi32(high[i]), _mm512_reduce_max_epu32(low[i]), steps);
    q_scale[i] = levels.scale;
    q_zero[i] = levels.zero;
    quantize_row(k, levels, x + i * k, to + i * q_stride);
  }
}

template <int R>
void quantize_along_ranks(int64_t rows, int64_t k, int32_t steps, const float* x, uint8_t* to, int64_t q_stride, float* q_scale,
                          int32_t* q_zero, const float* const* shrink, float* s, int64_t s_stride) {
  int64_t i = 0;
  for (; i + 2 <= rows; i += 2) {
    quantize_along_rows<2, R>(k, steps, x + i * k, to + i * q_stride, q_stride, q_scale + i, q_zero + i, shrink,
                              s + i * s_stride, s_stride);
  }
  if (i < rows) {
    quantize_along_rows<1, R>(k, steps, x + i * k, to + i * q_stride, q_stride, q_scale + i, q_zero + i, shrink,
                              s + i * s_stride, s_stride);
  }
}

void quantize_along(int64_t rows, int64_t k, int32_t steps, const float* x, void* q, int64_t q_stride, float* q_scale,
                    int32_t* q_zero, int64_t rank, const float* const* shrink, float* s, int64_t s_stride) {
  uint8_t* const to = static_cast<uint8_t*>(q);
  FEDMS_DISPATCH(rank, ALONG, quantize_along_ranks, rows, k, steps, x, to, q_stride, q_scale, q_zero, shrink, s, s_stride)
}

// sum += x * w, four products a lane. As an instruction, not an intrinsic: GCC 12 moves the intrinsic's accumulators
// through the stack.
inline void dot(__m512i& sum, __m512i x, __m512i w) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w)); }

template <int M>
void tile(const Int8Strip& strip, int64_t row) {
  const uint8_t* q = static_cast<const uint8_t*>(strip.q) + row * strip.q_stride;
  const int8_t* w = strip.panel;
  // Prefetches the tile's lines of y: otherwise its stores miss the caches one after the other (2040 us, now 1920 us).
  float* y = strip.y + row * strip.y_stride;
  FEDMS_UNROLL for (int i = 0; i < M; ++i)
    FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) __builtin_prefetch(y + i * strip.y_stride + 16 * v, 1);
  __m512i sum[M][VECTORS];
  FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) {
    const __m512i minus_sums = _mm512_loadu_si512(strip.minus_sums + 16 * v);
    FEDMS_UNROLL for (int i = 0; i < M; ++i) {
      sum[i][v] = _mm512_mullo_epi32(minus_sums, _mm512_set1_epi32(strip.q_zero[row + i]));
    }
  }
  for (int64_t c = 0; c < strip.k; c += 4, w += 4 * PANEL) {
    __m512i b[VECTORS];
    FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) b[v] = _mm512_loadu_si512(w + 64 * v);
    FEDMS_UNROLL for (int i = 0; i < M; ++i) {
      int32_t four;
      std::memcpy(&four, q + i * strip.q_stride + c, sizeof four);
      const __m512i a = _mm512_set1_epi32(four);
      FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) dot(sum[i][v], a, b[v]);
    }
  }

  __m512 out[M][VECTORS];
  FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) {
    const __m512 scale = _mm512_loadu_ps(strip.scale + 16 * v);
    const __m512 bias = strip.bias ? _mm512_loadu_ps(strip.bias + 16 * v) : _mm512_setzero_ps();
    FEDMS_UNROLL for (int i = 0; i < M; ++i) {
      const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(strip.q_scale[row + i]));
      out[i][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i][v]), both, bias);
    }
  }
  const float* s = strip.s + row * strip.rank;
  for (int64_t j = 0; j < strip.rank; ++j) {
    const float* from = strip.expand[j] + strip.expand_column;
    __m512 b[VECTORS];
    FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) b[v] = held(load(from + 16 * v));
    FEDMS_UNROLL for (int i = 0; i < M; ++i) {
      const __m512 factor = _mm512_set1_ps(s[i * strip.rank + j]);
      FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) out[i][v] = _mm512_fmadd_ps(factor, b[v], out[i][v]);
    }
  }
  FEDMS_UNROLL for (int i = 0; i < M; ++i)
    FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(y + i * strip.y_stride + 16 * v, out[i][v]);
}

void multiply(const Int8Strip& strip) {
  int64_t row = 0;
  for (; row + ROWS <= strip.rows; row += ROWS) tile<ROWS>(strip, row);
  switch (strip.rows - row) {
    case 1: return tile<1>(strip, row);
    case 2: return tile<2>(strip, row);
    case 3: return tile<3>(strip, row);
    case 4: return tile<4>(strip, row);
    case 5: return tile<5>(strip, row);
  }
}

}  // namespace

const Int8Kernels int8_avx512vnni = {
    "avx512vnni", 3, PANEL, GROUP, 1, 255, quantize, multiply, rotate, expand, decode, fold, quantize_along};

}  // namespace fedms
