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

thread_local Scratch scratch_of_thread, scratch_of_team, scratch_of_panel, scratch_of_expand;

// Rows of x after quantization, and their S times scale and gate.
struct Strip {
  uint8_t* q;
  float* q_scale;
  int32_t* q_zero;
  float* weighed;

  static int64_t size(int64_t rows, int64_t row_size, int64_t rank) {
    return rounded_up(rows * row_size, 64) + rows * (2 + rank) * static_cast<int64_t>(sizeof(float));
  }
  static Strip in(void* memory, int64_t rows, int64_t row_size) {
    uint8_t* q = static_cast<uint8_t*>(memory);
    float* q_scale = reinterpret_cast<float*>(q + rounded_up(rows * row_size, 64));
    return {q, q_scale, reinterpret_cast<int32_t*>(q_scale + rows), q_scale + 2 * rows};
  }
};

// y = dequantized(x) W^T + bias + weighed(S) expand, with S = x shrink^T: forward from x, backward from dy.
struct Product {
  const Int8Weight& weight;
  const Packed& layout;
  const Lora& lora;                        // ranks, scales, gates
  int64_t m, n, k;                         // of this product
  std::vector<const float*> shrink;        // R rows of k
  std::vector<const float*> expand;        // R rows of n; none: the columns of the experts' B
  const float* x;
  float *s, *y;
  bool masked = false;                     // dropout on the x that makes S

  int64_t rank() const { return static_cast<int64_t>(shrink.size()); }
};

// From one row of the quantized x to the next, in bytes: odd multiples of a cache line, because rows of a tile that lie a
// multiple of a power of two apart push each other out of the L1 cache.
int64_t row_size_of(const Packed& layout) { return rounded_up(layout.padded_k * layout.kernels->q_size, 64) | 64; }

// The floats that `prepare` needs beside the strip.
int64_t work_size(const Product& p) { return p.masked || p.layout.rotated ? PREPARED_ROWS * p.k : 0; }

void prepare(const Product& p, int64_t first, int64_t count, const Strip& to, float* work) {
  const int64_t rank = p.rank();
  const int64_t row_size = row_size_of(p.layout);
  for (int64_t i = 0; i < count; i += PREPARED_ROWS) {
    const int64_t rows = std::min(PREPARED_ROWS, count - i);
    const float* x = p.x + (first + i) * p.k;
    const float* levels_of = x;
    if (p.layout.rotated) {
      p.layout.kernels->rotate(rows * p.k, static_cast<int32_t>(p.layout.rotated), x, work);
      levels_of = work;
    }
    p.layout.kernels->quantize(rows, p.k, p.layout.steps, levels_of, to.q + i * row_size, row_size / p.layout.kernels->q_size,
                               to.q_scale + i, to.q_zero + i);
    if (rank == 0) continue;
    if (p.masked) {
      drop_rows(p.lora, first + i, rows, 0, p.k, x, p.k, work, p.k, false);
      x = work;
    }
    lora_kernels().dots(rows, rank, p.k, x, p.k, p.shrink.data(), p.s + (first + i) * rank, rank);
  }
  if (rank > 0) weigh(p.lora, first, count, p.s + first * rank, to.weighed);
}

// One panel of the weight as int8, and its columns' scales.
const int8_t* wide_panel(const Product& p, int64_t panel) {
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
// here, a panel at a time: so it is read once and written to the L1 cache. Whole it took 1.6 us at (768, 8), where the product of one
// row takes 6.8, because it was written to the L2 cache and read again.
const float* const* expand_panel(const Product& p, int64_t column, int64_t columns) {
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

// Rows first .. first + count - 1 of y, one panel of columns.
void multiply(const Product& p, int64_t panel, int64_t first, int64_t count, const Strip& from) {
  const Packed& layout = p.layout;
  const int64_t width = layout.kernels->panel, rank = p.rank();
  const int64_t column = panel * width, columns = std::min(width, p.n - column);
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
  strip.s = from.weighed;
  const bool in_place = columns == width && !p.expand.empty();
  strip.expand = in_place ? p.expand.data() : rank > 0 ? expand_panel(p, column, columns) : nullptr;
  strip.expand_column = in_place ? column : 0;
  if (columns == width) {
    strip.scale = scales + column;
    strip.bias = p.weight.bias ? p.weight.bias + column : nullptr;
    strip.y = p.y + first * p.n + column;
    strip.y_stride = p.n;
    layout.kernels->multiply(strip);
    return;
  }
  // The last panel: the kernel works on whole ones, so its operands are padded, and its y is copied.
  std::vector<float> padded((2 + count) * width, 0.0f);
  float* to = padded.data();
  const auto pad = [&](const float* values) {
    std::copy_n(values, columns, to);
    to += width;
    return to - width;
  };
  strip.scale = pad(scales + column);
  strip.bias = p.weight.bias ? pad(p.weight.bias + column) : nullptr;
  strip.y = to;
  strip.y_stride = width;
  layout.kernels->multiply(strip);
  for (int64_t i = 0; i < count; ++i) std::copy_n(to + i * width, columns, p.y + (first + i) * p.n + column);
}

void run(const Product& p) {
  if (p.m == 0) return;
  const int64_t panels = p.layout.panels, rank = p.rank();
  const int64_t row_size = row_size_of(p.layout);
  const int64_t work_bytes = work_size(p) * static_cast<int64_t>(sizeof(float));
  const int threads = threads_for(p.m * p.n * p.k, INTEGER_WORK, std::max(panels, p.m));

  if (p.m >= 24 * threads) {
    // A thread takes rows, and meets no barrier: equally many chunks a thread, of rows that are a multiple of the tile
    // heights, and no more of them than leave the L2 cache to q and to the panels (fewer than 100 or more than 400 are
    // up to 20 % slower at k = 3072, and make no difference at 384).
    const int64_t fitting = std::max<int64_t>(24, std::min<int64_t>(264, (768 << 10) / row_size / 12 * 12));
    const int64_t each = (p.m + threads * fitting - 1) / (threads * fitting);
    const int64_t chunk = std::max<int64_t>(24, rounded_up((p.m + threads * each - 1) / (threads * each), 12));
    const int64_t chunks = (p.m + chunk - 1) / chunk;
    const int64_t strip_size = rounded_up(Strip::size(chunk, row_size, rank), 64);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t first = c * chunk, count = std::min(chunk, p.m - first);
      char* memory = static_cast<char*>(
          scratch_of_thread.reserve(strip_size + work_bytes));
      const Strip strip = Strip::in(memory, chunk, row_size);
      prepare(p, first, count, strip, reinterpret_cast<float*>(memory + strip_size));
      for (int64_t panel = 0; panel < panels; ++panel) multiply(p, panel, first, count, strip);
    }
    return;
  }

  // Few rows: they are shared, and a thread takes panels.
  const Strip strip = Strip::in(scratch_of_team.reserve(Strip::size(p.m, row_size, rank)), p.m, row_size);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* work = static_cast<float*>(scratch_of_thread.reserve(work_bytes));
    const int64_t part = (p.m + threads - 1) / threads;
#pragma omp for schedule(static)
    for (int64_t first = 0; first < p.m; first += part) {
      const Strip rows{strip.q + first * row_size, strip.q_scale + first, strip.q_zero + first,
                       strip.weighed + first * rank};
      prepare(p, first, std::min(part, p.m - first), rows, work);
    }
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels; ++panel) multiply(p, panel, 0, p.m, strip);
  }
}

}  // namespace

void int8_forward(const Int8Weight& weight, const Lora& lora, const float* x, float* s, float* y) {
  const Packed layout = layout_of(lora.n, lora.k, weight.packed, weight.packed_size);
  if (!weight.scale && !layout.nibble_group) throw std::invalid_argument("an int8 weight needs its scale");
  run({weight, layout, lora, lora.m, lora.n, lora.k, rows_of_a(lora), {}, x, s, y, lora.dropout_p > 0});
}

void int8_backward(const Int8Weight& transposed, const Lora& lora, const float* dy, const float* x, const float* s,
                   const LoraGradients& out) {
  const int64_t m = lora.m, n = lora.n, k = lora.k;
  if (!out.dx) {
    if (!lora.experts.empty()) lora_backward(lora, dy, x, s, out);
    return;
  }
  const Packed layout = layout_of(k, n, transposed.packed, transposed.packed_size);
  if (lora.experts.empty() || lora.dropout_p > 0) {
    // The mask is on the LoRA part of dx alone, which therefore cannot be added in the product.
    run({transposed, layout, lora, m, k, n, {}, {}, dy, nullptr, out.dx});
    if (!lora.experts.empty()) lora_backward(lora, dy, x, s, out);
    return;
  }
  const TransposedB b(lora);
  const std::unique_ptr<float[]> u = buffer(m * lora.total_rank());
  run({transposed, layout, lora, m, k, n, b.rows, rows_of_a(lora), dy, u.get(), out.dx});
  LoraGradients rest = out;
  rest.dx = nullptr;
  lora_backward_from(lora, dy, x, s, u.get(), rest);
}

}  // namespace fedms
