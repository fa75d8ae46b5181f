// A linear layer whose frozen weight is int8, with the LoRA branch of lora.h in the same pass over the output:
//
//   y[i][c] = xs[i] * ws[c] * (sum over j of xq[i][j] * wq[c][j]) + bias[c] + (the LoRA branch of row i)[c]
//
// wq (n, k) int8 and ws (n,) are the weight, symmetric, one scale an output channel. x is quantized here, row by row,
// in T = int8_steps steps from low = min(x, 0) to high = max(x, 0), and 0 is a level: xs = high / T - low / T,
// zero = round(-low / xs), xq = min(round(x / xs), T - zero), where / xs is a product with 1 / xs and ties round to even.
// (Symmetric levels would lose a bit where a row has its outliers on one side.) The sums of products are exact. A row that
// holds an infinity or a NaN gives NaN; one with xs < INT8_TINY counts as zeros.
//
// T is 255, so that xq is a byte, where the CPU has a dot product of bytes. Where the products are of 16-bit values anyway
// (AVX2, portable) it is up to 4095 for an int8 weight, which costs nothing: after a LayerNorm one or two channels are many
// times as large as the others, and on MiniLM's activations 255 steps alone make an error of 1.40 %, the int8 weight alone
// one of 0.72 %, both 1.60 % (bench/accuracy/int8.py, also on what else would lessen it). Where xq is a byte, the simplest
// that reaches 1.3 % is to multiply the largest value of a row apart.
//
// A weight may be packed as rotated (QuaRot: Ashkboos et al., arXiv 2404.00456): then every block of so many values of a row of
// x is multiplied by the Hadamard matrix H of that size over the root of its size before the row is quantized, and wq and ws are
// of W H in place of W. H H = 1, so y is the same but for rounding, and a single large value is spread over its block. The LoRA
// branch sees x as it is. On SmolLM2 that takes four fifths of the error of int8 away (bench/accuracy/language.py).
//
// There is no GELU in the epilogue and no requantization for the next layer: bench/layers/bench_cpu_mlp.py bounds what they could
// gain, and finds nothing above its noise.
//
// All matrices are row-major and dense. The results are bitwise the same for any number of threads.
#pragma once

#include <cstdint>

#include "fedms/lora.h"

namespace fedms {

// 1 / INT8_TINY is still a float.
constexpr float INT8_TINY = 0x1p-100f;
// Sums of longer rows could leave 32 bits.
constexpr int64_t INT8_LONGEST = 65536;

// The size in bytes of a packed (n, k) weight, for the instruction set that is used now.
int64_t int8_packed_size(int64_t n, int64_t k);

// The steps T of the x that a packed weight of int8 or 4 bits is multiplied by: 4095, or half as many and so on, so that
// no sum leaves 32 bits, or 255.
// Throws as int8_unpack does.
int32_t int8_steps(const uint8_t* packed, int64_t packed_size);

// Packs wq for the instruction set that is used now. The multiplication keeps to the one that the weight was packed for.
// |wq| <= 127, k <= INT8_LONGEST. rotated: 0, or 4, 16 or 64 and a divisor of k.
void int8_pack(int64_t n, int64_t k, const int8_t* wq, int64_t rotated, uint8_t* packed);

// The inverse. int8_pack and int8_unpack throw std::invalid_argument where `packed` is not a packed (n, k) weight.
void int8_unpack(int64_t n, int64_t k, const uint8_t* packed, int64_t packed_size, int8_t* wq);

// A weight of 4 bits is stored as such and made int8 panel by panel, where it is used:
//
//   w[c][j] = levels[code[c][j]] * scale[c][j / group],   wq and ws of it as groups_as_int8 in fedms_ext/reference.py
//
// levels has 16 values, scale is (n, ceil(k / group)), group 32 or 64, and q (n, ceil(k / 2)) holds the code of an even j
// in the low nibble. nibbles_pack keeps what makes wq, not `scale`.
int64_t nibbles_packed_size(int64_t n, int64_t k, int64_t group);
void nibbles_pack(int64_t n, int64_t k, int64_t group, const float* levels, const uint8_t* q, const float* scale,
                  uint8_t* packed);
void nibbles_unpack(int64_t n, int64_t k, const uint8_t* packed, int64_t packed_size, uint8_t* q);
// w (n, k) as float, for the product that sums along n.
void nibbles_dequantize(int64_t n, int64_t k, int64_t group, const uint8_t* packed, int64_t packed_size,
                        const float* scale, float* w);

// dx (m, k) = dy (m, n) w, written, from a weight of 4 bits and its scale (n, groups) as nibbles_dequantize takes it. Each code
// is read once for up to nibbles_few_rows() rows; with more, a product of PyTorch's with a weight that was written out is faster.
int64_t nibbles_few_rows();
void nibbles_input_gradient(int64_t m, int64_t n, int64_t k, const uint8_t* packed, int64_t packed_size,
                            int64_t groups, const float* scale, const float* dy, float* dx);

// Packed by int8_pack or nibbles_pack.
struct Int8Weight {
  const uint8_t* packed;
  int64_t packed_size;
  const float* scale;  // ws; not looked at for a weight of 4 bits, which brings its own
  const float* bias;   // or null
};

// s (m, R) and y (m, n) are written. Throws as int8_unpack.
void int8_forward(const Int8Weight& weight, const Lora& lora, const float* x, float* s, float* y);

// Columns first .. first + count - 1 of y = x W^T + bias alone, as a dense (m, count). The bits are those of all columns
// together. first is a multiple of INT8_PANEL. Throws as int8_unpack.
constexpr int64_t INT8_PANEL = 192;  // a multiple of the panels of all kernels
void int8_columns(const Int8Weight& weight, int64_t m, int64_t n, int64_t k, const float* x, int64_t first, int64_t count,
                  float* y);

// The gradients of lora_backward, with the difference that out.dx is written: dx = dy W + its LoRA part. `transposed`
// is W^T (k, n), quantized apart from W and packed; it is not looked at where out.dx is null.
void int8_backward(const Int8Weight& transposed, const Lora& lora, const float* dy, const float* x, const float* s,
                   const LoraGradients& out);

// Layers that share x (m, k), such as the query, the key and the value of an attention layer: x is quantized once for those in a
// row whose weights were packed for the same levels, and dx is the sum over all of them. The bits of y and s are those of a layer
// by itself, and dx is the sum of the layers' dx in their order; where there is dropout, all products come first and then the
// LoRA parts.
struct Int8Layer {
  const Int8Weight& weight;
  const Lora& lora;
  float *s, *y;  // written
};
void int8_forward(const std::vector<Int8Layer>& layers, const float* x);

struct Int8LayerGradients {
  const Int8Weight& transposed;
  const Lora& lora;
  const float *dy, *s;
  const LoraGradients& out;  // its dx is not looked at
};
// dx (m, k) is written; null if it is not needed.
void int8_backward(const std::vector<Int8LayerGradients>& layers, const float* x, float* dx);

}  // namespace fedms
