// The packed layout of a weight, and which kernels it is for.
#pragma once

#include <utility>

#include "kernels.h"

namespace fedms {

// Those of the instruction set that is used now, for int8 and for 4-bit weights.
const Int8Kernels& int8_kernels();
const Int8Kernels& nibble_kernels();

inline int64_t rounded_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// A packed weight is this header, minus the sum of every column (int32), and the panels
// [n / panel][k / group][panel][group], each part at a multiple of 64 bytes. One of 4 bits has, in front of the panels,
// every column's scale (float) and the factors of its groups [n / panel][k / nibble_group][panel] (int16), and half as
// many bytes a panel: see Int8Kernels::expand for their order.
struct Header {
  int32_t magic, kernels;
  int64_t n, k;
  int64_t nibble_group;   // 0: int8
  int64_t rotated;        // values of a block of x that are rotated before x is quantized; 0: none
  int16_t levels[16];     // what `expand` takes
  float float_levels[16];
};
constexpr int32_t MAGIC = 0x38694d46;  // "FMi8"

struct Packed {
  const Int8Kernels* kernels;
  int32_t steps;  // of x
  int64_t rotated = 0;
  int64_t nibble_group, panels, padded_k, sums_at, scales_at, factors_at, panels_at, size;

  Packed(const Int8Kernels& with, int64_t n, int64_t k, int64_t nibble_group_ = 0)
      : kernels(&with), steps(nibble_group_ ? 255 : with.most_steps), nibble_group(nibble_group_) {
    while (steps > 255 && steps * 127 * k > INT32_MAX) steps /= 2;
    panels = rounded_up(n, with.panel) / with.panel;
    padded_k = rounded_up(k, nibble_group ? nibble_group : with.group);
    sums_at = rounded_up(sizeof(Header), 64);
    const int64_t column_size = rounded_up(panels * with.panel * static_cast<int64_t>(sizeof(int32_t)), 64);
    scales_at = sums_at + column_size;
    factors_at = scales_at + (nibble_group ? column_size : 0);
    panels_at = factors_at + rounded_up(panels * groups() * with.panel * static_cast<int64_t>(sizeof(int16_t)), 64);
    size = panels_at + panels * panel_size();
  }

  int64_t groups() const { return nibble_group ? padded_k / nibble_group : 0; }
  int64_t wide_panel_size() const { return kernels->panel * padded_k; }
  int64_t panel_size() const { return nibble_group ? wide_panel_size() / 2 : wide_panel_size(); }

  // Of wq[column][j] in its panel, as int8.
  int64_t offset_in_panel(int64_t column, int64_t j) const {
    const int64_t panel = kernels->panel, group = kernels->group;
    return (j / group * panel + column % panel) * group + j % group;
  }
  // Of an int8 wq[column][j] from panels_at.
  int64_t offset(int64_t column, int64_t j) const {
    return column / kernels->panel * panel_size() + offset_in_panel(column, j);
  }
  // Of the byte with the code of [column][j] from panels_at, and how far to shift it.
  std::pair<int64_t, int> nibble(int64_t column, int64_t j) const {
    const int64_t at = offset_in_panel(column, j);
    return {column / kernels->panel * panel_size() + at / 64 * 32 + at % 32, static_cast<int>(at % 64 / 32 * 4)};
  }
  // Of the factor of a column's group from factors_at, counted in int16.
  int64_t factor(int64_t column, int64_t group) const {
    return (column / kernels->panel * groups() + group) * kernels->panel + column % kernels->panel;
  }
};

// The layout of a packed (n, k) weight. Throws std::invalid_argument where it is none.
Packed layout_of(int64_t n, int64_t k, const uint8_t* packed, int64_t size);
// The same, of a weight of 4 bits.
Packed nibble_layout_of(int64_t n, int64_t k, const uint8_t* packed, int64_t size);

}  // namespace fedms
