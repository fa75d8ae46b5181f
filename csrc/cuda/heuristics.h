// Which tiles the GEMMs may run with, and in which order they are expected to do well: a cost model, and no table of
// GPU names. Its constants are round figures of the tensor cores and caches since Ampere; it only orders the tiles
// where nothing has been measured.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "fedms/cuda.h"
#include "layout.h"

namespace fedms::cuda {

enum class Kind { mma, wgmma };

struct Tile {
  Kind kind;
  int bm, bn, stages;
  int warps_m, warps_n;  // of mma: a warp has bm / warps_m rows and bn / warps_n columns. wgmma: 64 rows a warpgroup

  constexpr int threads() const {
    return kind == Kind::mma ? 32 * warps_m * warps_n : 128 * (1 + bm / 64);  // one more warpgroup copies
  }
  constexpr int stage_bytes() const { return (bm + bn) * 128; }
  // mma stages its output where the pipeline was. wgmma has two boxes of 64 x 64 for every warpgroup, so that the next
  // tile can be loaded meanwhile, and barriers.
  constexpr int shared_bytes() const {
    return stages * stage_bytes() + (kind == Kind::mma ? 0 : bm / 64 * 2 * 8192 + stages * 16);
  }
  constexpr int accumulators() const { return kind == Kind::mma ? bm * bn / threads() : bn / 2; }
};

constexpr Tile TILES[] = {
    {Kind::mma, 128, 128, 3, 2, 4},
    {Kind::mma, 64, 64, 4, 2, 2},
    {Kind::wgmma, 128, 256, 4, 0, 0},
    {Kind::wgmma, 128, 192, 4, 0, 0},
    {Kind::wgmma, 128, 128, 5, 0, 0},
};
// Of a shrink that runs ahead of a GEMM (shrink_sm90.cu): the ranks that it can have, the rows that it makes at a time, and its
// stages of 64 numbers of each row.
constexpr int OVERLAPPED_RANKS = 64, SHRINK_ROWS = 128, SHRINK_STAGES = 8;
constexpr int SHRINK_SHARED_BYTES = SHRINK_STAGES * ((SHRINK_ROWS + OVERLAPPED_RANKS) * 128 + 16);
// Of strips of dy and x (strips_sm90.cu): the columns of one, and the rows of a stage.
constexpr int STRIP_COLUMNS = 64, STRIP_ROWS = 128, STRIP_STAGES = 7;
constexpr int STRIP_SHARED_BYTES = STRIP_STAGES * (2 * STRIP_ROWS * 128 + 16);
// Of a GEMM that makes T itself (narrow_sm90.cu): its tile, and the ranks that it can have, which lie below W in every stage.
constexpr int NARROW_TILE = 3, NARROW_RANKS = 32;
constexpr int NARROW_SHARED_BYTES = TILES[NARROW_TILE].shared_bytes() + TILES[NARROW_TILE].stages * NARROW_RANKS * 128;
// Of the same backward (narrow_backward_sm90.cu), with T and dS of a tile beside the stages. A block makes dB of so many blocks
// of 64 columns of dy at most.
constexpr int NARROW_BACKWARD_SHARED_BYTES = NARROW_SHARED_BYTES + 2 * TILES[NARROW_TILE].bm * NARROW_RANKS * 2 + 16;
constexpr int NARROW_COLUMNS = TILES[NARROW_TILE].bn / 64;
static_assert(NARROW_BACKWARD_SHARED_BYTES <= 232448);
static_assert(TILES[NARROW_TILE].kind == Kind::wgmma && TILES[NARROW_TILE].bn == 192 && NARROW_SHARED_BYTES <= 232448);
static_assert(SHRINK_SHARED_BYTES <= 232448 && STRIP_SHARED_BYTES <= 232448);
constexpr int TILE_COUNT = sizeof(TILES) / sizeof(TILES[0]);
// An int8 W is made wide in registers, and dropout between the ranks and W touches the accumulator in the middle: both are
// for mma. The tensor memory accelerator writes whole tiles: `full_tiles`, no segment is shorter than one.
constexpr bool takes(const Tile& tile, bool int8, bool has_dropout, bool full_tiles) {
  return tile.kind == Kind::mma || !(int8 || has_dropout || !full_tiles);
}

constexpr bool all_fit() {
  for (const Tile& tile : TILES) {
    const bool mma = tile.kind == Kind::mma;
    if (mma && (tile.bm % (16 * tile.warps_m) || tile.bn % (16 * tile.warps_n))) return false;
    if (!mma && (tile.bm % 64 || tile.bn % 64 || tile.bn > 256)) return false;
    if (tile.bm * tile.bn * 2 > tile.stages * tile.stage_bytes()) return false;  // the output of mma, staged
    if (tile.accumulators() > 128 || tile.stages < 2) return false;
    if (tile.shared_bytes() > (mma ? 166912 : 232448)) return false;  // 8.0 and 8.7; 9.0
  }
  return true;
}
static_assert(all_fit());
static_assert(TILES[0].shared_bytes() <= 101376 && TILES[1].shared_bytes() <= 101376, "8.6 and 8.9 need a tile each");

inline int resident(const Tile& tile, const DeviceProperties& chip) {
  const int registers = tile.threads() * std::min(255, tile.accumulators() + 80);
  // A multiprocessor has 1 KiB more than a block may ask for, and keeps 1 KiB for each.
  return std::max(1, std::min(65536 / registers, (chip.shared_memory + 1024) / (tile.shared_bytes() + 1024)));
}

// How many row blocks a band of tiles has (layout.h): of 8 and 16 the one with which the tiles in flight, one a multiprocessor,
// read the fewest rows of x and W. The rule of DeepGEMM's get_num_1d_blocks_per_group (github.com/deepseek-ai/DeepGEMM).
inline int band_of(const Tile& tile, int multiprocessors) {
  const auto rows = [&](int band) { return band * tile.bm + ceil_div(multiprocessors, band) * tile.bn; };
  return rows(16) < rows(8) ? 16 : 8;
}

// Clock cycles, by the slower of the tensor cores and the caches.
inline double cost(const Tile& tile, const DeviceProperties& chip, int64_t m, int64_t n, int64_t k, int64_t r) {
  const bool wgmma = tile.kind == Kind::wgmma;
  const double row_blocks = ceil_div(m, tile.bm), column_blocks = ceil_div(n, tile.bn), tiles = row_blocks * column_blocks;
  // Steps of 64 along K, the last one filled up with zeros; the ranks come in steps of 16.
  const double steps = ceil_div(k, 64) + ceil_div(r, 16) / 4.0;
  const int at_once = chip.multiprocessors * resident(tile, chip);
  const double waves = std::ceil(tiles / at_once);
  // Multiply-adds a cycle of a multiprocessor: 2048 by wgmma on 9.0, 1024 by mma there and on 8.0, 512 elsewhere.
  // The part of them that a tile can feed falls with its loads from shared memory, which 128 x 256 hides.
  const double peak = wgmma ? 2048 : chip.capability == 80 || chip.capability == 90 ? 1024 : 512;
  const double feeding = std::min(1.0, double(tile.bm) * tile.bn / (tile.bm + tile.bn) / 85);
  const double maths = steps * 64 * tile.bm * tile.bn * resident(tile, chip) / (peak * feeding);
  // A wave reads each of its rows of x and columns of W from memory once (bands, layout.h), and from L2 once a tile.
  const double together = std::min<double>(at_once, tiles);
  const double band = std::min<double>(band_of(tile, chip.multiprocessors), row_blocks);
  const double memory = (band * tile.bm + std::ceil(together / band) * tile.bn) * 128 * steps / (16.0 * chip.multiprocessors);
  const double cache = together * tile.stage_bytes() * steps / (48.0 * chip.multiprocessors);
  // Filling the pipeline, and writing the tile: a persistent grid hides the first behind the second.
  const double ends = (wgmma ? 500 : 1500) + double(tile.bm) * tile.bn * 2 / 32;
  return waves * (std::max({maths, memory, cache}) + ends);
}

// How many blocks a shrink has that runs ahead of a GEMM of wgmma: few, which leaves the multiprocessors to the GEMM, but enough
// to be done when its first tiles come to the ranks. In clock cycles: a block of the shrink needs `row` for each of its row
// blocks, at 28 bytes a cycle, the least that a multiprocessor is expected to get where few read. The GEMM's first blocks start
// at once, and as many as the shrink has start at its end; all of them end their first tile after it. Tiles are dealt out in
// turn. `shrinks`: how many parts k has, each of which is a shrink of its own (siblings).
inline int shrink_ahead_blocks(const Tile& tile, const DeviceProperties& chip, int row_blocks, int tiles, int64_t k,
                               int shrinks = 1) {
  const double loop = double(k) * tile.bm * tile.bn / 2048, ends = 500 + double(tile.bm) * tile.bn * 2 / 32;
  const double row = double(k) / shrinks * SHRINK_ROWS * 2 / 28;
  const int all = chip.multiprocessors, items = row_blocks * shrinks, most = std::min(items, all);
  double least = INFINITY;
  int best = 1;
  for (int blocks = 1; blocks <= most; ++blocks) {
    const double done = ceil_div(items, blocks) * row;
    const auto end_of = [&](int block, double start) {
      return block >= tiles ? done : std::max(start + loop, done) + ends + (ceil_div(tiles - block, all) - 1) * (loop + ends);
    };
    const double end = std::max(blocks < all ? end_of(0, 0) : 0, end_of(all - blocks, done));
    if (end < least) least = end, best = blocks;
  }
  return best;
}

#ifdef FEDMS_WITH_SM90A
constexpr bool HAS_WGMMA = true;
#else
constexpr bool HAS_WGMMA = false;
#endif

inline bool runs_on(const Tile& tile, const DeviceProperties& chip) {
  return tile.shared_bytes() <= chip.shared_memory && (tile.kind == Kind::mma || (HAS_WGMMA && chip.capability == 90));
}

inline std::vector<int> rank_tiles(const DeviceProperties& chip, int64_t m, int64_t n, int64_t k, int64_t r, bool int8,
                                   bool has_dropout, bool full_tiles) {
  std::vector<int> legal;
  for (int i = 0; i < TILE_COUNT; ++i) {
    if (runs_on(TILES[i], chip) && takes(TILES[i], int8, has_dropout, full_tiles)) legal.push_back(i);
  }
  std::stable_sort(legal.begin(), legal.end(), [&](int i, int j) {
    return cost(TILES[i], chip, m, n, k, r) < cost(TILES[j], chip, m, n, k, r);
  });
  return legal;
}

}  // namespace fedms::cuda
