// Partial sums of dA or dB over the rows, and of U = dy B over the columns, in one pass over x or dy; and the entry of the
// strips, which are another way to dA and dB (strips_sm90.cu).
#include "heuristics.h"
#include "ranks.h"

namespace fedms::cuda {
namespace {

template <class T>
struct GradArguments {
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
struct GradTile {
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

  static FEDMS_DEVICE void run(const GradArguments<T>& g) {
    const uint32_t memory = ptx::shared_memory(), b_tile = memory + STAGES * STAGE;
    const Mask mask = g.mask.with_seed();
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
      if (mask.has_dropout()) {
        drop_tile<ROWS, CHUNKS, THREADS>(mask, z, begin + step * ROWS, column, g.c);
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
          to[int64_t(to_column) * g.r + to_rank] = mask.has_dropout() ? outer[o][j][i] * mask.kept_scale : outer[o][j][i];
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

  static FEDMS_DEVICE void project(const GradArguments<T>& g, uint32_t z, const uint32_t (&b)[OF_QUARTER][RANKS / 16][4],
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
__global__ void __launch_bounds__(GradTile<T, COLUMNS>::THREADS, 2)
    lora_grad_partials_kernel(__grid_constant__ const GradArguments<T> arguments) {
  GradTile<T, COLUMNS>::run(arguments);
}

}  // namespace

int64_t lora_grad_partials_blocks(int64_t c) { return ceil_div(c, lora_grad_partials_columns(c)); }

void lora_grad_partials(const LoraGradPartials& g, const Stream& stream) {
  const Launch what{"lora_grad_partials", g.m, g.c, 0, g.r, stream};
  check_sizes(what, g.m, g.c, g.r);
  if (g.c % 8) fail(what, "the columns of z are not a multiple of 8");
  if (g.rows_a_split < 64 || g.rows_a_split % 64 || g.rows_a_split > INT_MAX - 1024) {
    fail(what, "rows_a_split is not a positive multiple of 64");
  }
  if (g.u && g.dropout.p > 0) fail(what, "dropout is for z^T t alone");
  check_segments(what, g.segments, g.m);
  for_element(g.element, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const GradArguments<T> arguments{int(g.m), int(g.c), int(g.r), int(g.rows_a_split), static_cast<const T*>(g.z), g.z_stride,
                                     static_cast<const T*>(g.t), g.t_stride, g.g, static_cast<const T*>(g.b), g.b_stride, g.u,
                                     g.segments, mask_of(g.dropout)};
    const Grid grid{int(lora_grad_partials_blocks(g.c)), row_blocks(g.segments, int(g.rows_a_split), int(g.m)),
                    ceil_div(g.r, RANKS)};
    const auto start = [&](auto* kernel, auto tile) {
      launch(what, kernel, grid, decltype(tile)::THREADS, decltype(tile)::SHARED, arguments);
    };
    if (lora_grad_partials_columns(g.c) == 256) {
      start(lora_grad_partials_kernel<T, 256>, GradTile<T, 256>());
    } else {
      start(lora_grad_partials_kernel<T, 128>, GradTile<T, 128>());
    }
  });
}

int64_t lora_grad_strips_blocks(int64_t c) { return ceil_div(c, STRIP_COLUMNS); }

void lora_grad_strips(const LoraGradStrips& g, const Stream& stream) {
  const LoraGradStrips::Side& of_da = g.sides[LoraGradStrips::OF_DA];
  int64_t columns = -of_da.c, outputs = 0;
  for (const LoraGradStrips::Side& side : g.sides) {
    columns += side.c;
    if (side.c && !side.parts && &side != &of_da) outputs += side.out.size();
  }
  const Launch what{"lora_grad_strips", g.m, columns, of_da.c, g.r, stream};
  check_sizes(what, g.m, columns + of_da.c, g.r);
  if (g.r > OVERLAPPED_RANKS) fail(what, "the total rank is above 64");
  if (g.rows_a_split < STRIP_ROWS || g.rows_a_split % STRIP_ROWS) fail(what, "rows_a_split is not a positive multiple of 128");
  for (const LoraGradStrips::Side& side : g.sides) {
    const int64_t own = &side == &of_da ? side.out.size() : outputs;
    const bool in_place = g.segments.count == 0 && g.rows_a_split >= g.m && own <= LoraGradStrips::MOST_OUTPUTS;
    if (side.c % 8) fail(what, "the columns of a side are not a multiple of 8");
    if (side.c && !side.parts && !in_place) fail(what, "segments, splits, or so many outputs need parts");
  }
  check_segments(what, g.segments, g.m);
  if constexpr (HAS_WGMMA) {
    start_lora_grad_strips(what, g);
  } else {
    fail(what, "this build has no wgmma");
  }
}

}  // namespace fedms::cuda
