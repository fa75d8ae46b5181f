// The LoRA branch, forward: S = x A^T and y += S B^T. The products are in kernels.inc.
#include <algorithm>

#include "fedms/lora.h"
#include "operands.h"
#include "sharing.h"

namespace fedms {
namespace {

// s (m, R) = x A^T with dropout.
void shrink(const Lora& lora, const std::vector<const float*>& a, int64_t first, int64_t count, const float* x, float* s,
            float* masked) {
  const int64_t r = lora.total_rank(), k = lora.k;
  if (lora.dropout_p == 0) {
    lora_kernels().dots(count, r, k, x + first * k, k, a.data(), s + first * r, r);
    return;
  }
  for (int64_t i = first; i < first + count; i += MASKED_ROWS) {
    const int64_t rows = std::min(MASKED_ROWS, first + count - i);
    drop_rows(lora, i, rows, 0, k, x + i * k, k, masked, k, false);
    lora_kernels().dots(rows, r, k, masked, k, a.data(), s + i * r, r);
  }
}

void forward_few(const Lora& lora, const float* x, float* s, float* y) {
  const int64_t m = lora.m, r = lora.total_rank();
  const std::unique_ptr<float[]> masked = buffer(lora.dropout_p > 0 ? m * lora.k : 0), weighed = buffer(m * r);
  shrink(lora, rows_of_a(lora), 0, m, x, s, masked.get());
  weigh(lora, 0, m, s, weighed.get());
  const float* part = weighed.get();
  for (const LoraExpert& expert : lora.experts) {
    lora_kernels().expand_few(m, expert.rank, lora.n, part, r, expert.b, y, lora.n);
    part += expert.rank;
  }
}

}  // namespace

void lora_forward(const Lora& lora, const float* x, float* s, float* y) {
  const LoraKernels& kernel = lora_kernels();
  const int64_t m = lora.m, n = lora.n, k = lora.k, r = lora.total_rank();
  if (m == 0 || r == 0) return;
  if (m <= FEW_ROWS) return forward_few(lora, x, s, y);
  const std::vector<const float*> a = rows_of_a(lora);
  const TransposedB b(lora);
  const int64_t chunk = chunk_for(m);
  const int64_t chunks = (m + chunk - 1) / chunk;
  const int threads = threads_for(lora, chunks);
  const int64_t masked_size = lora.dropout_p > 0 ? MASKED_ROWS * k : 0;
  const int64_t scratch_size = chunk * r + masked_size;
  const std::unique_ptr<float[]> scratch = buffer(threads * scratch_size);

  on_threads(threads, [&](Member member) {
    float* weighed = scratch.get() + member.thread * scratch_size;
    float* masked = weighed + chunk * r;
    member.share(chunks, [&](int64_t c) {
      const int64_t first = c * chunk, count = std::min(chunk, m - first);
      shrink(lora, a, first, count, x, s, masked);
      weigh(lora, first, count, s + first * r, weighed);
      kernel.expand(count, r, n, weighed, r, b.rows.data(), y + first * n, n);
    });
  });
}

}  // namespace fedms
