// Launches that overlap: what the emulator makes of two of them, and how many blocks a shrink has that runs ahead of a GEMM.
#include <cstdio>

#include "../../../csrc/cuda/device.h"
#include "../../../csrc/cuda/heuristics.h"

using namespace fedms::cuda;

namespace {

int failures = 0;

void expect(bool holds, const char* what, double a = 0, double b = 0) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s (%g, %g)\n", what, a, b);
}

// --- The emulator: what the first launch writes is there for the second one from its wait on, and not sooner.

constexpr int BLOCKS = 3;

void write_ones(int* to) {
  ptx::let_next_launch_start();
  if (ptx::thread() == 0) to[ptx::block_x()] = 1;
}

void write_ones_alone(int* to) {
  if (ptx::thread() == 0) to[ptx::block_x()] = 1;
}

enum class Wait { never, first, last };

void add_up(const int* from, int* sum, Wait wait) {
  if (wait == Wait::first) ptx::wait_for_launch_before();
  if (ptx::thread() == 0) {
    for (int i = 0; i < BLOCKS; ++i) sum[ptx::block_x()] += from[i];
  }
  if (wait == Wait::last) ptx::wait_for_launch_before();
}

struct Result {
  int sum = 0;
  std::string error;
};

Result two_launches(void (*first)(int*), Wait wait, bool early) {
  const Stream stream{0, nullptr};
  const Launch what{"the second launch", 1, 1, 1, 1, stream};
  int ones[BLOCKS] = {}, sum[1] = {};
  Result result;
  try {
    launch(what, first, {BLOCKS}, 64, 0, static_cast<int*>(ones));
    launch(what, add_up, {1, 1, 1, early}, 64, 0, static_cast<const int*>(ones), static_cast<int*>(sum), wait);
  } catch (const Error& error) {
    result.error = error.what();
  }
  result.sum = sum[0];
  return result;
}

void emulated_overlap() {
  const Result right = two_launches(write_ones, Wait::first, true);
  expect(right.error.empty() && right.sum == BLOCKS, "a launch that waits sees what the one before wrote", right.sum);
  const Result too_late = two_launches(write_ones, Wait::last, true);
  expect(too_late.error.empty() && too_late.sum == 0, "what is read before the wait is not there yet", too_late.sum);
  const Result never = two_launches(write_ones, Wait::never, true);
  expect(never.error.find("the second launch") == 0 && never.error.find("did not wait") != std::string::npos,
         "a launch that starts early and does not wait is an error");
  const Result in_turn = two_launches(write_ones, Wait::never, false);
  expect(in_turn.error.empty() && in_turn.sum == BLOCKS, "a launch that does not start early needs no wait", in_turn.sum);
  const Result nobody_lets_it = two_launches(write_ones_alone, Wait::never, true);
  expect(nobody_lets_it.error.empty() && nobody_lets_it.sum == BLOCKS, "no launch starts early unless the one before lets it");
  std::printf("emulator: what a launch writes is there for the one that overlaps it from its wait on\n");
}

// --- The blocks of a shrink: the time that a GEMM with the shrink ahead of it takes, played tile by tile.

struct Case {
  const char* name;
  int m, k, n, shrinks = 1;  // of k / shrinks terms each: those of siblings, backward

  int items() const { return ceil_div(m, 128) * shrinks; }
};

constexpr int MULTIPROCESSORS = 132;  // of an H200
// In microseconds, as measured on an H200 with the kernels before these (docs/evidence/cuda.md): a tile of 128 x 256 with 4096
// terms, and of it what comes behind its main loop.
constexpr double TILE = 348.3 / 8, BEHIND = 1.9, START = 0.5, PUBLISH = 1.5;

// `rate`: GB/s that a block of the shrink reads with. Tiles are dealt out in turn; the last blocks start where the shrink's end.
double played(const Case& of, int shrink_blocks, double rate) {
  const int tiles = ceil_div(of.m, 128) * ceil_div(of.n, 256);
  const double row = 128.0 * of.k / of.shrinks * 2 / (rate * 1e3), main = (TILE - BEHIND) * of.k / 4096;
  std::vector<double> free_at(MULTIPROCESSORS, START);
  double done = 0;
  for (int i = 0; i < shrink_blocks; ++i) {
    const double end = ceil_div(of.items() - i, shrink_blocks) * row;
    free_at[MULTIPROCESSORS - 1 - i] = end + START;
    done = std::max(done, end + PUBLISH);
  }
  double end = done;
  for (int tile = 0; tile < tiles; ++tile) {
    double& at = free_at[tile % MULTIPROCESSORS];
    at = std::max(at + main, done) + BEHIND;
    end = std::max(end, at);
  }
  return end;
}

void blocks_of_a_shrink() {
  constexpr Tile tile = TILES[2];
  static_assert(tile.bm == 128 && tile.bn == 256);
  const DeviceProperties chip{90, MULTIPROCESSORS, 232448};
  const Case cases[] = {{"4096 -> 4096", 8192, 4096, 4096},   {"4096 -> 14336", 8192, 4096, 14336},
                        {"14336 -> 4096", 8192, 14336, 4096}, {"768 -> 768", 12608, 768, 768},
                        {"768 -> 3072", 12608, 768, 3072},    {"3072 -> 768", 12608, 3072, 768},
                        {"few rows", 1024, 4096, 4096},       {"fewer rows", 300, 768, 768},
                        {"one row", 1, 4096, 4096},           {"three siblings, 4096 -> 4096", 8192, 3 * 4096, 4096, 3},
                        {"three siblings, 768 -> 768", 12608, 3 * 768, 768, 3}};
  for (const Case& of : cases) {
    const int rows = ceil_div(of.m, 128), tiles = rows * ceil_div(of.n, 256);
    const int chosen = shrink_ahead_blocks(tile, chip, rows, tiles, of.k, of.shrinks), most = std::min(of.items(), MULTIPROCESSORS);
    expect(chosen >= 1 && chosen <= most, "a number of blocks", chosen, most);
    std::printf("%s, %d rows: %d blocks;", of.name, of.m, chosen);
    for (double rate : {45, 65, 90}) {
      double best = INFINITY;
      for (int blocks = 1; blocks <= most; ++blocks) best = std::min(best, played(of, blocks, rate));
      const double time = played(of, chosen, rate);
      std::printf(" at %g GB/s %.1f us (at best %.1f)%s", rate, time, best, rate == 90 ? "\n" : ",");
      expect(time <= best * 1.01, "another number of blocks would take less time", time, best);
    }
  }
}

}  // namespace

int main() {
  emulated_overlap();
  blocks_of_a_shrink();
  std::printf(failures ? "%d FAILURES\n" : "all right\n", failures);
  return failures != 0;
}
