// Arm with I8MM (Armv8.6): usmmla multiplies 2 x 8 unsigned bytes of x by 8 x 2 signed bytes of the weight.
#include <arm_neon.h>

#include <algorithm>

#include "kernels.h"

namespace fedms {
namespace {

typedef uint8_t Q;
constexpr int OFFSET = 0;
constexpr int PANEL = 8, GROUP = 8;
constexpr int ROWS = 8;  // of a tile: 16 sums of 2 x 2, 4 vectors of the weight and one of x

#include "neon.inc"

template <int M>
void tile(const Int8Strip& strip, int64_t row) {
  constexpr int PAIRS = (M + 1) / 2;  // of rows; with one row, it is its own partner
  const Q* q = static_cast<const Q*>(strip.q) + row * strip.q_stride;
  const int8_t* w = strip.panel;
  int32x4_t pair[PAIRS][PANEL / 2];
  FEDMS_UNROLL for (int p = 0; p < PAIRS; ++p)
    FEDMS_UNROLL for (int v = 0; v < PANEL / 2; ++v) pair[p][v] = vdupq_n_s32(0);
  for (int64_t c = 0; c < strip.k; c += GROUP, w += GROUP * PANEL) {
    int8x16_t b[PANEL / 2];
    FEDMS_UNROLL for (int v = 0; v < PANEL / 2; ++v) b[v] = vld1q_s8(w + 16 * v);
    FEDMS_UNROLL for (int p = 0; p < PAIRS; ++p) {
      const Q* first = q + 2 * p * strip.q_stride + c;
      const uint8x16_t a = vcombine_u8(vld1_u8(first), vld1_u8(2 * p + 1 < M ? first + strip.q_stride : first));
      FEDMS_UNROLL for (int v = 0; v < PANEL / 2; ++v) pair[p][v] = vusmmlaq_s32(pair[p][v], a, b[v]);
    }
  }
  // Each holds two columns of one row, then the same columns of the next.
  int32x4_t sum[M][VECTORS];
  FEDMS_UNROLL for (int i = 0; i < M; ++i) FEDMS_UNROLL for (int v = 0; v < VECTORS; ++v) {
    const int32x4_t left = pair[i / 2][2 * v], right = pair[i / 2][2 * v + 1];
    sum[i][v] = i % 2 ? vcombine_s32(vget_high_s32(left), vget_high_s32(right))
                      : vcombine_s32(vget_low_s32(left), vget_low_s32(right));
  }
  finish<M>(strip, row, sum);
}

void multiply(const Int8Strip& strip) { multiply_rows<ROWS, 2>(strip, 0); }

}  // namespace

const Int8Kernels int8_i8mm = {"i8mm", 6, PANEL, GROUP, sizeof(Q), 255, quantize, multiply, rotate, expand, decode, fold};

}  // namespace fedms
