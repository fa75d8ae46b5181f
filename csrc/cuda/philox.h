// The dropout mask of fedms_ext.philox_mask, bit for bit: drawn again wherever it is needed, never stored.
#pragma once

#include "fedms/cuda.h"
#include "device.h"

namespace fedms::cuda {

struct Mask {
  uint64_t seed;
  const int64_t* seed_at;  // in the device's memory, or null: see Dropout
  uint32_t threshold;  // floor(p * 2^32); 0: nothing is dropped
  float kept_scale;    // 1 / (1 - p)

  FEDMS_HD bool has_dropout() const { return threshold != 0; }
  // The mask as a kernel draws it: with the seed that lies in memory now, so that each replay of a graph has its own.
  FEDMS_HD Mask with_seed() const {
    return {threshold != 0 && seed_at ? static_cast<uint64_t>(*seed_at) : seed, nullptr, threshold, kept_scale};
  }
};

inline Mask mask_of(const Dropout& dropout) {
  return {dropout.seed, dropout.seed_at, static_cast<uint32_t>(dropout.p * 4294967296.0), static_cast<float>(1 / (1 - dropout.p))};
}

// One bit for each of the values 4 * quad .. 4 * quad + 3: 1 if it is kept.
FEDMS_HD uint32_t kept_of_quad(const Mask& mask, uint64_t quad) {
  uint32_t c0 = uint32_t(quad), c1 = uint32_t(quad >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(mask.seed), k1 = uint32_t(mask.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(c0) * 0xD2511F53, p1 = uint64_t(c2) * 0xCD9E8D57;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  const uint32_t t = mask.threshold;
  return uint32_t(c0 >= t) | uint32_t(c1 >= t) << 1 | uint32_t(c2 >= t) << 2 | uint32_t(c3 >= t) << 3;
}

// Sets the dropped ones of eight numbers of 16 bits to zero. `first` is the index of the first, a multiple of 8.
FEDMS_HD void drop_eight(const Mask& mask, uint64_t first, Words& eight) {
  for (int half = 0; half < 2; ++half) {
    const uint32_t kept = kept_of_quad(mask, first / 4 + half);
    for (int pair = 0; pair < 2; ++pair) {
      const uint32_t bits = kept >> (2 * pair);
      eight.word[2 * half + pair] &= (bits & 1 ? 0x0000FFFFu : 0) | (bits & 2 ? 0xFFFF0000u : 0);
    }
  }
}

}  // namespace fedms::cuda
