// The frozen GEMM with the ranks in it, for compute capability 9.0: a persistent grid in which one warpgroup copies
// tiles through the tensor memory accelerator, and two multiply them with wgmma, 64 rows of the output tile each.
//
// No multicast within a cluster: sharing W's tiles between two blocks took as long on an H200 (docs/evidence/cuda.md).
//
// Behind a shrink that runs ahead (shrink_sm90.cu) it starts before T is there: the thread that copies waits for the end of that
// launch before it comes to the ranks of its first tile.
#include "tile_sm90.h"

namespace fedms::cuda {
namespace {

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
  static_assert(CONSUMERS == 2);
  static_assert(Stages::BYTES + CONSUMERS * 2 * BOX + Stages::BARRIER_BYTES == tile.shared_bytes());

  // Copies a box of x or T, and one of W or F, whose numbers are at `first` of the reduction; in F that is at `first_of_f`.
  static FEDMS_DEVICE void load(const Maps& maps, const TilePlace& place, bool ranks, int first, int first_of_f, uint32_t stage,
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

  static FEDMS_DEVICE void produce(const GemmArguments<T>& g, const Maps& maps, const Stages& ring) {
    typename Stages::Cursor at;
    for_tiles<BM, BN>(g, [&](const TilePlace& place) {
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
    TileWriter<T> writer{staged + warpgroup * 2 * BOX, warpgroup};
    typename Stages::Reader reader;
    for_tiles<BM, BN>(g, [&](const TilePlace& place) {
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
      writer.template write<BN>(g, maps.y, place.rows.row + warpgroup * 64, place.column, sum);
    });
    writer.finish();
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
