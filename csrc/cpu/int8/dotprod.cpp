// Arm with the dot product (Armv8.2): sdot multiplies signed bytes, so x is shifted by 128.
#include <arm_neon.h>

#include <algorithm>

#include "kernels.h"

namespace fedms {
namespace {

typedef int8_t Q;
constexpr int OFFSET = -128;
constexpr int PANEL = 16, GROUP = 4;
constexpr int ROWS = 6;  // of a tile: 24 sums, 6 vectors of x and one or two of the weight fill the 32 registers

#include "neon.inc"

template <int M, int LANE>
inline void dot_lane(int32x4_t (&sum)[M][VECTORS], const int8x16_t (&a)[M], const int8_t* w) {
  FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) {
    const int8x16_t b = vld1q_s8(w + 16 * v);
    FEDMS_UNROLL for (int i = 0; i < M; ++i) sum[i][v] = vdotq_laneq_s32(sum[i][v], b, a[i], LANE);
  }
}

template <int M>
void tile(const Int8Strip& strip, int64_t row) {
  const Q* q = static_cast<const Q*>(strip.q) + row * strip.q_stride;
  const int8_t* w = strip.panel;
  int32x4_t sum[M][VECTORS];
  FEDMS_UNROLL for (int i = 0; i < M; ++i)
    FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) sum[i][v] = vdupq_n_s32(0);
  // Four groups of x lie in one register and are multiplied by lane: with a broadcast for each, an instruction in five was one
  // (see bench/kernels/arm_cycles.py).
  int64_t c = 0;
  for (; c + 4 * GROUP <= strip.k; c += 4 * GROUP, w += 4 * GROUP * PANEL) {
    int8x16_t a[M];
    FEDMS_UNROLL for (int i = 0; i < M; ++i) a[i] = vld1q_s8(q + i * strip.q_stride + c);
    dot_lane<M, 0>(sum, a, w);
    dot_lane<M, 1>(sum, a, w + GROUP * PANEL);
    dot_lane<M, 2>(sum, a, w + 2 * GROUP * PANEL);
    dot_lane<M, 3>(sum, a, w + 3 * GROUP * PANEL);
  }
  for (; c < strip.k; c += GROUP, w += GROUP * PANEL) {
    int8x16_t a[M];
    FEDMS_UNROLL for (int i = 0; i < M; ++i) {
      int32_t four;
      std::memcpy(&four, q + i * strip.q_stride + c, sizeof four);
      a[i] = vreinterpretq_s8_s32(vdupq_n_s32(four));
    }
    dot_lane<M, 0>(sum, a, w);
  }
  finish<M>(strip, row, sum);
}

void multiply(const Int8Strip& strip) { multiply_rows<ROWS, 1>(strip, 0); }

}  // namespace

const Int8Kernels int8_dotprod = {"dotprod", 5, PANEL, GROUP, sizeof(Q), 255, quantize, multiply, rotate, expand, decode, fold};

}  // namespace fedms
