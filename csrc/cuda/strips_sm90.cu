// dB and dA in one launch, for compute capability 9.0: a block owns a strip of 64 columns of dy or of x, and all rows of it, or
// those of one split. So no partial sums go through memory, unless there are too few strips for the multiprocessors.
#include "gemm.h"
#include "ranks.h"
#include "ring.h"

namespace fedms::cuda {
namespace {

constexpr int COLUMNS = STRIP_COLUMNS, ROWS = STRIP_ROWS;  // rows of 128 bytes

constexpr int SIDES = LoraGradStrips::SIDES;

struct Maps {
  TensorMap z[SIDES], t[SIDES];  // of dB: a sibling's dy, and T; of dA: x and dS
};

struct Output {
  ExpertGrad to;
  int side;
};

struct StripsArguments {
  int m, rows_a_split, count;  // of outputs
  Segments segments;
  int columns[SIDES];          // of each dy and of x; 0: that side is left out
  int64_t split_stride[SIDES];  // from the outputs of one split to those of the next
  Items<Output> outputs;
};

// Out: what the outputs consist of, float or T.
template <class T, class Out>
struct Strips {
  static constexpr int RANKS = OVERLAPPED_RANKS, THREADS = 128 + 32;  // one warpgroup multiplies, one warp copies
  using Stages = Ring<STRIP_STAGES, 2 * ROWS * 128>;
  static_assert(RANKS == 64 && COLUMNS == 64 && Stages::BYTES + Stages::BARRIER_BYTES == STRIP_SHARED_BYTES);

  using Sums = float[RANKS / 2];

  // What this block owns.
  struct Strip {
    int side, column, begin, end;  // its first column, and its rows
  };

  static FEDMS_DEVICE Strip strip_of(const StripsArguments& g) {
    int side = 0, strip = ptx::block_x();
    for (; side < SIDES - 1; ++side) {
      const int of_side = ceil_div(g.columns[side], COLUMNS);
      if (strip < of_side) break;
      strip -= of_side;
    }
    const RowBlock rows = row_block(g.segments, ptx::block_y(), g.rows_a_split, g.m, 0, false);
    return {side, strip * COLUMNS, rows.row, rows.end};
  }

  static FEDMS_DEVICE void produce(const Strip& strip, const Maps& maps, const Stages& ring) {
    typename Stages::Cursor at;
    for (int row = strip.begin; row < strip.end; row += ROWS) {
      ring.fill(at, [&](uint32_t stage, uint32_t full) {
        ptx::tma_load(stage, &maps.z[strip.side], full, row, strip.column);
        ptx::tma_load(stage + ROWS * 128, &maps.t[strip.side], full, row, 0);
      });
    }
  }

  // The sums over the rows: the strip turned over, times T or dS. Both have the rows across.
  static FEDMS_DEVICE void consume(const StripsArguments& g, const Strip& strip, const Stages& ring) {
    typename Stages::Reader reader;
    Sums sum = {};
    ptx::keep_in_place(sum);
    for (int row = strip.begin; row < strip.end; row += ROWS) {
      const auto multiply = [&](uint32_t stage) {
#pragma unroll
        for (int k16 = 0; k16 < ROWS / 16; ++k16) {
          const uint64_t z = matrix_descriptor(stage + k16 * 16 * 128, 0);
          const uint64_t t = matrix_descriptor(stage + ROWS * 128 + k16 * 16 * 128, 0);
          ptx::wgmma<T, RANKS, true, true>(sum, z, t);
        }
      };
      ring.multiply(reader, multiply, [&](uint32_t stage) {
        // Behind the last row of a segment others begin; behind the last of all rows come zeros by themselves.
        if (g.segments.count && strip.end - row < ROWS) keep_rows(stage, strip.end - row);
      });
    }
    ring.finish(reader, sum);
    write(g, strip, sum);
  }

  // Makes zeros of all but the first `rows` rows of both tiles of a stage, whatever they hold.
  static FEDMS_DEVICE void keep_rows(uint32_t stage, int rows) {
#pragma unroll 1
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll 1
      for (int first = rows * 8 / 128 * 128; first < ROWS * 8; first += 128) {
        const int chunk = first + ptx::thread();
        const uint32_t place = stage + tile * ROWS * 128 + chunk * 16;
        const Words kept = ptx::load_shared_128(place);
        ptx::store_shared_128(place, chunk < rows * 8 ? kept : Words{});
      }
    }
    ptx::fence_shared_for_tma();
    ptx::named_barrier(1, 128);
  }

  static FEDMS_DEVICE void write(const StripsArguments& g, const Strip& strip, const Sums& sum) {
    const int lane = ptx::thread() % 32, warp = ptx::thread() / 32;
    for (int output = 0; output < g.count; ++output) {
      if (g.outputs.item[output].side != strip.side) continue;
      const ExpertGrad& to = g.outputs.item[output].to;
      Out* const out = static_cast<Out*>(to.out) + ptx::block_y() * g.split_stride[strip.side];
#pragma unroll
      for (int i = 0; i < RANKS / 2; ++i) {
        const int column = strip.column + warp * 16 + accumulator_row(lane, i % 4);
        const int rank = i / 4 * 8 + accumulator_column(lane, i) - to.first;
        if (column >= g.columns[strip.side] || rank < 0 || rank >= to.count) continue;
        out[column * to.row_stride + rank * to.column_stride] = narrowed<Out>(sum[i]);
      }
    }
  }

  static FEDMS_DEVICE void run(const StripsArguments& g, const Maps& maps) {
    const uint32_t memory = ptx::shared_memory();
    const Stages ring{memory, memory + Stages::BYTES};
    ring.init(1);
    const Strip strip = strip_of(g);
    if (ptx::thread() < 128) return consume(g, strip, ring);
    if (ptx::thread() == 128) produce(strip, maps, ring);
  }
};

template <class T, class Out>
__global__ void __launch_bounds__(Strips<T, Out>::THREADS, 1)
    lora_grad_strips_kernel(__grid_constant__ const StripsArguments arguments, __grid_constant__ const Maps maps) {
  Strips<T, Out>::run(arguments, maps);
}

template <class T>
void start(const Launch& what, const LoraGradStrips& g, TensorMaps& kept) {
  using Of = TensorMaps::Operand;
  const auto map = [&](Of of, int sibling, const void* data, int64_t columns, int64_t stride) {
    return kept.of(of, what, Number<T>::is_bf16, data, g.m, columns, stride, ROWS, sibling);
  };
  StripsArguments arguments{int(g.m), int(g.rows_a_split), 0, g.segments, {}, {}, {}};
  Maps maps{};
  int strips = 0;
  bool fp32 = g.fp32;
  const auto add = [&](int side, const ExpertGrad& to) { arguments.outputs.item[arguments.count++] = {to, side}; };
  for (int side = 0; side < SIDES; ++side) {
    const LoraGradStrips::Side& of = g.sides[side];
    if (of.c == 0) continue;
    strips += ceil_div(of.c, COLUMNS);
    arguments.columns[side] = int(of.c);
    const bool of_da = side == LoraGradStrips::OF_DA;  // dy and dS are the GEMM's x and T
    maps.z[side] = map(of_da ? Of::z : Of::x, of_da ? 0 : side, of.z, of.c, of.z_stride);
    maps.t[side] = map(of_da ? Of::t : Of::s, 0, of.t, g.r, g.t_stride);
    if (of.parts) {
      fp32 = true;
      arguments.split_stride[side] = of.c * g.r;
      add(side, {0, int32_t(g.r), of.parts, g.r, 1});
    } else {
      for (const ExpertGrad& to : of.out) add(side, to);
    }
  }
  const int splits = row_blocks(g.segments, arguments.rows_a_split, arguments.m);
  const auto launch_with = [&](auto* null) {
    using Out = std::remove_pointer_t<decltype(null)>;
    launch(what, lora_grad_strips_kernel<T, Out>, {strips, splits}, Strips<T, Out>::THREADS, STRIP_SHARED_BYTES, arguments, maps);
  };
  fp32 ? launch_with(static_cast<float*>(nullptr)) : launch_with(static_cast<T*>(nullptr));
}

}  // namespace

void start_lora_grad_strips(const Launch& what, const LoraGradStrips& g) {
  TensorMaps own;
  TensorMaps& maps = g.maps ? *g.maps : own;
  g.element == Element::bf16 ? start<Bf16>(what, g, maps) : start<Fp16>(what, g, maps);
}

}  // namespace fedms::cuda
