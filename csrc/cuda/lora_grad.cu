// The narrow parts: everything with the ranks on one side and the rows, or a side of W, on the other. All are bound by
// one pass over x or dy. Sums over the rows, or over the columns of dy, are split into parts in a workspace, which
// another kernel adds up in order: no atomics, so the bits repeat.
#include <climits>

#include "mma.h"
#include "philox.h"
#include "segments.h"

namespace fedms::cuda {
namespace {

constexpr int RANKS = 32;        // of one block; more ranks are more blocks
constexpr int MOST_RANKS = 256;  // of all experts together

template <class T>
FEDMS_DEVICE float widened(T value) {
  return Number<T>::widen(value);
}
FEDMS_DEVICE float widened(float value) { return value; }

// Sets the dropped numbers of a tile in shared memory to zero. (row, column): of its first one in x.
template <int ROWS, int CHUNKS, int THREADS>
FEDMS_DEVICE void drop_tile(const Mask& mask, uint32_t tile, int row, int column, int columns) {
  static_assert(ROWS * CHUNKS % THREADS == 0);
  for (int first = 0; first < ROWS * CHUNKS; first += THREADS) {
    const int i = first + ptx::thread();
    const uint32_t place = tile + chunk_offset<CHUNKS>(i / CHUNKS, i % CHUNKS);
    Words eight = ptx::load_shared_128(place);
    drop_eight(mask, uint64_t(row + i / CHUNKS) * columns + column + i % CHUNKS * 8, eight);
    ptx::store_shared_128(place, eight);
  }
}

// --- S and T

template <class T>
struct ShrinkArguments {
  int m, k, r;
  const T* x;
  int64_t x_stride;
  const T* a;
  int64_t a_stride;
  T* s;
  T* t;
  int64_t t_stride;
  Factors factors;
  Segments segments;
  Mask mask;
};

template <class T>
struct Shrink {
  // Few blocks are there, about one for each multiprocessor: what its memory holds back, the bytes that arrive in a
  // microsecond (32 KiB on 9.0), must be under way for it, and more.
  // Eight warps: four share out the rows, and each two of them the numbers of a step.
  static constexpr int ROWS = 64, THREADS = 256, STAGES = 8, STAGE = (ROWS + RANKS) * 128;
  static constexpr int SHARED = STAGES * STAGE;
  static_assert(SHARED <= 101376);

  static FEDMS_DEVICE void run(const ShrinkArguments<T>& g) {
    const uint32_t memory = ptx::shared_memory();
    const RowBlock rows = row_block(g.segments, ptx::block_x(), ROWS, g.m, g.r, false);
    const int row = rows.row, rank = ptx::block_y() * RANKS, steps = ceil_div(g.k, STEP);
    const T* a_of_rows = g.a + rows.first_rank * g.a_stride;
    const auto load = [&](int step) {
      if (step < steps) {
        const uint32_t stage = memory + step % STAGES * STAGE;
        copy_tile<ROWS, 8, THREADS>(stage, g.x, g.x_stride, row, rows.end, step * STEP, g.k);
        copy_tile<RANKS, 8, THREADS>(stage + ROWS * 128, a_of_rows, g.a_stride, rank, rows.ranks, step * STEP, g.k);
      }
      ptx::cp_async_commit();
    };
    float sum[RANKS / 8][4] = {};
    for (int step = 0; step < STAGES - 1; ++step) load(step);
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<STAGES - 2>();
      ptx::sync_block();  // all see this step's tiles, and are done with the stage that is filled next
      load(step + STAGES - 1);
      const uint32_t x = memory + step % STAGES * STAGE, a = x + ROWS * 128;
      if (g.mask.has_dropout()) {
        drop_tile<ROWS, 8, THREADS>(g.mask, x, row, step * STEP, g.k);
        ptx::sync_block();
      }
#pragma unroll
      for (int i = 0; i < STEP / 32; ++i) {
        const int k16 = warp() / 4 * (STEP / 32) + i;
        uint32_t left[4], right[4];
        load_a<8>(left, x, warp() % 4 * 16, 2 * k16);
#pragma unroll
        for (int j = 0; j < RANKS / 16; ++j) {
          load_b<8>(right, a, j * 16, 2 * k16);
          ptx::mma_16x8x16<T>(sum[2 * j], left, right[0], right[1]);
          ptx::mma_16x8x16<T>(sum[2 * j + 1], left, right[2], right[3]);
        }
      }
    }
    ptx::cp_async_wait<0>();
    add_halves(sum, memory);
    if (warp() >= 4) return;
    float factor[RANKS / 8][4];  // all of them under way before the first is written
    const auto to_row = [&](int i) { return row + warp() * 16 + accumulator_row(lane(), i); };
    const auto to_rank = [&](int j, int i) { return rank + j * 8 + accumulator_column(lane(), i); };
#pragma unroll
    for (int j = 0; j < RANKS / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool own = to_row(i) < rows.end && to_rank(j, i) < rows.ranks;
        factor[j][i] = own ? factor_of(g.factors, g.segments, rows.owner, to_row(i), to_rank(j, i)) : 0;
      }
    }
#pragma unroll
    for (int j = 0; j < RANKS / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float value = g.mask.has_dropout() ? sum[j][i] * g.mask.kept_scale : sum[j][i];
        put_s(g.s, g.t, g.t_stride, g.r, rows, to_row(i), to_rank(j, i), value, factor[j][i]);
      }
    }
  }

  // The sums of the second four warps are added to those of the first, through the memory of the pipeline.
  static FEDMS_DEVICE void add_halves(float (&sum)[RANKS / 8][4], uint32_t memory) {
    constexpr int VALUES = RANKS / 2;
    const uint32_t place = memory + ptx::thread() % 128 * 16;
    ptx::sync_block();
#pragma unroll
    for (int i = 0; i < VALUES / 4; ++i) {
      if (warp() >= 4) ptx::store_shared_128(place + i * 2048, words_of(sum[i]));
    }
    ptx::sync_block();
    if (warp() >= 4) return;
#pragma unroll
    for (int i = 0; i < VALUES / 4; ++i) add_words(sum[i], ptx::load_shared_128(place + i * 2048));
  }
};

template <class T>
__global__ void __launch_bounds__(Shrink<T>::THREADS) shrink_kernel(__grid_constant__ const ShrinkArguments<T> arguments) {
  Shrink<T>::run(arguments);
}

// t = with scale and gate the sum of the parts of s (parts, m, r), in order. A block has whole rows of t.
template <class T, class From>
__global__ void __launch_bounds__(256)
    apply_scale_and_gate_kernel(int m, int r, int parts, const From* s, T* t, int t_stride, __grid_constant__ const Factors factors,
                 __grid_constant__ const Segments segments) {
  const int rows_of_block = 256 / t_stride, of_block = ptx::thread() / t_stride, rank = ptx::thread() % t_stride;
  const int row = ptx::block_x() * rows_of_block + of_block;
  if (of_block >= rows_of_block || row >= m) return;
  const RowBlock rows = row_block_of(segments, row, r);
  float value = 0;
  if (rank < rows.ranks) {
    const float factor = factor_of(factors, segments, rows.owner, row, rank);
#pragma unroll 8
    for (int part = 0; part < parts; ++part) value += widened(s[(int64_t(part) * m + row) * r + rank]);
    value *= factor;
  }
  t[int64_t(row) * t_stride + rank] = {Number<T>::narrow(value)};
}

// --- one pass over dy or x

template <class T>
struct LoraGradPartialsArguments {
  int m, c, r, rows_a_split;
  const T* z;
  int64_t z_stride;
  const T* t;
  int64_t t_stride;
  float* g;
  const T* b;
  int64_t b_stride;
  float* u;
  Segments segments;
  Mask mask;
};

// A wide block makes few parts of U; a narrow layer would leave multiprocessors idle with it.
constexpr int lora_grad_partials_columns(int64_t c) { return c >= 2048 ? 256 : 128; }

template <class T, int COLUMNS>
struct LoraGradPartials {
  // Low steps, so that several are under way in what memory two blocks of a multiprocessor have.
  static constexpr int ROWS = 32, THREADS = 256, STAGES = COLUMNS == 256 ? 4 : 6, CHUNKS = COLUMNS / 8;
  static constexpr int Z_BYTES = ROWS * COLUMNS * 2, STAGE = Z_BYTES + ROWS * RANKS * 2;
  static constexpr int OUTER = COLUMNS / 128;  // 16 columns of z each, for every warp
  // For z b two groups of warps share out the rows of a step, and four warps each the columns: their sums are added up.
  static constexpr int QUARTERS = 4, OF_QUARTER = COLUMNS / 16 / QUARTERS;
  static constexpr int SUMS = QUARTERS * ROWS * RANKS * 4;  // where b was before, whose part of a warp is in registers
  static constexpr int SHARED = STAGES * STAGE + (SUMS > COLUMNS * RANKS * 2 ? SUMS : COLUMNS * RANKS * 2);
  static_assert(ROWS * QUARTERS / 16 == THREADS / 32 && RANKS / 8 == QUARTERS);
  static_assert(SHARED <= 101376);

  static FEDMS_DEVICE void run(const LoraGradPartialsArguments<T>& g) {
    const uint32_t memory = ptx::shared_memory(), b_tile = memory + STAGES * STAGE;
    const int column = ptx::block_x() * COLUMNS, split = ptx::block_y(), rank = ptx::block_z() * RANKS;
    const RowBlock rows = row_block(g.segments, split, g.rows_a_split, g.m, g.r, false);
    const int begin = rows.row, end = rows.end;
    const int steps = ceil_div(end - begin, ROWS);
    const auto load = [&](int step) {
      if (step < steps) {
        const uint32_t stage = memory + step % STAGES * STAGE;
        copy_tile<ROWS, CHUNKS, THREADS>(stage, g.z, g.z_stride, begin + step * ROWS, end, column, g.c);
        if (g.g) copy_tile<ROWS, 4, THREADS>(stage + Z_BYTES, g.t, g.t_stride, begin + step * ROWS, end, rank, rows.ranks);
      }
      ptx::cp_async_commit();
    };
    uint32_t b[OF_QUARTER][RANKS / 16][4];
    if (g.u) {
      copy_tile<COLUMNS, 4, THREADS>(b_tile, g.b + rows.first_rank, g.b_stride, column, g.c, rank, rows.ranks);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      ptx::sync_block();
#pragma unroll
      for (int i = 0; i < OF_QUARTER; ++i) {
#pragma unroll
        for (int j = 0; j < RANKS / 16; ++j) load_b_across<4>(b[i][j], b_tile, (warp() % QUARTERS * OF_QUARTER + i) * 16, 2 * j);
      }
    }
    float outer[OUTER][RANKS / 8][4] = {};
    for (int step = 0; step < STAGES - 1; ++step) load(step);
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<STAGES - 2>();
      ptx::sync_block();
      load(step + STAGES - 1);
      const uint32_t z = memory + step % STAGES * STAGE;
      if (g.mask.has_dropout()) {
        drop_tile<ROWS, CHUNKS, THREADS>(g.mask, z, begin + step * ROWS, column, g.c);
        ptx::sync_block();
      }
      if (g.g) add_outer(outer, z, z + Z_BYTES);
      if (g.u) project(g, z, b, b_tile, begin + step * ROWS, end, rank);
    }
    if (!g.g) return;
    float* to = g.g + int64_t(split) * g.c * g.r;
#pragma unroll
    for (int o = 0; o < OUTER; ++o) {
#pragma unroll
      for (int j = 0; j < RANKS / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int to_column = column + (warp() * OUTER + o) * 16 + accumulator_row(lane(), i);
          const int to_rank = rank + j * 8 + accumulator_column(lane(), i);
          if (to_column >= g.c || to_rank >= g.r) continue;
          to[int64_t(to_column) * g.r + to_rank] = g.mask.has_dropout() ? outer[o][j][i] * g.mask.kept_scale : outer[o][j][i];
        }
      }
    }
  }

  // z^T t: the columns of z are shared out to the warps.
  static FEDMS_DEVICE void add_outer(float (&outer)[OUTER][RANKS / 8][4], uint32_t z, uint32_t t) {
#pragma unroll
    for (int row = 0; row < ROWS; row += 16) {
      uint32_t right[RANKS / 16][4];
#pragma unroll
      for (int j = 0; j < RANKS / 16; ++j) load_b_across<4>(right[j], t, row, 2 * j);
#pragma unroll
      for (int o = 0; o < OUTER; ++o) {
        uint32_t left[4];
        load_a_across<CHUNKS>(left, z, row, 2 * (warp() * OUTER + o));
#pragma unroll
        for (int j = 0; j < RANKS / 16; ++j) {
          ptx::mma_16x8x16<T>(outer[o][2 * j], left, right[j][0], right[j][1]);
          ptx::mma_16x8x16<T>(outer[o][2 * j + 1], left, right[j][2], right[j][3]);
        }
      }
    }
  }

  static FEDMS_DEVICE void project(const LoraGradPartialsArguments<T>& g, uint32_t z, const uint32_t (&b)[OF_QUARTER][RANKS / 16][4],
                                   uint32_t sums, int row, int end, int rank) {
    const int part = warp() / QUARTERS * 16, quarter = warp() % QUARTERS;
    float sum[RANKS / 8][4] = {};
#pragma unroll
    for (int i = 0; i < OF_QUARTER; ++i) {
      uint32_t left[4];
      load_a<CHUNKS>(left, z, part, 2 * (quarter * OF_QUARTER + i));
#pragma unroll
      for (int j = 0; j < RANKS / 16; ++j) {
        ptx::mma_16x8x16<T>(sum[2 * j], left, b[i][j][0], b[i][j][1]);
        ptx::mma_16x8x16<T>(sum[2 * j + 1], left, b[i][j][2], b[i][j][3]);
      }
    }
    // Lanes lie side by side in each of a quarter's values, and whoever adds finds his in the same places.
    const int half = warp() / QUARTERS;
    const auto place = [&](int of_half, int of_quarter, int j) {
      return sums + ((of_half * QUARTERS + of_quarter) * (RANKS / 8) + j) * 512 + lane() * 16;
    };
#pragma unroll
    for (int j = 0; j < RANKS / 8; ++j) ptx::store_shared_128(place(half, quarter, j), words_of(sum[j]));
    ptx::sync_block();
    float total[4] = {};
#pragma unroll
    for (int other = 0; other < QUARTERS; ++other) add_words(total, ptx::load_shared_128(place(half, other, quarter)));
    float* to = g.u + int64_t(ptx::block_x()) * g.m * g.r;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {  // two ranks side by side, the first one even
      const int to_row = row + part + accumulator_row(lane(), i), to_rank = rank + quarter * 8 + accumulator_column(lane(), i);
      if (to_row >= end || to_rank >= g.r) continue;
      float* place_of_u = to + int64_t(to_row) * g.r + to_rank;
      if (g.r % 2 == 0) {
        *reinterpret_cast<Pair*>(place_of_u) = {total[i], total[i + 1]};
      } else {
        place_of_u[0] = total[i];
        if (to_rank + 1 < g.r) place_of_u[1] = total[i + 1];
      }
    }
  }
};

template <class T, int COLUMNS>
__global__ void __launch_bounds__(LoraGradPartials<T, COLUMNS>::THREADS, 2)
    lora_grad_partials_kernel(__grid_constant__ const LoraGradPartialsArguments<T> arguments) {
  LoraGradPartials<T, COLUMNS>::run(arguments);
}

// --- sums of parts

// dgate, and dS on the way. A warp for every row.
template <class T>
__global__ void __launch_bounds__(256)
    finalize_row_grads_kernel(int m, int r, int experts, int parts, const float* u, const T* s, T* ds, int64_t ds_stride,
                       float* dgate, __grid_constant__ const Factors factors, __grid_constant__ const Segments segments) {
  const int row = ptx::block_x() * 8 + warp();
  if (row >= m) return;
  const RowBlock rows = row_block_of(segments, row, r);
  float products[MOST_RANKS / 32];
#pragma unroll
  for (int i = 0; i < MOST_RANKS / 32; ++i) {
    const int rank = i * 32 + lane();
    float sum = 0;
    products[i] = 0;
    if (rank < rows.ranks) {
      for (int part = 0; part < parts; ++part) sum += u[(int64_t(part) * m + row) * r + rank];
      products[i] = sum * Number<T>::widen(s[int64_t(row) * r + rank]);
    }
    if (ds && rank < ds_stride) {
      const float factor = rank < rows.ranks ? factor_of(factors, segments, rows.owner, row, rank) : 0;
      ds[row * ds_stride + rank] = {Number<T>::narrow(rank < rows.ranks ? sum * factor : 0)};
    }
  }
  const int columns = segments.count ? 1 : experts;
  for (int column = 0; column < columns; ++column) {
    const int expert = segments.count ? rows.owner : column;
    float total = 0;
#pragma unroll
    for (int i = 0; i < MOST_RANKS / 32; ++i) {
      const int rank = i * 32 + lane();
      if (rank < rows.ranks && (segments.count || factors.expert[rank] == expert)) total += products[i];
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) total += ptx::shuffle_xor(total, lanes);
    if (lane() == 0) dgate[int64_t(row) * columns + column] = total * factors.scale[expert];
  }
}

// A block has whole rows of the sum.
template <class T>
__global__ void __launch_bounds__(256)
    reduce_partials_kernel(int c, int r, int parts, int first, int count, const float* g, T* out, int64_t row_stride,
                     int64_t column_stride) {
  const int rows_of_block = 256 / count, of_block = ptx::thread() / count, column = ptx::thread() % count;
  const int row = ptx::block_x() * rows_of_block + of_block;
  if (of_block >= rows_of_block || row >= c) return;
  float sum = 0;
#pragma unroll 8
  for (int part = 0; part < parts; ++part) sum += g[(int64_t(part) * c + row) * r + first + column];
  out[row * row_stride + column * column_stride] = {Number<T>::narrow(sum)};
}

// Calls start with a null pointer of the element's type.
template <class Start>
void for_element(Element element, Start start) {
  element == Element::bf16 ? start(static_cast<Bf16*>(nullptr)) : start(static_cast<Fp16*>(nullptr));
}

void check_sizes(const Launch& what, int64_t m, int64_t columns, int64_t r) {
  if (m < 1 || columns < 1 || m > INT_MAX - 1024 || columns > INT_MAX - 1024) fail(what, "a size is out of range");
  if (r < 1 || r > MOST_RANKS) fail(what, "the total rank must be from 1 to " + std::to_string(MOST_RANKS));
}

// Blocks of 256 threads that have whole rows of so many columns, 256 at most.
Grid blocks_of_rows(int64_t rows, int64_t columns) { return {ceil_div(rows, 256 / int(columns))}; }

}  // namespace

void shrink(Element element, int64_t m, int64_t k, int64_t r, const void* x, int64_t x_stride, const void* a,
            int64_t a_stride, void* s, void* t, int64_t t_stride, const Factors& factors, const Segments& segments,
            const Dropout& dropout, const Stream& stream) {
  const Launch what{"shrink", m, 0, k, r, stream};
  check_sizes(what, m, k, r);
  if (k % 8) fail(what, "k is not a multiple of 8");
  check_segments(what, segments, m);
  // Blocks cover the ranks in steps of RANKS: what they do not reach behind the last rank would stay unwritten.
  if (t_stride < r || t_stride > int64_t(ceil_div(r, RANKS)) * RANKS) fail(what, "the stride of t is out of range");
  for_element(element, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const ShrinkArguments<T> arguments{int(m), int(k), int(r), static_cast<const T*>(x), x_stride,
                                       static_cast<const T*>(a), a_stride, static_cast<T*>(s), static_cast<T*>(t),
                                       t_stride, factors, segments, mask_of(dropout)};
    launch(what, shrink_kernel<T>, {row_blocks(segments, Shrink<T>::ROWS, int(m)), ceil_div(r, RANKS)}, Shrink<T>::THREADS,
           Shrink<T>::SHARED, arguments);
  });
}

void apply_scale_and_gate(Element element, int64_t m, int64_t r, const void* s, void* t, int64_t t_stride, const Factors& factors,
           const Segments& segments, const Stream& stream) {
  const Launch what{"apply_scale_and_gate", m, 0, 0, r, stream};
  check_sizes(what, m, r, r);
  check_segments(what, segments, m);
  if (t_stride < r || t_stride > MOST_RANKS) fail(what, "the stride of t is out of range");
  for_element(element, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    launch(what, apply_scale_and_gate_kernel<T, T>, blocks_of_rows(m, t_stride), 256, 0, int(m), int(r), 1, static_cast<const T*>(s),
           static_cast<T*>(t), int(t_stride), factors, segments);
  });
}

int64_t lora_grad_partials_blocks(int64_t c) { return ceil_div(c, lora_grad_partials_columns(c)); }

void lora_grad_partials(Element element, int64_t m, int64_t c, int64_t r, int64_t rows_a_split, const void* z, int64_t z_stride,
           const void* t, int64_t t_stride, float* g, const void* b, int64_t b_stride, float* u, const Segments& segments,
           const Dropout& dropout, const Stream& stream) {
  const Launch what{"lora_grad_partials", m, c, 0, r, stream};
  check_sizes(what, m, c, r);
  if (c % 8) fail(what, "the columns of z are not a multiple of 8");
  if (rows_a_split < 64 || rows_a_split % 64 || rows_a_split > INT_MAX - 1024) {
    fail(what, "rows_a_split is not a positive multiple of 64");
  }
  if (u && dropout.p > 0) fail(what, "dropout is for z^T t alone");
  check_segments(what, segments, m);
  for_element(element, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const LoraGradPartialsArguments<T> arguments{int(m), int(c), int(r), int(rows_a_split), static_cast<const T*>(z), z_stride,
                                      static_cast<const T*>(t), t_stride, g, static_cast<const T*>(b), b_stride, u,
                                      segments, mask_of(dropout)};
    const Grid grid{int(lora_grad_partials_blocks(c)), row_blocks(segments, int(rows_a_split), int(m)), ceil_div(r, RANKS)};
    if (lora_grad_partials_columns(c) == 256) {
      launch(what, lora_grad_partials_kernel<T, 256>, grid, LoraGradPartials<T, 256>::THREADS, LoraGradPartials<T, 256>::SHARED, arguments);
    } else {
      launch(what, lora_grad_partials_kernel<T, 128>, grid, LoraGradPartials<T, 128>::THREADS, LoraGradPartials<T, 128>::SHARED, arguments);
    }
  });
}

void finalize_row_grads(Element element, int64_t m, int64_t r, int64_t experts, int64_t parts, const float* u, const void* s,
                 void* ds, int64_t ds_stride, float* dgate, const Factors& factors, const Segments& segments,
                 const Stream& stream) {
  const Launch what{"finalize_row_grads", m, 0, 0, r, stream};
  check_sizes(what, m, r, r);
  check_segments(what, segments, m);
  if (ds && (ds_stride < r || ds_stride > MOST_RANKS)) fail(what, "the stride of ds is out of range");
  for_element(element, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    if (ds && !dgate) {
      launch(what, apply_scale_and_gate_kernel<T, float>, blocks_of_rows(m, ds_stride), 256, 0, int(m), int(r), int(parts), u,
             static_cast<T*>(ds), int(ds_stride), factors, segments);
    }
    if (!dgate) return;
    launch(what, finalize_row_grads_kernel<T>, {ceil_div(m, 8)}, 256, 0, int(m), int(r), int(experts), int(parts), u,
           static_cast<const T*>(s), static_cast<T*>(ds), ds_stride, dgate, factors, segments);
  });
}

void reduce_partials(Element element, int64_t c, int64_t r, int64_t parts, int64_t first, int64_t count, const float* g,
               void* out, int64_t row_stride, int64_t column_stride, const Stream& stream) {
  const Launch what{"reduce_partials", c, 0, 0, r, stream};
  check_sizes(what, c, r, r);
  if (first < 0 || count < 1 || first + count > r) fail(what, "the columns are out of range");
  for_element(element, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    launch(what, reduce_partials_kernel<T>, blocks_of_rows(c, count), 256, 0, int(c), int(r), int(parts), int(first),
           int(count), g, static_cast<T*>(out), row_stride, column_stride);
  });
}

}  // namespace fedms::cuda
