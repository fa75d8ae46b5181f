// S = x A^T and T, or dS from dy and B with the gate's gradient, by few blocks ahead of the GEMM that reads T or dS, for compute
// capability 9.0.
//
// The GEMM is started as soon as all blocks of this kernel run (programmatic dependent launch). Its blocks multiply W's part on
// the other multiprocessors meanwhile, and wait for the end of this kernel before they read T. So few blocks have to read all of
// x: much of it is under way for each.
#include "gate_grad.h"
#include "gemm.h"
#include "ring.h"

namespace fedms::cuda {
namespace {

constexpr int STEP = 64, BOX = 64 * 128;  // a box: 64 rows of 64 numbers, 128 bytes

// Backward each sibling has a dy and a B of its own; forward there is one x, and the A of all.
template <bool BACKWARD>
struct Maps {
  static constexpr int SIBLINGS = BACKWARD ? MOST_SIBLINGS : 1;
  TensorMap x[SIBLINGS], a[SIBLINGS];
};

// BACKWARD: x is dy, and A is B, given as (k, r).
template <class T, bool BACKWARD>
struct WgmmaShrink {
  static constexpr int ROWS = SHRINK_ROWS, RANKS = OVERLAPPED_RANKS;
  static constexpr int CONSUMERS = ROWS / 64, THREADS = CONSUMERS * 128 + 32;  // one more warp copies
  using Stages = Ring<SHRINK_STAGES, ROWS * 128 + BOX>;
  static_assert(RANKS == 64 && Stages::BYTES + Stages::BARRIER_BYTES == SHRINK_SHARED_BYTES);

  using Sums = float[RANKS / 2];

  // Calls work(rows, sibling) for the row blocks of all siblings that are this block's.
  template <class F>
  static FEDMS_DEVICE void for_row_blocks(const ShrinkAheadArguments<T>& g, F work) {
    const int blocks = row_blocks(g.segments, ROWS, g.m);
    for (int i = ptx::block_x(); i < blocks * g.siblings; i += ptx::blocks_x()) {
      const int sibling = BACKWARD ? i / blocks : 0;
      work(row_block(g.segments, i - sibling * blocks, ROWS, g.m, g.sibling[sibling].ranks, false), sibling);
    }
  }

  static FEDMS_DEVICE void produce(const ShrinkAheadArguments<T>& g, const Maps<BACKWARD>& maps, const Stages& ring) {
    typename Stages::Cursor at;
    for_row_blocks(g, [&](const RowBlock& rows, int sibling) {
      const int k = g.sibling[sibling].k;
      for (int first = 0; first < k; first += STEP) {
        ring.fill(at, [&](uint32_t stage, uint32_t full) {
          ptx::tma_load(stage, &maps.x[sibling], full, rows.row, first);
          if constexpr (BACKWARD) {
            ptx::tma_load(stage + ROWS * 128, &maps.a[sibling], full, first, rows.first_rank);
          } else {
            ptx::tma_load(stage + ROWS * 128, &maps.a[sibling], full, rows.first_rank, first);
          }
        });
      }
    });
  }

  static FEDMS_DEVICE void consume(const ShrinkAheadArguments<T>& g, const Stages& ring, int warpgroup) {
    typename Stages::Reader reader;
    for_row_blocks(g, [&](const RowBlock& rows, int sibling) {
      const int k = g.sibling[sibling].k;
      Sums sum = {};
      ptx::keep_in_place(sum);
      for (int first = 0; first < k; first += STEP) {
        ring.multiply(reader, [&](uint32_t stage) {
#pragma unroll
          for (int k16 = 0; k16 < STEP / 16; ++k16) {
            const uint64_t x = matrix_descriptor(stage + warpgroup * BOX + k16 * 32, 0);
            const uint64_t a = matrix_descriptor(stage + ROWS * 128 + k16 * (BACKWARD ? 16 * 128 : 32), 0);
            ptx::wgmma<T, RANKS, BACKWARD>(sum, x, a);
          }
        });
      }
      ring.finish(reader, sum);
      write(g, g.sibling[sibling], rows, rows.row + warpgroup * 64, sum);
    });
  }

  // What becomes of the sums of 64 rows, of which those of another segment are somebody else's.
  using Sibling = typename ShrinkAheadArguments<T>::Sibling;
  static FEDMS_DEVICE void write(const ShrinkAheadArguments<T>& g, const Sibling& of, const RowBlock& rows, int first_row,
                                 Sums& sum) {
    const int thread = ptx::thread() % 128, lane = thread % 32, warp = thread / 32;
    const auto row = [&](int i) { return first_row + warp * 16 + accumulator_row(lane, i % 4); };
    const auto rank = [&](int i) { return i / 4 * 8 + accumulator_column(lane, i); };
    const auto own = [&](int i) { return row(i) < rows.end && rank(i) < rows.ranks; };
    Sums factor;  // all of them under way before the first number is written
#pragma unroll
    for (int i = 0; i < RANKS / 2; ++i) {
      factor[i] = own(i) ? factor_of(g.factors, g.segments, rows.owner, row(i), of.first_rank + rank(i)) : 0;
    }
    T* const s = BACKWARD ? nullptr : g.s;
#pragma unroll
    for (int i = 0; i < RANKS / 2; ++i) {
      if (rank(i) < of.width) put_s(s, g.t + of.first_rank, g.t_stride, g.r, rows, row(i), rank(i), sum[i], factor[i]);
    }
    if constexpr (BACKWARD) {
      if (g.dgate == nullptr) return;
      const int columns = g.segments.count ? 1 : g.experts, first = g.segments.count ? rows.owner : of.first_expert;
      const GateGrad<T> to{g.dgate, columns, g.s + of.first_rank, g.r, g.factors.scale};
      put_gate_grad(to, sum, first, first + (g.segments.count ? 1 : of.experts), rows.end, row, rank, [&](int i) {
        if (rank(i) >= rows.ranks) return -1;
        return g.segments.count ? rows.owner : g.factors.expert[of.first_rank + rank(i)];
      });
    }
  }

  static FEDMS_DEVICE void run(const ShrinkAheadArguments<T>& g, const Maps<BACKWARD>& maps) {
    ptx::let_next_launch_start();
    const uint32_t memory = ptx::shared_memory();
    const Stages ring{memory, memory + Stages::BYTES};
    ring.init(CONSUMERS);
    const int warpgroup = ptx::thread() / 128;
    if (warpgroup < CONSUMERS) return consume(g, ring, warpgroup);
    if (ptx::thread() == CONSUMERS * 128) produce(g, maps, ring);
  }
};

template <class T, bool BACKWARD>
__global__ void __launch_bounds__(WgmmaShrink<T, BACKWARD>::THREADS, 1)
    shrink_ahead_kernel(__grid_constant__ const ShrinkAheadArguments<T> arguments, __grid_constant__ const Maps<BACKWARD> maps) {
  WgmmaShrink<T, BACKWARD>::run(arguments, maps);
}

}  // namespace

template <class T>
void start_shrink_ahead(const Launch& what, const ShrinkAheadArguments<T>& g, bool backward, int blocks,
                        TensorMaps& kept) {
  using Of = TensorMaps::Operand;
  const auto start = [&](auto* kernel, auto maps) {
    for (int i = 0; i < g.siblings; ++i) {
      const auto& of = g.sibling[i];
      const auto map = [&](Of operand, const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
        return kept.of(operand, what, Number<T>::is_bf16, data, rows, columns, stride, box_rows, i);
      };
      const int ranks = g.segments.count ? ranks_with_gaps(g.segments, g.r) : of.ranks;
      maps.x[i] = map(Of::x, of.x, g.m, of.k, of.x_stride, SHRINK_ROWS);
      maps.a[i] = backward ? map(Of::a, of.a, of.k, ranks, of.a_stride, STEP) : map(Of::a, of.a, ranks, of.k, of.a_stride, 64);
    }
    launch(what, kernel, {blocks}, WgmmaShrink<T, false>::THREADS, SHRINK_SHARED_BYTES, g, maps);
  };
  backward ? start(shrink_ahead_kernel<T, true>, Maps<true>{}) : start(shrink_ahead_kernel<T, false>, Maps<false>{});
}
template void start_shrink_ahead(const Launch&, const ShrinkAheadArguments<Bf16>&, bool, int, TensorMaps&);
template void start_shrink_ahead(const Launch&, const ShrinkAheadArguments<Fp16>&, bool, int, TensorMaps&);

}  // namespace fedms::cuda
