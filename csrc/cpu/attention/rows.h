// What becomes of one row of attention's products. One table an instruction set.
#pragma once

#include <cstdint>

#include "fedms/attention.h"

namespace fedms {

// The logits of a row are scale * z + mask; `mask` may be null.
struct AttentionRows {
  // z = exp(logits - the largest of them). Where all are masked, z and the inverse are 0.
  SoftmaxRow (*exponentials)(int64_t count, float scale, const float* mask, float* z);
  // z = p, the softmax, and dp = scale * p * (dp - sum of p * dp): the gradient of z from that of p.
  void (*gradients)(int64_t count, float scale, const float* mask, const SoftmaxRow& row, float* z, float* dp);
};

extern const AttentionRows attention_rows_portable;
#ifdef FEDMS_X86
extern const AttentionRows attention_rows_avx2;
extern const AttentionRows attention_rows_avx512;
#endif

}  // namespace fedms
