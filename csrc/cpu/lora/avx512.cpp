// AVX-512 (F, DQ, BW, VL): 16 lanes, 32 registers.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace fedms {
namespace {

#include "avx512.inc"

constexpr int DOTS_M = 3, DOTS_R = 8;
constexpr int EXPAND_M = 6, EXPAND_V = 4;
constexpr int REDUCE_R = 8, REDUCE_V = 3;

#include "kernels.inc"

}  // namespace

const LoraKernels lora_avx512 = {dots<float>, dots<Fp16>, dots<Bf16>, expand, reduce, expand_few, dots_few, outer_few,
                                   dropout};

}  // namespace fedms
