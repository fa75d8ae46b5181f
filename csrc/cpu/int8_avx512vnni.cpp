// AVX-512 with VNNI: vpdpbusd multiplies unsigned by signed bytes, so x is stored with an offset of 128.
#include <immintrin.h>

#include <cstring>

#include "fedms/int8.h"
#include "int8_kernels.h"

#define FEDMS_UNROLL _Pragma("GCC unroll 16")

namespace fedms {
namespace {

constexpr int ROWS = 6, VECTORS = 4;  // of a tile: 24 sums, 4 vectors of the weight and one of x fill 29 of 32 registers
constexpr int PANEL = 16 * VECTORS;

inline __m512i bits(__m512 v) { return _mm512_castps_si512(v); }

// max |x|; NaN if there is one. Without their signs, floats are ordered as the integers of their bits, NaN above all.
inline float largest(const float* x, int64_t k) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i m0 = _mm512_setzero_si512(), m1 = m0;
  int64_t c = 0;
  for (; c + 32 <= k; c += 32) {
    m0 = _mm512_max_epi32(m0, _mm512_and_si512(magnitude, _mm512_loadu_si512(x + c)));
    m1 = _mm512_max_epi32(m1, _mm512_and_si512(magnitude, _mm512_loadu_si512(x + c + 16)));
  }
  for (; c < k; c += 16) {
    const __mmask16 mask = static_cast<__mmask16>(k - c >= 16 ? 0xffff : (1u << (k - c)) - 1);
    m0 = _mm512_max_epi32(m0, _mm512_and_si512(magnitude, _mm512_maskz_loadu_epi32(mask, x + c)));
  }
  const int32_t most = _mm512_reduce_max_epi32(_mm512_max_epi32(m0, m1));
  float value;
  std::memcpy(&value, &most, sizeof value);
  return value;
}

void quantise(int64_t rows, int64_t k, const float* x, void* q, int64_t q_stride, float* q_scale) {
  const __m512i low = _mm512_set1_epi32(-127), offset = _mm512_set1_epi32(128);
  uint8_t* to = static_cast<uint8_t*>(q);
  for (int64_t i = 0; i < rows; ++i, x += k, to += q_stride) {
    const float most = largest(x, k);
    q_scale[i] = most < INT8_TINY ? 0.0f : most < __builtin_inff() ? most / 127.0f : __builtin_nanf("");
    const __m512 inverse = _mm512_set1_ps(most < INT8_TINY ? 0.0f : 127.0f / most);
    for (int64_t c = 0; c < k; c += 16) {
      const __mmask16 mask = static_cast<__mmask16>(k - c >= 16 ? 0xffff : (1u << (k - c)) - 1);
      const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + c), inverse));
      const __m512i shifted = _mm512_add_epi32(_mm512_max_epi32(rounded, low), offset);
      _mm512_mask_cvtusepi32_storeu_epi8(to + c, mask, shifted);
    }
  }
}

// sum += x * w, four products a lane. As an instruction, not an intrinsic: GCC 12 moves the intrinsic's accumulators
// through the stack.
inline void dot(__m512i& sum, __m512i x, __m512i w) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w)); }

template <int M>
void tile(const Int8Strip& strip, int64_t row) {
  const uint8_t* q = static_cast<const uint8_t*>(strip.q) + row * strip.k;
  const int8_t* w = strip.panel;
  __m512i sum[M][VECTORS];
  FEDMS_UNROLL for (int i = 0; i < M; ++i)
    FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) sum[i][v] = _mm512_loadu_si512(strip.start + 16 * v);
  for (int64_t c = 0; c < strip.k; c += 4, w += 4 * PANEL) {
    __m512i b[VECTORS];
    FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) b[v] = _mm512_loadu_si512(w + 64 * v);
    FEDMS_UNROLL for (int i = 0; i < M; ++i) {
      int32_t four;
      std::memcpy(&four, q + i * strip.k + c, sizeof four);
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

const Int8Kernels int8_avx512vnni = {"avx512vnni", 3, PANEL, 4, 1, 128, quantise, multiply};

}  // namespace fedms
