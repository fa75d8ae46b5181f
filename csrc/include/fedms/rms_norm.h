// The norm of a row by its root mean square (Zhang and Sennrich, arXiv 1910.07467), without a gradient.
//
//   y[i][c] = weight[c] * x[i][c] / sqrt(mean over j of x[i][j]^2 + epsilon)
#pragma once

#include <cstdint>

namespace fedms {

// x and y (rows, width) row-major and dense, weight (width,). A row's values depend on no other row, and not on the number of
// threads.
void rms_norm(int64_t rows, int64_t width, const float* x, const float* weight, double epsilon, float* y);

}  // namespace fedms
