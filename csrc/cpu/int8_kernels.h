// What an instruction set brings to the int8 linear layer. One table each.
#pragma once

#include <cstdint>

namespace fedms {

// A strip of rows of the quantised x times one panel of the packed weight, and all that is added to it.
struct Int8Strip {
  int64_t rows, k;             // k rounded up to a multiple of `group`
  const void* q;               // rows of `k` elements, one behind the other
  const float* q_scale;        // one a row
  const int8_t* panel;         // [k / group][panel][group]
  const int32_t* start;        // where the sums start: takes away what the offset of q adds to them
  const float* scale;          // `panel` values, as `bias`, which may be null, and every row of `expand`
  const float* bias;
  int64_t rank;
  const float* s;              // (rows, rank): row i gets the sum over j of s[i][j] * expand[j] added
  const float* const* expand;
  int64_t expand_column;       // where the panel starts in these rows
  float* y;                    // `panel` columns a row
  int64_t y_stride;
};

struct Int8Kernels {
  const char* name;
  int32_t id;            // stored with a packed weight
  int32_t panel, group;  // columns of a panel, and consecutive k that lie side by side
  int32_t q_size;        // bytes of a quantised value
  int32_t offset;        // q holds xq + offset
  // Quantises rows of x (see int8.h). q_stride is k rounded up to a multiple of `group`; what lies between is not read
  // into any sum, because the weight is zero there.
  void (*quantise)(int64_t rows, int64_t k, const float* x, void* q, int64_t q_stride, float* q_scale);
  void (*multiply)(const Int8Strip& strip);
};

extern const Int8Kernels int8_portable;
#ifdef FEDMS_X86
extern const Int8Kernels int8_avx2;
extern const Int8Kernels int8_avxvnni;
extern const Int8Kernels int8_avx512vnni;
#endif

}  // namespace fedms
