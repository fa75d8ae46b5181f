// The three skinny products that the LoRA branch is made of, its dropout, and the first of them on rows of 16 bits. One table
// per instruction set.
// `rows` points at r rows of a matrix that need not lie behind one another: so experts are joined without a copy.
#pragma once

#include <cstdint>

#include "fedms/dropout.h"
#include "fedms/half.h"

namespace fedms {

struct LoraKernels {
  // s[i][j] = sum over c of x[i][c] * rows[j][c],   i < m, j < r, c < k
  void (*dots)(int64_t m, int64_t r, int64_t k, const float* x, int64_t x_stride, const float* const* rows, float* s,
               int64_t s_stride);
  void (*fp16_dots)(int64_t m, int64_t r, int64_t k, const float* x, int64_t x_stride, const Fp16* const* rows, float* s,
                    int64_t s_stride);
  void (*bf16_dots)(int64_t m, int64_t r, int64_t k, const float* x, int64_t x_stride, const Bf16* const* rows, float* s,
                    int64_t s_stride);
  // y[i][c] += sum over j of s[i][j] * rows[j][c],   i < m, j < r, c < n
  void (*expand)(int64_t m, int64_t r, int64_t n, const float* s, int64_t s_stride, const float* const* rows, float* y,
                 int64_t y_stride);
  // g[j][c] += sum over i of s[i][j] * x[i][c],   i < m, j < r, c < n
  void (*reduce)(int64_t m, int64_t r, int64_t n, const float* s, int64_t s_stride, const float* x, int64_t x_stride,
                 float* g, int64_t g_stride);
  // The three products of few rows with a matrix b (n, r) as it lies, without its transpose:
  //   y[i][c] += sum over j of s[i][j] * b[c][j],   u[i][j] = sum over c of y[i][c] * b[c][j],
  //   g[c][j] = sum over i of y[i][c] * s[i][j],   i < m, j < r, c < n
  void (*expand_few)(int64_t m, int64_t r, int64_t n, const float* s, int64_t s_stride, const float* b, float* y,
                     int64_t y_stride);
  void (*dots_few)(int64_t m, int64_t r, int64_t n, const float* y, int64_t y_stride, const float* b, float* u,
                   int64_t u_stride);
  void (*outer_few)(int64_t m, int64_t r, int64_t n, const float* s, int64_t s_stride, const float* y, int64_t y_stride,
                    float* g);
  // to[c] = or += kept(first + c) ? from[c] * dropout_scale(p) : 0,   c < n
  void (*dropout)(double p, uint64_t seed, uint64_t first, int64_t n, const float* from, float* to, bool add);
};

extern const LoraKernels lora_portable;
#ifdef FEDMS_X86
extern const LoraKernels lora_avx2;
extern const LoraKernels lora_avx512;
#endif

}  // namespace fedms
