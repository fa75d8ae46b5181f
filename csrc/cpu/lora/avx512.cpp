// AVX-512 (F, DQ, BW, VL): 16 lanes, 32 registers.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace fedms {
namespace {

constexpr int WIDTH = 16;
constexpr int DOTS_M = 3, DOTS_R = 8;
constexpr int EXPAND_M = 6, EXPAND_V = 4;
constexpr int REDUCE_R = 8, REDUCE_V = 3;

typedef __m512 Vec;

inline __mmask16 mask(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
inline Vec splat(float value) { return _mm512_set1_ps(value); }
inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
inline Vec load(const Fp16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Vec load(const Bf16* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vec load_part(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(mask(count), from); }
inline void store(float* to, Vec v) { _mm512_storeu_ps(to, v); }
inline void store_part(float* to, Vec v, int64_t count) { _mm512_mask_storeu_ps(to, mask(count), v); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

inline __m256 half(Vec v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }

template <int COUNT>
inline void sums(const Vec* v, float* to) {
  if constexpr (COUNT == 8) {
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(half(v[0]), half(v[1])), _mm256_hadd_ps(half(v[2]), half(v[3])));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(half(v[4]), half(v[5])), _mm256_hadd_ps(half(v[6]), half(v[7])));
    _mm256_storeu_ps(to, _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)));
  } else {
    for (int j = 0; j < COUNT; ++j) to[j] = _mm512_reduce_add_ps(v[j]);
  }
}

#include "kernels.inc"

}  // namespace

const LoraKernels lora_avx512 = {dots<float>, dots<Fp16>, dots<Bf16>, expand, reduce, expand_few, dots_few, outer_few,
                                   dropout};

}  // namespace fedms
