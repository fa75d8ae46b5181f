// The frozen GEMM with the ranks in it, for compute capability 9.0: a persistent grid in which one warpgroup copies
// tiles through the tensor memory accelerator, and two multiply them with wgmma, 64 rows of the output tile each.
//
// No multicast within a cluster: sharing W's tiles between two blocks took as long on an H200 (docs/evidence/cuda.md).
//
// Behind a shrink that runs ahead (shrink_sm90.cu) it starts before T is there: the thread that copies waits for the end of that
// launch before it comes to the ranks of its first tile.
#include <type_traits>

#include "gemm.h"
#include "ring.h"

namespace fedms::cuda {
namespace {

constexpr int STEP = 64, BOX = 64 * 128;  // a box: 64 rows of 64 numbers, 128 bytes
// From so many numbers on, 32 MiB, y leaves no room in the 50 MB of L2 for what the other tiles read, and whoever reads y next
// would not find its beginning there: it is the first to be evicted.
constexpr int64_t STREAMED = 16 << 20;

template <int VALUE>
using Count = std::integral_constant<int, VALUE>;

// The operands as the tensor memory accelerator sees them.
struct Maps {
  TensorMap x, w, t, f, y;
};

template <class T, int TILE, bool TRANSPOSED>
struct WgmmaGemm {
  static constexpr Tile tile = TILES[TILE];
  static constexpr int BM = tile.bm, BN = tile.bn;
  static constexpr int CONSUMERS = BM / 64;
  using Stages = Ring<tile.stages, tile.stage_bytes()>;
  // What registers there are, 504 for each thread of a warpgroup, shared out in eights.
  static constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
  static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= 504);
  static_assert(Stages::BYTES + CONSUMERS * 2 * BOX + Stages::BARRIER_BYTES == tile.shared_bytes());

  // The rows of a tile of this block, and its first column.
  struct Place {
    RowBlock rows;
    int column;
  };

  // Copies a box of x or T, and one of W or F, whose numbers are at `first` of the reduction; in F that is at `first_of_f`.
  static FEDMS_DEVICE void load(const Maps& maps, const Place& place, bool ranks, int first, int first_of_f, uint32_t stage,
                                uint32_t full) {
    const uint32_t b = stage + BM * 128;
    ptx::tma_load(stage, ranks ? &maps.t : &maps.x, full, place.rows.row, first);
    const TensorMap* map = ranks ? &maps.f : &maps.w;
    if constexpr (TRANSPOSED) {
#pragma unroll
      for (int box = 0; box < BN / 64; ++box) ptx::tma_load(b + box * BOX, map, full, first_of_f, place.column + box * 64);
    } else {
      ptx::tma_load(b, map, full, place.column, first_of_f);
    }
  }

  // Calls work(place) for the tiles of this block, one after the other. In segments every tile is whole: what two of them
  // compute both comes out the same.
  template <class F>
  static FEDMS_DEVICE void for_tiles(const GemmArguments<T>& g, F work) {
    const int blocks = row_blocks(g.segments, BM, g.m), columns = ceil_div(g.n, BN);
    for (int t = ptx::block_x(); t < blocks * columns; t += ptx::blocks_x()) {
      const Tile2 tile = place_tile(t, blocks, columns, g.band);
      work(Place{row_block(g.segments, tile.row, BM, g.m, g.r, true), tile.column * BN});
    }
  }

  static FEDMS_DEVICE void produce(const GemmArguments<T>& g, const Maps& maps, const Stages& ring) {
    typename Stages::Cursor at;
    for_tiles(g, [&](const Place& place) {
      for (int first = 0; first < g.k; first += STEP) {
        ring.fill(at, [&](uint32_t stage, uint32_t full) { load(maps, place, false, first, first, stage, full); });
      }
      // Also without ranks, so that this launch does not end before the one that it overlaps. After the first time it is nothing.
      ptx::wait_for_launch_before();
      ptx::fence_global_for_tma();
      for (int first = 0; first < place.rows.ranks; first += STEP) {
        ring.fill(at, [&](uint32_t stage, uint32_t full) {
          load(maps, place, true, first, place.rows.first_rank + first, stage, full);
        });
      }
    });
  }

  using Accumulator = float[BN / 2];

  // 16 k of a stage, for the 64 rows of this warpgroup.
  static FEDMS_DEVICE void multiply(Accumulator& sum, uint32_t stage, int warpgroup, int k16) {
    const uint64_t a = matrix_descriptor(stage + warpgroup * BOX + k16 * 32, 0);
    // Along: 16 k are 32 bytes further on in each row. Across: they are 16 rows further down in each box.
    const uint64_t b = matrix_descriptor(stage + BM * 128 + k16 * (TRANSPOSED ? 16 * 128 : 32), TRANSPOSED ? BOX : 0);
    ptx::wgmma<T, BN, TRANSPOSED>(sum, a, b);
  }

  static FEDMS_DEVICE void consume(const GemmArguments<T>& g, const Maps& maps, const Stages& ring, uint32_t staged,
                                   int warpgroup) {
    int boxes = 0;
    typename Stages::Reader reader;
    for_tiles(g, [&](const Place& place) {
      Accumulator sum = {};
      ptx::keep_in_place(sum);
      const auto step = [&](auto count) {
        ring.multiply(reader, [&](uint32_t stage) {
#pragma unroll
          for (int k16 = 0; k16 < decltype(count)::value; ++k16) multiply(sum, stage, warpgroup, k16);
        });
      };
      for (int first = 0; first < g.k; first += STEP) step(Count<STEP / 16>());
      for (int first = 0; first < place.rows.ranks; first += STEP) {
        switch (ceil_div(place.rows.ranks - first, 16)) {
          case 1: step(Count<1>()); break;
          case 2: step(Count<2>()); break;
          case 3: step(Count<3>()); break;
          default: step(Count<4>());
        }
      }
      ring.finish(reader, sum);
      write(g, maps, staged + warpgroup * 2 * BOX, boxes, warpgroup, place.rows.row + warpgroup * 64, place.column, sum);
    });
    if (ptx::thread() % 128 == 0) ptx::tma_store_wait_read<0>();
  }

  // Boxes of 64 x 64 through two places in shared memory, taken in turns also from one tile to the next; the tensor memory
  // accelerator writes them behind our back.
  static FEDMS_DEVICE void write(const GemmArguments<T>& g, const Maps& maps, uint32_t staged, int& boxes, int warpgroup,
                                 int row, int column, Accumulator& sum) {
    const int thread = ptx::thread() % 128, lane = thread % 32, warp = thread / 32;
    const uint64_t policy = ptx::cache_policy(int64_t(g.m) * g.n > STREAMED);
#pragma unroll
    for (int box = 0; box < BN / 64; ++box) {
      const uint32_t place = staged + boxes++ % 2 * BOX;
      if (thread == 0) ptx::tma_store_wait_read<1>();
      ptx::named_barrier(1 + warpgroup, 128);
#pragma unroll
      for (int i = 0; i < 32; i += 2) {
        const int box_row = warp * 16 + accumulator_row(lane, i % 4), box_column = i / 4 * 8 + accumulator_column(lane, 0);
        float low = sum[box * 32 + i], high = sum[box * 32 + i + 1];
        add_bias(g.bias, column + box * 64 + box_column, g.n, low, high);
        ptx::store_shared_u32(place + chunk_offset<8>(box_row, box_column / 8) + box_column % 8 * 2, pack<T>(low, high));
      }
      ptx::fence_shared_for_tma();
      ptx::named_barrier(1 + warpgroup, 128);
      if (thread == 0) {
        ptx::tma_store(&maps.y, place, row, column + box * 64, policy);
        ptx::tma_store_commit();
      }
    }
  }

  static FEDMS_DEVICE void run(const GemmArguments<T>& g, const Maps& maps) {
    const uint32_t memory = ptx::shared_memory(), staged = memory + Stages::BYTES;
    const Stages ring{memory, staged + CONSUMERS * 2 * BOX};
    const int warpgroup = ptx::thread() / 128;
    if (ptx::thread() == 0) {
      for (const TensorMap* map : {&maps.x, &maps.w, &maps.t, &maps.f, &maps.y}) ptx::prefetch_map(map);
    }
    ring.init(CONSUMERS);
    if (warpgroup == CONSUMERS) {
      ptx::give_registers<PRODUCER_REGISTERS>();
      if (ptx::thread() == CONSUMERS * 128) produce(g, maps, ring);
    } else {
      ptx::take_registers<CONSUMER_REGISTERS>();
      consume(g, maps, ring, staged, warpgroup);
    }
  }
};

template <class T, int TILE, bool TRANSPOSED>
__global__ void __launch_bounds__(TILES[TILE].threads(), 1)
    wgmma_gemm(__grid_constant__ const GemmArguments<T> arguments, __grid_constant__ const Maps maps) {
  WgmmaGemm<T, TILE, TRANSPOSED>::run(arguments, maps);
}

template <class T, int TILE, bool TRANSPOSED>
void start(const Launch& what, const GemmArguments<T>& g, bool early, int multiprocessors, TensorMaps& kept) {
  constexpr Tile tile = TILES[TILE];
  using Of = TensorMaps::Operand;
  const auto map = [&](Of of, const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
    return kept.of(of, what, Number<T>::is_bf16, data, rows, columns, stride, box_rows);
  };
  const auto operand = [&](Of of, const void* data, int k, int64_t stride) {
    return TRANSPOSED ? map(of, data, k, g.n, stride, STEP) : map(of, data, g.n, k, stride, tile.bn);
  };
  Maps maps;
  maps.x = map(Of::x, g.x, g.m, g.k, g.x_stride, tile.bm);
  maps.w = operand(Of::w, g.w, g.k, g.w_stride);
  // Without ranks nobody looks at their maps, but they travel along. In segments F goes on behind the ranks of one expert.
  maps.t = g.r == 0 ? maps.x : map(Of::t, g.t, g.m, g.r, g.t_stride, tile.bm);
  maps.f = g.r == 0 ? maps.w : operand(Of::f, g.f, ranks_with_gaps(g.segments, g.r), g.f_stride);
  maps.y = map(Of::y, g.y, g.m, g.n, g.n, 64);
  const int tiles = row_blocks(g.segments, tile.bm, g.m) * ceil_div(g.n, tile.bn);
  launch(what, wgmma_gemm<T, TILE, TRANSPOSED>, {std::min(tiles, multiprocessors), 1, 1, early}, tile.threads(),
         tile.shared_bytes(), g, maps);
}

}  // namespace

template <class T>
void start_wgmma_gemm(const Launch& what, const GemmArguments<T>& g, int tile, bool transposed, bool early, int multiprocessors,
                      TensorMaps& maps) {
  const auto start_tile = [&](auto number) {
    constexpr int TILE = decltype(number)::value;
    transposed ? start<T, TILE, true>(what, g, early, multiprocessors, maps)
               : start<T, TILE, false>(what, g, early, multiprocessors, maps);
  };
  switch (tile) {
    case 2: return start_tile(Count<2>());
    case 3: return start_tile(Count<3>());
    case 4: return start_tile(Count<4>());
  }
}
template void start_wgmma_gemm(const Launch&, const GemmArguments<Bf16>&, int, bool, bool, int, TensorMaps&);
template void start_wgmma_gemm(const Launch&, const GemmArguments<Fp16>&, int, bool, bool, int, TensorMaps&);

}  // namespace fedms::cuda
