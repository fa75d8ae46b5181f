// The product that makes a head's gradient, of operands that are rounded to bfloat16.
#pragma once

#include <cstdint>

namespace fedms {

constexpr int64_t ROUNDED_PAIRS = 48;  // pairs of tokens whose rounded e are in `work` at a time

// y (rows, columns) += e (rows, tokens) weight (tokens, columns). Both operands are rounded to bfloat16, to nearest and ties to
// even, so that each keeps 8 significant bits whatever its size; products are exact and sums are in float. Every value of y is one
// chain of additions in the order of the tokens. The strides are those from one row to the next. `work` holds
// rows * ROUNDED_PAIRS values.
using RoundedProducts = void (*)(int64_t rows, int64_t tokens, int64_t columns, const float* e, int64_t e_stride,
                                 const float* weight, int64_t weight_stride, float* y, int64_t y_stride, uint32_t* work);

#ifdef FEDMS_X86
void rounded_products_avx512bf16(int64_t rows, int64_t tokens, int64_t columns, const float* e, int64_t e_stride,
                                 const float* weight, int64_t weight_stride, float* y, int64_t y_stride, uint32_t* work);
#endif

}  // namespace fedms
