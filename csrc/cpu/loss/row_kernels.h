// What becomes of the logits of one position, a stretch of the vocabulary at a time. One function an instruction set.
#pragma once

#include <cstdint>

namespace fedms {

// The tokens of a position so far. The sums leave the label out, so that a gradient keeps its digits where the label is nearly
// certain.
struct LogitRow {
  double sum = 0;           // of exp(t), t = z - largest
  double weighted = 0;      // of t exp(t)
  float largest = -3e38f;   // z
  float label = 0;          // z of the label
  int64_t best = 0;         // the first token of the largest z
};

// Adds the logits z (count,) of tokens first .. first + count - 1, and returns by what to multiply sums of exp(t) that were made
// before, because t is taken from the largest z. z is scaled and capped in place; with `gradient` it holds, afterwards,
// exp(t) dz / d(scaled logit), and 0 at the label.
using LogitRowKernel = float (*)(int64_t first, int64_t count, float* z, int64_t label, float scale, float cap, bool gradient,
                                 LogitRow& row);

float logit_row_portable(int64_t first, int64_t count, float* z, int64_t label, float scale, float cap, bool gradient,
                         LogitRow& row);
#ifdef FEDMS_X86
float logit_row_avx2(int64_t first, int64_t count, float* z, int64_t label, float scale, float cap, bool gradient,
                     LogitRow& row);
float logit_row_avx512(int64_t first, int64_t count, float* z, int64_t label, float scale, float cap, bool gradient,
                       LogitRow& row);
#endif

}  // namespace fedms
