// The frozen GEMM with the ranks in it, for every GPU from compute capability 8.0 on: cp.async into a ring of stages,
// ldmatrix, mma.sync. One output tile a block.
#include "gemm.h"
#include "mma.h"

namespace fedms::cuda {
namespace {

// INT8 && DROPS: the ranks' part has an accumulator of its own, since neither the scale of W nor the mask is for both.
// Without INT8 the mask is looked up as the kernel runs, and DROPS is false.
template <class T, int TILE, bool INT8, bool TRANSPOSED, bool DROPS>
struct MmaGemm {
  static constexpr Tile tile = TILES[TILE];
  static constexpr int BM = tile.bm, BN = tile.bn, STAGES = tile.stages, STAGE = tile.stage_bytes(), THREADS = tile.threads();
  static constexpr int WARP_ROWS = BM / tile.warps_m, WARP_COLUMNS = BN / tile.warps_n;
  static constexpr int TILES_M = WARP_ROWS / 16, TILES_N = WARP_COLUMNS / 16;
  static_assert(!(INT8 && TRANSPOSED) && !(DROPS && !INT8));

  using Accumulator = float[TILES_M][2 * TILES_N][4];

  // Loads step `step` of the reduction of one pair of operands: x and W, or T and F.
  static FEDMS_DEVICE void load(uint32_t stage, const GemmArguments<T>& g, const RowBlock& rows, int column, bool ranks,
                                int step) {
    const uint32_t b = stage + BM * 128;
    const int first = step * STEP, k = ranks ? rows.ranks : g.k;
    copy_tile<BM, 8, THREADS>(stage, ranks ? g.t : g.x, ranks ? g.t_stride : g.x_stride, rows.row, rows.end, first, k);
    if (INT8 && !ranks) {
      copy_tile<BN, 4, THREADS>(b, static_cast<const int8_t*>(g.w), g.w_stride, column, g.n, first, k);
      return;
    }
    const T* from = ranks ? g.f + rows.first_rank * (TRANSPOSED ? g.f_stride : 1) : static_cast<const T*>(g.w);
    const int64_t stride = ranks ? g.f_stride : g.w_stride;
    if constexpr (TRANSPOSED) {
      copy_tile<STEP, BN / 8, THREADS>(b, from, stride, first, k, column, g.n);
    } else {
      copy_tile<BN, 8, THREADS>(b, from, stride, column, g.n, first, k);
    }
  }

  // 16 k: every warp its part of the tile.
  template <bool WIDEN>
  static FEDMS_DEVICE void multiply(Accumulator& sum, uint32_t stage, int k16) {
    const uint32_t b_tile = stage + BM * 128;
    const int row = warp() / tile.warps_n * WARP_ROWS, column = warp() % tile.warps_n * WARP_COLUMNS;
    uint32_t a[TILES_M][4];
#pragma unroll
    for (int i = 0; i < TILES_M; ++i) load_a<8>(a[i], stage, row + i * 16, 2 * k16);
#pragma unroll
    for (int j = 0; j < TILES_N; ++j) {
      uint32_t b[4];
      if constexpr (WIDEN) {
        load_b_int8<T>(b, b_tile, column + j * 16, k16);
      } else if constexpr (TRANSPOSED) {
        load_b_across<BN / 8>(b, b_tile, k16 * 16, column / 8 + 2 * j);
      } else {
        load_b<8>(b, b_tile, column + j * 16, 2 * k16);
      }
#pragma unroll
      for (int i = 0; i < TILES_M; ++i) {
        ptx::mma_16x8x16<T>(sum[i][2 * j], a[i], b[0], b[1]);
        ptx::mma_16x8x16<T>(sum[i][2 * j + 1], a[i], b[2], b[3]);
      }
    }
  }

  // Calls change(value, row, column) for this thread's part of the output tile, two columns side by side at a time.
  template <class Change>
  static FEDMS_DEVICE void for_pairs(Accumulator& sum, Change change) {
    const int row = warp() / tile.warps_n * WARP_ROWS, column = warp() % tile.warps_n * WARP_COLUMNS;
#pragma unroll
    for (int i = 0; i < TILES_M; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * TILES_N; ++j) {
#pragma unroll
        for (int half = 0; half < 4; half += 2) {
          change(sum[i][j][half], sum[i][j][half + 1], row + i * 16 + accumulator_row(lane(), half),
                 column + j * 8 + accumulator_column(lane(), half));
        }
      }
    }
  }

  static FEDMS_DEVICE void run(const GemmArguments<T>& g) {
    const uint32_t memory = ptx::shared_memory();
    const Mask mask = g.mask.with_seed();
    const Tile2 block = place_tile(ptx::block_x(), row_blocks(g.segments, BM, g.m), ceil_div(g.n, BN), g.band);
    const RowBlock rows = row_block(g.segments, block.row, BM, g.m, g.r, false);
    const int first_column = block.column * BN;
    const int k_steps = ceil_div(g.k, STEP), rank_steps = ceil_div(rows.ranks, STEP), steps = k_steps + rank_steps;
    // Dropout covers the ranks' part alone, so that comes first, while nothing else is in the accumulator. The scale of an
    // int8 W covers W's part alone, so there that comes first.
    const int first_steps = INT8 ? k_steps : rank_steps;
    const auto load_step = [&](int step) {
      if (step < steps) {
        const bool first = step < first_steps;
        load(memory + step % STAGES * STAGE, g, rows, first_column, first != INT8, first ? step : step - first_steps);
      }
      ptx::cp_async_commit();
    };
    Accumulator sum = {}, of_ranks = {};
    const auto drop = [&](Accumulator& of) {
      for_pairs(of, [&](float& low, float& high, int row, int column) {
        drop_pair(mask, rows.row + row, first_column + column, g.n, low, high);
      });
    };
    const auto scale = [&] {
      for_pairs(sum, [&](float& low, float& high, int, int column) {
        if (first_column + column < g.n) {
          low *= g.w_scale[first_column + column];
          high *= g.w_scale[first_column + column + 1];
        }
      });
    };

    for (int step = 0; step < STAGES - 1; ++step) load_step(step);
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<STAGES - 2>();
      ptx::sync_block();  // all see this step's tiles, and are done with the stage that is filled next
      load_step(step + STAGES - 1);
      const uint32_t stage = memory + step % STAGES * STAGE;
      const bool first = step < first_steps;
      if (step == first_steps && INT8 && !DROPS) scale();
      if (step == first_steps && !INT8 && mask.has_dropout()) drop(sum);
      if (first == INT8) {
#pragma unroll
        for (int k16 = 0; k16 < STEP / 16; ++k16) multiply<INT8>(sum, stage, k16);
      } else {
        const int left = rows.ranks - (first ? step : step - first_steps) * STEP;
#pragma unroll 1
        for (int k16 = 0; k16 < STEP / 16 && k16 * 16 < left; ++k16) multiply<false>(DROPS ? of_ranks : sum, stage, k16);
      }
    }
    if (INT8 && (DROPS || rank_steps == 0)) scale();
    if constexpr (DROPS) {
      drop(of_ranks);
      add(sum, of_ranks);
    }
    write(g, rows, first_column, memory, sum);
  }

  static FEDMS_DEVICE void add(Accumulator& sum, const Accumulator& of_ranks) {
#pragma unroll
    for (int i = 0; i < TILES_M; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * TILES_N; ++j) {
#pragma unroll
        for (int value = 0; value < 4; ++value) sum[i][j][value] += of_ranks[i][j][value];
      }
    }
  }

  // Through the memory of the pipeline, so that whole rows of the tile are written.
  static FEDMS_DEVICE void write(const GemmArguments<T>& g, const RowBlock& rows, int first_column, uint32_t memory,
                                 Accumulator& sum) {
    ptx::cp_async_wait<0>();
    ptx::sync_block();
    for_pairs(sum, [&](float low, float high, int row, int column) {
      add_bias(g.bias, first_column + column, g.n, low, high);
      ptx::store_shared_u32(memory + chunk_offset<BN / 8>(row, column / 8) + column % 8 * 2, pack<T>(low, high));
    });
    ptx::sync_block();
#pragma unroll 4
    for (int i = ptx::thread(); i < BM * BN / 8; i += THREADS) {
      const int row = i / (BN / 8), chunk = i % (BN / 8);
      const Words eight = ptx::load_shared_128(memory + chunk_offset<BN / 8>(row, chunk));
      const int y_row = rows.row + row, y_column = first_column + chunk * 8;
      if (y_row < rows.end && y_column < g.n) *reinterpret_cast<Words*>(g.y + int64_t(y_row) * g.n + y_column) = eight;
    }
  }
};

template <class T, int TILE, bool INT8, bool TRANSPOSED, bool DROPS>
__global__ void __launch_bounds__(TILES[TILE].threads()) mma_gemm(__grid_constant__ const GemmArguments<T> arguments) {
  MmaGemm<T, TILE, INT8, TRANSPOSED, DROPS>::run(arguments);
}

template <class T, int TILE, bool INT8, bool TRANSPOSED, bool DROPS>
void start(const Launch& what, const GemmArguments<T>& g) {
  constexpr Tile tile = TILES[TILE];
  launch(what, mma_gemm<T, TILE, INT8, TRANSPOSED, DROPS>,
         {row_blocks(g.segments, tile.bm, g.m) * ceil_div(g.n, tile.bn)}, tile.threads(), tile.shared_bytes(), g);
}

template <class T, int TILE>
void start_layout(const Launch& what, const GemmArguments<T>& arguments, bool transposed) {
  if (arguments.w_scale && arguments.mask.has_dropout()) {
    start<T, TILE, true, false, true>(what, arguments);
  } else if (arguments.w_scale) {
    start<T, TILE, true, false, false>(what, arguments);
  } else if (transposed) {
    start<T, TILE, false, true, false>(what, arguments);
  } else {
    start<T, TILE, false, false, false>(what, arguments);
  }
}

}  // namespace

template <class T>
void start_mma_gemm(const Launch& what, const GemmArguments<T>& arguments, int tile, bool transposed) {
  switch (tile) {
    case 0: return start_layout<T, 0>(what, arguments, transposed);
    case 1: return start_layout<T, 1>(what, arguments, transposed);
  }
}
template void start_mma_gemm(const Launch&, const GemmArguments<Bf16>&, int, bool);
template void start_mma_gemm(const Launch&, const GemmArguments<Fp16>&, int, bool);

}  // namespace fedms::cuda
