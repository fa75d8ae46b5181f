// The entry of the GEMMs: checks, and the way to the kernel of a tile.
#include "gemm.h"

#include <climits>

namespace fedms::cuda {
namespace {

int blocks_ahead(const Gemm& g, int tile, const DeviceProperties& chip) {
  const int tiles = row_blocks(g.segments, TILES[tile].bm, int(g.m)) * ceil_div(g.n, TILES[tile].bn);
  return shrink_ahead_blocks(TILES[tile], chip, row_blocks(g.segments, SHRINK_ROWS, int(g.m)), tiles, g.k);
}

template <class T>
void start(const Launch& what, const Gemm& g, int tile, const DeviceProperties& chip) {
  const auto of = [](const void* data) { return static_cast<const T*>(data); };
  const GemmArguments<T> arguments{int(g.m),  int(g.n),        int(g.k), int(g.r), of(g.x),    g.x_stride, g.w,
                                   g.w_stride, g.w_scale,       of(g.bias), static_cast<T*>(g.t), g.t_stride, of(g.f),    g.f_stride,
                                   static_cast<T*>(g.y), mask_of(g.dropout), g.segments,
                                   band_of(TILES[tile], chip.multiprocessors)};
  if (TILES[tile].kind == Kind::mma) return start_mma_gemm(what, arguments, tile, g.transposed);
  if constexpr (HAS_WGMMA) {
    TensorMaps own;
    TensorMaps& maps = g.maps ? *g.maps : own;
    const GemmShrink& ahead = g.shrink;
    if (ahead.inside) {
      const NarrowArguments<T> narrow{arguments, of(ahead.a), ahead.a_stride, static_cast<T*>(ahead.s), ahead.factors};
      return start_narrow_forward(what, narrow, chip.multiprocessors, maps);
    }
    if (ahead.a) {
      const Launch shrink{"shrink_ahead", g.m, 0, g.k, g.r, what.stream};
      const ShrinkAheadArguments<T> of_shrink{int(g.m), int(g.k), int(g.r), ahead.experts, of(g.x), g.x_stride, of(ahead.a),
                                              ahead.a_stride, static_cast<T*>(ahead.s), static_cast<T*>(g.t), g.t_stride,
                                              ahead.dgate, ahead.factors, g.segments};
      start_shrink_ahead(shrink, of_shrink, g.transposed, blocks_ahead(g, tile, chip), maps);
    }
    start_wgmma_gemm(what, arguments, tile, g.transposed, ahead.a != nullptr, chip.multiprocessors, maps);
  }
}

std::string text(int value) { return std::to_string(value); }

}  // namespace

std::vector<int> gemm_tiles(const DeviceProperties& chip, int64_t m, int64_t n, int64_t k, int64_t r, bool int8, bool has_dropout, bool full_tiles) {
  return rank_tiles(chip, m, n, k, r, int8, has_dropout, full_tiles);
}

std::string gemm_tile_name(int tile) {
  const Tile& t = TILES[tile];
  return (t.kind == Kind::mma ? "mma " : "wgmma ") + text(t.bm) + "x" + text(t.bn) + " s" + text(t.stages);
}

std::shared_ptr<TensorMaps> make_tensor_maps() { return std::make_shared<TensorMaps>(); }

bool overlaps_shrink(int tile, int64_t r) { return TILES[tile].kind == Kind::wgmma && r <= OVERLAPPED_RANKS; }

bool has_shrink_inside(int tile, int64_t r) { return tile == NARROW_TILE && r <= NARROW_RANKS; }

void gemm(const Gemm& g, int tile, const DeviceProperties& chip, const Stream& stream) {
  if (tile < 0 || tile >= TILE_COUNT) throw Error("there is no tile " + text(tile));
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (int each = 0; each < TILE_COUNT; ++each) all.push_back("gemm " + gemm_tile_name(each));
    return all;
  }();
  const Launch what{names[tile].c_str(), g.m, g.n, g.k, g.r, stream};
  if (g.m < 1 || g.n < 8 || g.k < 8 || g.r < 0) fail(what, "a size is too small");
  if (std::max({g.m, g.n, g.k}) > INT_MAX - 1024) fail(what, "a size is beyond 2^31");
  if (g.n % 8 || g.k % (g.w_scale ? 16 : 8)) fail(what, "n or k is not a multiple of 8 (k of 16 for an int8 w)");
  check_segments(what, g.segments, g.m);
  const bool has_dropout = g.dropout.p > 0, int8 = g.w_scale != nullptr;
  bool full_tiles = true;
  for (int e = 0, begin = 0; e < g.segments.count; begin = g.segments.ends[e++]) {
    const int rows = g.segments.ends[e] - begin;
    full_tiles = full_tiles && (rows == 0 || rows >= TILES[tile].bm);
  }
  if (!takes(TILES[tile], int8, has_dropout, full_tiles) || (int8 && g.transposed) || (has_dropout && !g.transposed && !int8)) {
    fail(what, "this tile does not take an int8 w, dropout, or short segments in this way");
  }
  if (g.shrink.a) {
    const bool inside = g.shrink.inside, fits = inside ? has_shrink_inside(tile, g.r) : overlaps_shrink(tile, g.r);
    const bool ranks_fit = fits && g.r > 0 && g.t_stride >= g.r && g.t_stride <= (inside ? NARROW_RANKS : OVERLAPPED_RANKS);
    if (int8 || has_dropout || !ranks_fit || (inside && g.transposed)) fail(what, "no shrink can overlap this product or be in it");
  }
  if (!runs_on(TILES[tile], chip)) fail(what, "the device has too little shared memory, or it or this build no wgmma");
  if (g.element == Element::bf16) return start<Bf16>(what, g, tile, chip);
  start<Fp16>(what, g, tile, chip);
}

}  // namespace fedms::cuda
