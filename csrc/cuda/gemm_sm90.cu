// The frozen GEMM with the ranks in it, for compute capability 9.0: a persistent grid in which one warpgroup copies
// tiles through the tensor memory accelerator, and two multiply them with wgmma, 64 rows of the output tile each.
//
// No multicast within a cluster: sharing W's tiles between two blocks took as long on an H200 (docs/evidence/cuda.md).
//
// S can be made on the way (INSIDE): the tiles of the first columns, which come first, multiply their x by A too, and write S
// and T; the other tiles of their rows wait for T, which most find there. So x is read once. A lies where the output will
// go, which waits for its turn.
#include <type_traits>

#include "gemm.h"

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
  TensorMap x, w, t, f, y, a;
};

template <class T, int TILE, bool TRANSPOSED, bool INSIDE>
struct WgmmaGemm {
  static constexpr Tile tile = TILES[TILE];
  static constexpr int BM = tile.bm, BN = tile.bn, STAGES = tile.stages, STAGE = tile.stage_bytes();
  static constexpr int CONSUMERS = BM / 64;
  static constexpr int A_BYTES = RANKS_INSIDE * 128;  // of a step
  // What registers there are, 504 for each thread of a warpgroup, shared out in eights.
  static constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
  static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= 504);

  struct Ring {
    uint32_t stages, staged, full, empty, idle;  // addresses in shared memory

    FEDMS_DEVICE uint32_t full_of(int stage) const { return full + stage * 8; }
    FEDMS_DEVICE uint32_t empty_of(int stage) const { return empty + stage * 8; }
    FEDMS_DEVICE uint32_t a_of(int stage) const { return staged + stage * A_BYTES; }
  };

  // Where in the ring a warpgroup is. `phase` counts the rounds, of which barriers know the last bit.
  struct Cursor {
    int stage = 0, phase = 0;

    FEDMS_DEVICE void advance() {
      if (++stage == STAGES) {
        stage = 0;
        phase ^= 1;
      }
    }
  };

  // A tile of this block, and what comes before and after it.
  struct Place {
    RowBlock rows;
    int block, column;  // the number of the row block, and the first column
    bool first, then_shrinks;

    FEDMS_DEVICE bool shrinks() const { return INSIDE && column == 0; }
  };

  // The box of x and W, or with `ranks` of T and F, at `first` of the reduction; in F that is at `first_of_f`.
  static FEDMS_DEVICE void load(const Ring& ring, const Maps& maps, Cursor at, const Place& place, bool ranks, int first,
                                int first_of_f) {
    ptx::barrier_wait(ring.empty_of(at.stage), at.phase ^ 1);
    const uint32_t full = ring.full_of(at.stage), a = ring.stages + at.stage * STAGE, b = a + BM * 128;
    const int row = place.rows.row, column = place.column;
    const bool shrinks = place.shrinks() && !ranks;
    ptx::barrier_arrive_expect(full, shrinks ? STAGE + A_BYTES : STAGE);
    if (shrinks) ptx::tma_load(ring.a_of(at.stage), &maps.a, full, place.rows.first_rank, first);
    ptx::tma_load(a, ranks ? &maps.t : &maps.x, full, row, first);
    const TensorMap* map = ranks ? &maps.f : &maps.w;
    if constexpr (TRANSPOSED) {
#pragma unroll
      for (int box = 0; box < BN / 64; ++box) ptx::tma_load(b + box * BOX, map, full, first_of_f, column + box * 64);
    } else {
      ptx::tma_load(b, map, full, column, first_of_f);
    }
  }

  // Calls work(place) for the tiles of this block, one after the other. In segments every tile is whole: what two of them
  // compute both comes out the same.
  template <class F>
  static FEDMS_DEVICE void for_tiles(const GemmArguments<T>& g, F work) {
    const int blocks = row_blocks(g.segments, BM, g.m), columns = ceil_div(g.n, BN), step = ptx::blocks_x();
    const auto tile_at = [&](int t) {
      return INSIDE ? place_tile_first_column_first(t, blocks, columns, g.band) : place_tile(t, blocks, columns, g.band);
    };
    for (int t = ptx::block_x(); t < blocks * columns; t += step) {
      const Tile2 tile = tile_at(t);
      const bool then_shrinks = INSIDE && t + step < blocks * columns && tile_at(t + step).column == 0;
      const RowBlock rows = row_block(g.segments, tile.row, BM, g.m, g.r, true);
      work(Place{rows, tile.row, tile.column * BN, t == ptx::block_x(), then_shrinks});
    }
  }

  static FEDMS_DEVICE void produce(const GemmArguments<T>& g, const Maps& maps, const Ring& ring) {
    Cursor at;
    int idle_phase = 0;
    for_tiles(g, [&](const Place& place) {
      if (place.shrinks() && !place.first) {
        ptx::barrier_wait(ring.idle, idle_phase);
        idle_phase ^= 1;
      }
      for (int first = 0; first < g.k; first += STEP, at.advance()) load(ring, maps, at, place, false, first, first);
      if constexpr (INSIDE) {
        ptx::wait_for(g.ready + place.block);
        ptx::fence_global_for_tma();
      }
      for (int first = 0; first < place.rows.ranks; first += STEP, at.advance()) {
        load(ring, maps, at, place, true, first, place.rows.first_rank + first);
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

  using Shrunk = float[RANKS_INSIDE / 2];

  static FEDMS_DEVICE void consume(const GemmArguments<T>& g, const Maps& maps, const Ring& ring, int warpgroup) {
    const int thread = ptx::thread() % 128;
    const uint32_t staged = ring.staged + warpgroup * 2 * BOX;
    int boxes = 0;
    Cursor at;
    for_tiles(g, [&](const Place& place) {
      Accumulator sum = {};
      ptx::keep_in_place(sum);
      int before = -1;
      // Issues the multiplications of one stage while those of the stage before may still run; that one is free then.
      // Their number is known to the compiler: a branch between them would make it wait for each.
      const auto step = [&](auto count, auto more) {
        ptx::barrier_wait(ring.full_of(at.stage), at.phase);
        const uint32_t stage = ring.stages + at.stage * STAGE;
        ptx::wgmma_fence();
#pragma unroll
        for (int k16 = 0; k16 < decltype(count)::value; ++k16) {
          multiply(sum, stage, warpgroup, k16);
          more(stage, k16);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        if (before >= 0 && thread == 0) ptx::barrier_arrive(ring.empty_of(before));
        before = at.stage;
        at.advance();
      };
      const auto nothing = [](uint32_t, int) {};
      if (place.shrinks()) {
        Shrunk s = {};
        ptx::keep_in_place(s);
        for (int first = 0; first < g.k; first += STEP) {
          step(Count<STEP / 16>(), [&](uint32_t stage, int k16) {
            const uint64_t x = matrix_descriptor(stage + warpgroup * BOX + k16 * 32, 0);
            ptx::wgmma<T, RANKS_INSIDE, false>(s, x, matrix_descriptor(ring.a_of(at.stage) + k16 * 32, 0));
          });
        }
        ptx::wgmma_wait<0>();
        ptx::keep_in_place(sum);
        ptx::keep_in_place(s);
        if (thread == 0) ptx::barrier_arrive(ring.empty_of(before));
        before = -1;
        publish(g, place, warpgroup, s);
      } else {
        for (int first = 0; first < g.k; first += STEP) step(Count<STEP / 16>(), nothing);
      }
      for (int first = 0; first < place.rows.ranks; first += STEP) {
        switch (ceil_div(place.rows.ranks - first, 16)) {
          case 1: step(Count<1>(), nothing); break;
          case 2: step(Count<2>(), nothing); break;
          case 3: step(Count<3>(), nothing); break;
          default: step(Count<4>(), nothing);
        }
      }
      ptx::wgmma_wait<0>();
      ptx::keep_in_place(sum);
      if (before >= 0 && thread == 0) ptx::barrier_arrive(ring.empty_of(before));
      write(g, maps, staged, boxes, warpgroup, place.rows.row + warpgroup * 64, place.column, sum);
      if (place.then_shrinks && thread == 0) {  // A of the next tile will lie in the places of the output
        ptx::tma_store_wait_read<0>();
        ptx::barrier_arrive(ring.idle);
      }
    });
    if (thread == 0) ptx::tma_store_wait_read<0>();
  }

  // S and T of this warpgroup's 64 rows. When all rows of the tile have them, the other tiles are told.
  static FEDMS_DEVICE void publish(const GemmArguments<T>& g, const Place& place, int warpgroup, const Shrunk& s) {
    const int thread = ptx::thread() % 128, lane = thread % 32, warp = thread / 32;
    const auto row = [&](int i) { return place.rows.row + warpgroup * 64 + warp * 16 + accumulator_row(lane, i % 4); };
    const auto rank = [&](int i) { return i / 4 * 8 + accumulator_column(lane, i); };
    // Some factors are under way before the first number is written; registers are few beside the accumulator.
    constexpr int SOME = 8;
#pragma unroll
    for (int first = 0; first < RANKS_INSIDE / 2; first += SOME) {
      float factor[SOME];
#pragma unroll
      for (int i = 0; i < SOME; ++i) {
        const bool own = row(first + i) < place.rows.end && rank(first + i) < place.rows.ranks;
        factor[i] = own ? factor_of(g.factors, g.segments, place.rows.owner, row(first + i), rank(first + i)) : 0;
      }
#pragma unroll
      for (int i = 0; i < SOME; ++i) {
        put_s(g.s, g.t, g.t_stride, g.r, place.rows, row(first + i), rank(first + i), s[first + i], factor[i]);
      }
    }
    ptx::fence_global_for_tma();
    ptx::named_barrier(1 + CONSUMERS, CONSUMERS * 128);  // A's place is free, too: both warpgroups are done with it
    if (ptx::thread() == 0) ptx::announce(g.ready + place.block);
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
    const uint32_t memory = ptx::shared_memory(), staged = memory + STAGES * STAGE;
    const uint32_t barriers = staged + CONSUMERS * 2 * BOX;
    const Ring ring{memory, staged, barriers, barriers + STAGES * 8, barriers + STAGES * 16};
    const int warpgroup = ptx::thread() / 128;
    if (ptx::thread() == 0) {
      for (const TensorMap* map : {&maps.x, &maps.w, &maps.t, &maps.f, &maps.y}) ptx::prefetch_map(map);
      if (INSIDE) ptx::prefetch_map(&maps.a);
      for (int stage = 0; stage < STAGES; ++stage) {
        ptx::barrier_init(ring.full_of(stage), 1);
        ptx::barrier_init(ring.empty_of(stage), CONSUMERS);
      }
      ptx::barrier_init(ring.idle, CONSUMERS);
      ptx::fence_barrier_init();
    }
    ptx::sync_block();
    if (warpgroup == CONSUMERS) {
      ptx::give_registers<PRODUCER_REGISTERS>();
      if (ptx::thread() == CONSUMERS * 128) produce(g, maps, ring);
    } else {
      ptx::take_registers<CONSUMER_REGISTERS>();
      consume(g, maps, ring, warpgroup);
    }
  }
};

template <class T, int TILE, bool TRANSPOSED, bool INSIDE>
__global__ void __launch_bounds__(TILES[TILE].threads(), 1)
    wgmma_gemm(__grid_constant__ const GemmArguments<T> arguments, __grid_constant__ const Maps maps) {
  WgmmaGemm<T, TILE, TRANSPOSED, INSIDE>::run(arguments, maps);
}

template <class T, int TILE, bool TRANSPOSED, bool INSIDE>
void start(const Launch& what, const GemmArguments<T>& g, int multiprocessors, TensorMaps& kept) {
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
  const int count = g.segments.count, last = count - 1;
  const int ranks_of_f = count == 0 ? g.r : g.segments.firsts[last] + ceil_div(g.segments.ranks[last], 16) * 16;
  maps.t = g.r == 0 ? maps.x : map(Of::t, g.t, g.m, g.r, g.t_stride, tile.bm);
  maps.f = g.r == 0 ? maps.w : operand(Of::f, g.f, ranks_of_f, g.f_stride);
  maps.y = map(Of::y, g.y, g.m, g.n, g.n, 64);
  maps.a = INSIDE ? map(Of::a, g.a, ranks_of_f, g.k, g.a_stride, RANKS_INSIDE) : maps.x;
  const int blocks = row_blocks(g.segments, tile.bm, g.m), tiles = blocks * ceil_div(g.n, tile.bn);
  if (INSIDE) clear(what, g.ready, blocks * sizeof(*g.ready));
  launch(what, wgmma_gemm<T, TILE, TRANSPOSED, INSIDE>, {std::min(tiles, multiprocessors), 1, 1, INSIDE}, tile.threads(),
         tile.shared_bytes(), g, maps);
}

}  // namespace

template <class T>
void start_wgmma_gemm(const Launch& what, const GemmArguments<T>& g, int tile, bool transposed, int multiprocessors,
                      TensorMaps& maps) {
  const auto start_tile = [&](auto number) {
    constexpr int TILE = decltype(number)::value;
    if (transposed) return start<T, TILE, true, false>(what, g, multiprocessors, maps);
    g.ready ? start<T, TILE, false, true>(what, g, multiprocessors, maps)
            : start<T, TILE, false, false>(what, g, multiprocessors, maps);
  };
  switch (tile) {
    case 2: return start_tile(Count<2>());
    case 3: return start_tile(Count<3>());
    case 4: return start_tile(Count<4>());
  }
}
template void start_wgmma_gemm(const Launch&, const GemmArguments<Bf16>&, int, bool, int, TensorMaps&);
template void start_wgmma_gemm(const Launch&, const GemmArguments<Fp16>&, int, bool, int, TensorMaps&);

}  // namespace fedms::cuda
