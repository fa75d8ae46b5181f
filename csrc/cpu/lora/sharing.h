// How the rows and columns of the LoRA branch are shared among threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "../threads.h"
#include "fedms/lora.h"

namespace fedms {

// Rows that one thread takes at a time: a multiple of every tile height, and few enough that x, S and y of the
// chunk stay in the L2 cache between the products. Dropout works on as many masked rows.
constexpr int64_t ROW_CHUNK = 48;
constexpr int64_t MASKED_ROWS = 12;
// dA and dB: columns per task, and rows that are summed up in registers before they are added to memory.
constexpr int64_t COLUMNS = 96;
constexpr int64_t SUMMED_ROWS = 64;

// Rows do not depend on one another, so small inputs may be cut as finely as there are threads.
inline int64_t chunk_for(int64_t m) {
  const int64_t threads = omp_get_max_threads();
  return std::min(ROW_CHUNK, std::max<int64_t>(6, (m + threads - 1) / threads));
}

inline int threads_for(const Lora& lora, int64_t tasks) {
  return threads_for(lora.m * lora.total_rank() * (lora.n + lora.k), LORA_WORK, tasks);
}

}  // namespace fedms
