#include "fedms/token_loss.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../lora/operands.h"
#include "fedms/isa.h"
#include "rounded_products.h"
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

// A stretch of the vocabulary whose logits are in memory at the same time, for all positions of a chunk.
constexpr int64_t STRETCH = TOKEN_STRETCH;
static_assert(STRETCH % TOKENS == 0 && STRETCH % INT8_PANEL == 0);

std::vector<const float*> weight_rows(const TokenHead& head, int64_t first, int64_t count, int64_t column) {
  std::vector<const float*> rows(count);
  for (int64_t j = 0; j < count; ++j) rows[j] = head.weight + (first + j) * head.width + column;
  return rows;
}

// z (rows, count) of tokens first .. first + count - 1, before scale and cap.
void raw_logits(const TokenHead& head, int64_t rows, const float* hidden, int64_t first, int64_t count, float* z) {
  if (head.quantized.packed) {
    int8_columns(head.quantized, rows, head.vocabulary, head.width, hidden, first, count, z);
    return;
  }
#pragma omp parallel for schedule(static)
  for (int64_t c = 0; c < count; c += TOKENS) {
    const int64_t some = std::min(TOKENS, count - c);
    const std::vector<const float*> weights = weight_rows(head, first + c, some, 0);
    lora_kernels().dots(rows, some, head.width, hidden, head.width, weights.data(), z + c, count);
    for (int64_t i = 0; head.bias && i < rows; ++i)
      for (int64_t j = c; j < c + some; ++j) z[i * count + j] += head.bias[first + j];
  }
}

// gradient (rows, width) = diag(factor) gradient + e (weight of tokens first .. first + count - 1), e (rows, count). A thread
// takes columns, so that every value is one chain of additions in the order of the vocabulary.
void add_products(const TokenHead& head, int64_t rows, const float* e, int64_t first, int64_t count, const float* factor,
                  float* gradient) {
  const int64_t d = head.width;
#pragma omp parallel
  {
    const int64_t vectors = (d + 15) / 16, threads = omp_get_num_threads(), t = omp_get_thread_num();
    const int64_t column = std::min(d, vectors * t / threads * 16), last = std::min(d, vectors * (t + 1) / threads * 16);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = column; factor[i] != 1.0f && c < last; ++c) gradient[i * d + c] *= factor[i];
    }
    // The gradient of a quantized head is made of rounded operands where the CPU can multiply those.
    const PairKernels* const rounded = head.quantized.packed ? pair_kernels() : nullptr;
    if (rounded && column < last) {
      add_rounded_products(*rounded, rows, count, last - column, e, count, head.weight + first * d + column, d,
                           gradient + column, d);
    }
    std::vector<float> block(rounded ? 0 : rows * TOKENS);  // of e: its rows lie far apart
    for (int64_t from = 0; !rounded && from < count && column < last; from += TOKENS) {
      const int64_t some = std::min(TOKENS, count - from);
      for (int64_t i = 0; i < rows; ++i) std::memcpy(&block[i * some], e + i * count + from, some * sizeof(float));
      const std::vector<const float*> weights = weight_rows(head, first + from, some, column);
      lora_kernels().expand(rows, some, last - column, block.data(), some, weights.data(), gradient + column, d);
    }
  }
}

// Writes what position i has when all tokens were added, and completes its gradient, in which the label is missing.
void finish(const TokenHead& head, const LogitRow& row, int64_t label, int64_t i, const TokenLogProb& out) {
  const double t = static_cast<double>(row.label) - row.largest, kept = t < -87.0 ? -87.0 : t, e = std::exp(kept);
  const double sum = row.sum + e, log_sum = std::log(sum);
  out.log_p[i] = static_cast<float>(t - log_sum);
  out.confidence[2 * i] = static_cast<float>(log_sum - (row.weighted + e * kept) / sum);
  out.confidence[2 * i + 1] = static_cast<float>(-log_sum);
  out.best[i] = row.best;
  if (!out.gradient) return;
  const float capped = head.cap > 0.0f ? row.label / head.cap : 0.0f;
  const float others = static_cast<float>(-head.scale / sum);
  const float own = static_cast<float>(head.scale * (row.sum / sum)) * (1.0f - capped * capped);
  const float* const weight = head.weight + label * head.width;
  float* const gradient = out.gradient + i * head.width;
  for (int64_t c = 0; c < head.width; ++c) gradient[c] = own * weight[c] + others * gradient[c];
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
  const LogitRowKernel add = row_kernel();
  std::vector<LogitRow> found;
  std::vector<float> factor(std::min(chunk, n));
  for (int64_t first = 0; first < n; first += chunk) {
    const int64_t rows = std::min(chunk, n - first);
    found.assign(rows, {});
    if (out.gradient) std::fill_n(out.gradient + first * d, rows * d, 0.0f);
    for (int64_t token = 0; token < v; token += STRETCH) {
      const int64_t count = std::min(STRETCH, v - token);
      raw_logits(head, rows, hidden + first * d, token, count, work);
#pragma omp parallel for schedule(static)
      for (int64_t i = 0; i < rows; ++i) {
        factor[i] = add(token, count, work + i * count, labels[first + i], head.scale, head.cap, out.gradient != nullptr,
                        found[i]);
      }
      if (out.gradient) add_products(head, rows, work, token, count, factor.data(), out.gradient + first * d);
    }
    for (int64_t i = 0; i < rows; ++i) finish(head, found[i], labels[first + i], first + i, out);
  }
}

}  // namespace fedms
