// The int8 linear layer: how the product is blocked and shared among threads. The kernels are one file an instruction set.
#include <algorithm>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <vector>

#include "../lora/operands.h"
#include "../threads.h"
#include "fedms/int8.h"
#include "layout.h"

namespace fedms {
namespace {

// A buffer that a thread keeps, so that large ones are not mapped anew at every call.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  void* reserve(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, rounded_up(bytes, 4096));
      if (!data_) throw std::bad_alloc();
      size_ = rounded_up(bytes, 4096);
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

thread_local Scratch scratch_of_thread, scratch_of_team, scratch_of_panel, scratch_of_expand, scratch_of_tile;

// Rows of x after quantization, and the S times scale and gate that each part of a product makes of them.
struct Strip {
  uint8_t* q;
  float* q_scale;
  int32_t* q_zero;
  float* weighed;  // (rows, rank) of each part, one part after the other

  static int64_t size(int64_t rows, int64_t row_size, int64_t ranks) {
    return rounded_up(rows * row_size, 64) + rows * (2 + ranks) * static_cast<int64_t>(sizeof(float));
  }
  static Strip in(void* memory, int64_t rows, int64_t row_size) {
    uint8_t* q = static_cast<uint8_t*>(memory);
    float* q_scale = reinterpret_cast<float*>(q + rounded_up(rows * row_size, 64));
    return {q, q_scale, reinterpret_cast<int32_t*>(q_scale + rows), q_scale + 2 * rows};
  }
};

// y = or += dequantized(x) W^T + bias + weighed(S) expand, with S = x shrink^T: forward from x, backward from dy.
struct Part {
  const Int8Weight& weight;
  Packed layout;
  const Lora& lora;                        // ranks, scales, gates
  int64_t n;                               // of this product
  std::vector<const float*> shrink;        // R rows of k
  std::vector<const float*> expand;        // R rows of n; none: the columns of the experts' B
  float *s, *y;
  bool masked = false;                     // dropout on the x that makes S
  bool add = false;                        // to what y holds
  int64_t first = 0, columns = n;          // those of the product that y has; first is that of a panel

  int64_t rank() const { return static_cast<int64_t>(shrink.size()); }
  int64_t first_panel() const { return first / layout.kernels->panel; }
  int64_t last_panel() const { return (first + columns + layout.kernels->panel - 1) / layout.kernels->panel; }
};

// The products of one x (m, k), which is quantized once for all of them: the layouts agree in what the rows look like.
struct Product {
  const float* x;
  int64_t m, k;
  std::vector<Part> parts;

  const Packed& layout() const { return parts.front().layout; }
  int64_t ranks() const {
    int64_t sum = 0;
    for (const Part& part : parts) sum += part.rank();
    return sum;
  }
};

bool same_rows(const Packed& a, const Packed& b) {
  return a.kernels == b.kernels && a.steps == b.steps && a.rotated == b.rotated && a.padded_k == b.padded_k;
}

// From one row of the quantized x to the next, in bytes: odd multiples of a cache line, because rows of a tile that lie a
// multiple of a power of two apart push each other out of the L1 cache.
int64_t row_size_of(const Packed& layout) { return rounded_up(layout.padded_k * layout.kernels->q_size, 64) | 64; }

// The floats that `prepare` needs beside the strip.
int64_t work_size(const Product& p) {
  const bool masked = std::any_of(p.parts.begin(), p.parts.end(), [](const Part& part) { return part.masked; });
  return masked || p.layout().rotated ? PREPARED_ROWS * p.k : 0;
}

// So many columns of the first part's S are made while x is quantized.
int64_t made_along(const Product& p) {
  const Part& part = p.parts.front();
  const bool readable = p.layout().kernels->quantize_along && !p.layout().rotated && !part.masked;  // both read x as it is
  return readable && p.k <= LONGEST_ALONG ? std::min(part.rank(), ALONG) : 0;
}

// Rows first .. first + count - 1 of x to the rows of `to` from `at` on. A part's `weighed` starts at a multiple of `to_rows`.
void prepare(const Product& p, int64_t first, int64_t count, const Strip& to, int64_t at, int64_t to_rows, float* work) {
  const Packed& layout = p.layout();
  const Int8Kernels& kernels = *layout.kernels;
  const Part& leading = p.parts.front();
  const int64_t row_size = row_size_of(layout), q_stride = row_size / kernels.q_size, along = made_along(p);
  for (int64_t i = 0; i < count; i += PREPARED_ROWS) {
    const int64_t rows = std::min(PREPARED_ROWS, count - i), row = at + i;
    const float* const x = p.x + (first + i) * p.k;
    uint8_t* const q = to.q + row * row_size;
    float* const q_scale = to.q_scale + row;
    int32_t* const q_zero = to.q_zero + row;
    if (along > 0) {
      kernels.quantize_along(rows, p.k, layout.steps, x, q, q_stride, q_scale, q_zero, along, leading.shrink.data(),
                             leading.s + (first + i) * leading.rank(), leading.rank());
    } else {
      if (layout.rotated) kernels.rotate(rows * p.k, static_cast<int32_t>(layout.rotated), x, work);
      kernels.quantize(rows, p.k, layout.steps, layout.rotated ? work : x, q, q_stride, q_scale, q_zero);
    }
    for (const Part& part : p.parts) {
      const int64_t rank = part.rank(), made = &part == &leading ? along : 0;
      if (rank == made) continue;
      if (part.masked) drop_rows(part.lora, first + i, rows, 0, p.k, x, p.k, work, p.k, false);
      lora_kernels().dots(rows, rank - made, p.k, part.masked ? work : x, p.k, part.shrink.data() + made,
                          part.s + (first + i) * rank + made, rank);
    }
  }
  float* weighed = to.weighed;
  for (const Part& part : p.parts) {
    const int64_t rank = part.rank();
    if (rank > 0) weigh(part.lora, first, count, part.s + first * rank, weighed + at * rank);
    weighed += to_rows * rank;
  }
}

// One panel of the weight as int8, and its columns' scales.
const int8_t* wide_panel(const Part& p, int64_t panel) {
  const Packed& layout = p.layout;
  const uint8_t* from = p.weight.packed + layout.panels_at + panel * layout.panel_size();
  if (!layout.nibble_group) return reinterpret_cast<const int8_t*>(from);
  const Header* header = reinterpret_cast<const Header*>(p.weight.packed);
  const int64_t width = layout.kernels->panel, count = layout.nibble_group * width;
  const int16_t* factors = reinterpret_cast<const int16_t*>(p.weight.packed + layout.factors_at);
  int8_t* const wide = static_cast<int8_t*>(scratch_of_panel.reserve(layout.wide_panel_size()));
  for (int64_t g = 0; g < layout.groups(); ++g) {
    layout.kernels->expand(count, from + g * count / 2, header->levels, factors + layout.factor(panel * width, g),
                           wide + g * count);
  }
  return wide;
}

// R rows of a panel's width, without gaps, zeros behind the first `columns`: what `expand` has from `column` on. B is transposed
// here, a panel at a time, and stays in the L1 cache: one row of 576 -> 1536 was expected to take 1 us less than with all of B
// transposed before, and takes 13.4 in place of 14.0; at 2048 rows there is no difference.
const float* const* expand_panel(const Part& p, int64_t column, int64_t columns) {
  const int64_t width = p.layout.kernels->panel, rank = p.rank();
  char* const memory = static_cast<char*>(
      scratch_of_expand.reserve(rank * static_cast<int64_t>(width * sizeof(float) + sizeof(float*))));
  float* to = reinterpret_cast<float*>(memory);
  const float** const rows = reinterpret_cast<const float**>(memory + rank * width * sizeof(float));
  for (int64_t j = 0; j < rank; ++j) rows[j] = to + j * width;
  if (columns < width) std::fill_n(to, rank * width, 0.0f);
  if (p.expand.empty()) {
    for (const LoraExpert& expert : p.lora.experts) {
      transpose(columns, expert.rank, expert.b + column * expert.rank, expert.rank, to, width);
      to += expert.rank * width;
    }
  } else {
    for (int64_t j = 0; j < rank; ++j) std::copy_n(p.expand[j] + column, columns, to + j * width);
  }
  return rows;
}

// `count` rows of y from `first` on, one panel of columns. The strip holds these rows, and `weighed` their S.
void multiply(const Part& p, int64_t panel, int64_t first, int64_t count, const Strip& from, const float* weighed) {
  const Packed& layout = p.layout;
  const int64_t width = layout.kernels->panel, rank = p.rank();
  const int64_t column = panel * width, columns = std::min(width, p.first + p.columns - column);
  const uint8_t* packed = p.weight.packed;
  const float* scales =
      layout.nibble_group ? reinterpret_cast<const float*>(packed + layout.scales_at) : p.weight.scale;
  Int8Strip strip{};
  strip.rows = count;
  strip.k = layout.padded_k;
  strip.q = from.q;
  strip.q_stride = row_size_of(layout) / layout.kernels->q_size;
  strip.q_scale = from.q_scale;
  strip.panel = wide_panel(p, panel);
  strip.q_zero = from.q_zero;
  strip.minus_sums = reinterpret_cast<const int32_t*>(packed + layout.sums_at) + column;
  strip.rank = rank;
  strip.s = weighed;
  strip.scale = scales + column;
  strip.bias = p.weight.bias ? p.weight.bias + column : nullptr;
  const bool whole = columns == width, in_place = whole && !p.expand.empty();
  strip.expand = in_place ? p.expand.data() : rank > 0 ? expand_panel(p, column, columns) : nullptr;
  strip.expand_column = in_place ? column : 0;
  float* const y = p.y + first * p.columns + column - p.first;
  if (whole && !p.add) {
    strip.y = y;
    strip.y_stride = p.columns;
    layout.kernels->multiply(strip);
    return;
  }
  // The last panel: the kernel works on whole ones, so its operands are padded.
  std::vector<float> padded(whole ? 0 : 2 * width, 0.0f);
  if (!whole) {
    std::copy_n(strip.scale, columns, padded.data());
    strip.scale = padded.data();
    if (strip.bias) strip.bias = std::copy_n(strip.bias, columns, padded.data() + width) - columns;
  }
  // The kernel writes, and whole panels, so the result is taken over from a tile that stays in the cache.
  const float* const tile = strip.y =
      static_cast<float*>(scratch_of_tile.reserve(count * width * static_cast<int64_t>(sizeof(float))));
  strip.y_stride = width;
  layout.kernels->multiply(strip);
  for (int64_t i = 0; i < count; ++i) {
    const float* const row = tile + i * width;
    float* const to = y + i * p.columns;
    if (p.add) {
      for (int64_t c = 0; c < columns; ++c) to[c] += row[c];
    } else {
      std::copy_n(row, columns, to);
    }
  }
}

// A thread takes rows, and meets no barrier.
void run_by_rows(const std::vector<Product>& products, int threads, int64_t row_size, int64_t ranks, int64_t work_bytes) {
  // Equally many chunks a thread, of no more rows than leave the L2 cache to q and to the panels (fewer than 100 or more than 400
  // are up to 20 % slower at k = 3072, and make no difference at 384). They differ by one tile of rows at most, the larger ones
  // first, so that threads of one speed end together.
  constexpr int64_t TILE = 12;  // a multiple of the tile heights
  const int64_t m = products.front().m, tiles = (m + TILE - 1) / TILE;
  const int64_t fitting = std::max<int64_t>(2, std::min<int64_t>(22, (768 << 10) / row_size / TILE));  // tiles
  const int64_t each = (tiles + threads * fitting - 1) / (threads * fitting);
  const int64_t chunks = std::min(threads * each, std::max<int64_t>(1, tiles / 2));
  const auto first_row = [=](int64_t c) { return std::min((c * (tiles / chunks) + std::min(c, tiles % chunks)) * TILE, m); };
  const int64_t chunk = first_row(1);  // rows of the largest
  const int64_t strip_size = rounded_up(Strip::size(chunk, row_size, ranks), 64);
  Queue queue(chunks);
  on_threads(threads, [&](Member) {
    char* const memory = static_cast<char*>(scratch_of_thread.reserve(strip_size + work_bytes));
    queue.take([&](int64_t c) {
      const int64_t first = first_row(c), count = first_row(c + 1) - first;
      for (const Product& p : products) {
        const Strip strip = Strip::in(memory, chunk, row_size_of(p.layout()));
        prepare(p, first, count, strip, 0, chunk, reinterpret_cast<float*>(memory + strip_size));
        const float* weighed = strip.weighed;
        for (const Part& part : p.parts) {
          for (int64_t panel = part.first_panel(); panel < part.last_panel(); ++panel)
            multiply(part, panel, first, count, strip, weighed);
          weighed += chunk * part.rank();
        }
      }
    });
  });
}

// Few rows: they are shared, and a thread takes panels.
void run_by_panels(const std::vector<Product>& products, int threads, int64_t row_size, int64_t ranks, int64_t work_bytes) {
  const int64_t m = products.front().m;
  void* const memory = scratch_of_team.reserve(Strip::size(m, row_size, ranks));
  on_threads(threads, [&](Member member) {
    float* work = static_cast<float*>(scratch_of_thread.reserve(work_bytes));
    const int64_t rows = (m + threads - 1) / threads;
    for (const Product& p : products) {
      const Strip strip = Strip::in(memory, m, row_size_of(p.layout()));
      member.share((m + rows - 1) / rows, [&](int64_t i) {
        const int64_t first = i * rows;
        prepare(p, first, std::min(rows, m - first), strip, first, m, work);
      });
      member.wait();
      const float* weighed = strip.weighed;
      for (const Part& part : p.parts) {
        // Parts with a y of their own need not wait for one another.
        member.share(part.last_panel() - part.first_panel(),
                     [&](int64_t i) { multiply(part, part.first_panel() + i, 0, m, strip, weighed); });
        weighed += m * part.rank();
      }
      member.wait();  // the strip is written again
    }
  });
}

// The products, which have the same rows, one after the other.
void run(const std::vector<Product>& products) {
  if (products.empty() || products.front().m == 0) return;
  const int64_t m = products.front().m;
  int64_t work = 0, row_size = 0, ranks = 0, panels = 0, multiplications = 0;
  for (const Product& p : products) {
    work = std::max(work, work_size(p) * static_cast<int64_t>(sizeof(float)));
    row_size = std::max(row_size, row_size_of(p.layout()));
    ranks = std::max(ranks, p.ranks());
    for (const Part& part : p.parts) {
      panels = std::max(panels, part.last_panel() - part.first_panel());
      multiplications += m * part.columns * p.k;
    }
  }
  const int threads = threads_for(multiplications, INTEGER_WORK, std::max(panels, m));
  (m >= 24 * threads ? run_by_rows : run_by_panels)(products, threads, row_size, ranks, work);
}

}  // namespace

void int8_forward(const std::vector<Int8Layer>& layers, const float* x) {
  std::vector<Product> products;
  for (const auto& [weight, lora, s, y] : layers) {
    const Packed layout = layout_of(lora.n, lora.k, weight.packed, weight.packed_size);
    if (!weight.scale && !layout.nibble_group) throw std::invalid_argument("an int8 weight needs its scale");
    if (products.empty() || !same_rows(products.back().layout(), layout)) products.push_back({x, lora.m, lora.k, {}});
    products.back().parts.push_back({weight, layout, lora, lora.n, rows_of_a(lora), {}, s, y, lora.dropout_p > 0});
  }
  run(products);
}

void int8_forward(const Int8Weight& weight, const Lora& lora, const float* x, float* s, float* y) {
  int8_forward({{weight, lora, s, y}}, x);
}

void int8_columns(const Int8Weight& weight, int64_t m, int64_t n, int64_t k, const float* x, int64_t first, int64_t count,
                  float* y) {
  const Packed layout = layout_of(n, k, weight.packed, weight.packed_size);
  Lora none;
  none.m = m;
  none.n = n;
  none.k = k;
  Part part{weight, layout, none, n, {}, {}, nullptr, y};
  part.first = first;
  part.columns = count;
  run({{x, m, k, {std::move(part)}}});
}

void int8_backward(const std::vector<Int8LayerGradients>& layers, const float* x, float* dx) {
  std::vector<Product> products;
  std::vector<TransposedB> bs;
  std::vector<std::unique_ptr<float[]>> us(layers.size());
  bs.reserve(layers.size());
  for (size_t i = 0; dx && i < layers.size(); ++i) {
    const auto& [transposed, lora, dy, s, out] = layers[i];
    const Packed layout = layout_of(lora.k, lora.n, transposed.packed, transposed.packed_size);
    Part part{transposed, layout, lora, lora.k, {}, {}, nullptr, dx, false, i > 0};
    // A dropout mask is on the LoRA part of dx alone, which therefore cannot be added in the product.
    if (!lora.experts.empty() && lora.dropout_p == 0) {
      us[i] = buffer(lora.m * lora.total_rank());
      bs.emplace_back(lora);
      part.shrink = bs.back().rows;
      part.expand = rows_of_a(lora);
      part.s = us[i].get();
    }
    products.push_back({dy, lora.m, lora.n, {std::move(part)}});
  }
  run(products);
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto& [transposed, lora, dy, s, out] = layers[i];
    if (lora.experts.empty()) continue;
    LoraGradients rest = out;
    rest.dx = us[i] ? nullptr : dx;
    lora_backward_from(lora, dy, x, s, us[i].get(), rest);
  }
}

void int8_backward(const Int8Weight& transposed, const Lora& lora, const float* dy, const float* x, const float* s,
                   const LoraGradients& out) {
  int8_backward({{transposed, lora, dy, s, out}}, x, out.dx);
}

}  // namespace fedms
