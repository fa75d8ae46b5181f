// The operands of the LoRA branch in the form that the kernels want, shared by the layers that contain one.
#pragma once

#ifdef FEDMS_X86
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <memory>
#include <vector>

#include "fedms/isa.h"
#include "fedms/lora.h"
#include "kernels.h"

namespace fedms {

inline const LoraKernels& lora_kernels() {
#ifdef FEDMS_X86
  if (isa() == Isa::avx512) return lora_avx512;
  if (isa() == Isa::avx2 || isa() == Isa::avxvnni) return lora_avx2;
#endif
  return lora_portable;
}

// An uninitialized buffer.
inline std::unique_ptr<float[]> buffer(int64_t size) { return std::unique_ptr<float[]>(new float[size]); }

// to (r, n) = b^T, b (n, r); the strides are those from one row to the next. In blocks that are one cache line wide where they
// are written.
inline void transpose(int64_t n, int64_t r, const float* b, int64_t stride, float* to, int64_t to_stride) {
  for (int64_t first = 0; first < n; first += 16) {
    const int64_t last = std::min(first + 16, n);
    for (int64_t j = 0; j < r; j += 4) {
      int64_t c = first;
#ifdef FEDMS_X86  // SSE, which all of these have, takes a fourth of the time
      for (; j + 4 <= r && c + 4 <= last; c += 4) {
        __m128 row[4];
        for (int i = 0; i < 4; ++i) row[i] = _mm_loadu_ps(b + (c + i) * stride + j);
        _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
        for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + (j + i) * to_stride + c, row[i]);
      }
#endif
      for (; c < last; ++c)
        for (int64_t i = j; i < std::min(j + 4, r); ++i) to[i * to_stride + c] = b[c * stride + i];
    }
  }
}

// B_e^T of all experts, (R, n), and pointers to its rows.
struct TransposedB {
  std::unique_ptr<float[]> data;
  std::vector<const float*> rows;

  explicit TransposedB(const Lora& lora) : data(buffer(lora.total_rank() * lora.n)) {
    float* to = data.get();
    for (const LoraExpert& expert : lora.experts) {
      transpose(lora.n, expert.rank, expert.b, expert.rank, to, lora.n);
      for (int64_t j = 0; j < expert.rank; ++j, to += lora.n) rows.push_back(to);
    }
  }
};

inline std::vector<const float*> rows_of_a(const Lora& lora) {
  std::vector<const float*> rows;
  rows.reserve(lora.total_rank());
  for (const LoraExpert& expert : lora.experts)
    for (int64_t j = 0; j < expert.rank; ++j) rows.push_back(expert.a + j * lora.k);
  return rows;
}

inline float gate_at(const Lora& lora, int64_t row, int64_t expert) {
  return lora.gate ? lora.gate[row * lora.gate_row_stride + expert * lora.gate_expert_stride] : 1.0f;
}

// to = from, each expert's part of every row times its scale and gate; rows first .. first + count - 1.
inline void weigh(const Lora& lora, int64_t first, int64_t count, const float* from, float* to) {
  for (int64_t i = first; i < first + count; ++i) {
    for (size_t e = 0; e < lora.experts.size(); ++e) {
      const float factor = lora.experts[e].scale * gate_at(lora, i, e);
      for (int64_t j = 0; j < lora.experts[e].rank; ++j) *to++ = factor * *from++;
    }
  }
}

inline void drop_rows(const Lora& lora, int64_t row, int64_t rows, int64_t column, int64_t columns, const float* from,
               int64_t from_stride, float* to, int64_t to_stride, bool add) {
  for (int64_t i = 0; i < rows; ++i) {
    const auto place = static_cast<uint64_t>((lora.first_row + row + i) * lora.k + column);
    lora_kernels().dropout(lora.dropout_p, lora.seed, place, columns, from + i * from_stride, to + i * to_stride, add);
  }
}

// Up to so many rows of fp32 B is used as it lies: to transpose (768, 8) takes 1.6 us on a Zen 4, longer than the products. dA
// and dB of one row went from 5.1 us to 2.2 us; at four rows it is no gain. The int8 layer keeps to the transpose in what has a
// row of its own, y and dx, whose bits do not depend on the other rows.
constexpr int64_t FEW_ROWS = 2;

// lora_backward, with u = dy B of all experts side by side, (m, R), where it is known already (null: it is not). It is
// overwritten.
void lora_backward_from(const Lora& lora, const float* dy, const float* x, const float* s, float* u,
                        const LoraGradients& out);

}  // namespace fedms
