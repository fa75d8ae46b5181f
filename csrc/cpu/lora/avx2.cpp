// AVX2, FMA and F16C, which every CPU with AVX2 has: 8 lanes, 16 registers.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace fedms {
namespace {

constexpr int WIDTH = 8;
constexpr int DOTS_M = 3, DOTS_R = 4;
constexpr int EXPAND_M = 6, EXPAND_V = 2;
constexpr int REDUCE_R = 4, REDUCE_V = 3;

typedef __m256 Vec;

inline __m256i mask(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec splat(float value) { return _mm256_set1_ps(value); }
inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
inline Vec load(const Fp16* from) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
inline Vec load(const Bf16* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Vec held(Vec v) { return v; }
inline Vec load_part(const float* from, int64_t count) { return _mm256_maskload_ps(from, mask(count)); }
inline void store(float* to, Vec v) { _mm256_storeu_ps(to, v); }
inline void store_part(float* to, Vec v, int64_t count) { _mm256_maskstore_ps(to, mask(count), v); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

inline __m128 half(Vec v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }

template <int COUNT>
inline void sums(const Vec* v, float* to) {
  if constexpr (COUNT == 4) {
    _mm_storeu_ps(to, _mm_hadd_ps(_mm_hadd_ps(half(v[0]), half(v[1])), _mm_hadd_ps(half(v[2]), half(v[3]))));
  } else {
    for (int j = 0; j < COUNT; ++j) {
      const __m128 pair = _mm_hadd_ps(half(v[j]), half(v[j]));
      to[j] = _mm_cvtss_f32(_mm_hadd_ps(pair, pair));
    }
  }
}

#include "kernels.inc"

}  // namespace

const LoraKernels lora_avx2 = {dots<float>, dots<Fp16>, dots<Bf16>, expand, reduce, expand_few, dots_few, outer_few,
                                   dropout};

}  // namespace fedms
