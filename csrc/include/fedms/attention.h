// Attention of short sequences, forward and backward, on every head apart:
//
//   p[i][j] = softmax over j of (scale * q[i] . k[j] + mask[i][j]),   out[i] = sum over j of p[i][j] * v[j]
//
// A row whose mask is minus infinity everywhere has p = 0. The results are bitwise the same for any number of threads.
#pragma once

#include <cstdint>

namespace fedms {

// One of q, k, v, out and their gradients: (batch, heads, rows, width), the values of a row side by side.
template <class Value>
struct Heads {
  Value* data;
  int64_t batch_stride, head_stride, row_stride;
};

// What is added to the scaled products; strides are 0 where it is expanded. Null data: no mask.
struct AttentionMask {
  const float* data;
  int64_t batch_stride, head_stride, row_stride;
};

struct Attention {
  int64_t batch, heads, queries, keys, width;
  Heads<const float> q, k, v;
  AttentionMask mask;
  float scale;
  bool rounded;  // whether products may round their operands to bfloat16, which is done where the CPU multiplies such values
};

// What the softmax of a row takes from its logits and multiplies their exponentials by.
struct SoftmaxRow {
  float largest, inverse;
};

// Written: out, and softmax (batch, heads, queries), which the backward pass needs.
void attention_forward(const Attention& attention, const Heads<float>& out, SoftmaxRow* softmax);

// Written: the gradients of q, k and v.
void attention_backward(const Attention& attention, const Heads<const float>& dout, const SoftmaxRow* softmax,
                        const Heads<float>& dq, const Heads<float>& dk, const Heads<float>& dv);

}  // namespace fedms
