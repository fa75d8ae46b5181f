// What an instruction set brings to the int8 linear layer. One table each.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fedms/int8.h"

namespace fedms {

// A strip of rows of the quantized x times one panel of the packed weight, and all that is added to it.
struct Int8Strip {
  int64_t rows, k;             // k rounded up to a multiple of `group`
  const void* q;               // rows of `k` elements
  int64_t q_stride;            // from one row to the next, in elements
  const float* q_scale;        // one a row, as `q_zero`
  const int32_t* q_zero;       // what q holds for x = 0
  const int8_t* panel;         // [k / group][panel][group]
  const int32_t* minus_sums;   // of the panel's columns: times q_zero, this is where the sums of products start
  const float* scale;          // `panel` values, as `bias`, which may be null, and every row of `expand`
  const float* bias;
  int64_t rank;
  const float* s;              // (rows, rank): row i gets the sum over j of s[i][j] * expand[j] added
  const float* const* expand;
  int64_t expand_column;       // where the panel starts in these rows
  float* y;                    // `panel` columns a row
  int64_t y_stride;
};

// Rows that are quantized at a time, before their S is made: they stay in the L1 cache from the one pass over x to the other.
constexpr int64_t PREPARED_ROWS = 12;

// The most columns of S that `quantize_along` makes, and the longest rows that it is used for: of longer ones `shrink` leaves the
// L1 cache, and two rows at a time read it more often than `dots` does (1024 rows, 1536 -> 384: 3 % slower).
constexpr int64_t ALONG = 8, LONGEST_ALONG = 1024;

struct Int8Kernels {
  const char* name;
  int32_t id;            // stored with a packed weight
  int32_t panel, group;  // columns of a panel, and consecutive k that lie side by side
  int32_t q_size;        // bytes of a quantized value
  int32_t most_steps;    // that a quantized value has room for
  // Quantizes rows of x in so many steps (see int8.h): q = xq + q_zero. What lies between k and its next multiple of
  // `group` may be anything, because the weight is zero there; q_stride is at least that.
  void (*quantize)(int64_t rows, int64_t k, int32_t steps, const float* x, void* q, int64_t q_stride, float* q_scale,
                   int32_t* q_zero);
  void (*multiply)(const Int8Strip& strip);
  // Blocks of `block` (4, 16 or 64) of `count` values times the Hadamard matrix of int8.h. `count` is a multiple of `block`.
  void (*rotate)(int64_t count, int32_t block, const float* x, float* to);
  // Makes 4-bit codes wide: to[i] = (levels[code i] * factors[i / group % panel] + 2^14) >> 15, i < count, a multiple
  // of 64. Of every 64 codes the first 32 are the low nibbles of 32 bytes, the others the high ones.
  void (*expand)(int64_t count, const uint8_t* nibbles, const int16_t* levels, const int16_t* factors, int8_t* to);
  // The levels of 64 codes, in their order.
  void (*decode)(const uint8_t* nibbles, const float* levels, float* to);
  // Sums along the columns of a panel, for the gradient of x. The codes of a panel come `panel * group` at a time, of `group`
  // values of k; every such step has 16 sums of its own, to each of which belong the codes that lie a multiple of 16 apart:
  //   sums[row][16 * step + i % 16] += levels[code i of the step] * factors[row][i],   i < panel * group
  // `count` codes are a multiple of 32 * panel; factors is (rows, panel * group).
  void (*fold)(int64_t rows, int64_t count, const uint8_t* nibbles, const float* levels, const float* factors, float* sums,
               int64_t sums_stride);
  // `quantize`, and s[i][j] = the sum over c of x[i][c] * shrink[j][c], j < rank <= ALONG, in the same bits as `dots` of
  // LoraKernels, so that x is read once for both. Null where it would not pay.
  void (*quantize_along)(int64_t rows, int64_t k, int32_t steps, const float* x, void* q, int64_t q_stride, float* q_scale,
                         int32_t* q_zero, int64_t rank, const float* const* shrink, float* s, int64_t s_stride) = nullptr;
};

// How a row is quantized, from the bits of its floats: `largest` as signed integers, at least 0, which is its largest
// positive value, and as unsigned ones, which is its lowest negative value if there is one. (Without the sign, floats
// are ordered as their bits, and NaN lies above all.)
struct Int8Levels {
  float scale, inverse;
  int32_t zero;

  Int8Levels() = default;
  Int8Levels(int32_t largest, uint32_t largest_unsigned, int32_t steps) {
    const uint32_t lowest_bits = largest_unsigned >> 31 ? largest_unsigned : 0;
    float high, low;
    std::memcpy(&high, &largest, sizeof high);
    std::memcpy(&low, &lowest_bits, sizeof low);
    const float divisor = static_cast<float>(steps);
    scale = high / divisor - low / divisor;
    if (scale >= INT8_TINY && scale < __builtin_inff()) {
      inverse = 1.0f / scale;
      zero = static_cast<int32_t>(std::nearbyint(-low * inverse));
    } else {
      scale = scale < INT8_TINY ? 0.0f : __builtin_nanf("");
      inverse = 0;
      zero = 0;
    }
  }
};

extern const Int8Kernels int8_portable;
#ifdef FEDMS_X86
extern const Int8Kernels int8_avx2;
extern const Int8Kernels int8_avx2_narrow;
extern const Int8Kernels int8_avxvnni;
extern const Int8Kernels int8_avx512vnni;
#endif
#ifdef FEDMS_ARM64
extern const Int8Kernels int8_dotprod;
extern const Int8Kernels int8_i8mm;
#endif

}  // namespace fedms
