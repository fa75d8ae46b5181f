// The linear layer of 16-bit weights: how its columns are shared among threads. The products are in lora/kernels.inc.
#include "fedms/half.h"

#include <omp.h>

#include <algorithm>

#include "lora/operands.h"

namespace fedms {
namespace {

template <class Half>
using Dots = void (*)(int64_t, int64_t, int64_t, const float*, int64_t, const Half* const*, float*, int64_t);

template <class Half>
void run(Dots<Half> dots, int64_t m, int64_t n, int64_t k, const float* x, const Half* w, const float* bias, float* y) {
  constexpr int64_t COLUMNS = 64;
  // Waking a thread costs about as much as this many multiply-adds.
  constexpr int64_t work_per_thread = 1 << 18;
  const int64_t parts = (n + COLUMNS - 1) / COLUMNS;
  const int64_t useful = std::min({m * n * k / work_per_thread, parts, int64_t{omp_get_max_threads()}});
  const int threads = static_cast<int>(std::max<int64_t>(1, useful));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = part * COLUMNS, count = std::min(COLUMNS, n - first);
    const Half* rows[COLUMNS];
    for (int64_t c = 0; c < count; ++c) rows[c] = w + (first + c) * k;
    dots(m, count, k, x, k, rows, y + first, n);
    for (int64_t i = 0; bias && i < m; ++i)
      for (int64_t c = first; c < first + count; ++c) y[i * n + c] += bias[c];
  }
}

}  // namespace

void half_forward(int64_t m, int64_t n, int64_t k, const float* x, const Fp16* w, const float* bias, float* y) {
  run(lora_kernels().fp16_dots, m, n, k, x, w, bias, y);
}

void half_forward(int64_t m, int64_t n, int64_t k, const float* x, const Bf16* w, const float* bias, float* y) {
  run(lora_kernels().bf16_dots, m, n, k, x, w, bias, y);
}

}  // namespace fedms
