// What arm_cycles.py counts under an emulator: one call of a part of an int8 layer, `times` times.
//
//     arm_count KERNEL PART ROWS K RANK TIMES        PART: quantize, or multiply (of one panel of columns)
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/int8/kernels.h"

namespace fedms {
extern const Int8Kernels int8_dotprod, int8_i8mm;
}

int main(int, char** given) {
  const fedms::Int8Kernels& kernels = std::strcmp(given[1], "i8mm") ? fedms::int8_dotprod : fedms::int8_i8mm;
  const bool quantizes = !std::strcmp(given[2], "quantize");
  const int64_t rows = std::atoll(given[3]), k = std::atoll(given[4]), rank = std::atoll(given[5]), times = std::atoll(given[6]);
  std::vector<float> x(rows * k, 0.5f), s(rows * rank, 1.0f), y(rows * kernels.panel), scale(kernels.panel, 1.0f), row_scale(rows, 1.0f);
  std::vector<int8_t> q(rows * k, 1), panel(k * kernels.panel, 1);
  std::vector<int32_t> zero(rows), sums(kernels.panel);
  std::vector<const float*> expand(rank, scale.data());
  const fedms::Int8Strip strip{rows, k, q.data(), k, row_scale.data(), zero.data(), panel.data(), sums.data(), scale.data(), scale.data(),
                               rank, s.data(), expand.data(), 0, y.data(), kernels.panel};
  for (int64_t i = 0; i < times; ++i) {
    quantizes ? kernels.quantize(rows, k, 255, x.data(), q.data(), k, row_scale.data(), zero.data()) : kernels.multiply(strip);
  }
}
