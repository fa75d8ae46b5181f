// The kernels of csrc/cpu on random cases against the same computed in double precision, without Python: for machines
// that only an emulator plays (test_arm.py), and for sanitizers. Checks every instruction set that is available; what
// the command line names must be among them.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "fedms/half.h"
#include "fedms/int8.h"
#include "fedms/isa.h"

namespace {

std::mt19937 generator(1);
int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
std::vector<float> normal(int64_t count) {
  std::normal_distribution<float> draw;
  std::vector<float> values(count);
  for (float& v : values) v = draw(generator);
  return values;
}

double worst = 0;
void compare(const char* what, const std::vector<float>& got, const std::vector<double>& want) {
  double difference = 0, size = 1e-30;
  for (size_t i = 0; i < want.size(); ++i) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    size += want[i] * want[i];
  }
  const double error = std::sqrt(difference / size);
  worst = std::max(worst, error);
  if (!(error < 2e-6)) {
    std::printf("%s: relative error %.2e\n", what, error);
    std::exit(1);
  }
}

// Rows of x as int8.h quantizes them, made wide again.
std::vector<double> quantized_rows(const std::vector<float>& x, int m, int k, const std::vector<uint8_t>& packed) {
  const float steps = static_cast<float>(fedms::int8_steps(packed.data(), packed.size()));
  std::vector<double> out(x.size());
  for (int i = 0; i < m; ++i) {
    const float* row = &x[i * k];
    const float low = std::min(0.0f, *std::min_element(row, row + k)), high = std::max(0.0f, *std::max_element(row, row + k));
    const float scale = high / steps - low / steps, inverse = 1.0f / scale;
    const float zero = std::nearbyint(-low * inverse);
    for (int j = 0; j < k; ++j) {
      const volatile float product = row[j] * inverse;  // volatile: rounded before anything else happens to it
      out[i * k + j] = static_cast<double>(std::min(std::nearbyint(static_cast<float>(product)), steps - zero)) * scale;
    }
  }
  return out;
}

struct Weight {
  std::vector<double> wide;  // (n, k), what the packed one stands for
  std::vector<uint8_t> packed;
  std::vector<float> scale;
};

Weight int8_weight(int n, int k) {
  Weight w;
  std::vector<int8_t> q(n * k), back(n * k);
  for (int8_t& v : q) v = static_cast<int8_t>(between(-127, 127));
  w.scale = normal(n);
  w.packed.resize(fedms::int8_packed_size(n, k));
  fedms::int8_pack(n, k, q.data(), 0, w.packed.data());
  fedms::int8_unpack(n, k, w.packed.data(), w.packed.size(), back.data());
  if (q != back) std::puts("int8_unpack differs"), std::exit(1);
  for (int i = 0; i < n * k; ++i) w.wide.push_back(static_cast<double>(q[i]) * w.scale[i / k]);
  return w;
}

Weight nibble_weight(int n, int k, int group) {
  Weight w;
  float levels[16];
  for (int i = 0; i < 16; ++i) levels[i] = static_cast<float>(i) - 8;
  const int groups = (k + group - 1) / group, bytes = (k + 1) / 2;
  const std::vector<float> scale = normal(n * groups);
  std::vector<uint8_t> q(n * bytes), back(n * bytes);
  const auto code = [&](int c, int j) { return q[c * bytes + j / 2] >> (j % 2 * 4) & 15; };
  for (int c = 0; c < n; ++c)
    for (int j = 0; j < k; ++j) q[c * bytes + j / 2] |= static_cast<uint8_t>(between(0, 15) << (j % 2 * 4));
  w.packed.resize(fedms::nibbles_packed_size(n, k, group));
  fedms::nibbles_pack(n, k, group, levels, q.data(), scale.data(), w.packed.data());
  fedms::nibbles_unpack(n, k, w.packed.data(), w.packed.size(), back.data());
  if (q != back) std::puts("nibbles_unpack differs"), std::exit(1);
  std::vector<float> wide(n * k);
  fedms::nibbles_dequantize(n, k, group, w.packed.data(), w.packed.size(), scale.data(), wide.data());
  for (int c = 0; c < n; ++c) {
    float largest = 0;
    for (int g = 0; g < groups; ++g) largest = std::max(largest, std::abs(scale[c * groups + g]));
    for (int j = 0; j < k; ++j) {
      const float of_group = scale[c * groups + j / group];
      if (wide[c * k + j] != levels[code(c, j)] * of_group) std::puts("nibbles_dequantize differs"), std::exit(1);
      const int factor = static_cast<int>(std::nearbyint(of_group / largest * 2048));
      const int value = ((code(c, j) - 8) * 126 * factor + (1 << 14)) >> 15;
      w.wide.push_back(value * static_cast<double>(largest * static_cast<float>(8.0 / 63)));
    }
  }
  return w;
}

// to (m, n) += x (m, k) w (n, k)^T
void add_product(std::vector<double>& to, const std::vector<double>& x, const std::vector<double>& w, int m, int n, int k) {
  for (int i = 0; i < m; ++i)
    for (int c = 0; c < n; ++c)
      for (int j = 0; j < k; ++j) to[i * n + c] += x[i * k + j] * w[c * k + j];
}

std::vector<double> wide(const std::vector<float>& v) { return {v.begin(), v.end()}; }

void check(int m, int n, int k, int rank, int group) {
  const Weight weight = group ? nibble_weight(n, k, group) : int8_weight(n, k);
  const std::vector<float> x = normal(m * k), a = normal(rank * k), b = normal(n * rank), bias = normal(n);
  const std::vector<float> dy = normal(m * n);
  fedms::Lora lora;
  lora.m = m, lora.n = n, lora.k = k;
  lora.experts.push_back({rank, 0.5f, a.data(), b.data()});
  std::vector<float> s(m * rank, NAN), y(m * n, NAN);
  fedms::int8_forward({weight.packed.data(), static_cast<int64_t>(weight.packed.size()),
                       weight.scale.empty() ? nullptr : weight.scale.data(), bias.data()},
                      lora, x.data(), s.data(), y.data());
  std::vector<double> want(m * n), want_s(m * rank);
  add_product(want, quantized_rows(x, m, k, weight.packed), weight.wide, m, n, k);
  add_product(want_s, wide(x), wide(a), m, rank, k);
  compare("s", s, want_s);
  std::vector<double> scaled = want_s;
  for (double& v : scaled) v *= 0.5;
  add_product(want, scaled, wide(b), m, n, rank);
  for (int i = 0; i < m * n; ++i) want[i] += bias[i % n];
  compare("y", y, want);
  if (group) return;

  const Weight transposed = int8_weight(k, n);
  std::vector<float> dx(m * k, NAN), da(rank * k, NAN), db(n * rank, NAN);
  fedms::LoraGradients out;
  out.dx = dx.data(), out.da = {da.data()}, out.db = {db.data()};
  fedms::int8_backward({transposed.packed.data(), static_cast<int64_t>(transposed.packed.size()),
                        transposed.scale.data(), nullptr},
                       lora, dy.data(), x.data(), s.data(), out);
  std::vector<double> want_dx(m * k), want_da(rank * k), want_db(n * rank), ds(m * rank);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < rank; ++j)
      for (int c = 0; c < n; ++c) ds[i * rank + j] += 0.5 * dy[i * n + c] * b[c * rank + j];
  add_product(want_dx, quantized_rows(dy, m, n, transposed.packed), transposed.wide, m, k, n);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < rank; ++j) {
      for (int c = 0; c < k; ++c) {
        want_dx[i * k + c] += ds[i * rank + j] * a[j * k + c];
        want_da[j * k + c] += ds[i * rank + j] * x[i * k + c];
      }
      for (int c = 0; c < n; ++c) want_db[c * rank + j] += dy[i * n + c] * scaled[i * rank + j];
    }
  }
  compare("dx", dx, want_dx);
  compare("da", da, want_da);
  compare("db", db, want_db);
}

double value_of(fedms::Fp16 v) {
  const int exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
  const double size = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return v.bits >> 15 ? -size : size;
}
double value_of(fedms::Bf16 v) {
  const int exponent = v.bits >> 7 & 255, mantissa = v.bits & 127;
  const double size = std::ldexp(exponent ? 128 + mantissa : mantissa, std::max(exponent, 1) - 134);
  return v.bits >> 15 ? -size : size;
}

template <class Half>
void check_half(int m, int n, int k, int mantissa_bits) {
  const std::vector<float> x = normal(m * k), bias = normal(n);
  std::vector<Half> weight(n * k);
  const int one = (mantissa_bits == 10 ? 15 : 127) << mantissa_bits;  // so that values lie around 1, subnormal ones apart
  for (Half& v : weight) {
    const int bits = between(0, 9) ? one + between(-(4 << mantissa_bits), 2 << mantissa_bits) : between(0, 1);
    v.bits = static_cast<uint16_t>(bits | between(0, 1) << 15);
  }
  std::vector<double> decoded, want(m * n);
  for (const Half v : weight) decoded.push_back(value_of(v));
  add_product(want, wide(x), decoded, m, n, k);
  for (int i = 0; i < m * n; ++i) want[i] += bias[i % n];
  std::vector<float> y(m * n, NAN);
  fedms::half_forward(m, n, k, x.data(), weight.data(), bias.data(), y.data());
  compare("y of 16 bits", y, want);
}

}  // namespace

int main(int count, char** names) {
  std::set<std::string> missing(names + 1, names + count);
  for (const fedms::Isa isa : fedms::ALL_ISAS) {
    if (!fedms::available(isa)) continue;
    missing.erase(fedms::name(isa));
    fedms::set_isa(fedms::name(isa));
    worst = 0;
    int cases = 0;
    for (int group : {0, 0, 32, 64}) {
      for (int i = 0; i < 12; ++i, ++cases) check(between(1, 60), between(1, 100), between(1, 200), between(1, 18), group);
      check(1, 1, 1, 1, group), check(25, 64, 128, 8, group), check(26, 40, 801, 3, group), cases += 3;
    }
    for (int i = 0; i < 12; ++i, cases += 2) {
      check_half<fedms::Fp16>(between(1, 20), between(1, 150), between(1, 200), 10);
      check_half<fedms::Bf16>(between(1, 20), between(1, 150), between(1, 200), 7);
    }
    std::printf("%s: %d cases, largest relative error %.1e\n", fedms::name(isa), cases, worst);
  }
  for (const std::string& name : missing) std::printf("%s is not available\n", name.c_str());
  return missing.empty() ? 0 : 1;
}
