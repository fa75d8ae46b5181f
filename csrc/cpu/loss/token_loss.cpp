#include "fedms/token_loss.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../lora/operands.h"
#include "fedms/isa.h"
#include "row_kernels.h"

namespace fedms {
namespace {

LogitRowKernel row_kernel() {
#ifdef FEDMS_X86
  if (isa() == Isa::avx512) return logit_row_avx512;
  if (isa() != Isa::portable) return logit_row_avx2;
#endif
  return logit_row_portable;
}

// Tokens whose rows of the weight are multiplied at a time: with the columns of a register tile they stay in the L1 cache.
constexpr int64_t TOKENS = 96;

std::vector<const float*> weight_rows(const TokenHead& head, int64_t first, int64_t count, int64_t column) {
  std::vector<const float*> rows(count);
  for (int64_t j = 0; j < count; ++j) rows[j] = head.weight + (first + j) * head.width + column;
  return rows;
}

// z (rows, vocabulary), before scale and cap.
void raw_logits(const TokenHead& head, int64_t rows, const float* hidden, float* z) {
  const int64_t v = head.vocabulary;
  if (head.quantized.packed) {
    Lora none;
    none.m = rows;
    none.n = v;
    none.k = head.width;
    int8_forward(head.quantized, none, hidden, nullptr, z);
    return;
  }
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < v; first += TOKENS) {
    const int64_t count = std::min(TOKENS, v - first);
    const std::vector<const float*> weights = weight_rows(head, first, count, 0);
    lora_kernels().dots(rows, count, head.width, hidden, head.width, weights.data(), z + first, v);
    for (int64_t i = 0; head.bias && i < rows; ++i)
      for (int64_t j = first; j < first + count; ++j) z[i * v + j] += head.bias[j];
  }
}

// gradient (rows, width) = diag(factor) g weight, g (rows, vocabulary). A thread takes columns, so that every value is one
// chain of additions in the order of the vocabulary.
void multiply_by_weight(const TokenHead& head, int64_t rows, const float* g, const float* factor, float* gradient) {
  const int64_t v = head.vocabulary, d = head.width;
  std::fill_n(gradient, rows * d, 0.0f);
#pragma omp parallel
  {
    const int64_t vectors = (d + 15) / 16, threads = omp_get_num_threads(), t = omp_get_thread_num();
    const int64_t column = std::min(d, vectors * t / threads * 16), last = std::min(d, vectors * (t + 1) / threads * 16);
    std::vector<float> block(rows * TOKENS);  // of g: its rows lie far apart
    for (int64_t first = 0; first < v && column < last; first += TOKENS) {
      const int64_t count = std::min(TOKENS, v - first);
      for (int64_t i = 0; i < rows; ++i) std::memcpy(&block[i * count], g + i * v + first, count * sizeof(float));
      const std::vector<const float*> weights = weight_rows(head, first, count, column);
      lora_kernels().expand(rows, count, last - column, block.data(), count, weights.data(), gradient + column, d);
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = column; c < last; ++c) gradient[i * d + c] *= factor[i];
  }
}

}  // namespace

void token_log_prob(const TokenHead& head, int64_t n, const float* hidden, const int64_t* labels, int64_t chunk,
                    float* work, const TokenLogProb& out) {
  const int64_t v = head.vocabulary, d = head.width;
  if (chunk < 1) throw std::invalid_argument("chunk is " + std::to_string(chunk) + ", expected at least 1");
  for (int64_t i = 0; i < n; ++i) {
    if (labels[i] < 0 || labels[i] >= v) {
      throw std::invalid_argument("labels[" + std::to_string(i) + "] is " + std::to_string(labels[i]) +
                                  ", expected 0 to " + std::to_string(v - 1));
    }
  }
  const LogitRowKernel reduce = row_kernel();
  std::vector<float> factor(std::min(chunk, n));
  for (int64_t first = 0; first < n; first += chunk) {
    const int64_t rows = std::min(chunk, n - first);
    raw_logits(head, rows, hidden + first * d, work);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      const LogitRow row = reduce(v, work + i * v, labels[first + i], head.scale, head.cap, out.gradient != nullptr);
      out.log_p[first + i] = static_cast<float>(row.label - row.largest - row.log_sum);
      out.confidence[2 * (first + i)] = row.entropy;
      out.confidence[2 * (first + i) + 1] = static_cast<float>(-row.log_sum);
      out.best[first + i] = row.best;
      factor[i] = -head.scale * row.inverse;
    }
    if (out.gradient) multiply_by_weight(head, rows, work, factor.data(), out.gradient + first * d);
  }
}

}  // namespace fedms
