// All of csrc/cuda/layout.h and segments.h, and the parts of the kernels' addresses that rest on it, gone through on a CPU.
#include <cstdio>
#include <set>
#include <vector>

#include "../../../csrc/cuda/heuristics.h"
#include "../../../csrc/cuda/segments.h"

using namespace fedms::cuda;

namespace {

int failures = 0;

void expect(bool holds, const char* what, int a = 0, int b = 0) {
  if (holds) return;
  if (++failures <= 20) std::printf("FAILED: %s (%d, %d)\n", what, a, b);
}

// The turns that a warp waits for banks: `bytes` at each address, in phases of as many lanes as fill 128 bytes.
int conflicts(const std::vector<int>& addresses, int bytes) {
  const int lanes = bytes == 16 ? 8 : 32;
  int waited = 0;
  for (size_t first = 0; first < addresses.size(); first += lanes) {
    std::vector<std::set<int>> words(32);
    for (size_t i = first; i < first + lanes && i < addresses.size(); ++i) {
      for (int word = addresses[i] / 4; word * 4 < addresses[i] + bytes; ++word) words[word % 32].insert(word);
    }
    size_t most = 1;
    for (const auto& bank : words) most = std::max(most, bank.size());
    waited += int(most) - 1;
  }
  return waited;
}

void tiles_of_the_grid() {
  long grids = 0;
  for (int rows = 1; rows <= 70; ++rows) {
    for (int columns = 1; columns <= 70; ++columns) {
      for (int band : {8, 16}) {
        std::vector<int> seen(rows * columns);
        for (int tile = 0; tile < rows * columns; ++tile) {
          const Tile2 at = place_tile(tile, rows, columns, band);
          const bool inside = at.row >= 0 && at.row < rows && at.column >= 0 && at.column < columns;
          expect(inside, "a tile leaves the grid", rows, columns);
          if (inside) ++seen[at.row * columns + at.column];
        }
        for (int count : seen) expect(count == 1, "a tile is not computed once", rows, columns);
        ++grids;
      }
    }
  }
  std::printf("place_tile: every tile once, in %ld grids\n", grids);
}

// All ways to lay three segments over up to 200 rows, in steps of 7 rows.
void blocks_of_rows() {
  long grids = 0;
  for (int m = 1; m <= 200; m += 7) {
    for (int first = 0; first <= m; first += 7) {
      for (int second = first; second <= m; second += 7) {
        const Segments segments{3, {first, second, m}, {5, 0, 40}, {0, 16, 16}};
        for (int size : {16, 64}) {
          const bool full_tiles = (first == 0 || first >= size) && (second == first || second - first >= size) &&
                             (m == second || m - second >= size);
          for (int reach_back = 0; reach_back <= full_tiles; ++reach_back, ++grids) {
            std::vector<int> seen(m);
            const int blocks = row_blocks(segments, size, m);
            for (int block = 0; block < blocks; ++block) {
              const RowBlock rows = row_block(segments, block, size, m, 40, reach_back);
              const int start = rows.owner == 0 ? 0 : segments.ends[rows.owner - 1];
              expect(rows.row >= start && rows.end <= segments.ends[rows.owner] && rows.row < rows.end,
                     "a block leaves its segment", m, block);
              expect(rows.end - rows.row <= size && (!reach_back || rows.end - rows.row == size), "a block's size", m, block);
              expect(rows.ranks == segments.ranks[rows.owner] && rows.first_rank == segments.firsts[rows.owner], "ranks", m);
              for (int row = rows.row; row < rows.end && row >= 0 && row < m; ++row) ++seen[row];
            }
            for (int row = 0; row < m; ++row) {
              expect(seen[row] == 1 || (reach_back && seen[row] == 2), "a row is not in one block", m, row);
              const RowBlock one = row_block_of(segments, row, 40);
              expect(row < segments.ends[one.owner] && row >= (one.owner == 0 ? 0 : segments.ends[one.owner - 1]),
                     "a row is not its owner's", m, row);
            }
          }
        }
      }
    }
    const Segments none{};
    expect(row_blocks(none, 64, m) == (m + 63) / 64, "blocks of all rows", m);
    const RowBlock last = row_block(none, row_blocks(none, 64, m) - 1, 64, m, 40, true);
    expect(last.end == m && last.ranks == 40 && last.first_rank == 0, "the last block of all rows", m);
  }
  std::printf("row_block: every row in one block of its own segment, in %ld grids\n", grids);
}

template <int CHUNKS>
void swizzle() {
  std::set<int> places;
  constexpr int ROWS = 256;
  for (int row = 0; row < ROWS; ++row) {
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const int place = chunk_offset<CHUNKS>(row, chunk);
      expect(place % 16 == 0 && place >= 0 && place < ROWS * CHUNKS * 16, "a chunk leaves its tile", row, chunk);
      places.insert(place);
      // What the tensor memory accelerator does, address by address, to rows of 128 and of 64 bytes.
      const int straight = (row * CHUNKS + chunk) * 16;
      if (CHUNKS == 8) expect(place == (straight ^ (straight >> 3 & 0x70)), "the 128-byte swizzle differs", row, chunk);
      if (CHUNKS == 4) expect(place == (straight ^ (straight >> 3 & 0x30)), "the 64-byte swizzle differs", row, chunk);
    }
  }
  expect(places.size() == size_t(ROWS * CHUNKS), "two chunks share a place", CHUNKS);
  int waited = 0;
  for (int row = 0; row < ROWS; row += 8) {
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      std::vector<int> eight;
      for (int i = 0; i < 8; ++i) eight.push_back(chunk_offset<CHUNKS>(row + i, chunk));
      waited += conflicts(eight, 16);
    }
  }
  expect(waited == 0, "ldmatrix waits for banks", CHUNKS, waited);
  std::printf("chunk_offset<%d>: one place a chunk; ldmatrix waits %d times for a bank\n", CHUNKS, waited);
}

void fragments() {
  std::set<std::pair<int, int>> rows, chunks, sums;
  for (int lane = 0; lane < 32; ++lane) {
    const Place first = rows_first(lane), second = chunks_first(lane);
    rows.insert({first.row, first.chunk});
    chunks.insert({second.row, second.chunk});
    for (int i = 0; i < 4; ++i) sums.insert({accumulator_row(lane, i), accumulator_column(lane, i)});
  }
  expect(rows.size() == 32 && chunks.size() == 32, "two lanes point ldmatrix at one row");
  expect(sums.size() == 128 && sums.rbegin()->first == 15, "an accumulator is not 16 x 8");
  // The four 8 x 8 matrices of ldmatrix.x4, lane by lane, against the operands as the PTX manual draws them.
  for (int lane = 0; lane < 32; ++lane) {
    const int matrix = lane / 8;
    // A's registers: (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15); B's: k turns first.
    expect(rows_first(lane).row == lane % 8 + matrix % 2 * 8 && rows_first(lane).chunk == matrix / 2, "rows_first", lane);
    expect(chunks_first(lane).row == lane % 8 + matrix / 2 * 8 && chunks_first(lane).chunk == matrix % 2, "chunks_first", lane);
  }
  std::printf("fragments: 32 lanes, 32 rows; 128 sums in 16 x 8\n");
}

void int8_tile() {
  int waited = 0;
  for (int row = 0; row + 8 <= 128; row += 8) {
    for (int step = 0; step < 64; step += 8) {
      std::vector<int> warp;
      for (int lane = 0; lane < 32; ++lane) {
        warp.push_back(chunk_offset<4>(row + lane / 4, step / 16) + step % 16 + 2 * (lane % 4));
      }
      waited += conflicts(warp, 2);
    }
  }
  expect(waited == 0, "reading int8 waits for banks", waited);
  for (int value = -128; value < 128; ++value) {
    const uint32_t two = uint32_t(value & 0xFF) | uint32_t(-value & 0xFF) << 8;
    const int negated = int8_t(-value);
    const uint32_t b = widen_int8<Bf16>(two), f = widen_int8<Fp16>(two);
    expect(Number<Bf16>::widen({uint16_t(b)}) == value && Number<Bf16>::widen({uint16_t(b >> 16)}) == negated, "bf16 of int8", value);
    expect(Number<Fp16>::widen({uint16_t(f)}) == value && Number<Fp16>::widen({uint16_t(f >> 16)}) == negated, "fp16 of int8", value);
  }
  std::printf("int8: all 256 values exact; reading waits %d times for a bank\n", waited);
}

// The epilogue of an mma tile: every number of it staged once and written once.
template <int NUMBER>
void epilogue() {
  constexpr Tile tile = TILES[NUMBER];
  constexpr int BM = tile.bm, BN = tile.bn;
  std::vector<int> staged(BM * BN / 2), written(BM * BN / 8);
  int waited = 0;
  for (int warp = 0; warp < tile.threads() / 32; ++warp) {
    const int row = warp / tile.warps_n * (BM / tile.warps_m), column = warp % tile.warps_n * (BN / tile.warps_n);
    for (int i = 0; i < BM / tile.warps_m / 16; ++i) {
      for (int j = 0; j < BN / tile.warps_n / 8; ++j) {
        for (int half = 0; half < 4; half += 2) {
          std::vector<int> lanes;
          for (int lane = 0; lane < 32; ++lane) {
            const int r = row + i * 16 + accumulator_row(lane, half), c = column + j * 8 + accumulator_column(lane, half);
            lanes.push_back(chunk_offset<BN / 8>(r, c / 8) + c % 8 * 2);
            ++staged[lanes.back() / 4];
          }
          waited += conflicts(lanes, 4);
        }
      }
    }
  }
  for (int i = 0; i < BM * BN / 8; ++i) ++written[chunk_offset<BN / 8>(i / (BN / 8), i % (BN / 8)) / 16];
  for (int count : staged) expect(count == 1, "a pair is not staged once", BM, BN);
  for (int count : written) expect(count == 1, "a chunk is not written once", BM, BN);
  expect(waited == 0, "staging waits for banks", BM, BN);
  std::printf("epilogue of mma %dx%d: every number once; staging waits %d times for a bank\n", BM, BN, waited);
}

// The same for a warpgroup's boxes.
void boxes() {
  std::vector<int> staged(64 * 32);
  int waited = 0;
  for (int warp = 0; warp < 4; ++warp) {
    for (int i = 0; i < 32; i += 2) {
      std::vector<int> lanes;
      for (int lane = 0; lane < 32; ++lane) {
        const int row = warp * 16 + accumulator_row(lane, i % 4), column = i / 4 * 8 + accumulator_column(lane, 0);
        lanes.push_back(chunk_offset<8>(row, column / 8) + column % 8 * 2);
        ++staged[lanes.back() / 4];
      }
      waited += conflicts(lanes, 4);
    }
  }
  for (int count : staged) expect(count == 1, "a pair of a box is not staged once");
  expect(waited == 0, "staging a box waits for banks");
  std::printf("epilogue of wgmma: every number of a box once; staging waits %d times for a bank\n", waited);
}

void cost_model() {
  const DeviceProperties chips[] = {{80, 108, 166912}, {86, 84, 101376}, {87, 16, 166912}, {89, 128, 101376}, {90, 132, 232448}};
  for (const DeviceProperties& chip : chips) {
    for (int64_t m : {1, 64, 512, 8192}) {
      for (int64_t n : {8, 768, 4096, 14336}) {
        for (bool int8 : {false, true}) {
          const std::vector<int> tiles = rank_tiles(chip, m, n, 4096, 32, int8, false, true);
          expect(!tiles.empty(), "no tile for a problem", int(m), int(n));
          for (int tile : tiles) expect(TILES[tile].shared_bytes() <= chip.shared_memory, "a tile does not fit", chip.capability, tile);
          if (!int8) expect(cost(TILES[tiles[0]], chip, m, n, 4096, 32) <= cost(TILES[tiles[0]], chip, 2 * m + 256, n, 4096, 32), "more rows cost less");
        }
      }
    }
    const Tile& large = TILES[rank_tiles(chip, 8192, 4096, 4096, 32, false, false, true)[0]];
    for (int tile : rank_tiles(chip, 8192, 4096, 4096, 32, false, false, false)) {
      expect(TILES[tile].kind == Kind::mma, "a tile that must be whole for short segments", chip.capability, tile);
    }
    expect((large.kind == Kind::wgmma) == (chip.capability == 90), "wgmma is for 9.0, and first there", chip.capability);
  }
  std::printf("cost model: legal tiles for every problem on 5 chips\n");
}

}  // namespace

int main() {
  tiles_of_the_grid();
  blocks_of_rows();
  swizzle<4>();
  swizzle<8>();
  swizzle<16>();
  swizzle<32>();
  fragments();
  int8_tile();
  epilogue<0>();
  epilogue<1>();
  boxes();
  cost_model();
  std::printf(failures ? "%d FAILURES\n" : "all right\n", failures);
  return failures != 0;
}
