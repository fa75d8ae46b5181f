// The grid of a launch, and what an error message says of it: what launch.h and the emulator share.
#pragma once

#include <string>

#include "fedms/cuda.h"

namespace fedms::cuda {

struct Grid {
  int x, y = 1, z = 1;
  // It starts while the launch before still runs, as soon as that one lets it, and waits for it in the kernel (compute capability
  // 9.0). Only for a kernel of which every block calls ptx::wait_for_launch_before.
  bool early = false;
};

// What an error message says of a launch.
struct Launch {
  const char* kernel;
  int64_t m, n, k, r;
  const Stream& stream;
};

inline std::string name_of(const Launch& launch) {
  return std::string(launch.kernel) + " (m " + std::to_string(launch.m) + ", n " + std::to_string(launch.n) + ", k " +
         std::to_string(launch.k) + ", total rank " + std::to_string(launch.r) + ")";
}

}  // namespace fedms::cuda
