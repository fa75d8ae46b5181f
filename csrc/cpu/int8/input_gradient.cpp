// dx = dy W of few rows, from a weight of 4 bits as it is packed: each code is read once, and W is never written out.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "../threads.h"
#include "fedms/int8.h"
#include "fedms/isa.h"
#include "layout.h"

namespace fedms {
namespace {

struct InputGradient {
  const Packed& layout;
  int64_t m, n, k;
  const uint8_t* packed;
  const float *scale, *dy;
  float* dx;
};

// dy times the scales of group g, of one row and the columns of a panel, as often as `fold` takes each: `EACH` times.
template <int EACH>
void put_factors(const InputGradient& p, int64_t row, int64_t g, int64_t column, int64_t columns, float* to) {
  const int64_t groups = p.layout.groups();
  const float *dy = p.dy + row * p.n + column, *scale = p.scale + column * groups + g;
  for (int64_t c = 0; c < columns; ++c, to += EACH) {
    const float factor = dy[c] * scale[c * groups];
    for (int e = 0; e < EACH; ++e) to[e] = factor;
  }
  std::fill_n(to, (p.layout.kernels->panel - columns) * EACH, 0.0f);
}

// The columns of dx that belong to group g, which is `nibble_group` of them.
void one_group(const InputGradient& p, int64_t g) {
  const Packed& layout = p.layout;
  const Header* header = reinterpret_cast<const Header*>(p.packed);
  const int64_t width = layout.kernels->panel, each = layout.kernels->group, folded = width * each;
  const int64_t count = layout.nibble_group * width, steps = count / folded;
  const auto put = each == 8 ? put_factors<8> : each == 4 ? put_factors<4> : each == 2 ? put_factors<2> : put_factors<1>;
  std::vector<float> factors(p.m * folded), sums(p.m * steps * 16, 0.0f);
  for (int64_t panel = 0; panel < layout.panels; ++panel) {
    const int64_t column = panel * width, columns = std::min(width, p.n - column);
    for (int64_t i = 0; i < p.m; ++i) put(p, i, g, column, columns, factors.data() + i * folded);
    const uint8_t* codes = p.packed + layout.panels_at + panel * layout.panel_size() + g * count / 2;
    layout.kernels->fold(p.m, count, codes, header->float_levels, factors.data(), sums.data(), steps * 16);
  }
  const int64_t first = g * layout.nibble_group, last = std::min(first + layout.nibble_group, p.k);
  for (int64_t i = 0; i < p.m; ++i) {
    for (int64_t j = first; j < last; ++j) {
      const float* from = sums.data() + (i * steps + (j - first) / each) * 16 + (j - first) % each;
      float sum = 0;
      for (int64_t lane = 0; lane < 16; lane += each) sum += from[lane];
      p.dx[i * p.k + j] = sum;
    }
  }
}

}  // namespace

int64_t nibbles_few_rows() {
  // Measured on a Zen 4 beside a weight that is written out and a product of PyTorch's, (768, 768): with AVX-512 at one row 0.17
  // of its time, at 32 rows 0.84; with AVX2 at one row 0.27, at 8 rows 0.6, at 16 as long; where the levels are looked up in
  // memory, at one row 0.55, at two as long.
  if (isa() == Isa::avx512) return 32;
  return isa() == Isa::avx2 || isa() == Isa::avxvnni ? 8 : 1;
}

void nibbles_input_gradient(int64_t m, int64_t n, int64_t k, const uint8_t* packed, int64_t packed_size,
                            int64_t groups, const float* scale, const float* dy, float* dx) {
  const Packed layout = nibble_layout_of(n, k, packed, packed_size);
  if (layout.groups() != groups) throw std::invalid_argument("the packed weight has another group");
  const InputGradient gradient{layout, m, n, k, packed, scale, dy, dx};
  const int threads = threads_for(m * n * k, FP32_WORK, groups);
  share_out(threads, groups, [&](int64_t g) { one_group(gradient, g); });
}

}  // namespace fedms
