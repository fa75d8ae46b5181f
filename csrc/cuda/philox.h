// The dropout mask of fedms_ext.philox_mask, bit for bit: drawn again wherever it is needed, never stored.
#pragma once

#include "fedms/cuda.h"
#include "fedms/dropout.h"
#include "device.h"

namespace fedms::cuda {

struct Mask {
  uint64_t seed;
  const int64_t* seed_at;  // in the device's memory, or null: see Dropout
  uint32_t threshold;  // dropout_threshold(p); 0: nothing is dropped
  float kept_scale;    // dropout_scale(p)

  FEDMS_HD bool has_dropout() const { return threshold != 0; }
  // The mask as a kernel draws it: with the seed that lies in memory now, so that each replay of a graph has its own.
  FEDMS_HD Mask with_seed() const {
    return {threshold != 0 && seed_at ? static_cast<uint64_t>(*seed_at) : seed, nullptr, threshold, kept_scale};
  }
};

inline Mask mask_of(const Dropout& dropout) {
  return {dropout.seed, dropout.seed_at, dropout_threshold(dropout.p), dropout_scale(dropout.p)};
}

// Philox4x32-7 (Salmon et al., SC 2011): the random numbers of the values 8 * octet .. 8 * octet + 7, two a word.
FEDMS_HD Words philox_of_octet(const Mask& mask, uint64_t octet) {
  uint32_t c0 = uint32_t(octet), c1 = uint32_t(octet >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(mask.seed), k1 = uint32_t(mask.seed >> 32);
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    const uint64_t p0 = uint64_t(c0) * 0xD2511F53, p1 = uint64_t(c2) * 0xCD9E8D57;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// All bits of the half of a word that belongs to a kept value: the lower half is the first of the two.
FEDMS_HD uint32_t kept_halves(const Mask& mask, uint32_t word) {
  return ((word & 0xFFFF) >= mask.threshold ? 0x0000FFFFu : 0) | (word >> 16 >= mask.threshold ? 0xFFFF0000u : 0);
}

// The same of the values `first` and first + 1, an even number.
FEDMS_HD uint32_t kept_of_pair(const Mask& mask, uint64_t first) {
  const Words words = philox_of_octet(mask, first / 8);
  const uint32_t low = first & 2 ? words.word[1] : words.word[0], high = first & 2 ? words.word[3] : words.word[2];
  return kept_halves(mask, first & 4 ? high : low);
}

// Sets the dropped ones of eight numbers of 16 bits to zero. `first` is the index of the first, a multiple of 8.
FEDMS_HD void drop_eight(const Mask& mask, uint64_t first, Words& eight) {
  const Words words = philox_of_octet(mask, first / 8);
  for (int pair = 0; pair < 4; ++pair) eight.word[pair] &= kept_halves(mask, words.word[pair]);
}

}  // namespace fedms::cuda
