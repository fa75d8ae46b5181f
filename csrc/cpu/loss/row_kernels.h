// What becomes of one row of logits. One function an instruction set.
#pragma once

#include <cstdint>

namespace fedms {

struct LogitRow {
  double log_sum;    // log of the sum of exp(z - largest)
  float largest;
  float label;       // z[label]
  float entropy;     // nats
  float inverse;     // 1 / (sum of exp(z - largest))
  int64_t best;      // the first place of the largest value
};

// z (count,) is scaled and capped in place. With `gradient` it holds, afterwards, -sum * d log p(label) / d raw logit / scale.
using LogitRowKernel = LogitRow (*)(int64_t count, float* z, int64_t label, float scale, float cap, bool gradient);

LogitRow logit_row_portable(int64_t count, float* z, int64_t label, float scale, float cap, bool gradient);
#ifdef FEDMS_X86
LogitRow logit_row_avx2(int64_t count, float* z, int64_t label, float scale, float cap, bool gradient);
LogitRow logit_row_avx512(int64_t count, float* z, int64_t label, float scale, float cap, bool gradient);
#endif

}  // namespace fedms
