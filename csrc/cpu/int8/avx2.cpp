// AVX2 without VNNI. Its product of bytes, vpmaddubsw, saturates at 16 bits, so the products are of 16-bit values: x is
// stored that wide, the weight is widened on the way into the registers.
#include <immintrin.h>

#include <algorithm>

#include "kernels.h"

namespace fedms {
namespace {

typedef int16_t Q;
constexpr bool SIGNED = true;
constexpr int GROUP = 2;
constexpr int ROWS = 3, VECTORS = 4;  // 12 sums; 6 x 2 takes a load more for as many, and more time

inline void store(Q* to, __m256i v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}

inline __m256i load_weight(const int8_t* w) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
}

inline __m256i load_weight(const int16_t* w) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)); }

inline void dot(__m256i& sum, __m256i x, __m256i w) { sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, w)); }

#include "x86.inc"

void multiply(const Int8Strip& strip) {
  // Widening takes the ports that the products need: many rows do it once, a block of the panel that fits into the L1
  // cache at a time.
  constexpr int64_t ENOUGH_ROWS = 4 * ROWS, BLOCK = 384;
  constexpr int DIRECT_ROWS = 2;  // a widened vector needs a register, a loaded one can be read where it lies
  if (strip.rows < ENOUGH_ROWS) return multiply_rows<DIRECT_ROWS>(strip, 0, strip.panel, 0, strip.k);
  alignas(64) int16_t wide[BLOCK * PANEL];
  for (int64_t first = 0; first < strip.k; first += BLOCK) {
    const int64_t last = std::min(first + BLOCK, strip.k);
    const int8_t* from = strip.panel + first * PANEL;
    for (int64_t i = 0; i < (last - first) * PANEL; i += 16) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(wide + i), load_weight(from + i));
    }
    multiply_rows<ROWS>(strip, 0, wide, first, last);
  }
}

}  // namespace

const Int8Kernels int8_avx2 = {"avx2", 1, PANEL, GROUP, sizeof(Q), 4095, quantize, multiply, rotate, expand, decode, fold};

}  // namespace fedms
