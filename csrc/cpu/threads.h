// How many threads share the work of a product in fp32.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace fedms {

// At most one for each part that the work can be cut into. The result is at least 1.
inline int threads_for(int64_t multiply_adds, int64_t parts) {
  // Waking a thread costs about as much as this many multiply-adds.
  constexpr int64_t work_per_thread = 1 << 18;
  const int64_t useful = std::min({multiply_adds / work_per_thread, parts, int64_t{omp_get_max_threads()}});
  return static_cast<int>(std::max<int64_t>(1, useful));
}

}  // namespace fedms
