// The LoRA branch: how its products are blocked and shared among threads. The products are in kernels.inc.
#include "fedms/lora.h"

#include <omp.h>

#include <algorithm>

#include "operands.h"

namespace fedms {
namespace {

// Rows that one thread takes at a time: a multiple of every tile height, and few enough that x, S and y of the
// chunk stay in the L2 cache between the products. Dropout works on as many masked rows.
constexpr int64_t ROW_CHUNK = 48;
constexpr int64_t MASKED_ROWS = 12;
// dA and dB: columns per task, and rows that are summed up in registers before they are added to memory.
constexpr int64_t COLUMNS = 96;
constexpr int64_t SUMMED_ROWS = 64;

// Rows do not depend on one another, so small inputs may be cut as finely as there are threads.
int64_t chunk_for(int64_t m) {
  const int64_t threads = omp_get_max_threads();
  return std::min(ROW_CHUNK, std::max<int64_t>(6, (m + threads - 1) / threads));
}

int threads_for(const Lora& lora, int64_t tasks) {
  // Waking threads costs about as much as this many multiply-adds.
  constexpr int64_t work_per_thread = 1 << 17;
  const int64_t work = lora.m * lora.total_rank() * (lora.n + lora.k);
  const int64_t useful = std::min(work / work_per_thread, tasks);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(useful, omp_get_max_threads())));
}

}  // namespace

void lora_forward(const Lora& lora, const float* x, float* s, float* y) {
  const LoraKernels& kernel = lora_kernels();
  const int64_t m = lora.m, n = lora.n, k = lora.k, r = lora.total_rank();
  if (m == 0 || r == 0) return;
  const std::vector<const float*> a = rows_of_a(lora);
  const TransposedB b(lora);
  const int64_t chunk = chunk_for(m);
  const int64_t chunks = (m + chunk - 1) / chunk;
  const int threads = threads_for(lora, chunks);
  const int64_t masked_size = lora.dropout_p > 0 ? MASKED_ROWS * k : 0;
  const int64_t scratch_size = chunk * r + masked_size;
  const std::unique_ptr<float[]> scratch = buffer(threads * scratch_size);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* weighed = scratch.get() + omp_get_thread_num() * scratch_size;
    float* masked = weighed + chunk * r;
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t first = c * chunk, count = std::min(chunk, m - first);
      if (lora.dropout_p > 0) {
        for (int64_t i = first; i < first + count; i += MASKED_ROWS) {
          const int64_t rows = std::min(MASKED_ROWS, first + count - i);
          drop_rows(lora, i, rows, 0, k, x + i * k, k, masked, k, false);
          kernel.dots(rows, r, k, masked, k, a.data(), s + i * r, r);
        }
      } else {
        kernel.dots(count, r, k, x + first * k, k, a.data(), s + first * r, r);
      }
      weigh(lora, first, count, s + first * r, weighed);
      kernel.expand(count, r, n, weighed, r, b.rows.data(), y + first * n, n);
    }
  }
}

void lora_backward(const Lora& lora, const float* dy, const float* x, const float* s, const LoraGradients& out) {
  lora_backward_from(lora, dy, x, s, nullptr, out);
}

void lora_backward_from(const Lora& lora, const float* dy, const float* x, const float* s, float* u,
                        const LoraGradients& out) {
  const LoraKernels& kernel = lora_kernels();
  const int64_t m = lora.m, n = lora.n, k = lora.k, r = lora.total_rank();
  const int64_t experts = static_cast<int64_t>(lora.experts.size());
  const auto needed = [](const float* gradient) { return gradient != nullptr; };
  const bool needs_da = std::any_of(out.da.begin(), out.da.end(), needed);
  const bool needs_db = std::any_of(out.db.begin(), out.db.end(), needed);
  const bool needs_ds = needs_da || out.dx || out.dgate;

  const std::vector<const float*> a = rows_of_a(lora);
  std::unique_ptr<TransposedB> b;
  std::unique_ptr<float[]> own_u;
  const bool needs_u = needs_ds && !u;
  if (needs_u) {
    b = std::make_unique<TransposedB>(lora);
    own_u = buffer(m * r);
    u = own_u.get();
  }
  float* const ds = u;  // dy B, then also times scale and gate
  const std::unique_ptr<float[]> weighed = buffer(needs_db ? m * r : 0);  // S times scale and gate

  const int64_t chunk = chunk_for(m);
  const int64_t chunks = (m + chunk - 1) / chunk;
  const int64_t a_tasks = needs_da ? (k + COLUMNS - 1) / COLUMNS : 0;
  const int64_t b_tasks = needs_db ? (n + COLUMNS - 1) / COLUMNS : 0;
  const int threads = threads_for(lora, std::max(chunks, a_tasks + b_tasks));
  const int64_t scratch_size =
      std::max({r * COLUMNS, lora.dropout_p > 0 ? MASKED_ROWS * k : 0, lora.dropout_p > 0 ? SUMMED_ROWS * COLUMNS : 0});
  const std::unique_ptr<float[]> scratch_of_all = buffer(threads * scratch_size);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* scratch = scratch_of_all.get() + omp_get_thread_num() * scratch_size;

#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t first = c * chunk, count = std::min(chunk, m - first);
      if (needs_db) weigh(lora, first, count, s + first * r, weighed.get() + first * r);
      if (!needs_ds) continue;
      float* u_rows = ds + first * r;
      if (needs_u) kernel.dots(count, r, n, dy + first * n, n, b->rows.data(), u_rows, r);
      if (out.dgate) {
        const float *su = s + first * r, *uu = u_rows;
        for (int64_t i = first; i < first + count; ++i) {
          for (int64_t e = 0; e < experts; ++e) {
            float sum = 0;
            for (int64_t j = 0; j < lora.experts[e].rank; ++j) sum += *su++ * *uu++;
            out.dgate[i * experts + e] = lora.experts[e].scale * sum;
          }
        }
      }
      weigh(lora, first, count, u_rows, u_rows);
      if (out.dx && lora.dropout_p > 0) {
        for (int64_t i = 0; i < count; i += MASKED_ROWS) {
          const int64_t rows = std::min(MASKED_ROWS, count - i);
          std::fill_n(scratch, rows * k, 0.0f);
          kernel.expand(rows, r, k, u_rows + i * r, r, a.data(), scratch, k);
          drop_rows(lora, first + i, rows, 0, k, scratch, k, out.dx + (first + i) * k, k, true);
        }
      } else if (out.dx) {
        kernel.expand(count, r, k, u_rows, r, a.data(), out.dx + first * k, k);
      }
    }  // the implicit barrier: dA and dB need every row

#pragma omp for schedule(static)
    for (int64_t task = 0; task < a_tasks + b_tasks; ++task) {
      if (task < a_tasks) {
        const int64_t first = task * COLUMNS, count = std::min(COLUMNS, k - first);
        for (int64_t e = 0; e < experts; ++e) {
          for (int64_t j = 0; out.da[e] && j < lora.experts[e].rank; ++j) std::fill_n(out.da[e] + j * k + first, count, 0.0f);
        }
        for (int64_t i = 0; i < m; i += SUMMED_ROWS) {
          const int64_t rows = std::min(SUMMED_ROWS, m - i);
          const float* from = x + i * k + first;
          int64_t stride = k;
          if (lora.dropout_p > 0) {
            drop_rows(lora, i, rows, first, count, from, k, scratch, COLUMNS, false);
            from = scratch;
            stride = COLUMNS;
          }
          const float* part = ds + i * r;
          for (int64_t e = 0; e < experts; part += lora.experts[e].rank, ++e) {
            if (out.da[e]) kernel.reduce(rows, lora.experts[e].rank, count, part, r, from, stride, out.da[e] + first, k);
          }
        }
      } else {
        const int64_t first = (task - a_tasks) * COLUMNS, count = std::min(COLUMNS, n - first);
        std::fill_n(scratch, r * COLUMNS, 0.0f);
        for (int64_t i = 0; i < m; i += SUMMED_ROWS) {
          const int64_t rows = std::min(SUMMED_ROWS, m - i);
          int64_t j = 0;
          for (int64_t e = 0; e < experts; j += lora.experts[e].rank, ++e) {
            if (!out.db[e]) continue;
            kernel.reduce(rows, lora.experts[e].rank, count, weighed.get() + i * r + j, r, dy + i * n + first, n,
                          scratch + j * COLUMNS, COLUMNS);
          }
        }
        const float* from = scratch;
        for (int64_t e = 0; e < experts; from += lora.experts[e].rank * COLUMNS, ++e) {
          const int64_t rank = lora.experts[e].rank;
          for (int64_t c = 0; out.db[e] && c < count; ++c)
            for (int64_t j = 0; j < rank; ++j) out.db[e][(first + c) * rank + j] = from[j * COLUMNS + c];
        }
      }
    }
  }
}

}  // namespace fedms
