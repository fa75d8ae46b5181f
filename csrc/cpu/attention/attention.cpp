// Attention of short sequences: how the heads are shared among threads, and the products, which are those of the LoRA branch.
//
// One pass over a head holds its K, V, their transposes and a block of rows of P, which stay in the caches where PyTorch's
// kernel, made for long sequences, prepares as much for every head as it computes. On a Zen 4, one thread, 384 heads of 64 rows
// of 32 values, forward and backward: from the rate of fp32 products 10 ms were expected of PyTorch's 21.5 ms.
#include "fedms/attention.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "../lora/operands.h"
#include "../threads.h"
#include "heads.h"
#include "rounded.h"

namespace fedms {
namespace {

constexpr int64_t BLOCK = 48;  // rows of P at a time: a multiple of every tile height

std::vector<const float*> rows_of(const float* first, int64_t count, int64_t stride) {
  std::vector<const float*> rows(count);
  for (int64_t j = 0; j < count; ++j) rows[j] = first + j * stride;
  return rows;
}

// The rows of one head's k or v, and of its transpose.
struct Side {
  std::unique_ptr<float[]> transposed;
  std::vector<const float*> rows, columns;

  Side(const Attention& a, const Heads<const float>& heads, int64_t b, int64_t h) : transposed(buffer(a.keys * a.width)) {
    const float* const first = head_of(heads, b, h);
    transpose(a.keys, a.width, first, heads.row_stride, transposed.get(), a.keys);
    rows = rows_of(first, a.keys, heads.row_stride);
    columns = rows_of(transposed.get(), a.width, a.keys);
  }
};

// to (count, columns) = x (count, rows) times the rows, of `columns` values each. Strides are values from one row to the next.
void product(int64_t count, const float* x, int64_t x_stride, const std::vector<const float*>& rows, int64_t columns, float* to,
             int64_t to_stride) {
  for (int64_t i = 0; i < count; ++i) std::fill_n(to + i * to_stride, columns, 0.0f);
  lora_kernels().expand(count, static_cast<int64_t>(rows.size()), columns, x, x_stride, rows.data(), to, to_stride);
}

void forward_head(const Attention& a, int64_t b, int64_t h, const Heads<float>& out, SoftmaxRow* softmax) {
  const Side k(a, a.k, b, h);
  const std::vector<const float*> v = rows_of(head_of(a.v, b, h), a.keys, a.v.row_stride);
  const std::unique_ptr<float[]> p = buffer(BLOCK * a.keys);
  for (int64_t first = 0; first < a.queries; first += BLOCK) {
    const int64_t count = std::min(BLOCK, a.queries - first);
    product(count, head_of(a.q, b, h) + first * a.q.row_stride, a.q.row_stride, k.columns, a.keys, p.get(), a.keys);
    for (int64_t i = 0; i < count; ++i) {
      softmax[first + i] = attention_rows().exponentials(a.keys, a.scale, mask_row(a, b, h, first + i), p.get() + i * a.keys);
    }
    float* const to = head_of(out, b, h) + first * out.row_stride;
    product(count, p.get(), a.keys, v, a.width, to, out.row_stride);
    normalize(count, a.width, softmax + first, to, out.row_stride);
  }
}

void backward_head(const Attention& a, int64_t b, int64_t h, const SoftmaxRow* softmax, const AttentionGradients& g) {
  const Side k(a, a.k, b, h), v(a, a.v, b, h);
  const std::unique_ptr<float[]> p = buffer(BLOCK * a.keys), ds = buffer(BLOCK * a.keys);
  float *const dk = head_of(g.dk, b, h), *const dv = head_of(g.dv, b, h);
  for (int64_t j = 0; j < a.keys; ++j) {
    std::fill_n(dk + j * g.dk.row_stride, a.width, 0.0f);
    std::fill_n(dv + j * g.dv.row_stride, a.width, 0.0f);
  }
  for (int64_t first = 0; first < a.queries; first += BLOCK) {
    const int64_t count = std::min(BLOCK, a.queries - first);
    const float* const q = head_of(a.q, b, h) + first * a.q.row_stride;
    const float* const dout = head_of(g.dout, b, h) + first * g.dout.row_stride;
    product(count, q, a.q.row_stride, k.columns, a.keys, p.get(), a.keys);
    product(count, dout, g.dout.row_stride, v.columns, a.keys, ds.get(), a.keys);
    for (int64_t i = 0; i < count; ++i) {
      attention_rows().gradients(a.keys, a.scale, mask_row(a, b, h, first + i), softmax[first + i], p.get() + i * a.keys,
                                 ds.get() + i * a.keys);
    }
    const LoraKernels& kernels = lora_kernels();
    kernels.reduce(count, a.keys, a.width, p.get(), a.keys, dout, g.dout.row_stride, dv, g.dv.row_stride);
    kernels.reduce(count, a.keys, a.width, ds.get(), a.keys, q, a.q.row_stride, dk, g.dk.row_stride);
    product(count, ds.get(), a.keys, k.rows, a.width, head_of(g.dq, b, h) + first * g.dq.row_stride, g.dq.row_stride);
  }
}

// Calls worker(b, h, first of the head's rows) for every head; each thread makes its own worker.
template <class MakeWorker>
void for_heads(const Attention& a, MakeWorker make_worker) {
  const int64_t all = a.batch * a.heads;
  const int threads = threads_for(all * a.queries * a.keys * a.width, FP32_WORK, all);
  Queue heads(all);
  on_threads(threads, [&](Member) {
    const auto worker = make_worker();
    heads.take([&](int64_t i) { worker(i / a.heads, i % a.heads, i * a.queries); });
  });
}

const PairKernels* rounding(const Attention& attention) { return attention.rounded ? pair_kernels() : nullptr; }

}  // namespace

const AttentionRows& attention_rows() {
#ifdef FEDMS_X86
  if (isa() == Isa::avx512) return attention_rows_avx512;
  if (isa() == Isa::avx2 || isa() == Isa::avxvnni) return attention_rows_avx2;
#endif
  return attention_rows_portable;
}

void attention_forward(const Attention& attention, const Heads<float>& out, SoftmaxRow* softmax) {
  if (const PairKernels* kernels = rounding(attention)) {
    return for_heads(attention, [&] {
      return [&, heads = std::make_unique<RoundedHeads>(*kernels, attention)](int64_t b, int64_t h, int64_t row) {
        heads->forward(b, h, out, softmax + row);
      };
    });
  }
  for_heads(attention, [&] {
    return [&](int64_t b, int64_t h, int64_t row) { forward_head(attention, b, h, out, softmax + row); };
  });
}

void attention_backward(const Attention& attention, const Heads<const float>& dout, const SoftmaxRow* softmax,
                        const Heads<float>& dq, const Heads<float>& dk, const Heads<float>& dv) {
  const AttentionGradients gradients{dout, dq, dk, dv};
  if (const PairKernels* kernels = rounding(attention)) {
    return for_heads(attention, [&] {
      return [&, heads = std::make_unique<RoundedHeads>(*kernels, attention)](int64_t b, int64_t h, int64_t row) {
        heads->backward(b, h, softmax + row, gradients);
      };
    });
  }
  for_heads(attention, [&] {
    return [&](int64_t b, int64_t h, int64_t row) { backward_head(attention, b, h, softmax + row, gradients); };
  });
}

}  // namespace fedms
