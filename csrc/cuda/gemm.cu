// The entry of the GEMMs: checks, and the way to the kernel of a tile.
#include "gemm.h"

#include <climits>

namespace fedms::cuda {
namespace {

// A product by itself is one sibling.
std::vector<GemmSibling> siblings_of(const Gemm& g) {
  if (!g.siblings.empty()) return g.siblings;
  return {{g.transposed ? g.k : g.n, g.w, g.w_stride, 0, int(g.r), 0, g.shrink.experts, g.transposed ? g.shrink.a : g.f,
           g.transposed ? g.shrink.a_stride : g.f_stride, g.bias, g.y, g.x, g.x_stride}};
}

int blocks_ahead(const Gemm& g, int tile, const DeviceProperties& chip) {
  int columns = 0;
  for (const GemmSibling& sibling : siblings_of(g)) columns += ceil_div(sibling.width, TILES[tile].bn);
  const int tiles = row_blocks(g.segments, TILES[tile].bm, int(g.m)) * (g.transposed ? ceil_div(g.n, TILES[tile].bn) : columns);
  const int shrinks = g.transposed ? std::max<int>(1, g.siblings.size()) : 1;
  return shrink_ahead_blocks(TILES[tile], chip, row_blocks(g.segments, SHRINK_ROWS, int(g.m)), tiles, g.k, shrinks);
}

bool has_shrink(const Gemm& g) { return g.shrink.a != nullptr || (g.transposed && !g.siblings.empty()); }

template <class T>
void start_ahead(const Gemm& g, int blocks, TensorMaps& maps, const Stream& stream) {
  const Launch what{"shrink_ahead", g.m, 0, g.k, g.r, stream};
  const GemmShrink& ahead = g.shrink;
  ShrinkAheadArguments<T> arguments{int(g.m), int(g.r), ahead.experts, 0, {}, static_cast<T*>(ahead.s), static_cast<T*>(g.t),
                                    g.t_stride, ahead.dgate, ahead.factors, g.segments};
  const auto add = [&](const void* x, int64_t x_stride, const void* a, int64_t a_stride, int64_t k, int first, int ranks,
                       int64_t width, int first_expert, int experts) {
    arguments.sibling[arguments.siblings++] = {static_cast<const T*>(x), x_stride, static_cast<const T*>(a), a_stride, int(k),
                                               first, ranks, int(width), first_expert, experts};
  };
  if (!g.transposed) add(g.x, g.x_stride, ahead.a, ahead.a_stride, g.k, 0, int(g.r), g.t_stride, 0, ahead.experts);
  if (g.transposed) {
    const std::vector<GemmSibling> siblings = siblings_of(g);
    for (size_t i = 0; i < siblings.size(); ++i) {
      const GemmSibling& of = siblings[i];
      const int64_t end = i + 1 < siblings.size() ? siblings[i + 1].first_rank : g.t_stride;
      add(of.x, of.x_stride, of.b, of.b_stride, of.width, of.first_rank, of.ranks, end - of.first_rank, of.first_expert,
          of.experts);
    }
  }
  start_shrink_ahead(what, arguments, g.transposed, blocks, maps);
}

template <class T>
void start(const Launch& what, const Gemm& g, int tile, const DeviceProperties& chip) {
  const auto of = [](const void* data) { return static_cast<const T*>(data); };
  const GemmArguments<T> arguments{int(g.m), int(g.n), int(g.k), int(g.r), of(g.x), g.x_stride, g.w, g.w_stride, g.w_scale,
                                   of(g.bias), static_cast<T*>(g.t), g.t_stride, of(g.f), g.f_stride, static_cast<T*>(g.y),
                                   mask_of(g.dropout), g.segments, band_of(TILES[tile], chip.multiprocessors)};
  if (TILES[tile].kind == Kind::mma) return start_mma_gemm(what, arguments, tile, g.transposed);
  if constexpr (HAS_WGMMA) {
    TensorMaps own;
    TensorMaps& maps = g.maps ? *g.maps : own;
    const GemmShrink& ahead = g.shrink;
    if (ahead.inside) {
      const NarrowArguments<T> narrow{arguments, of(ahead.a), ahead.a_stride, static_cast<T*>(ahead.s), ahead.factors};
      return start_narrow_forward(what, narrow, chip.multiprocessors, maps);
    }
    const bool runs_ahead = has_shrink(g);
    if (runs_ahead) start_ahead<T>(g, blocks_ahead(g, tile, chip), maps, what.stream);
    start_wgmma_gemm(what, arguments, siblings_of(g), tile, g.transposed, runs_ahead, chip.multiprocessors, maps);
  }
}

std::string text(int value) { return std::to_string(value); }

// The siblings of a product add up to it, and their ranks are in place.
void check_siblings(const Launch& what, const Gemm& g, int tile) {
  if (g.siblings.empty()) return;
  int64_t width = 0, rank = 0;
  for (const GemmSibling& of : g.siblings) {
    if (of.width < 8 || of.width % 8) fail(what, "the width of a sibling is not a positive multiple of 8");
    if (of.first_rank < rank || of.first_rank % 16 || of.ranks < 1) fail(what, "the ranks of a sibling are out of place");
    width += of.width;
    rank = of.first_rank + of.ranks;
  }
  if (g.siblings.size() > MOST_SIBLINGS || TILES[tile].kind != Kind::wgmma || g.segments.count || g.w_scale || g.dropout.p > 0) {
    fail(what, "siblings are 4 at most, for tiles of wgmma, without segments, int8 and dropout");
  }
  if (width != (g.transposed ? g.k : g.n) || rank > g.r) fail(what, "the siblings do not add up to the product");
}

}  // namespace

std::vector<int> gemm_tiles(const DeviceProperties& chip, int64_t m, int64_t n, int64_t k, int64_t r, bool int8,
                            bool has_dropout, bool full_tiles) {
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
  check_siblings(what, g, tile);
  const bool has_dropout = g.dropout.p > 0, int8 = g.w_scale != nullptr;
  bool full_tiles = true;
  for (int e = 0, begin = 0; e < g.segments.count; begin = g.segments.ends[e++]) {
    const int rows = g.segments.ends[e] - begin;
    full_tiles = full_tiles && (rows == 0 || rows >= TILES[tile].bm);
  }
  if (!takes(TILES[tile], int8, has_dropout, full_tiles) || (int8 && g.transposed) || (has_dropout && !g.transposed && !int8)) {
    fail(what, "this tile does not take an int8 w, dropout, or short segments in this way");
  }
  if (has_shrink(g)) {
    const bool inside = g.shrink.inside, fits = inside ? has_shrink_inside(tile, g.r) : overlaps_shrink(tile, g.r);
    const bool ranks_fit = fits && g.r > 0 && g.t_stride >= g.r && g.t_stride <= (inside ? NARROW_RANKS : OVERLAPPED_RANKS);
    if (int8 || has_dropout) fail(what, "t is made by a launch of its own with an int8 w or dropout");
    if (!ranks_fit) fail(what, "t_stride or the total rank is too large for this tile, or t cannot be made with it");
    if (inside && g.transposed) fail(what, "ds cannot be made inside of this product, see narrow_backward");
    if (inside && !g.siblings.empty()) fail(what, "t of siblings cannot be made inside of their product");
  }
  if (!runs_on(TILES[tile], chip)) fail(what, "the device has too little shared memory, or it or this build no wgmma");
  if (g.element == Element::bf16) return start<Bf16>(what, g, tile, chip);
  start<Fp16>(what, g, tile, chip);
}

void shrink_ahead(const Gemm& g, const DeviceProperties& chip, const Stream& stream) {
  const Launch what{"shrink_ahead", g.m, 0, g.k, g.r, stream};
  if (!HAS_WGMMA || chip.capability != 90) fail(what, "the device or this build has no wgmma");
  if (!has_shrink(g) || g.r < 1 || g.t_stride < g.r || g.t_stride > OVERLAPPED_RANKS) {
    fail(what, "the total rank is not from 1 to 64");
  }
  if constexpr (HAS_WGMMA) {
    TensorMaps own;
    TensorMaps& maps = g.maps ? *g.maps : own;
    const int items = row_blocks(g.segments, SHRINK_ROWS, int(g.m)) * int(siblings_of(g).size());
    const int blocks = std::min(items, chip.multiprocessors);
    g.element == Element::bf16 ? start_ahead<Bf16>(g, blocks, maps, stream) : start_ahead<Fp16>(g, blocks, maps, stream);
  }
}

int64_t narrow_backward_parts(const DeviceProperties& chip, int64_t m, int64_t n, int64_t k, int64_t r) {
  const Tile& tile = TILES[NARROW_TILE];
  const int columns = ceil_div(k, tile.bn);
  const bool fits = runs_on(tile, chip) && NARROW_BACKWARD_SHARED_BYTES <= chip.shared_memory && r <= NARROW_RANKS &&
                    columns <= chip.multiprocessors && ceil_div(n, 64) <= NARROW_COLUMNS * columns;
  return fits ? std::min(chip.multiprocessors / columns, ceil_div(m, tile.bm)) : 0;
}

void narrow_backward(const NarrowBackward& g, const DeviceProperties& chip, const Stream& stream) {
  const Launch what{"narrow_backward", g.m, g.n, g.k, g.r, stream};
  if (g.m < 1 || g.n < 8 || g.k < 8 || g.r < 1 || g.n % 8 || g.k % 8) {
    fail(what, "a size is too small, or n or k is no multiple of 8");
  }
  if (std::max({g.m, g.n, g.k}) > INT_MAX - 1024) fail(what, "a size is beyond 2^31");
  const int64_t parts = narrow_backward_parts(chip, g.m, g.n, g.k, g.r);
  if (parts == 0) fail(what, "the ranks are more than 32, n is too large for k, or the device or this build has no wgmma");
  if constexpr (HAS_WGMMA) start_narrow_backward(what, g, parts);
}

}  // namespace fedms::cuda
