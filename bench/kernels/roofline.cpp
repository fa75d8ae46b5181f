// Times every CPU kernel on one thread beside what the machine allows: the rates of its instructions from registers alone, and
// the bandwidth of the cache that a kernel's operands fit into. roofline.py builds and runs it, and makes a table of it.
//
// A line of the output, separated by tabs: what, instruction set, kernel, shape, unit of arithmetic, multiply-adds, bytes,
// bytes of the working set, median seconds, 20th and 80th percentile. `what` is "peak" (multiply-adds a second follow),
// "bandwidth" (a working set, and bytes a second) or "kernel".
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <string>
#include <vector>

#include <omp.h>

#include "cpu/bfloat16/pairs.h"
#include "cpu/int8/layout.h"
#include "cpu/lora/operands.h"
#include "fedms/attention.h"
#include "fedms/half.h"
#include "fedms/int8.h"
#include "fedms/isa.h"
#include "fedms/lora.h"
#include "fedms/rms_norm.h"
#include "fedms/token_loss.h"

namespace {

using namespace fedms;

double now() {  // CPU time of this thread: other processes do not count
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Memory as torch allocates it: at multiples of a cache line. Elsewhere most loads would cross two of them.
template <class T>
struct CacheAligned {
  using value_type = T;
  CacheAligned() = default;
  template <class U>
  CacheAligned(const CacheAligned<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)); }
  void deallocate(T* data, size_t) { std::free(data); }
  bool operator==(const CacheAligned&) const { return true; }
  bool operator!=(const CacheAligned&) const { return false; }
};
template <class T>
using Buffer = std::vector<T, CacheAligned<T>>;

struct Timing {
  double median, p20, p80;
};

template <class Call>
Timing time_of(const Call& call, double turn = 1e-3, int turns = 31) {
  call();
  double start = now();
  call();
  const int repeats = std::max(1, static_cast<int>(turn / std::max(now() - start, 1e-9)));
  std::vector<double> taken;
  for (int i = 0; i < turns; ++i) {
    start = now();
    for (int j = 0; j < repeats; ++j) call();
    taken.push_back((now() - start) / repeats);
  }
  std::sort(taken.begin(), taken.end());
  return {taken[turns / 2], taken[turns / 5], taken[turns * 4 / 5]};
}

// Twelve independent sums hide the latency of every instruction below.
#define TWELVE(STEP) STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)
#define FMA_ZMM(i) "vfmadd231ps %%zmm15, %%zmm14, %%zmm" #i "\n"
#define DOT_ZMM(i) "vpdpbusd %%zmm15, %%zmm14, %%zmm" #i "\n"
#define PAIR_ZMM(i) "vdpbf16ps %%zmm15, %%zmm14, %%zmm" #i "\n"
#define FMA_YMM(i) "vfmadd231ps %%ymm15, %%ymm14, %%ymm" #i "\n"
#define DOT_YMM(i) "%{vex%} vpdpbusd %%ymm15, %%ymm14, %%ymm" #i "\n"
#define WORDS(i) "vpmaddwd %%ymm15, %%ymm14, %%ymm13\n vpaddd %%ymm13, %%ymm" #i ", %%ymm" #i "\n"
#define BYTES(i)                                                                                     \
  "vpmaddubsw %%ymm15, %%ymm14, %%ymm13\n vpmaddwd %%ymm12, %%ymm13, %%ymm13\n vpaddd %%ymm13, %%ymm" #i ", %%ymm" #i "\n"

constexpr long PEAK_TURNS = 10000;
#define PEAK(NAME, STEP)                                                                                              \
  void NAME() {                                                                                                       \
    long turns = PEAK_TURNS;                                                                                          \
    asm volatile("1:\n" TWELVE(STEP) "sub $1, %0\n jnz 1b\n vzeroupper"                                               \
                 : "+r"(turns)::"cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",  \
                   "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");                                             \
  }

#ifdef FEDMS_X86
PEAK(fma_zmm, FMA_ZMM)
PEAK(dot_zmm, DOT_ZMM)
PEAK(pair_zmm, PAIR_ZMM)
PEAK(fma_ymm, FMA_YMM)
PEAK(dot_ymm, DOT_YMM)
PEAK(words, WORDS)
PEAK(bytes, BYTES)
#endif

void print_peak(const char* isa, const char* unit, void (*loop)(), int products) {
  const Timing t = time_of(loop);
  std::printf("peak\t%s\t%s\t%.6g\n", isa, unit, 12.0 * PEAK_TURNS * products / t.p20);
}

void print_peaks() {
#ifdef FEDMS_X86
  if (available(Isa::avx512)) print_peak("avx512", "fp32", fma_zmm, 16);
  if (avx512_has_vnni()) print_peak("avx512", "int8", dot_zmm, 64), print_peak("avx512", "4-bit", dot_zmm, 64);
  if (avx512_has_bf16()) print_peak("avx512", "bf16", pair_zmm, 32);
  if (available(Isa::avxvnni)) print_peak("avxvnni", "int8", dot_ymm, 32), print_peak("avxvnni", "4-bit", dot_ymm, 32);
  if (available(Isa::avxvnni)) print_peak("avxvnni", "fp32", fma_ymm, 8);
  if (available(Isa::avx2)) {
    print_peak("avx2", "fp32", fma_ymm, 8);
    print_peak("avx2", "int8", words, 16);
    print_peak("avx2", "4-bit", bytes, 32);
  }
#endif
}

void print_bandwidths() {
  for (int64_t kib : {16, 512, 4096, 65536}) {  // within L1, L2, L3 of most machines, and memory
    const Buffer<uint64_t> data(kib * 128, 1);
    volatile uint64_t result;
    const auto read = [&] {
      uint64_t sums[8] = {};
      for (size_t i = 0; i < data.size(); i += 8)
        for (int j = 0; j < 8; ++j) sums[j] |= data[i + j];
      result = sums[0] | sums[1] | sums[2] | sums[3] | sums[4] | sums[5] | sums[6] | sums[7];
    };
    const double bytes = static_cast<double>(kib * 1024);
    std::printf("bandwidth\t%.0f\t%.6g\n", bytes, bytes / time_of(read).p20);
  }
}

void report(const char* kernel, const std::string& shape, const char* unit, double macs, double bytes, double working_set,
            const std::function<void()>& call) {
  const Timing t = time_of(call);
  std::printf("kernel\t%s\t%s\t%s\t%s\t%.6g\t%.6g\t%.6g\t%.6g\t%.6g\t%.6g\n", name(isa()), kernel, shape.c_str(), unit, macs, bytes,
              working_set, t.median, t.p20, t.p80);
  std::fflush(stdout);
}

Buffer<float> values(int64_t count) {
  Buffer<float> out(count);
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>((i * 37 + 11) % 101) / 50.0f - 1.0f;
  return out;
}

std::vector<const float*> rows_of(const Buffer<float>& matrix, int64_t rows) {
  std::vector<const float*> out;
  for (int64_t i = 0; i < rows; ++i) out.push_back(&matrix[i * static_cast<int64_t>(matrix.size()) / rows]);
  return out;
}

std::string shape_of(int64_t m, int64_t k, int64_t n, int64_t r = 0) {
  return std::to_string(m) + "; " + std::to_string(k) + " -> " + std::to_string(n) + (r ? ", r = " + std::to_string(r) : "");
}

// The three products of the LoRA branch, its dropout, and the fp32 and 16-bit products of few rows.
void lora_kernel_rows() {
  const LoraKernels& kernel = lora_kernels();
  const int64_t m = 48;
  for (const auto& [width, r] : {std::pair<int64_t, int64_t>{384, 8}, {768, 8}, {768, 32}, {3072, 8}}) {
    const Buffer<float> x = values(m * width), a = values(r * width);
    Buffer<float> s(m * r), y(m * width), g(r * width);
    const std::vector<const float*> rows = rows_of(a, r);
    const double macs = static_cast<double>(m * r * width), read = 4.0 * static_cast<double>((m + r) * width + m * r);
    report("lora dots (S = x A^T)", shape_of(m, width, r), "fp32", macs, read, read,
           [&] { kernel.dots(m, r, width, x.data(), width, rows.data(), s.data(), r); });
    report("lora expand (y += S B^T)", shape_of(m, r, width), "fp32", macs, read + 4.0 * static_cast<double>(m * width), read,
           [&] { kernel.expand(m, r, width, s.data(), r, rows.data(), y.data(), width); });
    report("lora reduce (dA += S^T x)", shape_of(m, r, width), "fp32", macs, read + 4.0 * static_cast<double>(r * width), read,
           [&] { kernel.reduce(m, r, width, s.data(), r, x.data(), width, g.data(), width); });
  }
  const Buffer<float> x = values(3072);
  Buffer<float> y(3072);
  report("dropout", "3072 values", "none", 0, 8.0 * 3072, 8.0 * 3072,
         [&] { kernel.dropout(0.1, 7, 5, 3072, x.data(), y.data(), false); });
}

void few_rows_rows() {
  for (const auto& [m, k, n] : {std::array<int64_t, 3>{1, 768, 768}, {4, 768, 768}, {1, 576, 1536}}) {
    const Buffer<float> x = values(m * k), w = values(n * k), dy = values(m * n);
    const Buffer<uint16_t> half(n * k, 0x3800);
    Buffer<float> y(m * n), dx(m * k);
    const double macs = static_cast<double>(m * n * k), weight = static_cast<double>(n * k);
    report("few rows, fp32 weight, forward", shape_of(m, k, n), "fp32", macs, 4 * weight, 4 * weight,
           [&] { few_rows_forward(m, n, k, x.data(), w.data(), nullptr, y.data()); });
    report("few rows, fp32 weight, backward", shape_of(m, k, n), "fp32", macs, 4 * weight, 4 * weight,
           [&] { few_rows_backward(m, n, k, dy.data(), w.data(), dx.data()); });
    report("few rows, fp16 weight", shape_of(m, k, n), "fp32", macs, 2 * weight, 2 * weight,
           [&] { half_forward(m, n, k, x.data(), reinterpret_cast<const Fp16*>(half.data()), nullptr, y.data()); });
    report("few rows, bf16 weight", shape_of(m, k, n), "fp32", macs, 2 * weight, 2 * weight,
           [&] { half_forward(m, n, k, x.data(), reinterpret_cast<const Bf16*>(half.data()), nullptr, y.data()); });
  }
}

// Whole layers with one expert of rank r, and without an expert (r = 0): int8 and 4 bits, forward and backward.
void layer_rows(int64_t m, int64_t k, int64_t n, int64_t r) {
  const Buffer<float> x = values(m * k), dy = values(m * n), a = values(r * k), b = values(n * r), scale(std::max(n, k), 0.01f);
  Buffer<float> s(m * r), y(m * n), dx(m * k), da(r * k), db(n * r);
  Buffer<int8_t> q(n * k);
  for (int64_t i = 0; i < n * k; ++i) q[i] = static_cast<int8_t>(i * 37 % 255 - 127);
  Buffer<uint8_t> packed(int8_packed_size(n, k)), transposed(int8_packed_size(k, n)), packed_4bit(nibbles_packed_size(n, k, 64));
  int8_pack(n, k, q.data(), 0, packed.data());
  int8_pack(k, n, q.data(), 0, transposed.data());
  float levels[16];
  for (int i = 0; i < 16; ++i) levels[i] = static_cast<float>(i - 8) / 8.0f;
  const Buffer<uint8_t> codes(n * ((k + 1) / 2), 0x5a);
  const Buffer<float> groups(n * ((k + 63) / 64), 0.01f);
  nibbles_pack(n, k, 64, levels, codes.data(), groups.data(), packed_4bit.data());

  Lora lora;
  lora.m = m;
  lora.n = n;
  lora.k = k;
  if (r > 0) lora.experts.push_back({r, 2.0f, a.data(), b.data()});
  const Int8Weight weight{packed.data(), static_cast<int64_t>(packed.size()), scale.data(), nullptr};
  const Int8Weight weight_t{transposed.data(), static_cast<int64_t>(transposed.size()), scale.data(), nullptr};
  const Int8Weight weight_4bit{packed_4bit.data(), static_cast<int64_t>(packed_4bit.size()), nullptr, nullptr};
  LoraGradients gradients;
  gradients.dx = dx.data();
  if (r > 0) gradients.da.push_back(da.data()), gradients.db.push_back(db.data());

  // What LoRA multiplies counts as if in int8: its products in fp32 are apart in the rows above.
  const double rows = static_cast<double>(4 * m * (k + n)), frozen = static_cast<double>(m) * static_cast<double>(n * k);
  const double pairs = 4.0 * static_cast<double>(r * (n + k)), bytes = static_cast<double>(n * k) + rows + pairs;
  report("int8 layer, forward", shape_of(m, k, n, r), "int8", frozen, bytes, bytes,
         [&] { int8_forward(weight, lora, x.data(), s.data(), y.data()); });
  report("int8 layer, backward", shape_of(m, k, n, r), "int8", frozen, bytes + rows + pairs, bytes,
         [&] { int8_backward(weight_t, lora, dy.data(), x.data(), s.data(), gradients); });
  report("4-bit layer, forward", shape_of(m, k, n, r), "4-bit", frozen, bytes - 0.5 * static_cast<double>(n * k), bytes,
         [&] { int8_forward(weight_4bit, lora, x.data(), s.data(), y.data()); });
}

void quantize_rows() {
  Buffer<uint8_t> packed(int8_packed_size(64, 64));
  for (int64_t k : {384, 768, 3072}) {
    const int64_t m = PREPARED_ROWS;
    const Buffer<float> x = values(m * k);
    Buffer<int16_t> q(m * (k + 64));
    Buffer<float> q_scale(m);
    Buffer<int32_t> q_zero(m);
    const Int8Kernels& kernels = int8_kernels();
    const double bytes = static_cast<double>(m * k * (4 + kernels.q_size));
    report("quantize x", std::to_string(m) + " rows of " + std::to_string(k), "none", 0, bytes, bytes, [&] {
      kernels.quantize(m, k, kernels.most_steps, x.data(), q.data(), k + 64, q_scale.data(), q_zero.data());
    });
  }
}

// The products of attention, in float and with operands rounded to bfloat16, MiniLM's heads and those of a ViT.
void attention_rows(bool rounded) {
  for (const auto& [batch, heads, tokens, width] : {std::array<int64_t, 4>{32, 12, 64, 32}, {4, 12, 197, 64}}) {
    const int64_t count = batch * tokens * heads * width, row = heads * width;
    const Buffer<float> q = values(count), k = values(count), v = values(count), dout = values(count);
    Buffer<float> out(count), dq(count), dk(count), dv(count);
    Buffer<SoftmaxRow> softmax(batch * heads * tokens);
    const auto read = [&](const Buffer<float>& of) { return Heads<const float>{of.data(), tokens * row, width, row}; };
    const auto written = [&](Buffer<float>& of) { return Heads<float>{of.data(), tokens * row, width, row}; };
    const Attention attention{batch, heads, tokens, tokens, width, read(q), read(k), read(v), {nullptr, 0, 0, 0}, 0.2f, rounded};
    const double macs = static_cast<double>(count * tokens), bytes = 4.0 * static_cast<double>(count);
    const char* const unit = rounded ? "bf16" : "fp32";
    const std::string shape = std::to_string(batch) + " x " + std::to_string(heads) + " x " + std::to_string(tokens) + " x " +
                              std::to_string(width) + ", " + unit;
    report("attention, forward", shape, unit, 2 * macs, 4 * bytes, 4 * bytes,
           [&] { attention_forward(attention, written(out), softmax.data()); });
    report("attention, backward", shape, unit, 5 * macs, 7 * bytes, 7 * bytes, [&] {
      attention_backward(attention, read(dout), softmax.data(), written(dq), written(dk), written(dv));
    });
  }
}

// The loss of a language model's head and its gradient, of a small vocabulary, and the norm of its rows.
void language_rows() {
  const int64_t n = 128, v = 4096, d = 576;
  const Buffer<float> hidden = values(n * d), weight = values(v * d), norm = values(d);
  const std::vector<int64_t> labels(n, 3);
  Buffer<float> work(n * TOKEN_STRETCH), log_p(n), confidence(2 * n), gradient(n * d), y(n * d);
  std::vector<int64_t> best(n);
  TokenHead head{};
  head.vocabulary = v, head.width = d, head.weight = weight.data(), head.scale = 1;
  const double macs = static_cast<double>(n * v * d), bytes = 4.0 * static_cast<double>((v + 2 * n) * d);
  report("token loss and gradient", shape_of(n, d, v), "fp32", 2 * macs, 2 * bytes, bytes, [&] {
    token_log_prob(head, n, hidden.data(), labels.data(), n, work.data(), {log_p.data(), confidence.data(), best.data(), gradient.data()});
  });
  report("RMS norm", shape_of(n, d, d), "none", 0, 8.0 * static_cast<double>(n * d), 8.0 * static_cast<double>(n * d),
         [&] { rms_norm(n, d, hidden.data(), norm.data(), 1e-5, y.data()); });
}

}  // namespace

int main() {
  omp_set_num_threads(1);
  print_peaks();
  print_bandwidths();
  for (Isa set : ALL_ISAS) {
    if (!available(set) || set == Isa::portable) continue;
    set_isa(name(set));
    lora_kernel_rows();
    few_rows_rows();
    quantize_rows();
    attention_rows(false);
    if (pair_kernels()) attention_rows(true);
    language_rows();
    for (int64_t r : {0, 8}) {
      for (const auto& [m, k, n] :
           {std::array<int64_t, 3>{1, 768, 768}, {1, 576, 1536}, {16, 768, 768}, {64, 768, 768}, {2048, 384, 384}, {1576, 768, 3072}}) {
        layer_rows(m, k, n, r);
      }
    }
    layer_rows(2048, 384, 384, 32);
  }
}
