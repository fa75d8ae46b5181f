#include "fedms/rms_norm.h"

#include <cmath>

#include "threads.h"

namespace fedms {

void rms_norm(int64_t rows, int64_t width, const float* x, const float* weight, double epsilon, float* y) {
  constexpr int LANES = 16;  // chains of additions, which the compiler turns into vectors
  const int threads = threads_for(4 * rows * width, FP32_WORK, rows);
  share_out(threads, rows, [&](int64_t row) {
    const float* const from = x + row * width;
    float* const to = y + row * width;
    float sums[LANES] = {};
    int64_t c = 0;
    for (; c + LANES <= width; c += LANES)
      for (int l = 0; l < LANES; ++l) sums[l] += from[c + l] * from[c + l];
    double sum = 0;
    for (; c < width; ++c) sum += static_cast<double>(from[c]) * from[c];
    for (const float lane : sums) sum += lane;
    const float inverse = static_cast<float>(1 / std::sqrt(sum / static_cast<double>(width) + epsilon));
    for (c = 0; c < width; ++c) to[c] = weight[c] * (from[c] * inverse);
  });
}

}  // namespace fedms
