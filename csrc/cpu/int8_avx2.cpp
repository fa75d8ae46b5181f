// AVX2 without VNNI. Its product of bytes, vpmaddubsw, saturates at 16 bits, so the products are of 16-bit values: x is
// stored that wide, the weight is widened on the way into the registers.
#include <immintrin.h>

#include <algorithm>

#include "int8_kernels.h"

namespace fedms {
namespace {

typedef int16_t Q;
constexpr bool SIGNED = true;
constexpr int GROUP = 2;
constexpr int ROWS = 6, VECTORS = 2;  // 12 sums, 2 vectors of the weight, one of x, one of products

inline void store(Q* to, __m256i v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}

inline __m256i load_weight(const int8_t* w) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
}

inline void dot(__m256i& sum, __m256i x, __m256i w) { sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, w)); }

#include "int8_ymm.inc"

}  // namespace

const Int8Kernels int8_avx2 = {"avx2", 1, PANEL, GROUP, sizeof(Q), quantise, multiply, expand};

}  // namespace fedms
