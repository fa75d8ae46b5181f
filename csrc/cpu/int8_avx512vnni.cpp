// AVX-512 with VNNI: vpdpbusd multiplies unsigned bytes of x by signed bytes of the weight.
#include <immintrin.h>

#include "int8_kernels.h"

#define FEDMS_UNROLL _Pragma("GCC unroll 16")

namespace fedms {
namespace {

constexpr int ROWS = 6, VECTORS = 4;  // of a tile: 24 sums, 4 vectors of the weight and one of x fill 29 of 32 registers
constexpr int PANEL = 16 * VECTORS, GROUP = 4;

#include "int8_expand_ymm.inc"

inline __mmask16 first(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1); }

void quantise(int64_t rows, int64_t k, int32_t steps, const float* x, void* q, int64_t q_stride, float* q_scale,
              int32_t* q_zero) {
  uint8_t* to = static_cast<uint8_t*>(q);
  for (int64_t i = 0; i < rows; ++i, x += k, to += q_stride) {
    __m512i high0 = _mm512_setzero_si512(), high1 = high0, low0 = high0, low1 = high0;
    int64_t c = 0;
    for (; c + 32 <= k; c += 32) {
      const __m512i v0 = _mm512_loadu_si512(x + c), v1 = _mm512_loadu_si512(x + c + 16);
      high0 = _mm512_max_epi32(high0, v0);
      low0 = _mm512_max_epu32(low0, v0);
      high1 = _mm512_max_epi32(high1, v1);
      low1 = _mm512_max_epu32(low1, v1);
    }
    for (; c < k; c += 16) {
      const __m512i v = _mm512_maskz_loadu_epi32(first(k - c), x + c);
      high0 = _mm512_max_epi32(high0, v);
      low0 = _mm512_max_epu32(low0, v);
    }
    const Int8Levels levels(_mm512_reduce_max_epi32(_mm512_max_epi32(high0, high1)),
                            _mm512_reduce_max_epu32(_mm512_max_epu32(low0, low1)), steps);
    q_scale[i] = levels.scale;
    q_zero[i] = levels.zero;
    const __m512 inverse = _mm512_set1_ps(levels.inverse);
    const __m512i zero = _mm512_set1_epi32(levels.zero);
    const auto quantised = [&](__m512 v) {
      return _mm512_add_epi32(zero, _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse)));
    };
    // The stores cut off above 255.
    for (c = 0; c + 16 <= k; c += 16) {
      const __m128i bytes = _mm512_cvtusepi32_epi8(quantised(_mm512_loadu_ps(x + c)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c), bytes);
    }
    if (c < k) {
      const __mmask16 mask = first(k - c);
      _mm512_mask_cvtusepi32_storeu_epi8(to + c, mask, quantised(_mm512_maskz_loadu_ps(mask, x + c)));
    }
  }
}

// sum += x * w, four products a lane. As an instruction, not an intrinsic: GCC 12 moves the intrinsic's accumulators
// through the stack.
inline void dot(__m512i& sum, __m512i x, __m512i w) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w)); }

template <int M>
void tile(const Int8Strip& strip, int64_t row) {
  const uint8_t* q = static_cast<const uint8_t*>(strip.q) + row * strip.q_stride;
  const int8_t* w = strip.panel;
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
    FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) b[v] = _mm512_loadu_ps(from + 16 * v);
    FEDMS_UNROLL for (int i = 0; i < M; ++i) {
      const __m512 factor = _mm512_set1_ps(s[i * strip.rank + j]);
      FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) out[i][v] = _mm512_fmadd_ps(factor, b[v], out[i][v]);
    }
  }
  float* y = strip.y + row * strip.y_stride;
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

const Int8Kernels int8_avx512vnni = {"avx512vnni", 3, PANEL, GROUP, 1, 255, quantise, multiply, expand};

}  // namespace fedms
