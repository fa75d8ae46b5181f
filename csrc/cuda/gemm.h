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
  int band;  // row blocks of a band of tiles, see layout.h
};

// What differs between the siblings of a product, of which there is one at least.
template <class T>
struct Siblings {
  int count;
  struct Sibling {
    int width;              // columns of y, or, transposed, terms of the sums
    int first_rank, ranks;  // in T
    const T* bias;
  } each[MOST_SIBLINGS];
};

// Of a shrink that runs ahead of a GEMM (GemmShrink).
template <class T>
struct ShrinkAheadArguments {
  int m, r, experts, siblings;  // experts and siblings: how many
  struct Sibling {
    const T* x;
    int64_t x_stride;
    const T* a;
    int64_t a_stride;
    int k, first_rank, ranks, width;  // width: of its columns in T
    int first_expert, experts;
  } sibling[MOST_SIBLINGS];
  T* s;
  T* t;
  int64_t t_stride;
  float* dgate;
  Factors factors;
  Segments segments;
};

// Of a GEMM that makes s and t itself (GemmShrink).
template <class T>
struct NarrowArguments {
  GemmArguments<T> gemm;
  const T* a;
  int64_t a_stride;
  T* s;
  Factors factors;
};

// Two columns side by side, the first one even, of an output with n columns, an even number.
FEDMS_HD void drop_pair(const Mask& mask, int row, int column, int n, float& low, float& high) {
  const uint32_t kept = kept_of_pair(mask, uint64_t(row) * n + column);
  low = kept & 0xFFFF ? low * mask.kept_scale : 0.0f;
  high = kept >> 16 ? high * mask.kept_scale : 0.0f;
}

template <class T>
FEDMS_HD void add_bias(const T* bias, int column, int n, float& low, float& high) {
  if (bias == nullptr || column >= n) return;
  low += Number<T>::widen(bias[column]);
  high += Number<T>::widen(bias[column + 1]);
}

// Maps of matrices, each made again where its matrix is another one than in the call before.
struct TensorMaps {
  enum Operand { x, w, t, f, y, a, z, s, COUNT };  // z and s: the x and T of a backward pass, for strips
  struct Kept {
    TensorMap map;
    const void* data = nullptr;
    int64_t rows, columns, stride;
    int box_rows, box_columns;
    bool bf16;
  } kept[MOST_SIBLINGS][COUNT];

  const TensorMap& of(Operand operand, const Launch& what, bool bf16, const void* data, int64_t rows, int64_t columns,
                      int64_t stride, int box_rows, int sibling = 0, int box_columns = 64) {
    Kept& k = kept[sibling][operand];
    const bool same = k.data == data && k.rows == rows && k.columns == columns && k.stride == stride &&
                      k.box_rows == box_rows && k.box_columns == box_columns && k.bf16 == bf16;
    if (!same) {
      k = {tensor_map(what, bf16, data, rows, columns, stride, box_rows, box_columns), data, rows, columns, stride, box_rows,
           box_columns, bf16};
    }
    return k.map;
  }
};

template <class T>
void start_mma_gemm(const Launch& what, const GemmArguments<T>& arguments, int tile, bool transposed);
template <class T>
void start_wgmma_gemm(const Launch& what, const GemmArguments<T>& arguments, const std::vector<GemmSibling>& siblings, int tile,
                      bool transposed, bool early, int multiprocessors, TensorMaps& maps);
template <class T>
void start_shrink_ahead(const Launch& what, const ShrinkAheadArguments<T>& arguments, bool backward, int blocks,
                        TensorMaps& maps);

template <class T>
void start_narrow_forward(const Launch& what, const NarrowArguments<T>& arguments, int multiprocessors, TensorMaps& maps);
void start_narrow_backward(const Launch& what, const NarrowBackward& call, int64_t parts);

}  // namespace fedms::cuda
