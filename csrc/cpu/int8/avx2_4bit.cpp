// AVX2 for weights from -63 to 63, which those made of 4 bits are: then two products of bytes, of which vpmaddubsw makes
// one 16-bit value, are at most 2 * 255 * 63 = 32130 and do not saturate. With weights of 8 bits half of the groups of
// MiniLM's layers would hold a pair that can.
#include <immintrin.h>

#include <algorithm>

#include "kernels.h"

namespace fedms {
namespace {

typedef uint8_t Q;
constexpr bool SIGNED = false;
constexpr int GROUP = 4;
constexpr int ROWS = 4, VECTORS = 2;  // with 6 rows and the vector of ones the products do not fit into 16 registers

inline void store(Q* to, __m256i v) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
}

inline __m256i load_weight(const int8_t* w) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)); }

inline void dot(__m256i& sum, __m256i x, __m256i w) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
}

#include "x86.inc"

void multiply(const Int8Strip& strip) { multiply_rows<ROWS>(strip, 0, strip.panel, 0, strip.k); }

}  // namespace

const Int8Kernels int8_avx2_narrow = {"avx2 narrow", 4, PANEL, GROUP, sizeof(Q), 255,
    quantize, multiply, rotate, expand, decode, fold};

}  // namespace fedms
