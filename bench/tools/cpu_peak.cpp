// What an x86 core with AVX2 multiplies at most, from registers alone: the floor under the int8 kernels.
//
//   g++ -O2 bench/tools/cpu_peak.cpp -o build/cpu_peak && build/cpu_peak
//
// Twelve independent sums, as the tiles have; multiply-adds a second of CPU time. The loops take turns: median, 20th and 80th
// percentile.
#include <algorithm>
#include <cstdio>
#include <ctime>
#include <vector>

namespace {

double seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

#define TWELVE(STEP) \
  STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)
#define FMA(i) "vfmadd231ps %%ymm15, %%ymm14, %%ymm" #i "\n"
#define WORDS(i) "vpmaddwd %%ymm15, %%ymm14, %%ymm13\n vpaddd %%ymm13, %%ymm" #i ", %%ymm" #i "\n"
#define BYTES(i)                                                                            \
  "vpmaddubsw %%ymm15, %%ymm14, %%ymm13\n vpmaddwd %%ymm12, %%ymm13, %%ymm13\n vpaddd %%ymm13, %%ymm" #i \
  ", %%ymm" #i "\n"

constexpr long TURNS = 20000;

#define LOOP(NAME, STEP)                                                                                             \
  void NAME() {                                                                                                      \
    long turns = TURNS;                                                                                              \
    asm volatile("vzeroall\n1:\n" TWELVE(STEP) "sub $1, %0\n jnz 1b\n vzeroupper"                                    \
                 : "+r"(turns)::"xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
                   "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");                                                     \
  }

LOOP(fma, FMA)
LOOP(words, WORDS)
LOOP(bytes, BYTES)

struct Loop {
  const char* name;
  void (*run)();
  int products;  // of an instruction
  std::vector<double> rates;
};

}  // namespace

int main() {
  Loop loops[] = {{"fp32: vfmadd231ps", fma, 8, {}},
                  {"16-bit values (int8 weights): vpmaddwd, vpaddd", words, 16, {}},
                  {"bytes (4-bit weights): vpmaddubsw, vpmaddwd, vpaddd", bytes, 32, {}}};
  for (int turn = 0; turn < 301; ++turn) {
    for (Loop& loop : loops) {
      const double start = seconds();
      loop.run();
      loop.rates.push_back(12.0 * TURNS * loop.products / (seconds() - start) / 1e9);
    }
  }
  for (Loop& loop : loops) {
    std::sort(loop.rates.begin(), loop.rates.end());
    std::printf("%-54s %5.1f GMAC/s (%.1f-%.1f)\n", loop.name, loop.rates[150], loop.rates[60], loop.rates[240]);
  }
}
