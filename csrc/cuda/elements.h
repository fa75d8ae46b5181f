// bf16 and fp16 as bits, and their conversions, the same on both sides of the bus.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef FEDMS_HD
#define FEDMS_HD __host__ __device__ __forceinline__
#endif

namespace fedms::cuda {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

struct alignas(16) Words {
  uint32_t word[4];
};

struct alignas(8) Pair {
  float low, high;
};

FEDMS_HD float float_of_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}
FEDMS_HD uint32_t bits_of_float(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#endif
}

// Four floats as they travel through shared memory.
FEDMS_HD Words words_of(const float (&value)[4]) {
  return {{bits_of_float(value[0]), bits_of_float(value[1]), bits_of_float(value[2]), bits_of_float(value[3])}};
}
FEDMS_HD void add_words(float (&sum)[4], const Words& words) {
  for (int i = 0; i < 4; ++i) sum[i] += float_of_bits(words.word[i]);
}

template <class T>
struct Number;

template <>
struct Number<Bf16> {
  static constexpr bool is_bf16 = true;
  static FEDMS_HD float widen(Bf16 value) { return float_of_bits(uint32_t(value.bits) << 16); }
  static FEDMS_HD uint16_t narrow(float value) {
#ifdef __CUDA_ARCH__
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    const uint32_t bits = bits_of_float(value);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;                      // NaN
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);  // ties to even
#endif
  }
};

template <>
struct Number<Fp16> {
  static constexpr bool is_bf16 = false;
  static FEDMS_HD float widen(Fp16 value) {
#ifdef __CUDA_ARCH__
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#else
    _Float16 half;
    std::memcpy(&half, &value.bits, 2);
    return static_cast<float>(half);
#endif
  }
  static FEDMS_HD uint16_t narrow(float value) {
#ifdef __CUDA_ARCH__
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
#endif
  }
};

// Two numbers in one register, the first one in the low half.
template <class T>
FEDMS_HD uint32_t pack(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t packed;
  if constexpr (Number<T>::is_bf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
#else
  return Number<T>::narrow(low) | uint32_t(Number<T>::narrow(high)) << 16;
#endif
}

// Two int8, the first one in the low byte, as two numbers: exact, since 8 bits fit into either significand. A byte b
// with its sign bit turned over is b + 128 without a sign; in the last byte of 2^23 as a float it is 2^23 + 128 + b.
template <class T>
FEDMS_HD uint32_t widen_int8(uint32_t two) {
  const uint32_t turned = two ^ 0x8080;
  const float low = float_of_bits(0x4B000000 | (turned & 0xFF)) - 8388736.0f;
  const float high = float_of_bits(0x4B000000 | (turned >> 8 & 0xFF)) - 8388736.0f;
  return pack<T>(low, high);
}

}  // namespace fedms::cuda
