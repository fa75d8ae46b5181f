// The linear layer on few rows: how its columns are shared among threads. The products are in lora/kernels.inc.
#include "fedms/half.h"

#include <algorithm>

#include "lora/operands.h"
#include "threads.h"

namespace fedms {
namespace {

template <class Half>
using Dots = void (*)(int64_t, int64_t, int64_t, const float*, int64_t, const Half* const*, float*, int64_t);

constexpr int64_t COLUMNS = 64;

template <class Half>
void run(Dots<Half> dots, int64_t m, int64_t n, int64_t k, const float* x, const Half* w, const float* bias, float* y) {
  const int64_t parts = (n + COLUMNS - 1) / COLUMNS;
  const int threads = threads_for(m * n * k, FP32_WORK, parts);
  share_out(threads, parts, [&](int64_t part) {
    const int64_t first = part * COLUMNS, count = std::min(COLUMNS, n - first);
    const Half* rows[COLUMNS];
    for (int64_t c = 0; c < count; ++c) rows[c] = w + (first + c) * k;
    dots(m, count, k, x, k, rows, y + first, n);
    for (int64_t i = 0; bias && i < m; ++i)
      for (int64_t c = first; c < first + count; ++c) y[i * n + c] += bias[c];
  });
}

}  // namespace

int64_t few_rows() {
#ifdef FEDMS_X86
  // Measured beside PyTorch's product on a Zen 4: forward and backward, at four rows 1.1 times as fast, at eight 0.95.
  if (&lora_kernels() == &lora_avx512) return 4;
  if (&lora_kernels() == &lora_avx2) return 1;
#endif
  return 0;
}

void few_rows_forward(int64_t m, int64_t n, int64_t k, const float* x, const float* w, const float* bias, float* y) {
  run(lora_kernels().dots, m, n, k, x, w, bias, y);
}

void few_rows_backward(int64_t m, int64_t n, int64_t k, const float* dy, const float* w, float* dx) {
  // Every thread takes columns of its own, a multiple of the tiles' width.
  const int threads = threads_for(m * n * k, FP32_WORK, (k + COLUMNS - 1) / COLUMNS);
  const int64_t part = ((k + threads - 1) / threads + COLUMNS - 1) / COLUMNS * COLUMNS;
  share_out(threads, (k + part - 1) / part, [&](int64_t i) {
    const int64_t first = i * part, count = std::min(part, k - first);
    for (int64_t row = 0; row < m; ++row) std::fill_n(dx + row * k + first, count, 0.0f);
    // A few rows of the weight at a time, from one end to the other, as the hardware prefetches them.
    constexpr int64_t ROWS = 16;
    const float* rows[ROWS];
    for (int64_t c = 0; c < n; c += ROWS) {
      const int64_t part_rows = std::min(ROWS, n - c);
      for (int64_t j = 0; j < part_rows; ++j) rows[j] = w + (c + j) * k + first;
      lora_kernels().expand(m, part_rows, count, dy + c, n, rows, dx + first, k);
    }
  });
}

void half_forward(int64_t m, int64_t n, int64_t k, const float* x, const Fp16* w, const float* bias, float* y) {
  run(lora_kernels().fp16_dots, m, n, k, x, w, bias, y);
}

void half_forward(int64_t m, int64_t n, int64_t k, const float* x, const Bf16* w, const float* bias, float* y) {
  run(lora_kernels().bf16_dots, m, n, k, x, w, bias, y);
}

}  // namespace fedms
