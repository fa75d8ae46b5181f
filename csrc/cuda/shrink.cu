// S = drop(x) A^T, and T = S with scale and gate.
#include "ranks.h"

namespace fedms::cuda {
namespace {

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
struct ShrinkTile {
  // Few blocks are there, about one for each multiprocessor: what its memory holds back, the bytes that arrive in a
  // microsecond (32 KiB on 9.0), must be under way for it, and more.
  // Eight warps: four share out the rows, and each two of them the numbers of a step.
  static constexpr int ROWS = 64, THREADS = 256, STAGES = 8, STAGE = (ROWS + RANKS) * 128;
  static constexpr int SHARED = STAGES * STAGE;
  static_assert(SHARED <= 101376);

  static FEDMS_DEVICE void run(const ShrinkArguments<T>& g) {
    const uint32_t memory = ptx::shared_memory();
    const Mask mask = g.mask.with_seed();
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
      if (mask.has_dropout()) {
        drop_tile<ROWS, 8, THREADS>(mask, x, row, step * STEP, g.k);
        ptx::sync_block();
      }
      multiply(sum, x, a);
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
        const float value = mask.has_dropout() ? sum[j][i] * mask.kept_scale : sum[j][i];
        put_s(g.s, g.t, g.t_stride, g.r, rows, to_row(i), to_rank(j, i), value, factor[j][i]);
      }
    }
  }

  // This warp's share of a step: 16 rows of x, half of the step's numbers, all ranks of a.
  static FEDMS_DEVICE void multiply(float (&sum)[RANKS / 8][4], uint32_t x, uint32_t a) {
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
__global__ void __launch_bounds__(ShrinkTile<T>::THREADS) shrink_kernel(__grid_constant__ const ShrinkArguments<T> arguments) {
  ShrinkTile<T>::run(arguments);
}

}  // namespace

void shrink(const Shrink& g, const Stream& stream) {
  const Launch what{"shrink", g.m, 0, g.k, g.r, stream};
  check_sizes(what, g.m, g.k, g.r);
  if (g.k % 8) fail(what, "k is not a multiple of 8");
  check_segments(what, g.segments, g.m);
  // Blocks cover the ranks in steps of RANKS: what they do not reach behind the last rank would stay unwritten.
  if (g.t_stride < g.r || g.t_stride > int64_t(ceil_div(g.r, RANKS)) * RANKS) fail(what, "the stride of t is out of range");
  for_element(g.element, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const ShrinkArguments<T> arguments{int(g.m), int(g.k), int(g.r), static_cast<const T*>(g.x), g.x_stride,
                                       static_cast<const T*>(g.a), g.a_stride, static_cast<T*>(g.s), static_cast<T*>(g.t),
                                       g.t_stride, g.factors, g.segments, mask_of(g.dropout)};
    launch(what, shrink_kernel<T>, {row_blocks(g.segments, ShrinkTile<T>::ROWS, int(g.m)), ceil_div(g.r, RANKS)},
           ShrinkTile<T>::THREADS, ShrinkTile<T>::SHARED, arguments);
  });
}

}  // namespace fedms::cuda
