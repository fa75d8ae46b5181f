// The LoRA branch of a linear layer with several gated experts, in fp32, beside a frozen GEMM that others run.
//
//   S_e = dropout(x) A_e^T            y += sum over e of scale_e * diag(gate_e) S_e B_e^T
//
// All matrices are row-major and dense. S holds the S_e side by side: (m, R), R the sum of the ranks. The results
// are bitwise the same for any number of threads. Nothing is written but the outputs; no pointer may alias another.
#pragma once

#include <cstdint>
#include <vector>

namespace fedms {

struct LoraExpert {
  int64_t rank;
  float scale;
  const float* a;  // (rank, k)
  const float* b;  // (n, rank)
};

struct Lora {
  int64_t m, n, k;                  // rows of x, columns of y, columns of x
  std::vector<LoraExpert> experts;  // those that are applied
  const float* gate = nullptr;      // gate[i * gate_row_stride + e * gate_expert_stride]; null means 1
  int64_t gate_row_stride = 0, gate_expert_stride = 0;
  double dropout_p = 0;  // the mask is philox_mask(seed, m, k, dropout_p) of fedms_ext/reference.py, bit for bit
  uint64_t seed = 0;
  int64_t first_row = 0;  // where these rows lie in the mask, if they are a part of the layer's

  int64_t total_rank() const {
    int64_t total = 0;
    for (const LoraExpert& expert : experts) total += expert.rank;
    return total;
  }
};

// s (m, R) is written, y (m, n) is added to.
void lora_forward(const Lora& lora, const float* x, float* s, float* y);

// What lora_backward computes; a null pointer is a gradient that is not needed.
struct LoraGradients {
  float* dx = nullptr;          // (m, k), added to: it holds dy W
  float* dgate = nullptr;       // (m, experts), written
  std::vector<float*> da, db;   // of each expert, (rank, k) and (n, rank), written
};

// x may be null if no da is needed, s if neither dgate nor any db is.
void lora_backward(const Lora& lora, const float* dy, const float* x, const float* s, const LoraGradients& out);

}  // namespace fedms
