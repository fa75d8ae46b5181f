// Any CPU: plain loops over a panel of columns, which the compiler turns into what vectors there are. x is quantized to
// 16 bits with their sign, so q_zero is 0.
#include <algorithm>

#include "kernels.h"

namespace fedms {
namespace {

constexpr int PANEL = 16, GROUP = 1;

#define FEDMS_UNROLL _Pragma("GCC unroll 16")

#include "levels_by_table.inc"
#include "rotate.inc"

void quantize(int64_t rows, int64_t k, int32_t steps, const float* x, void* q, int64_t q_stride, float* q_scale,
              int32_t* q_zero) {
  int16_t* to = static_cast<int16_t*>(q);
  for (int64_t i = 0; i < rows; ++i, x += k, to += q_stride) {
    int32_t largest = 0;
    uint32_t largest_unsigned = 0;
    for (int64_t c = 0; c < k; ++c) {
      int32_t bits;
      std::memcpy(&bits, x + c, sizeof bits);
      largest = std::max(largest, bits);
      largest_unsigned = std::max(largest_unsigned, static_cast<uint32_t>(bits));
    }
    const Int8Levels levels(largest, largest_unsigned, steps);
    q_scale[i] = levels.scale;
    q_zero[i] = 0;
    const float top = static_cast<float>(steps - levels.zero);
    // Adding and taking away 1.5 * 2^23 rounds to the nearest even integer.
    constexpr float rounding = 12582912.0f;
    const bool finite = levels.scale >= 0;
    for (int64_t c = 0; c < k; ++c) {
      to[c] = finite ? static_cast<int16_t>(std::min(top, (x[c] * levels.inverse + rounding) - rounding)) : 0;
    }
  }
}

void multiply(const Int8Strip& strip) {
  for (int64_t i = 0; i < strip.rows; ++i) {
    const int16_t* q = static_cast<const int16_t*>(strip.q) + i * strip.q_stride;
    const int8_t* w = strip.panel;
    int32_t sum[PANEL] = {};
    for (int64_t c = 0; c < strip.k; ++c, w += PANEL)
      for (int v = 0; v < PANEL; ++v) sum[v] += q[c] * w[v];

    float out[PANEL];
    for (int v = 0; v < PANEL; ++v) {
      const float bias = strip.bias ? strip.bias[v] : 0.0f;
      out[v] = static_cast<float>(sum[v]) * (strip.scale[v] * strip.q_scale[i]) + bias;
    }
    for (int64_t j = 0; j < strip.rank; ++j) {
      const float factor = strip.s[i * strip.rank + j];
      const float* b = strip.expand[j] + strip.expand_column;
      for (int v = 0; v < PANEL; ++v) out[v] += factor * b[v];
    }
    std::memcpy(strip.y + i * strip.y_stride, out, sizeof out);
  }
}

void expand(int64_t count, const uint8_t* nibbles, const int16_t* levels, const int16_t* factors, int8_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    const int code = nibbles[i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4) & 15;
    to[i] = static_cast<int8_t>((levels[code] * factors[i % PANEL] + (1 << 14)) >> 15);
  }
}

}  // namespace

const Int8Kernels int8_portable = {"portable", 0, PANEL, GROUP, sizeof(int16_t), 4095,
    quantize, multiply, rotate, expand, decode, fold};

}  // namespace fedms
