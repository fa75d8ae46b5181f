// Four lanes of GCC's and Clang's vector extension: SSE2 on x86-64, NEON on arm64, scalars elsewhere.
#include <cstring>

#include "lora_kernels.h"

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

#include "lora_kernels.inc"

}  // namespace

const LoraKernels lora_portable = {dots, expand, reduce, dropout};

}  // namespace fedms
