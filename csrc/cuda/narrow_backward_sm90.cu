// The backward pass of a layer in one launch, for compute capability 9.0: dx = dy W + dS A, where each tile of dx makes dS of its
// rows by itself, and the parts of dA and dB.
//
// A block keeps one block of columns of dx and goes through blocks of rows, so that it can sum up over them, in registers: dA of
// its own columns of x, in one warpgroup, and dB of a share of the columns of dy, in the other, while these columns are in shared
// memory for dx anyway. Each block leaves one part of both sums, which reduce_partials adds up in order. The blocks of the first
// columns make the gate's gradient too, from the dy B of which each makes dS.
#include "gate_grad.h"
#include "tile_sm90.h"

namespace fedms::cuda {
namespace {

// The operands as the tensor memory accelerator sees them. B and T have rows of 64 bytes in shared memory.
struct Maps {
  TensorMap dy, w, b, x, a, t, dx;
};

struct NarrowBackwardArguments {
  int m, n, k, r, experts;
  int columns, parts;  // blocks of columns, for each of which so many blocks share the rows
  float *da, *db;      // (parts, k, r) and (parts, n, r)
  const void* s;
  float* dgate;
  Factors factors;
};

template <class T>
struct NarrowTile {
  static constexpr Tile tile = TILES[NARROW_TILE];
  static constexpr int BM = tile.bm, BN = tile.bn, RANKS = NARROW_RANKS, CONSUMERS = BM / 64, BOXES = BN / 64;
  static constexpr int VALUES = RANKS / 2;  // of 64 rows of dS in a thread
  static constexpr int A_BOX = RANKS * 128, W_BYTES = BOXES * BOX, ROW = RANKS * 2;
  using Stages = Ring<tile.stages, BM * 128 + W_BYTES + STEP * ROW>;  // dy, W, B; or half of x, and A
  using TStage = Ring<1, BM * ROW>;
  static_assert(W_BYTES + BOXES * A_BOX <= BM * 128 + W_BYTES + STEP * ROW);
  static constexpr int STAGED = CONSUMERS * 2 * BOX, DS_BYTES = BM * ROW;
  static_assert(Stages::BYTES + STAGED + TStage::BYTES + DS_BYTES + Stages::BARRIER_BYTES + TStage::BARRIER_BYTES ==
                NARROW_BACKWARD_SHARED_BYTES);

  struct Memory {
    Stages ring;
    TStage t;
    uint32_t staged, ds;
  };

  // The steps over the columns of dy: this block's own ones, of which it makes dB, come first.
  struct Steps {
    int all, first, own;

    FEDMS_DEVICE static Steps of(const NarrowBackwardArguments& g, int column_block) {
      const int all = ceil_div(g.n, STEP), share = ceil_div(all, g.columns);
      const int first = clamp(column_block * share, 0, all), end = clamp(first + share, 0, all);
      return {all, first, end - first};
    }
    // The first column of dy of a step.
    FEDMS_DEVICE int column(int step) const {
      if (step < own) return (first + step) * STEP;
      return (step - own < first ? step - own : step) * STEP;
    }
  };

  // The number of this block's block of columns, computed where it is needed.
  static FEDMS_DEVICE int own_columns(const NarrowBackwardArguments& g) { return ptx::computed_here(ptx::block_x()) % g.columns; }

  // Calls work(first row) for the blocks of rows of this block.
  template <class F>
  static FEDMS_DEVICE void for_rows(const NarrowBackwardArguments& g, F work) {
    const int blocks = ceil_div(g.m, BM);
    for (int i = ptx::block_x() / g.columns; i < blocks; i += g.parts) work(i * BM);
  }

  static FEDMS_DEVICE void produce(const NarrowBackwardArguments& g, const Maps& maps, const Memory& memory, int column_block) {
    const Steps steps = Steps::of(g, column_block);
    const int column = column_block * BN;
    typename Stages::Cursor at;
    typename TStage::Cursor t_at;
    for_rows(g, [&](int row) {
      memory.t.fill(t_at, [&](uint32_t stage, uint32_t full) { ptx::tma_load(stage, &maps.t, full, row, 0); });
      for (int step = 0; step < steps.all; ++step) {
        memory.ring.fill(at, [&](uint32_t stage, uint32_t full) {
          const int term = steps.column(step);
          ptx::tma_load(stage, &maps.dy, full, row, term);
          load_boxes(stage + BM * 128, BOX, maps.w, full, term, column);
          ptx::tma_load(stage + BM * 128 + W_BYTES, &maps.b, full, term, 0);
        });
      }
      for (int half = 0; half < 2; ++half) {
        const auto load = [&](uint32_t stage, uint32_t full) {
          load_boxes(stage, BOX, maps.x, full, row + half * 64, column);
          if (half == 0) load_boxes(stage + W_BYTES, A_BOX, maps.a, full, 0, column);
        };
        memory.ring.fill(at, load, W_BYTES + (half == 0 ? BOXES * A_BOX : 0));
      }
    });
  }

  static FEDMS_DEVICE void load_boxes(uint32_t to, int bytes, const TensorMap& map, uint32_t full, int row, int column) {
#pragma unroll
    for (int box = 0; box < BOXES; ++box) ptx::tma_load(to + box * bytes, &map, full, row, column + box * 64);
  }

  using Gradient = float[BOXES][VALUES];  // of dA or dB: 192 columns of x or dy, and the ranks

  // Of one warpgroup, 64 rows of each tile; the first one makes dA, the second one dB.
  template <int WARPGROUP>
  static FEDMS_DEVICE void consume(const NarrowBackwardArguments& g, const Maps& maps, const Memory& memory, int column_block) {
    const Steps steps = Steps::of(g, column_block);
    const Stages& ring = memory.ring;
    TileWriter<T> writer{memory.staged + WARPGROUP * 2 * BOX, WARPGROUP, int64_t(g.m) * g.k > STREAMED};
    typename Stages::Reader reader;
    typename TStage::Cursor t_at;
    Gradient gradient = {};
    keep_in_place(gradient);
    for_rows(g, [&](int row) {
      const int first_row = row + WARPGROUP * 64;
      float sum[BN / 2] = {}, u[VALUES] = {};
      ptx::keep_in_place(sum);
      ptx::keep_in_place(u);
      if (WARPGROUP == 1) ptx::barrier_wait(memory.t.full(0), t_at.phase);
      const auto step = [&](auto own) {  // own: its number among this block's own ones, or -1
        constexpr int OWN = decltype(own)::value;
        ring.multiply(reader, [&](uint32_t stage) {
#pragma unroll
          for (int k16 = 0; k16 < STEP / 16; ++k16) {
            const uint64_t dy = matrix_descriptor(stage + WARPGROUP * BOX + k16 * 32, 0);
            ptx::wgmma<T, BN, true>(sum, dy, matrix_descriptor(stage + BM * 128 + k16 * 16 * 128, BOX));
            ptx::wgmma<T, RANKS, true>(u, dy, short_rows_descriptor(stage + BM * 128 + W_BYTES + k16 * 16 * ROW));
          }
          if constexpr (WARPGROUP == 1 && OWN >= 0) add_rows<BM>(gradient[OWN], stage, memory.t.stages);
        });
      };
      if (steps.own > 0) step(Count<0>());
      if (steps.own > 1) step(Count<1>());
      if (steps.own > 2) step(Count<2>());
      for (int i = steps.own; i < steps.all; ++i) step(Count<-1>());
      float factor[VALUES];  // under way while the last step is multiplied
      load_factors(g, first_row, factor);
      ring.finish(reader, sum);
      ptx::keep_in_place(u);
      if (WARPGROUP == 1) {
        if (ptx::thread() % 128 == 0) ptx::barrier_arrive(memory.t.empty(0));
        t_at.advance();
      }
      uint32_t ds[RANKS / 16][4];
      make_ds(g.r, factor, u, ds);
      if (g.dgate && own_columns(g) == 0) write_dgate(g, first_row, u);
      share_ds(ds, memory.ds, WARPGROUP * 64);
      ring.multiply(reader, [&](uint32_t stage) {
#pragma unroll
        for (int k16 = 0; k16 < RANKS / 16; ++k16) {
          ptx::wgmma_from_registers<T, BN, true>(sum, ds[k16], matrix_descriptor(stage + W_BYTES + k16 * 16 * 128, A_BOX));
        }
        if constexpr (WARPGROUP == 0) add_half_of_x(gradient, stage, memory.ds);
      });
      ring.multiply(reader, [&](uint32_t stage) {
        if constexpr (WARPGROUP == 0) add_half_of_x(gradient, stage, memory.ds + 64 * ROW);
      });
      ring.finish(reader, sum);
      writer.template write<BN>(nullptr, g.k, maps.dx, first_row, column_block * BN, sum);
    });
    writer.finish();
    keep_in_place(gradient);
    write_gradient<WARPGROUP>(g, gradient);
  }

  // This block's part of dA or of dB.
  template <int WARPGROUP>
  static FEDMS_DEVICE void write_gradient(const NarrowBackwardArguments& g, const Gradient& gradient) {
    const int part = ptx::computed_here(ptx::block_x()) / g.columns;
    if constexpr (WARPGROUP == 0) {
      write_part(g.da + int64_t(part) * g.k * g.r, own_columns(g) * BN, BOXES, g.k, g.r, gradient);
    } else {
      const Steps own = Steps::of(g, own_columns(g));
      write_part(g.db + int64_t(part) * g.n * g.r, own.first * STEP, own.own, g.n, g.r, gradient);
    }
  }

  static FEDMS_DEVICE void keep_in_place(Gradient& gradient) {
#pragma unroll
    for (int box = 0; box < BOXES; ++box) ptx::keep_in_place(gradient[box]);
  }

  // Adds z^T t over ROWS rows: z has rows of 128 bytes, t short ones.
  template <int ROWS>
  static FEDMS_DEVICE void add_rows(float (&to)[VALUES], uint32_t z, uint32_t t) {
#pragma unroll
    for (int k16 = 0; k16 < ROWS / 16; ++k16) {
      ptx::wgmma<T, RANKS, true, true>(to, matrix_descriptor(z + k16 * 16 * 128, 0), short_rows_descriptor(t + k16 * 16 * ROW));
    }
  }

  static FEDMS_DEVICE void add_half_of_x(Gradient& da, uint32_t x, uint32_t ds) {
#pragma unroll
    for (int box = 0; box < BOXES; ++box) add_rows<64>(da[box], x + box * BOX, ds);
  }

  // Where value i of 64 rows of dS lies in a thread; of a gradient, its column and rank.
  struct Place {
    int thread = ptx::computed_here(ptx::thread() % 128);

    FEDMS_DEVICE int row(int i) const { return thread / 32 * 16 + accumulator_row(thread % 32, i % 4); }
    FEDMS_DEVICE int rank(int i) const { return i / 4 * 8 + accumulator_column(thread % 32, i); }
  };

  static FEDMS_DEVICE void load_factors(const NarrowBackwardArguments& g, int first_row, float (&factor)[VALUES]) {
    const Place place;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
      const int row = first_row + place.row(i), rank = place.rank(i);
      factor[i] = row < g.m && rank < g.r ? factor_of(g.factors, Segments{}, 0, row, rank) : 0;
    }
  }

  // dS as the first operand of wgmma: 16 ranks of it are two blocks of eight columns of U, packed. Zeros behind the last rank,
  // whatever dy holds.
  static FEDMS_DEVICE void make_ds(int r, const float (&factor)[VALUES], const float (&u)[VALUES],
                                   uint32_t (&ds)[RANKS / 16][4]) {
    const Place place;
    const auto value = [&](int i) { return place.rank(i) < r ? u[i] * factor[i] : 0; };
#pragma unroll
    for (int i = 0; i < VALUES; i += 2) ds[i / 8][i % 8 / 2] = pack<T>(value(i), value(i + 1));
  }

  static FEDMS_DEVICE void write_dgate(const NarrowBackwardArguments& g, int first_row, float (&u)[VALUES]) {
    const Place place;
    const GateGrad<T> to{g.dgate, g.experts, static_cast<const T*>(g.s), g.r, g.factors.scale};
    const auto row = [&](int i) { return first_row + place.row(i); };
    const auto rank = [&](int i) { return place.rank(i); };
    put_gate_grad(to, u, 0, g.experts, g.m, row, rank, [&](int i) { return rank(i) < g.r ? g.factors.expert[rank(i)] : -1; });
  }

  // Lets both warpgroups read these 64 rows of dS, once dA of the rows before is done with the last dS.
  static FEDMS_DEVICE void share_ds(const uint32_t (&ds)[RANKS / 16][4], uint32_t to, int first_row) {
    const Place place;
    ptx::named_barrier(3, CONSUMERS * 128);
#pragma unroll
    for (int i = 0; i < VALUES; i += 2) {
      const int row = first_row + place.row(i), rank = place.rank(i);
      ptx::store_shared_u32(to + chunk_offset<ROW / 16>(row, rank / 8) + rank % 8 * 2, ds[i / 8][i % 8 / 2]);
    }
    ptx::fence_shared_for_tma();
    ptx::named_barrier(3, CONSUMERS * 128);
  }

  static FEDMS_DEVICE void write_part(float* part, int first, int boxes, int columns, int r, const Gradient& gradient) {
    const Place place;
#pragma unroll
    for (int box = 0; box < BOXES; ++box) {
#pragma unroll
      for (int i = 0; i < VALUES; ++i) {
        const int column = first + box * 64 + place.row(i), rank = place.rank(i);
        if (box < boxes && column < columns && rank < r) part[int64_t(column) * r + rank] = gradient[box][i];
      }
    }
  }

  static FEDMS_DEVICE void run(const NarrowBackwardArguments& g, const Maps& maps) {
    const uint32_t stages = ptx::shared_memory(), t = stages + Stages::BYTES, ds = t + TStage::BYTES, staged = ds + DS_BYTES;
    const uint32_t barriers = staged + STAGED;
    const Memory memory{{stages, barriers}, {t, barriers + Stages::BARRIER_BYTES}, staged, ds};
    if (ptx::thread() == 0) {
      for (const TensorMap* map : {&maps.dy, &maps.w, &maps.b, &maps.x, &maps.a, &maps.t, &maps.dx}) ptx::prefetch_map(map);
    }
    memory.ring.init(CONSUMERS);
    memory.t.init(1);
    const int column_block = ptx::block_x() % g.columns;
    share_out(
        CONSUMERS, [&] { produce(g, maps, memory, column_block); },
        [&](int warpgroup) {
          warpgroup == 0 ? consume<0>(g, maps, memory, column_block) : consume<1>(g, maps, memory, column_block);
        });
  }
};

template <class T>
__global__ void __launch_bounds__(TILES[NARROW_TILE].threads(), 1)
    narrow_backward_kernel(__grid_constant__ const NarrowBackwardArguments arguments, __grid_constant__ const Maps maps) {
  NarrowTile<T>::run(arguments, maps);
}

template <class T>
void start(const Launch& what, const NarrowBackward& g, int64_t parts, TensorMaps& kept) {
  using Of = TensorMaps::Operand;
  constexpr Tile tile = TILES[NARROW_TILE];
  const auto map = [&](Of of, const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows,
                       int box_columns = 64) {
    return kept.of(of, what, Number<T>::is_bf16, data, rows, columns, stride, box_rows, 0, box_columns);
  };
  Maps maps;
  maps.dy = map(Of::x, g.dy, g.m, g.n, g.dy_stride, tile.bm);
  maps.w = map(Of::w, g.w, g.n, g.k, g.w_stride, STEP);
  maps.b = map(Of::f, g.b, g.n, g.r, g.b_stride, STEP, NARROW_RANKS);
  maps.x = map(Of::z, g.x, g.m, g.k, g.x_stride, 64);
  maps.a = map(Of::a, g.a, g.r, g.k, g.a_stride, NARROW_RANKS);
  maps.t = map(Of::t, g.t, g.m, g.r, g.t_stride, tile.bm, NARROW_RANKS);
  maps.dx = map(Of::y, g.dx, g.m, g.k, g.k, 64);
  const int columns = ceil_div(g.k, tile.bn);
  const NarrowBackwardArguments arguments{int(g.m),   int(g.n),   int(g.k),   int(g.r), int(g.experts), columns,
                                          int(parts), g.da_parts, g.db_parts, g.s,      g.dgate,        g.factors};
  launch(what, narrow_backward_kernel<T>, {int(parts) * columns}, tile.threads(), NARROW_BACKWARD_SHARED_BYTES, arguments, maps);
}

}  // namespace

void start_narrow_backward(const Launch& what, const NarrowBackward& g, int64_t parts) {
  TensorMaps own;
  TensorMaps& maps = g.maps ? *g.maps : own;
  g.element == Element::bf16 ? start<Bf16>(what, g, parts, maps) : start<Fp16>(what, g, parts, maps);
}

}  // namespace fedms::cuda
