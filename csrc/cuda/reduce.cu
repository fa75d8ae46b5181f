// Sums of partial sums in order, and what they make: T, dS, dgate, dA and dB.
#include <algorithm>

#include "ranks.h"

namespace fedms::cuda {
namespace {

// t = with scale and gate the sum of the parts of s (parts, m, r), in order. A block has whole rows of t.
template <class T, class From>
__global__ void __launch_bounds__(256)
    apply_scale_and_gate_kernel(int m, int r, int parts, const From* s, T* t, int t_stride,
                                __grid_constant__ const Factors factors, __grid_constant__ const Segments segments) {
  const int rows_of_block = 256 / t_stride, of_block = ptx::thread() / t_stride, rank = ptx::thread() % t_stride;
  const int row = ptx::block_x() * rows_of_block + of_block;
  if (of_block >= rows_of_block || row >= m) return;
  const RowBlock rows = row_block_of(segments, row, r);
  float value = 0;
  if (rank < rows.ranks) {
    const float factor = factor_of(factors, segments, rows.owner, row, rank);
#pragma unroll 8
    for (int part = 0; part < parts; ++part) value += widened(s[(int64_t(part) * m + row) * r + rank]);
    value *= factor;
  }
  t[int64_t(row) * t_stride + rank] = {Number<T>::narrow(value)};
}

// dgate, and dS on the way. A warp for every row.
template <class T>
__global__ void __launch_bounds__(256)
    finalize_row_grads_kernel(int m, int r, int experts, int parts, const float* u, const T* s, T* ds, int64_t ds_stride,
                       float* dgate, __grid_constant__ const Factors factors, __grid_constant__ const Segments segments) {
  const int row = ptx::block_x() * 8 + warp();
  if (row >= m) return;
  const RowBlock rows = row_block_of(segments, row, r);
  float products[MOST_RANKS / 32];
#pragma unroll
  for (int i = 0; i < MOST_RANKS / 32; ++i) {
    const int rank = i * 32 + lane();
    float sum = 0;
    products[i] = 0;
    if (rank < rows.ranks) {
      for (int part = 0; part < parts; ++part) sum += u[(int64_t(part) * m + row) * r + rank];
      products[i] = sum * Number<T>::widen(s[int64_t(row) * r + rank]);
    }
    if (ds && rank < ds_stride) {
      const float factor = rank < rows.ranks ? factor_of(factors, segments, rows.owner, row, rank) : 0;
      ds[row * ds_stride + rank] = {Number<T>::narrow(rank < rows.ranks ? sum * factor : 0)};
    }
  }
  const int columns = segments.count ? 1 : experts;
  for (int column = 0; column < columns; ++column) {
    const int expert = segments.count ? rows.owner : column;
    float total = 0;
#pragma unroll
    for (int i = 0; i < MOST_RANKS / 32; ++i) {
      const int rank = i * 32 + lane();
      if (rank < rows.ranks && (segments.count || factors.expert[rank] == expert)) total += products[i];
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) total += ptx::shuffle_xor(total, lanes);
    if (lane() == 0) dgate[int64_t(row) * columns + column] = total * factors.scale[expert];
  }
}

// A block has whole rows of one of the sums.
template <class T>
__global__ void __launch_bounds__(256) reduce_partials_kernel(int r, __grid_constant__ const Items<PartialSum> sums) {
  const PartialSum& g = sums.item[ptx::block_y()];
  const ExpertGrad& to = g.to;
  const int rows_of_block = 256 / to.count, of_block = ptx::thread() / to.count, column = ptx::thread() % to.count;
  const int row = ptx::block_x() * rows_of_block + of_block;
  if (of_block >= rows_of_block || row >= g.c) return;
  float sum = 0;
#pragma unroll 8
  for (int part = 0; part < g.parts; ++part) sum += g.g[(int64_t(part) * g.c + row) * r + to.first + column];
  static_cast<T*>(to.out)[row * to.row_stride + column * to.column_stride] = narrowed<T>(sum);
}

// Blocks of 256 threads that have whole rows of so many columns, 256 at most.
Grid blocks_of_rows(int64_t rows, int64_t columns) { return {ceil_div(rows, 256 / int(columns))}; }

}  // namespace

void apply_scale_and_gate(const ScaleAndGate& g, const Stream& stream) {
  const Launch what{"apply_scale_and_gate", g.m, 0, 0, g.r, stream};
  check_sizes(what, g.m, g.r, g.r);
  check_segments(what, g.segments, g.m);
  if (g.t_stride < g.r || g.t_stride > MOST_RANKS) fail(what, "the stride of t is out of range");
  for_element(g.element, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    launch(what, apply_scale_and_gate_kernel<T, T>, blocks_of_rows(g.m, g.t_stride), 256, 0, int(g.m), int(g.r), 1,
           static_cast<const T*>(g.s), static_cast<T*>(g.t), int(g.t_stride), g.factors, g.segments);
  });
}

void finalize_row_grads(const RowGrads& g, const Stream& stream) {
  const Launch what{"finalize_row_grads", g.m, 0, 0, g.r, stream};
  check_sizes(what, g.m, g.r, g.r);
  check_segments(what, g.segments, g.m);
  if (g.ds && (g.ds_stride < g.r || g.ds_stride > MOST_RANKS)) fail(what, "the stride of ds is out of range");
  for_element(g.element, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    if (g.ds && !g.dgate) {
      launch(what, apply_scale_and_gate_kernel<T, float>, blocks_of_rows(g.m, g.ds_stride), 256, 0, int(g.m), int(g.r),
             int(g.parts), g.u, static_cast<T*>(g.ds), int(g.ds_stride), g.factors, g.segments);
    }
    if (!g.dgate) return;
    launch(what, finalize_row_grads_kernel<T>, {ceil_div(g.m, 8)}, 256, 0, int(g.m), int(g.r), int(g.experts), int(g.parts), g.u,
           static_cast<const T*>(g.s), static_cast<T*>(g.ds), g.ds_stride, g.dgate, g.factors, g.segments);
  });
}

void reduce_partials(Element element, bool fp32, int64_t r, const std::vector<PartialSum>& sums, const Stream& stream) {
  for_items(sums, [&](const Items<PartialSum>& some, int count) {
    int blocks = 0;
    for (int i = 0; i < count; ++i) {
      const PartialSum& sum = some.item[i];
      const Launch what{"reduce_partials", sum.c, 0, 0, r, stream};
      check_sizes(what, sum.c, r, r);
      if (sum.to.first < 0 || sum.to.count < 1 || sum.to.first + sum.to.count > r) fail(what, "the columns are out of range");
      blocks = std::max(blocks, blocks_of_rows(sum.c, sum.to.count).x);
    }
    const Launch what{"reduce_partials", some.item[0].c, 0, 0, r, stream};
    const auto start = [&](auto* null) {
      using T = std::remove_pointer_t<decltype(null)>;
      launch(what, reduce_partials_kernel<T>, {blocks, count}, 256, 0, int(r), some);
    };
    fp32 ? start(static_cast<float*>(nullptr)) : for_element(element, start);
  });
}

}  // namespace fedms::cuda
