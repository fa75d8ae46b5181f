// The product that makes a head's gradient, of operands that are rounded to bfloat16.
#pragma once

#include <cstdint>

#include "../bfloat16/pairs.h"

namespace fedms {

// y (rows, columns) += e (rows, tokens) weight (tokens, columns). The strides are those from one row to the next.
void add_rounded_products(const PairKernels& kernels, int64_t rows, int64_t tokens, int64_t columns, const float* e,
                          int64_t e_stride, const float* weight, int64_t weight_stride, float* y, int64_t y_stride);

}  // namespace fedms
