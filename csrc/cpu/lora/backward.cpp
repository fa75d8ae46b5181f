// The LoRA branch, backward: the gradients of x, the gate, A and B. The products are in kernels.inc.
#include <algorithm>

#include "fedms/lora.h"
#include "operands.h"
#include "sharing.h"

namespace fedms {
namespace {

// One backward pass. What is not needed is null.
struct Backward {
  const Lora& lora;
  const float *dy, *x, *s;
  const LoraGradients& out;
  bool needs_da, needs_db;
  float* ds;                       // (m, R): dy B, then also times scale and gate
  float* weighed;                  // (m, R): S times scale and gate
  bool has_u;                      // ds holds dy B already
  const TransposedB* b = nullptr;  // where dy B is to be made from many rows
  std::vector<const float*> a;

  bool needs_ds() const { return needs_da || out.dx || out.dgate; }
  int64_t rank() const { return lora.total_rank(); }
};

void gate_gradient(const Backward& pass, int64_t first, int64_t count) {
  const int64_t r = pass.rank(), experts = static_cast<int64_t>(pass.lora.experts.size());
  const float *s = pass.s + first * r, *u = pass.ds + first * r;
  for (int64_t i = first; i < first + count; ++i) {
    for (int64_t e = 0; e < experts; ++e) {
      float sum = 0;
      for (int64_t j = 0; j < pass.lora.experts[e].rank; ++j) sum += *s++ * *u++;
      pass.out.dgate[i * experts + e] = pass.lora.experts[e].scale * sum;
    }
  }
}

// dx += dS A, with dropout on it.
void input_gradient(const Backward& pass, int64_t first, int64_t count, float* scratch) {
  const Lora& lora = pass.lora;
  const int64_t r = pass.rank(), k = lora.k;
  const float* ds = pass.ds + first * r;
  if (lora.dropout_p == 0) {
    lora_kernels().expand(count, r, k, ds, r, pass.a.data(), pass.out.dx + first * k, k);
    return;
  }
  for (int64_t i = 0; i < count; i += MASKED_ROWS) {
    const int64_t rows = std::min(MASKED_ROWS, count - i);
    std::fill_n(scratch, rows * k, 0.0f);
    lora_kernels().expand(rows, r, k, ds + i * r, r, pass.a.data(), scratch, k);
    drop_rows(lora, first + i, rows, 0, k, scratch, k, pass.out.dx + (first + i) * k, k, true);
  }
}

// dS, dgate and dx of some rows, which no other rows have a part in.
void row_gradients(const Backward& pass, int64_t first, int64_t count, float* scratch) {
  const Lora& lora = pass.lora;
  const int64_t r = pass.rank(), n = lora.n;
  if (pass.needs_db) weigh(lora, first, count, pass.s + first * r, pass.weighed + first * r);
  if (!pass.needs_ds()) return;
  float* const ds = pass.ds + first * r;
  if (!pass.has_u && pass.b) lora_kernels().dots(count, r, n, pass.dy + first * n, n, pass.b->rows.data(), ds, r);
  if (pass.out.dgate) gate_gradient(pass, first, count);
  weigh(lora, first, count, ds, ds);
  if (pass.out.dx) input_gradient(pass, first, count, scratch);
}

// Columns first .. first + count - 1 of every dA = dS^T x that is needed.
void a_gradients(const Backward& pass, int64_t first, int64_t count, float* scratch) {
  const Lora& lora = pass.lora;
  const int64_t r = pass.rank(), k = lora.k, experts = static_cast<int64_t>(lora.experts.size());
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t j = 0; pass.out.da[e] && j < lora.experts[e].rank; ++j) std::fill_n(pass.out.da[e] + j * k + first, count, 0.0f);
  }
  for (int64_t i = 0; i < lora.m; i += SUMMED_ROWS) {
    const int64_t rows = std::min(SUMMED_ROWS, lora.m - i);
    const float* from = pass.x + i * k + first;
    int64_t stride = k;
    if (lora.dropout_p > 0) {
      drop_rows(lora, i, rows, first, count, from, k, scratch, COLUMNS, false);
      from = scratch;
      stride = COLUMNS;
    }
    const float* part = pass.ds + i * r;
    for (int64_t e = 0; e < experts; part += lora.experts[e].rank, ++e) {
      if (!pass.out.da[e]) continue;
      lora_kernels().reduce(rows, lora.experts[e].rank, count, part, r, from, stride, pass.out.da[e] + first, k);
    }
  }
}

// Rows first .. first + count - 1 of every dB = dy^T (S times scale and gate) that is needed.
void b_gradients(const Backward& pass, int64_t first, int64_t count, float* scratch) {
  const Lora& lora = pass.lora;
  const int64_t r = pass.rank(), n = lora.n, experts = static_cast<int64_t>(lora.experts.size());
  std::fill_n(scratch, r * COLUMNS, 0.0f);
  for (int64_t i = 0; i < lora.m; i += SUMMED_ROWS) {
    const int64_t rows = std::min(SUMMED_ROWS, lora.m - i);
    int64_t j = 0;
    for (int64_t e = 0; e < experts; j += lora.experts[e].rank, ++e) {
      if (!pass.out.db[e]) continue;
      lora_kernels().reduce(rows, lora.experts[e].rank, count, pass.weighed + i * r + j, r, pass.dy + i * n + first, n,
                            scratch + j * COLUMNS, COLUMNS);
    }
  }
  const float* from = scratch;
  for (int64_t e = 0; e < experts; from += lora.experts[e].rank * COLUMNS, ++e) {
    const int64_t rank = lora.experts[e].rank;
    for (int64_t c = 0; pass.out.db[e] && c < count; ++c)
      for (int64_t j = 0; j < rank; ++j) pass.out.db[e][(first + c) * rank + j] = from[j * COLUMNS + c];
  }
}

// On one thread, with B as it lies.
void backward_few(const Backward& pass) {
  const Lora& lora = pass.lora;
  const int64_t m = lora.m, n = lora.n, k = lora.k, r = pass.rank();
  if (pass.needs_ds() && !pass.has_u) {
    float* u = pass.ds;
    for (const LoraExpert& expert : lora.experts) {
      lora_kernels().dots_few(m, expert.rank, n, pass.dy, n, expert.b, u, r);
      u += expert.rank;
    }
  }
  const std::unique_ptr<float[]> scratch = buffer(lora.dropout_p > 0 ? std::max(m * k, SUMMED_ROWS * COLUMNS) : 0);
  row_gradients(pass, 0, m, scratch.get());
  for (int64_t first = 0; pass.needs_da && first < k; first += COLUMNS) {
    a_gradients(pass, first, std::min(COLUMNS, k - first), scratch.get());
  }
  const float* part = pass.weighed;
  for (size_t e = 0; e < lora.experts.size(); part += lora.experts[e].rank, ++e) {
    if (pass.out.db[e]) lora_kernels().outer_few(m, lora.experts[e].rank, n, part, r, pass.dy, n, pass.out.db[e]);
  }
}

void backward_many(const Backward& pass) {
  const Lora& lora = pass.lora;
  const int64_t m = lora.m, n = lora.n, k = lora.k;
  const int64_t chunk = chunk_for(m);
  const int64_t chunks = (m + chunk - 1) / chunk;
  const int64_t a_tasks = pass.needs_da ? (k + COLUMNS - 1) / COLUMNS : 0;
  const int64_t b_tasks = pass.needs_db ? (n + COLUMNS - 1) / COLUMNS : 0;
  const int threads = threads_for(lora, std::max(chunks, a_tasks + b_tasks));
  const int64_t masked_size = lora.dropout_p > 0 ? std::max(MASKED_ROWS * k, SUMMED_ROWS * COLUMNS) : 0;
  const int64_t scratch_size = std::max(pass.rank() * COLUMNS, masked_size);
  const std::unique_ptr<float[]> scratch_of_all = buffer(threads * scratch_size);

  on_threads(threads, [&](Member member) {
    float* const scratch = scratch_of_all.get() + member.thread * scratch_size;
    member.share(chunks, [&](int64_t c) { row_gradients(pass, c * chunk, std::min(chunk, m - c * chunk), scratch); });
    member.wait();  // dA and dB need every row
    member.share(a_tasks + b_tasks, [&](int64_t task) {
      const int64_t first = (task < a_tasks ? task : task - a_tasks) * COLUMNS;
      if (task < a_tasks) {
        a_gradients(pass, first, std::min(COLUMNS, k - first), scratch);
      } else {
        b_gradients(pass, first, std::min(COLUMNS, n - first), scratch);
      }
    });
  });
}

}  // namespace

void lora_backward(const Lora& lora, const float* dy, const float* x, const float* s, const LoraGradients& out) {
  lora_backward_from(lora, dy, x, s, nullptr, out);
}

void lora_backward_from(const Lora& lora, const float* dy, const float* x, const float* s, float* u,
                        const LoraGradients& out) {
  const auto needed = [](const float* gradient) { return gradient != nullptr; };
  Backward pass{lora, dy, x, s, out, std::any_of(out.da.begin(), out.da.end(), needed),
                std::any_of(out.db.begin(), out.db.end(), needed), u, nullptr, u != nullptr, nullptr, rows_of_a(lora)};
  const int64_t size = lora.m * pass.rank();
  const bool makes_u = pass.needs_ds() && !u;
  const std::unique_ptr<float[]> own_u = buffer(makes_u ? size : 0), weighed = buffer(pass.needs_db ? size : 0);
  if (makes_u) pass.ds = own_u.get();
  pass.weighed = weighed.get();
  if (lora.m <= FEW_ROWS) return backward_few(pass);
  std::unique_ptr<TransposedB> b;
  if (makes_u) b = std::make_unique<TransposedB>(lora);
  pass.b = b.get();
  backward_many(pass);
}

}  // namespace fedms
