// What the GEMMs of all architectures share: their arguments, and what happens to an accumulator.
#pragma once

#include "heuristics.h"
#include "philox.h"
#include "segments.h"

namespace fedms::cuda {

template <class T>
struct GemmArguments {
  int m, n, k, r;
  const T* x;
  int64_t x_stride;
  const void* w;  // of T, or int8 if there is a w_scale
  int64_t w_stride;
  const float* w_scale;
  const T* bias;
  T* t;
  int64_t t_stride;
  const T* f;
  int64_t f_stride;
  T* y;
  Mask mask;
  Segments segments;
  const T* a;  // of FusedShrink, and what follows
  int64_t a_stride;
  T* s;
  Factors factors;
  int32_t* ready;
};

// Two columns side by side, the first one even, of an output with n columns, an even number.
FEDMS_HD void drop_pair(const Mask& mask, int row, int column, int n, float& low, float& high) {
  const uint64_t index = uint64_t(row) * n + column;
  const uint32_t kept = kept_of_quad(mask, index / 4) >> (index & 2);
  low = kept & 1 ? low * mask.kept_scale : 0.0f;
  high = kept & 2 ? high * mask.kept_scale : 0.0f;
}

template <class T>
FEDMS_HD void add_bias(const T* bias, int column, int n, float& low, float& high) {
  if (bias == nullptr || column >= n) return;
  low += Number<T>::widen(bias[column]);
  high += Number<T>::widen(bias[column + 1]);
}

template <class T>
void start_mma_gemm(const Launch& what, const GemmArguments<T>& arguments, int tile, bool transposed);
template <class T>
void start_wgmma_gemm(const Launch& what, const GemmArguments<T>& arguments, int tile, bool transposed,
                      int multiprocessors);

}  // namespace fedms::cuda
