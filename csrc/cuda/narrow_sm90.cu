// The forward pass of a layer in one launch, for compute capability 9.0: y = x W^T + T B^T + bias, where each tile of y makes S
// and T of its rows by itself.
//
// It is the GEMM of gemm_sm90.cu with A below W in every stage. So S is columns BN to BN + RANKS of the accumulator; it becomes T
// in registers, and T is the first operand of the last multiplications, by B. Every tile of a row of tiles makes the same T
// again. That costs RANKS / BN of the products, and saves the launch that makes T and what is waited for at its ends: it is for
// layers of few columns, whose products take little time.
#include "tile_sm90.h"

namespace fedms::cuda {
namespace {

// The operands as the tensor memory accelerator sees them; f is B.
struct Maps {
  TensorMap x, w, a, f, y;
};

template <class T>
struct NarrowForward {
  static constexpr Tile tile = TILES[NARROW_TILE];
  static constexpr int BM = tile.bm, BN = tile.bn, RANKS = NARROW_RANKS, CONSUMERS = BM / 64;
  using Stages = Ring<tile.stages, (BM + BN + RANKS) * 128>;
  static_assert(Stages::BYTES + CONSUMERS * 2 * BOX + Stages::BARRIER_BYTES == NARROW_SHARED_BYTES);

  static FEDMS_DEVICE void produce(const NarrowArguments<T>& g, const Maps& maps, const Stages& ring) {
    typename Stages::Cursor at;
    for_tiles<BM>(g.gemm, ceil_div(g.gemm.n, BN), [&](const RowBlock& rows, int block) {
      for (int first = 0; first < g.gemm.k; first += STEP) {
        ring.fill(at, [&](uint32_t stage, uint32_t full) {
          ptx::tma_load(stage, &maps.x, full, rows.row, first);
          ptx::tma_load(stage + BM * 128, &maps.w, full, block * BN, first);
          ptx::tma_load(stage + (BM + BN) * 128, &maps.a, full, rows.first_rank, first);
        });
      }
      if (rows.ranks == 0) return;
      const auto load_b = [&](uint32_t stage, uint32_t full) {
        ptx::tma_load(stage, &maps.f, full, block * BN, rows.first_rank);
      };
      ring.fill(at, load_b, BN * 128);
    });
  }

  using Accumulator = float[(BN + RANKS) / 2];
  static constexpr int VALUES = RANKS / 2;  // of S in a thread, the last ones of its accumulator

  // Where a value of S lies, in the rows of a warpgroup.
  struct Values {
    const RowBlock& rows;
    int first_row;

    FEDMS_DEVICE int row(int i) const {
      return first_row + ptx::thread() % 128 / 32 * 16 + accumulator_row(ptx::thread() % 32, i % 4);
    }
    FEDMS_DEVICE int rank(int i) const { return i / 4 * 8 + accumulator_column(ptx::thread() % 32, i); }
    FEDMS_DEVICE bool own(int i) const { return row(i) < rows.end && rank(i) < rows.ranks; }
  };

  static FEDMS_DEVICE void consume(const NarrowArguments<T>& g, const Maps& maps, const Stages& ring, uint32_t staged,
                                   int warpgroup) {
    TileWriter<T> writer{staged + warpgroup * 2 * BOX, warpgroup, int64_t(g.gemm.m) * g.gemm.n > STREAMED};
    typename Stages::Reader reader;
    for_tiles<BM>(g.gemm, ceil_div(g.gemm.n, BN), [&](const RowBlock& rows, int block) {
      const Values values{rows, rows.row + warpgroup * 64};
      float factor[VALUES];  // under way while W's part is multiplied
#pragma unroll
      for (int i = 0; i < VALUES; ++i) {
        const int row = values.row(i), rank = values.rank(i);
        factor[i] = values.own(i) ? factor_of(g.factors, g.gemm.segments, rows.owner, row, rank) : 0;
      }
      Accumulator sum = {};
      ptx::keep_in_place(sum);
      for (int first = 0; first < g.gemm.k; first += STEP) {
        ring.multiply(reader, [&](uint32_t stage) {
#pragma unroll
          for (int k16 = 0; k16 < STEP / 16; ++k16) {
            const uint64_t x = matrix_descriptor(stage + warpgroup * BOX + k16 * 32, 0);
            ptx::wgmma<T, BN + RANKS, false>(sum, x, matrix_descriptor(stage + BM * 128 + k16 * 32, 0));
          }
        });
      }
      ring.finish(reader, sum);
      uint32_t t[RANKS / 16][4];
      make_t(g, values, block == 0, factor, sum, t);
      const auto multiply_by_b = [&](auto count) {
        ring.multiply(reader, [&](uint32_t stage) {
#pragma unroll
          for (int k16 = 0; k16 < decltype(count)::value; ++k16) {
            ptx::wgmma_from_registers<T, BN, false>(sum, t[k16], matrix_descriptor(stage + k16 * 32, 0));
          }
        });
        ring.finish(reader, sum);
      };
      switch (ceil_div(rows.ranks, 16)) {
        case 0: break;
        case 1: multiply_by_b(Count<1>()); break;
        default: multiply_by_b(Count<2>());
      }
      writer.template write<BN>(g.gemm.bias, g.gemm.n, maps.y, values.first_row, block * BN, sum);
    });
    writer.finish();
  }

  // T as the first operand of wgmma: 16 ranks of it are two blocks of eight columns of the accumulator, packed. One tile of each
  // row of tiles writes S and T for the backward pass.
  static FEDMS_DEVICE void make_t(const NarrowArguments<T>& g, const Values& values, bool writes, const float (&factor)[VALUES],
                                  const Accumulator& sum, uint32_t (&t)[RANKS / 16][4]) {
#pragma unroll
    for (int i = 0; i < VALUES; i += 2) {
      float scaled[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float s = sum[BN / 2 + i + half];
        scaled[half] = values.own(i + half) ? s * factor[i + half] : 0;
        if (writes) {
          put_s(g.s, g.gemm.t, g.gemm.t_stride, g.gemm.r, values.rows, values.row(i + half), values.rank(i + half), s,
                factor[i + half]);
        }
      }
      t[i / 8][i % 8 / 2] = pack<T>(scaled[0], scaled[1]);
    }
  }

  static FEDMS_DEVICE void run(const NarrowArguments<T>& g, const Maps& maps) {
    const uint32_t memory = ptx::shared_memory(), staged = memory + Stages::BYTES;
    const Stages ring{memory, staged + CONSUMERS * 2 * BOX};
    if (ptx::thread() == 0) {
      for (const TensorMap* map : {&maps.x, &maps.w, &maps.a, &maps.f, &maps.y}) ptx::prefetch_map(map);
    }
    ring.init(CONSUMERS);
    share_out(
        CONSUMERS, [&] { produce(g, maps, ring); }, [&](int warpgroup) { consume(g, maps, ring, staged, warpgroup); });
  }
};

template <class T>
__global__ void __launch_bounds__(TILES[NARROW_TILE].threads(), 1)
    narrow_forward_kernel(__grid_constant__ const NarrowArguments<T> arguments, __grid_constant__ const Maps maps) {
  NarrowForward<T>::run(arguments, maps);
}

}  // namespace

template <class T>
void start_narrow_forward(const Launch& what, const NarrowArguments<T>& arguments, int multiprocessors, TensorMaps& kept) {
  using Of = TensorMaps::Operand;
  const GemmArguments<T>& g = arguments.gemm;
  constexpr Tile tile = TILES[NARROW_TILE];
  const auto map = [&](Of of, const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
    return kept.of(of, what, Number<T>::is_bf16, data, rows, columns, stride, box_rows);
  };
  const int ranks = ranks_with_gaps(g.segments, g.r);
  Maps maps;
  maps.x = map(Of::x, g.x, g.m, g.k, g.x_stride, tile.bm);
  maps.w = map(Of::w, g.w, g.n, g.k, g.w_stride, tile.bn);
  maps.a = map(Of::a, arguments.a, ranks, g.k, arguments.a_stride, NARROW_RANKS);
  maps.f = map(Of::f, g.f, g.n, ranks, g.f_stride, tile.bn);
  maps.y = map(Of::y, g.y, g.m, g.n, g.n, 64);
  const int tiles = row_blocks(g.segments, tile.bm, g.m) * ceil_div(g.n, tile.bn);
  launch(what, narrow_forward_kernel<T>, {std::min(tiles, multiprocessors)}, tile.threads(), NARROW_SHARED_BYTES, arguments,
         maps);
}
template void start_narrow_forward(const Launch&, const NarrowArguments<Bf16>&, int, TensorMaps&);
template void start_narrow_forward(const Launch&, const NarrowArguments<Fp16>&, int, TensorMaps&);

}  // namespace fedms::cuda
