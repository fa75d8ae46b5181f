#include "rounded.h"

#include <algorithm>

namespace fedms {
namespace {

constexpr int64_t BLOCK = 96;  // queries at a time: a multiple of a tile's rows and of 2

int64_t half_of(int64_t count) { return (count + 1) / 2; }

template <class Value>
Rows<Value> rows_of(const Heads<Value>& heads, int64_t b, int64_t h, int64_t first = 0) {
  return {head_of(heads, b, h) + first * heads.row_stride, heads.row_stride};
}

// Calls a kernel that makes pairs of x (rows, columns).
template <class Kernel>
void make_pairs(Kernel kernel, int64_t rows, int64_t columns, Rows<const float> x, const Padded<Pair>& to) {
  kernel(rows, columns, x.data, x.stride, to.rows().data, to.rows().stride);
}

Rows<const float> constant(const Padded<float>& matrix) { return {matrix.rows().data, matrix.rows().stride}; }

}  // namespace

RoundedHeads::RoundedHeads(const PairKernels& kernels, const Attention& attention)
    : kernels_(kernels),
      a_(attention),
      block_(std::min(BLOCK, a_.queries)),
      p_(block_, a_.keys),
      ds_(block_, a_.keys),
      k_by_width_(half_of(a_.width), a_.keys),
      v_by_width_(half_of(a_.width), a_.keys),
      k_by_key_(half_of(a_.keys), a_.width),
      v_by_key_(half_of(a_.keys), a_.width),
      x_by_width_(block_, half_of(a_.width)),
      x_by_query_(half_of(block_), a_.width),
      z_by_key_(block_, half_of(a_.keys)),
      z_by_query_(half_of(block_), a_.keys) {}

void RoundedHeads::multiply_by_keys(int64_t count, Floats x, const Padded<Pair>& keys, const Padded<float>& z) const {
  make_pairs(kernels_.pair_columns, count, a_.width, x, x_by_width_);
  const Rows<Pair> pairs = x_by_width_.rows(), w = keys.rows();
  kernels_.multiply(count, half_of(a_.width), a_.keys, pairs.data, pairs.stride, 1, w.data, w.stride, z.rows().data,
                    z.rows().stride, false);
}

void RoundedHeads::sum_over_keys(int64_t count, const Padded<float>& z, const Padded<Pair>& keys, Rows<float> to) const {
  make_pairs(kernels_.pair_columns, count, a_.keys, constant(z), z_by_key_);
  const Rows<Pair> pairs = z_by_key_.rows(), w = keys.rows();
  kernels_.multiply(count, half_of(a_.keys), a_.width, pairs.data, pairs.stride, 1, w.data, w.stride, to.data, to.stride, false);
}

void RoundedHeads::sum_over_queries(int64_t count, const Padded<float>& z, Floats x, Rows<float> to, bool add) const {
  make_pairs(kernels_.pair_rows, count, a_.keys, constant(z), z_by_query_);
  make_pairs(kernels_.pair_rows, count, a_.width, x, x_by_query_);
  const Rows<Pair> pairs = z_by_query_.rows(), w = x_by_query_.rows();
  kernels_.multiply(a_.keys, half_of(count), a_.width, pairs.data, 1, pairs.stride, w.data, w.stride, to.data, to.stride, add);
}

void RoundedHeads::forward(int64_t b, int64_t h, const Heads<float>& out, SoftmaxRow* softmax) const {
  make_pairs(kernels_.pair_columns_transposed, a_.keys, a_.width, rows_of(a_.k, b, h), k_by_width_);
  make_pairs(kernels_.pair_rows, a_.keys, a_.width, rows_of(a_.v, b, h), v_by_key_);
  for (int64_t first = 0; first < a_.queries; first += BLOCK) {
    const int64_t count = std::min(BLOCK, a_.queries - first);
    multiply_by_keys(count, rows_of(a_.q, b, h, first), k_by_width_, p_);
    for (int64_t i = 0; i < count; ++i)
      softmax[first + i] = attention_rows().exponentials(a_.keys, a_.scale, mask_row(a_, b, h, first + i), p_.row(i));
    const Rows<float> to = rows_of(out, b, h, first);
    sum_over_keys(count, p_, v_by_key_, to);
    normalize(count, a_.width, softmax + first, to.data, to.stride);
  }
}

void RoundedHeads::backward(int64_t b, int64_t h, const SoftmaxRow* softmax, const AttentionGradients& g) const {
  make_pairs(kernels_.pair_columns_transposed, a_.keys, a_.width, rows_of(a_.k, b, h), k_by_width_);
  make_pairs(kernels_.pair_columns_transposed, a_.keys, a_.width, rows_of(a_.v, b, h), v_by_width_);
  make_pairs(kernels_.pair_rows, a_.keys, a_.width, rows_of(a_.k, b, h), k_by_key_);
  for (int64_t first = 0; first < a_.queries; first += BLOCK) {
    const int64_t count = std::min(BLOCK, a_.queries - first);
    const Floats q = rows_of(a_.q, b, h, first), dout = rows_of(g.dout, b, h, first);
    multiply_by_keys(count, q, k_by_width_, p_);
    multiply_by_keys(count, dout, v_by_width_, ds_);
    for (int64_t i = 0; i < count; ++i)
      attention_rows().gradients(a_.keys, a_.scale, mask_row(a_, b, h, first + i), softmax[first + i], p_.row(i), ds_.row(i));
    sum_over_queries(count, p_, dout, rows_of(g.dv, b, h), first > 0);
    sum_over_queries(count, ds_, q, rows_of(g.dk, b, h), first > 0);
    sum_over_keys(count, ds_, k_by_key_, rows_of(g.dq, b, h, first));
  }
}

}  // namespace fedms
