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

const AttentionRows& attention_rows();  // of the instruction set in use

}  // namespace fedms
