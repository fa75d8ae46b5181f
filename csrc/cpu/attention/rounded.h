// Attention whose products round their operands to bfloat16: q, k, v, the exponentials, and in the backward pass the
// probabilities and the gradients of the result and of the logits. The softmax and all sums are in float.
//
// Products take about four fifths of the time in float. At twice their rate 0.6 of it was expected. On a Zen 4, one thread,
// forward and backward, it is 0.59 at 197 tokens of width 64, and 0.75 at 64 tokens of width 32, where the pairs that
// are made serve fewer products (`bench/kernels/bench_cpu_kernels.py`).
#pragma once

#include <memory>

#include "../bfloat16/pairs.h"
#include "heads.h"

namespace fedms {

// The rows of a head or of another matrix.
template <class Value>
struct Rows {
  Value* data;
  int64_t stride;
};

// A matrix, at first uninitialized, whose rows are padded to whole vectors.
template <class Value>
class Padded {
 public:
  Padded(int64_t rows, int64_t columns) : stride_((columns + 15) / 16 * 16), data_(new Value[rows * stride_]) {}
  Rows<Value> rows() const { return {data_.get(), stride_}; }
  Value* row(int64_t i) const { return data_.get() + i * stride_; }

 private:
  int64_t stride_;
  std::unique_ptr<Value[]> data_;
};

// Computes one head after the other in the memory of one thread.
class RoundedHeads {
 public:
  RoundedHeads(const PairKernels& kernels, const Attention& attention);

  // Head (b, h) of attention_forward and of attention_backward; `softmax` has the rows of the head.
  void forward(int64_t b, int64_t h, const Heads<float>& out, SoftmaxRow* softmax) const;
  void backward(int64_t b, int64_t h, const SoftmaxRow* softmax, const AttentionGradients& g) const;

 private:
  using Floats = Rows<const float>;

  // z (count, keys) = x (count, width) times the transpose of the keys.
  void multiply_by_keys(int64_t count, Floats x, const Padded<Pair>& keys, const Padded<float>& z) const;
  // to (count, width) = z (count, keys) times the keys.
  void sum_over_keys(int64_t count, const Padded<float>& z, const Padded<Pair>& keys, Rows<float> to) const;
  // to (keys, width) = the transpose of z (count, keys) times x (count, width), added to what `to` holds where `add` is true.
  void sum_over_queries(int64_t count, const Padded<float>& z, Floats x, Rows<float> to, bool add) const;

  const PairKernels& kernels_;
  const Attention& a_;
  const int64_t block_;                          // queries at a time
  const Padded<float> p_, ds_;                   // (block, keys): the products with the keys, and what becomes of them
  // Operands. The two values of a pair follow one another along what is summed over: the width, the keys or the queries.
  const Padded<Pair> k_by_width_, v_by_width_;   // (width / 2, keys)
  const Padded<Pair> k_by_key_, v_by_key_;       // (keys / 2, width)
  const Padded<Pair> x_by_width_, x_by_query_;   // (block, width / 2) and (block / 2, width)
  const Padded<Pair> z_by_key_, z_by_query_;     // (block, keys / 2) and (block / 2, keys)
};

}  // namespace fedms
