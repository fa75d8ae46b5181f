// Output tiles of a persistent grid, for compute capability 9.0: which of them a block has, and how they are written.
#pragma once

#include <type_traits>

#include "gemm.h"
#include "ring.h"

namespace fedms::cuda {

constexpr int STEP = 64, BOX = 64 * 128;  // a box: 64 rows of 64 numbers, 128 bytes
// From so many numbers on, 32 MiB, y leaves no room in the 50 MB of L2 for what the other tiles read, and whoever reads y next
// would not find its beginning there: it is the first to be evicted.
constexpr int64_t STREAMED = 16 << 20;

// What registers there are, 504 for each thread of a warpgroup, shared out in eights: to one warpgroup that copies and two that
// multiply.
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
static_assert(PRODUCER_REGISTERS + 2 * CONSUMER_REGISTERS <= 504);

// Shares out the work of a block: the warpgroup behind those that consume produces, by one thread that needs few registers, and
// leaves the others to them.
template <class Produce, class Consume>
FEDMS_DEVICE void share_out(int consumers, Produce produce, Consume consume) {
  const int warpgroup = ptx::thread() / 128;
  if (warpgroup == consumers) {
    ptx::give_registers<PRODUCER_REGISTERS>();
    if (ptx::thread() == consumers * 128) produce();
  } else {
    ptx::take_registers<CONSUMER_REGISTERS>();
    consume(warpgroup);
  }
}

template <int VALUE>
using Count = std::integral_constant<int, VALUE>;

// Calls work(rows, number of the block of columns) for the tiles of this block, one after the other, of `columns` blocks of
// columns. In segments every tile is whole: what two of them compute both comes out the same.
template <int BM, class T, class F>
FEDMS_DEVICE void for_tiles(const GemmArguments<T>& g, int columns, F work) {
  const int blocks = row_blocks(g.segments, BM, g.m);
  for (int t = ptx::block_x(); t < blocks * columns; t += ptx::blocks_x()) {
    const Tile2 tile = place_tile(t, blocks, columns, g.band);
    work(row_block(g.segments, tile.row, BM, g.m, g.r, true), tile.column);
  }
}

// Writes the outputs of one warpgroup, 64 rows at a time: boxes of 64 x 64 through two places in shared memory, taken in turns
// also from one tile to the next; the tensor memory accelerator writes them behind our back.
template <class T>
struct TileWriter {
  uint32_t staged;  // the two places
  int warpgroup;
  bool streams;     // the outputs are too large for the L2 cache
  int boxes = 0;

  // With a bias (n,) or null.
  template <int BN, int D>
  FEDMS_DEVICE void write(const T* bias, int n, const TensorMap& y, int row, int column, const float (&sum)[D]) {
    static_assert(BN / 2 <= D);
    const int thread = ptx::thread() % 128, lane = thread % 32, warp = thread / 32;
    const uint64_t policy = ptx::cache_policy(streams);
#pragma unroll
    for (int box = 0; box < BN / 64; ++box) {
      const uint32_t place = staged + boxes++ % 2 * BOX;
      if (thread == 0) ptx::tma_store_wait_read<1>();
      ptx::named_barrier(1 + warpgroup, 128);
#pragma unroll
      for (int i = 0; i < 32; i += 2) {
        const int box_row = warp * 16 + accumulator_row(lane, i % 4), box_column = i / 4 * 8 + accumulator_column(lane, 0);
        float low = sum[box * 32 + i], high = sum[box * 32 + i + 1];
        add_bias(bias, column + box * 64 + box_column, n, low, high);
        ptx::store_shared_u32(place + chunk_offset<8>(box_row, box_column / 8) + box_column % 8 * 2, pack<T>(low, high));
      }
      ptx::fence_shared_for_tma();
      ptx::named_barrier(1 + warpgroup, 128);
      if (thread == 0) {
        ptx::tma_store(&y, place, row, column + box * 64, policy);
        ptx::tma_store_commit();
      }
    }
  }

  FEDMS_DEVICE static void finish() {
    if (ptx::thread() % 128 == 0) ptx::tma_store_wait_read<0>();
  }
};

}  // namespace fedms::cuda
