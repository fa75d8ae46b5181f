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

// The operands as the tensor memory accelerator sees them. Siblings share x, and each has a y; or, transposed, each has an x, and
// the sum of all is one y.
template <bool TRANSPOSED>
struct Maps {
  static constexpr int INPUTS = TRANSPOSED ? MOST_SIBLINGS : 1, OUTPUTS = TRANSPOSED ? 1 : MOST_SIBLINGS;
  TensorMap x[INPUTS], w[MOST_SIBLINGS], t, f[OUTPUTS], y[OUTPUTS];
};

template <class T>
struct WgmmaArguments : GemmArguments<T> {
  Siblings<T> siblings;
};

template <class T, int TILE, bool TRANSPOSED>
struct WgmmaGemm {
  using Arguments = WgmmaArguments<T>;
  static constexpr Tile tile = TILES[TILE];
  static constexpr int BM = tile.bm, BN = tile.bn;
  static constexpr int CONSUMERS = BM / 64;
  using Stages = Ring<tile.stages, tile.stage_bytes()>;
  static_assert(CONSUMERS == 2);
  static_assert(Stages::BYTES + CONSUMERS * 2 * BOX + Stages::BARRIER_BYTES == tile.shared_bytes());

  // The rows of a tile of this block, the output that it lies in, its first column there, and its ranks: how many there are, and
  // where they begin in T.
  struct Place {
    RowBlock rows;
    int output, column, ranks, first_rank;
  };

  // Copies a box of the first map, x or T, and one of the second, W or F, whose numbers are at `first` of the reduction; in F
  // that is at `first_of_f`.
  static FEDMS_DEVICE void load(const TensorMap& a_map, const TensorMap& b_map, const Place& place, int first, int first_of_f,
                                uint32_t stage, uint32_t full) {
    const uint32_t b = stage + BM * 128;
    ptx::tma_load(stage, &a_map, full, place.rows.row, first);
    if constexpr (TRANSPOSED) {
#pragma unroll
      for (int box = 0; box < BN / 64; ++box) ptx::tma_load(b + box * BOX, &b_map, full, first_of_f, place.column + box * 64);
    } else {
      ptx::tma_load(b, &b_map, full, place.column, first_of_f);
    }
  }

  // Calls work(place) for the tiles of this block.
  template <class F>
  static FEDMS_DEVICE void for_places(const Arguments& g, F work) {
    for_tiles<BM>(g, column_blocks(g), [&](const RowBlock& rows, int column) {
      if constexpr (TRANSPOSED) {
        work(Place{rows, 0, column * BN, rows.ranks, 0});
      } else {
        int output = 0;
        for (; output < g.siblings.count - 1; ++output) {
          const int of_output = ceil_div(g.siblings.each[output].width, BN);
          if (column < of_output) break;
          column -= of_output;
        }
        const auto& own = g.siblings.each[output];
        work(Place{rows, output, column * BN, g.segments.count ? rows.ranks : own.ranks, own.first_rank});
      }
    });
  }

  static FEDMS_DEVICE int column_blocks(const Arguments& g) {
    if constexpr (TRANSPOSED) return ceil_div(g.n, BN);
    int columns = 0;
    for (int i = 0; i < g.siblings.count; ++i) columns += ceil_div(g.siblings.each[i].width, BN);
    return columns;
  }

  // Of the reduction without the ranks. Transposed, each sibling ends with a step of its own, which ends with zeros.
  static FEDMS_DEVICE int steps_of(const Arguments& g) {
    if constexpr (!TRANSPOSED) return ceil_div(g.k, STEP);
    int steps = 0;
    for (int i = 0; i < g.siblings.count; ++i) steps += ceil_div(g.siblings.each[i].width, STEP);
    return steps;
  }

  static FEDMS_DEVICE void produce(const Arguments& g, const Maps<TRANSPOSED>& maps, const Stages& ring) {
    typename Stages::Cursor at;
    for_places(g, [&](const Place& place) {
      for (int input = 0; input < (TRANSPOSED ? g.siblings.count : 1); ++input) {
        const int k = TRANSPOSED ? g.siblings.each[input].width : g.k;
        const TensorMap& w = maps.w[TRANSPOSED ? input : place.output];
        for (int first = 0; first < k; first += STEP) {
          ring.fill(at, [&](uint32_t stage, uint32_t full) { load(maps.x[input], w, place, first, first, stage, full); });
        }
      }
      // Also without ranks, so that this launch does not end before the one that it overlaps. After the first time it is nothing.
      ptx::wait_for_launch_before();
      ptx::fence_global_for_tma();
      for (int first = 0; first < place.ranks; first += STEP) {
        ring.fill(at, [&](uint32_t stage, uint32_t full) {
          load(maps.t, maps.f[place.output], place, place.first_rank + first, place.rows.first_rank + first, stage, full);
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

  static FEDMS_DEVICE void consume(const Arguments& g, const Maps<TRANSPOSED>& maps, const Stages& ring, uint32_t staged,
                                   int warpgroup) {
    const int steps = steps_of(g);
    TileWriter<T> writer{staged + warpgroup * 2 * BOX, warpgroup, int64_t(g.m) * g.n > STREAMED};
    typename Stages::Reader reader;
    for_places(g, [&](const Place& place) {
      Accumulator sum = {};
      ptx::keep_in_place(sum);
      const auto step = [&](auto count) {
        ring.multiply(reader, [&](uint32_t stage) {
#pragma unroll
          for (int k16 = 0; k16 < decltype(count)::value; ++k16) multiply(sum, stage, warpgroup, k16);
        });
      };
      for (int i = 0; i < steps; ++i) step(Count<STEP / 16>());
      for (int first = 0; first < place.ranks; first += STEP) {
        switch (ceil_div(place.ranks - first, 16)) {
          case 1: step(Count<1>()); break;
          case 2: step(Count<2>()); break;
          case 3: step(Count<3>()); break;
          default: step(Count<4>());
        }
      }
      ring.finish(reader, sum);
      const auto& own = g.siblings.each[place.output];
      const T* const bias = TRANSPOSED ? nullptr : own.bias;
      writer.template write<BN>(bias, TRANSPOSED ? g.n : own.width, maps.y[place.output], place.rows.row + warpgroup * 64,
                                place.column, sum);
    });
    writer.finish();
  }

  static FEDMS_DEVICE void run(const Arguments& g, const Maps<TRANSPOSED>& maps) {
    const uint32_t memory = ptx::shared_memory(), staged = memory + Stages::BYTES;
    const Stages ring{memory, staged + CONSUMERS * 2 * BOX};
    if (ptx::thread() == 0) {
      for (const TensorMap* map : {&maps.x[0], &maps.w[0], &maps.t, &maps.f[0], &maps.y[0]}) ptx::prefetch_map(map);
    }
    ring.init(CONSUMERS);
    share_out(
        CONSUMERS, [&] { produce(g, maps, ring); }, [&](int warpgroup) { consume(g, maps, ring, staged, warpgroup); });
  }
};

template <class T, int TILE, bool TRANSPOSED>
__global__ void __launch_bounds__(TILES[TILE].threads(), 1)
    wgmma_gemm(__grid_constant__ const WgmmaArguments<T> arguments, __grid_constant__ const Maps<TRANSPOSED> maps) {
  WgmmaGemm<T, TILE, TRANSPOSED>::run(arguments, maps);
}

template <class T, int TILE, bool TRANSPOSED>
void start(const Launch& what, const GemmArguments<T>& g, const std::vector<GemmSibling>& siblings, bool early,
           int multiprocessors, TensorMaps& kept) {
  constexpr Tile tile = TILES[TILE];
  using Of = TensorMaps::Operand;
  const auto map = [&](Of of, const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows, int sibling = 0) {
    return kept.of(of, what, Number<T>::is_bf16, data, rows, columns, stride, box_rows, sibling);
  };
  WgmmaArguments<T> arguments{g, {}};
  Maps<TRANSPOSED> maps{};
  int columns = 0;
  for (const GemmSibling& of : siblings) {
    const int i = arguments.siblings.count++;
    arguments.siblings.each[i] = {int(of.width), of.first_rank, of.ranks, static_cast<const T*>(of.bias)};
    columns += ceil_div(of.width, tile.bn);
    if constexpr (TRANSPOSED) {
      maps.x[i] = map(Of::x, of.x, g.m, of.width, of.x_stride, tile.bm, i);
      maps.w[i] = map(Of::w, of.w, of.width, g.n, of.w_stride, STEP, i);
    } else {
      maps.w[i] = map(Of::w, of.w, of.width, g.k, of.w_stride, tile.bn, i);
      const int ranks = g.segments.count ? ranks_with_gaps(g.segments, g.r) : of.ranks;  // in segments F has those of all experts
      maps.f[i] = g.r == 0 ? maps.w[i] : map(Of::f, of.b, of.width, ranks, of.b_stride, tile.bn, i);
      maps.y[i] = map(Of::y, of.y, g.m, of.width, of.width, 64, i);
    }
  }
  // Without ranks nobody looks at their maps, but they travel along.
  if constexpr (TRANSPOSED) {
    maps.f[0] = g.r == 0 ? maps.w[0] : map(Of::f, g.f, ranks_with_gaps(g.segments, g.r), g.n, g.f_stride, STEP);
    maps.y[0] = map(Of::y, g.y, g.m, g.n, g.n, 64);
    columns = ceil_div(g.n, tile.bn);
  } else {
    maps.x[0] = map(Of::x, g.x, g.m, g.k, g.x_stride, tile.bm);
  }
  maps.t = g.r == 0 ? maps.x[0] : map(Of::t, g.t, g.m, g.r, g.t_stride, tile.bm);
  const int tiles = row_blocks(g.segments, tile.bm, g.m) * columns;
  launch(what, wgmma_gemm<T, TILE, TRANSPOSED>, {std::min(tiles, multiprocessors), 1, 1, early}, tile.threads(),
         tile.shared_bytes(), arguments, maps);
}

}  // namespace

template <class T>
void start_wgmma_gemm(const Launch& what, const GemmArguments<T>& g, const std::vector<GemmSibling>& siblings, int tile,
                      bool transposed, bool early, int multiprocessors, TensorMaps& maps) {
  const auto start_tile = [&](auto number) {
    constexpr int TILE = decltype(number)::value;
    transposed ? start<T, TILE, true>(what, g, siblings, early, multiprocessors, maps)
               : start<T, TILE, false>(what, g, siblings, early, multiprocessors, maps);
  };
  switch (tile) {
    case 2: return start_tile(Count<2>());
    case 3: return start_tile(Count<3>());
    case 4: return start_tile(Count<4>());
  }
}
template void start_wgmma_gemm(const Launch&, const GemmArguments<Bf16>&, const std::vector<GemmSibling>&, int, bool, bool, int,
                               TensorMaps&);
template void start_wgmma_gemm(const Launch&, const GemmArguments<Fp16>&, const std::vector<GemmSibling>&, int, bool, bool, int,
                               TensorMaps&);

}  // namespace fedms::cuda
