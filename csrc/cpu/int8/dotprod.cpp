// Arm with the dot product (Armv8.2): sdot multiplies signed bytes, so x is shifted by 128.
#include <arm_neon.h>

#include <algorithm>

#include "kernels.h"

namespace fedms {
namespace {

typedef int8_t Q;
constexpr int OFFSET = -128;
constexpr int PANEL = 16, GROUP = 4;
constexpr int ROWS = 6;  // of a tile: 24 sums, 4 vectors of the weight and one of x fill 29 of 32 registers

#include "neon.inc"

template <int M>
void tile(const Int8Strip& strip, int64_t row) {
  const Q* q = static_cast<const Q*>(strip.q) + row * strip.q_stride;
  const int8_t* w = strip.panel;
  int32x4_t sum[M][VECTORS];
  FEDMS_UNROLL for (int i = 0; i < M; ++i)
    FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) sum[i][v] = vdupq_n_s32(0);
  for (int64_t c = 0; c < strip.k; c += GROUP, w += GROUP * PANEL) {
    int8x16_t b[VECTORS];
    FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) b[v] = vld1q_s8(w + 16 * v);
    FEDMS_UNROLL for (int i = 0; i < M; ++i) {
      int32_t four;
      std::memcpy(&four, q + i * strip.q_stride + c, sizeof four);
      const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(four));
      FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) sum[i][v] = vdotq_s32(sum[i][v], b[v], a);
    }
  }
  finish<M>(strip, row, sum);
}

void multiply(const Int8Strip& strip) {
  int64_t row = 0;
  for (; row + ROWS <= strip.rows; row += ROWS) tile<ROWS>(strip, row);
  for (; row < strip.rows; ++row) tile<1>(strip, row);
}

}  // namespace

const Int8Kernels int8_dotprod = {"dotprod", 5, PANEL, GROUP, sizeof(Q), 255, quantize, multiply, expand};

}  // namespace fedms
