// Any CPU: plain loops over a panel of columns, which the compiler turns into what vectors there are.
#include <cmath>
#include <cstring>

#include "fedms/int8.h"
#include "int8_kernels.h"

namespace fedms {
namespace {

constexpr int PANEL = 16;

// max |x|; NaN if there is one. Without their signs, floats are ordered as the integers of their bits, NaN above all.
float largest(const float* x, int64_t k) {
  uint32_t most = 0;
  for (int64_t c = 0; c < k; ++c) {
    uint32_t bits;
    std::memcpy(&bits, x + c, sizeof bits);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  float value;
  std::memcpy(&value, &most, sizeof value);
  return value;
}

void quantise(int64_t rows, int64_t k, const float* x, void* q, int64_t q_stride, float* q_scale) {
  int16_t* to = static_cast<int16_t*>(q);
  for (int64_t i = 0; i < rows; ++i, x += k, to += q_stride) {
    const float most = largest(x, k);
    const bool finite = most < __builtin_inff();
    q_scale[i] = most < INT8_TINY ? 0.0f : finite ? most / 127.0f : __builtin_nanf("");
    const float inverse = most < INT8_TINY || !finite ? 0.0f : 127.0f / most;
    // Adding and taking away 1.5 * 2^23 rounds to the nearest even integer.
    constexpr float rounding = 12582912.0f;
    for (int64_t c = 0; c < k; ++c) to[c] = finite ? static_cast<int16_t>((x[c] * inverse + rounding) - rounding) : 0;
  }
}

void multiply(const Int8Strip& strip) {
  for (int64_t i = 0; i < strip.rows; ++i) {
    const int16_t* q = static_cast<const int16_t*>(strip.q) + i * strip.k;
    const int8_t* w = strip.panel;
    int32_t sum[PANEL];
    std::memcpy(sum, strip.start, sizeof sum);
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

}  // namespace

const Int8Kernels int8_portable = {"portable", 0, PANEL, 1, sizeof(int16_t), 0, quantise, multiply};

}  // namespace fedms
