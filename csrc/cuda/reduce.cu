// Sums of partial sums in order, and what they make: T, dS, dgate, dA and dB.
#include <type_traits>

#include "ranks.h"

namespace fedms::cuda {
namespace {

// t = with scale and gate the sum of the parts of s (parts, m, r), in order. A block has whole rows of t.
template <class T, class From>
__global__ void __launch_bounds__(256)
    apply_scale_and_gate_kernel(int m, int r, int parts, const From* s, T* t, int t_stride, __grid_constant__ const Factors factors,
                 __grid_constant__ const Segments segments) {
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

// A block has whole rows of the sum.
template <class T>
__global__ void __launch_bounds__(256)
    reduce_partials_kernel(int c, int r, int parts, int first, int count, const float* g, T* out, int64_t row_stride,
                     int64_t column_stride) {
  const int rows_of_block = 256 / count, of_block = ptx::thread() / count, column = ptx::thread() % count;
  const int row = ptx::block_x() * rows_of_block + of_block;
  if (of_block >= rows_of_block || row >= c) return;
  float sum = 0;
#pragma unroll 8
  for (int part = 0; part < parts; ++part) sum += g[(int64_t(part) * c + row) * r + first + column];
  if constexpr (std::is_same_v<T, float>) {
    out[row * row_stride + column * column_stride] = sum;
  } else {
    out[row * row_stride + column * column_stride] = {Number<T>::narrow(sum)};
  }
}

// Blocks of 256 threads that have whole rows of so many columns, 256 at most.
Grid blocks_of_rows(int64_t rows, int64_t columns) { return {ceil_div(rows, 256 / int(columns))}; }

}  // namespace

void apply_scale_and_gate(Element element, int64_t m, int64_t r, const void* s, void* t, int64_t t_stride, const Factors& factors,
           const Segments& segments, const Stream& stream) {
  const Launch what{"apply_scale_and_gate", m, 0, 0, r, stream};
  check_sizes(what, m, r, r);
  check_segments(what, segments, m);
  if (t_stride < r || t_stride > MOST_RANKS) fail(what, "the stride of t is out of range");
  for_element(element, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    launch(what, apply_scale_and_gate_kernel<T, T>, blocks_of_rows(m, t_stride), 256, 0, int(m), int(r), 1, static_cast<const T*>(s),
           static_cast<T*>(t), int(t_stride), factors, segments);
  });
}

void finalize_row_grads(Element element, int64_t m, int64_t r, int64_t experts, int64_t parts, const float* u, const void* s,
                 void* ds, int64_t ds_stride, float* dgate, const Factors& factors, const Segments& segments,
                 const Stream& stream) {
  const Launch what{"finalize_row_grads", m, 0, 0, r, stream};
  check_sizes(what, m, r, r);
  check_segments(what, segments, m);
  if (ds && (ds_stride < r || ds_stride > MOST_RANKS)) fail(what, "the stride of ds is out of range");
  for_element(element, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    if (ds && !dgate) {
      launch(what, apply_scale_and_gate_kernel<T, float>, blocks_of_rows(m, ds_stride), 256, 0, int(m), int(r), int(parts), u,
             static_cast<T*>(ds), int(ds_stride), factors, segments);
    }
    if (!dgate) return;
    launch(what, finalize_row_grads_kernel<T>, {ceil_div(m, 8)}, 256, 0, int(m), int(r), int(experts), int(parts), u,
           static_cast<const T*>(s), static_cast<T*>(ds), ds_stride, dgate, factors, segments);
  });
}

void reduce_partials(Element element, bool fp32, int64_t c, int64_t r, int64_t parts, int64_t first, int64_t count,
                     const float* g, void* out, int64_t row_stride, int64_t column_stride, const Stream& stream) {
  const Launch what{"reduce_partials", c, 0, 0, r, stream};
  check_sizes(what, c, r, r);
  if (first < 0 || count < 1 || first + count > r) fail(what, "the columns are out of range");
  const auto start = [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    launch(what, reduce_partials_kernel<T>, blocks_of_rows(c, count), 256, 0, int(c), int(r), int(parts), int(first),
           int(count), g, static_cast<T*>(out), row_stride, column_stride);
  };
  fp32 ? start(static_cast<float*>(nullptr)) : for_element(element, start);
}

}  // namespace fedms::cuda
