#include "rounded_products.h"

#include <algorithm>
#include <vector>

namespace fedms {
namespace {

constexpr int64_t PAIRS = 48;          // of tokens at a time: their part of a panel, 12 KiB, stays in the L1 cache
constexpr int64_t TOKENS = 2 * PAIRS;

}  // namespace

// While one panel is multiplied, the next panel's part of the weight is fetched: the hardware does not foresee the step from one
// short row to the next. The loss with its gradient was expected to gain the 15 ms that 113 MB take from memory, and
// gained 26 of 270 (508 positions, 49,152 tokens, Zen 4). To read the weight as it lies, 96 rows at a time,
// gained nothing.
void add_rounded_products(const PairKernels& kernels, int64_t rows, int64_t tokens, int64_t columns, const float* e,
                          int64_t e_stride, const float* weight, int64_t weight_stride, float* y, int64_t y_stride) {
  std::vector<Pair> of_e(rows * PAIRS), panel(PAIRS * PAIRED_COLUMNS);
  for (int64_t first = 0; first < tokens; first += TOKENS) {
    const int64_t some = std::min(TOKENS, tokens - first), each = (some * PAIRED_ROWS + rows - 1) / rows;
    kernels.pair_columns(rows, some, e + first, e_stride, of_e.data(), PAIRS);
    for (int64_t c = 0; c < columns; c += PAIRED_COLUMNS) {
      const float* const from = weight + first * weight_stride + c;
      const int64_t width = std::min(PAIRED_COLUMNS, columns - c);
      // Behind the last token it is memory that is fetched in vain, which an instruction that only fetches may be given.
      const float* const next = c + PAIRED_COLUMNS < columns ? from + PAIRED_COLUMNS : from - c + TOKENS * weight_stride;
      kernels.pair_rows(some, width, from, weight_stride, panel.data(), PAIRED_COLUMNS);
      for (int64_t i = 0, fetched = 0; i < rows; i += PAIRED_ROWS) {
        for (const int64_t end = std::min(fetched + each, some); fetched < end; ++fetched)
          for (int64_t v = 0; v < PAIRED_COLUMNS; v += 16) __builtin_prefetch(next + fetched * weight_stride + v);
        kernels.multiply(std::min(PAIRED_ROWS, rows - i), (some + 1) / 2, width, &of_e[i * PAIRS], PAIRS, 1, panel.data(),
                         PAIRED_COLUMNS, y + i * y_stride + c, y_stride, true);
      }
    }
  }
}

}  // namespace fedms
