// A linear layer whose frozen weight is int8, with the LoRA branch of lora.h in the same pass over the output:
//
//   y[i][c] = xs[i] * ws[c] * (sum over j of xq[i][j] * wq[c][j]) + bias[c] + (the LoRA branch of row i)[c]
//
// wq (n, k) int8 and ws (n,) are the weight, symmetric, one scale an output channel. xq and xs are made from x here,
// one scale a row: xs = max |x| / 127, xq = x * (127 / max |x|) rounded to nearest even. The sums of products are exact.
// A row that holds an infinity or a NaN gives NaN; one whose values all lie below TINY in magnitude counts as zeros.
//
// All matrices are row-major and dense. The results are bitwise the same for any number of threads.
#pragma once

#include <cstdint>

#include "fedms/lora.h"

namespace fedms {

// A row's largest magnitude from which 127 / max |x| is still a float.
constexpr float INT8_TINY = 0x1p-100f;

// The size in bytes of a packed (n, k) weight, for the instruction set that is used now.
int64_t int8_packed_size(int64_t n, int64_t k);

// Packs wq for the instruction set that is used now. The multiplication keeps to the one that the weight was packed for.
// |wq| <= 127.
void int8_pack(int64_t n, int64_t k, const int8_t* wq, uint8_t* packed);

// The inverse. int8_pack and int8_unpack throw std::invalid_argument where `packed` is not a packed (n, k) weight.
void int8_unpack(int64_t n, int64_t k, const uint8_t* packed, int64_t packed_size, int8_t* wq);

struct Int8Weight {
  const uint8_t* packed;
  int64_t packed_size;
  const float* scale;  // ws
  const float* bias;   // or null
};

// s (m, R) and y (m, n) are written. Throws as int8_unpack.
void int8_forward(const Int8Weight& weight, const Lora& lora, const float* x, float* s, float* y);

// The gradients of lora_backward, with the difference that out.dx is written: dx = dy W + its LoRA part. `transposed`
// is W^T (k, n), quantised apart from W and packed; it is not looked at where out.dx is null.
void int8_backward(const Int8Weight& transposed, const Lora& lora, const float* dy, const float* x, const float* s,
                   const LoraGradients& out);

}  // namespace fedms
