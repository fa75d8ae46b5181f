// How many threads share a piece of work.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace fedms {

// Waking a thread costs about as much as so many multiply-adds: of a product in fp32, of the LoRA branch, whose operands are
// read more often than they are multiplied, and of a product of integers.
constexpr int64_t FP32_WORK = 1 << 18, LORA_WORK = 1 << 17, INTEGER_WORK = 1 << 19;

// At most one thread for `work_per_thread` multiply-adds, and for each part that the work can be cut into. At least 1.
inline int threads_for(int64_t multiply_adds, int64_t work_per_thread, int64_t parts) {
  const int64_t useful = std::min({multiply_adds / work_per_thread, parts, int64_t{omp_get_max_threads()}});
  return static_cast<int>(std::max<int64_t>(1, useful));
}

}  // namespace fedms
