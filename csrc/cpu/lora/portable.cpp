// Four lanes of GCC's and Clang's vector extension: SSE2 on x86-64, NEON on arm64, scalars elsewhere.
#include <cstring>

#include "kernels.h"

namespace fedms {
namespace {

constexpr int WIDTH = 4;
constexpr int DOTS_M = 2, DOTS_R = 4;
constexpr int EXPAND_M = 4, EXPAND_V = 2;
constexpr int REDUCE_R = 4, REDUCE_V = 2;

typedef float Vec __attribute__((vector_size(16)));

inline Vec splat(float value) { return Vec{value, value, value, value}; }
inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float wide(Bf16 v) { return as_float(uint32_t{v.bits} << 16); }
inline float wide(Fp16 v) {
  const uint32_t sign = uint32_t{v.bits & 0x8000u} << 16, size = uint32_t{v.bits & 0x7fffu} << 13;
  if (size >= 0x0f800000) return as_float(sign | size | 0x7f800000);  // infinity and NaN
  const float scaled = as_float(size) * 0x1p112f;  // the exponents' biases differ by 112; right for subnormal ones too
  return sign ? -scaled : scaled;
}
template <class Half>
inline Vec load(const Half* from) {
  return Vec{wide(from[0]), wide(from[1]), wide(from[2]), wide(from[3])};
}
inline Vec held(Vec v) { return v; }
inline Vec load_part(const float* from, int64_t count) {
  Vec v = splat(0);
  std::memcpy(&v, from, count * sizeof(float));
  return v;
}
inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }
inline void store_part(float* to, Vec v, int64_t count) { std::memcpy(to, &v, count * sizeof(float)); }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

template <int COUNT>
inline void sums(const Vec* v, float* to) {
  for (int j = 0; j < COUNT; ++j) to[j] = (v[j][0] + v[j][2]) + (v[j][1] + v[j][3]);
}

#include "kernels.inc"

}  // namespace

const LoraKernels lora_portable = {dots<float>, dots<Fp16>, dots<Bf16>, expand, reduce, expand_few, dots_few, outer_few,
                                   dropout};

}  // namespace fedms
