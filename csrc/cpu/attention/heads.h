// What the two ways to compute attention, in float and with operands rounded to bfloat16, have in common.
#pragma once

#include "fedms/attention.h"
#include "rows.h"

namespace fedms {

struct AttentionGradients {
  Heads<const float> dout;
  Heads<float> dq, dk, dv;
};

template <class Value>
Value* head_of(const Heads<Value>& heads, int64_t b, int64_t h) {
  return heads.data + b * heads.batch_stride + h * heads.head_stride;
}

inline const float* mask_row(const Attention& a, int64_t b, int64_t h, int64_t i) {
  const AttentionMask& mask = a.mask;
  return mask.data ? mask.data + b * mask.batch_stride + h * mask.head_stride + i * mask.row_stride : nullptr;
}

// Multiplies rows of the result, (count, width), by the inverses of the sums of their exponentials. These factors could also be
// applied to P, whose rows mostly are longer.
inline void normalize(int64_t count, int64_t width, const SoftmaxRow* softmax, float* out, int64_t stride) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < width; ++c) out[i * stride + c] *= softmax[i].inverse;
}

const AttentionRows& attention_rows();  // of the instruction set in use

}  // namespace fedms
