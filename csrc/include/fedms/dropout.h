// The numbers behind a dropout mask, which is philox_mask of fedms_ext/reference.py, bit for bit: MASK_VERSION 2.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace fedms {

// Of the 2^16 values of a random number those below are dropped: p * 2^16, rounded. 0: nothing is dropped.
inline uint32_t dropout_threshold(double p) {
  return static_cast<uint32_t>(std::min(std::nearbyint(p * 65536.0), 65535.0));
}

// 1 over the probability that a value is kept.
inline float dropout_scale(double p) { return static_cast<float>(65536.0 / (65536.0 - dropout_threshold(p))); }

constexpr int PHILOX_ROUNDS = 7;
constexpr int PHILOX_VALUES = 8;  // of 16 bits that one call makes

}  // namespace fedms
