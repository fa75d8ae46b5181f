// The gate's gradient from an accumulator of wgmma that holds dy B.
#pragma once

#include "segments.h"

namespace fedms::cuda {

// Where it goes: dgate (m, columns), from a dense s (m, r) whose rows are s_stride numbers apart.
template <class T>
struct GateGrad {
  float* dgate;
  int columns;
  const T* s;
  int s_stride;
  const float* scale;  // of each expert
};

// For each expert from `first` to `end` - 1: its scale times the sum over its ranks of S times dy B, in the rows of this
// warpgroup that are before end_row. u: dy B, whose value i in a thread is that of row(i) and rank(i), which has the expert
// of(i); below 0 it has none. The products take its place.
template <class T, int VALUES, class Row, class Rank, class Of>
FEDMS_DEVICE void put_gate_grad(const GateGrad<T>& to, float (&u)[VALUES], int first, int end, int end_row, Row row, Rank rank,
                                Of of) {
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    u[i] = row(i) < end_row && of(i) >= 0 ? u[i] * Number<T>::widen(to.s[int64_t(row(i)) * to.s_stride + rank(i)]) : 0;
  }
  for (int expert = first; expert < end; ++expert) {
    float total[2] = {};  // of the two rows of this thread
#pragma unroll
    for (int i = 0; i < VALUES; ++i) total[i % 4 / 2] += of(i) == expert ? u[i] : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // four threads share a row
      for (int lanes = 1; lanes < 4; lanes *= 2) total[half] += ptx::shuffle_xor(total[half], lanes);
      const int to_row = row(2 * half);
      if (ptx::thread() % 4 == 0 && to_row < end_row) {
        to.dgate[int64_t(to_row) * to.columns + (to.columns == 1 ? 0 : expert)] = total[half] * to.scale[expert];
      }
    }
  }
}

}  // namespace fedms::cuda
