// AVX2 with AVX-VNNI: vpdpbusd on 256 bits. It multiplies unsigned bytes of x by signed
// bytes of the weight.
#include <immintrin.h>

#include <algorithm>

#include "kernels.h"

namespace fedms {
namespace {

typedef uint8_t Q;
constexpr bool SIGNED = false;
constexpr int GROUP = 4;
constexpr int ROWS = 4, VECTORS = 3;  // 12 sums, 3 vectors of the weight, one of x

inline void store(Q* to, __m256i v) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
}

inline __m256i load_weight(const int8_t* w) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)); }

// As an instruction, not an intrinsic: GCC 12 moves the intrinsic's accumulators through the stack.
inline void dot(__m256i& sum, __m256i x, __m256i w) { asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(w)); }

#include "x86.inc"

void multiply(const Int8Strip& strip) { multiply_rows<ROWS>(strip, 0, strip.panel, 0, strip.k); }

}  // namespace

const Int8Kernels int8_avxvnni = {"avxvnni", 2, PANEL, GROUP, sizeof(Q), 255, quantize, multiply, rotate, expand, decode, fold};

}  // namespace fedms
