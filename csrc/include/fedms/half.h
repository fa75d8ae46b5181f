// A linear layer on few rows, where reading the weight is what takes the time: each value is read once and, where it has
// 16 bits, made fp32 in the registers.
//
//   y[i][c] = bias[c] + sum over j of x[i][j] * w[c][j]
//
// All matrices are row-major and dense. The results are
// bitwise the same for any number of threads, and a row's do not depend on the other rows.
#pragma once

#include <cstdint>

namespace fedms {

struct Fp16 {  // IEEE 754 binary16
  uint16_t bits;
};
struct Bf16 {  // the upper half of a float
  uint16_t bits;
};

// x (m, k), w (n, k), bias (n,) or null; y (m, n) is written.
void half_forward(int64_t m, int64_t n, int64_t k, const float* x, const Fp16* w, const float* bias, float* y);
void half_forward(int64_t m, int64_t n, int64_t k, const float* x, const Bf16* w, const float* bias, float* y);

// Up to how many rows the next two are used: with more, or without wide vectors, PyTorch's product of an fp32 weight is
// faster.
int64_t few_rows();
void few_rows_forward(int64_t m, int64_t n, int64_t k, const float* x, const float* w, const float* bias, float* y);

// dx (m, k) = dy (m, n) w, for an fp32 weight.
void few_rows_backward(int64_t m, int64_t n, int64_t k, const float* dy, const float* w, float* dx);

}  // namespace fedms
