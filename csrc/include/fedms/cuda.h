// The linear layer with gated LoRA experts on an NVIDIA GPU, in bf16 and fp16, from compute capability 8.0 on: the launches
// that a pass is made of (cuda_layer.h makes them). Forward: the experts side by side (join_experts), S = x A^T (shrink), and
// y = x W^T + T B^T + bias (gemm). Backward: one pass over dy for dB and U (lora_grad_partials), dS and dgate from U
// (finalize_row_grads), the GEMM again for dx, a pass over x for dA, and the sums of all gradients (reduce_partials). On compute
// capability 9.0 there are other ways: S, and backward dS and dgate, in a launch that overlaps the GEMM, and both gradients in
// one launch (lora_grad_strips); or S in the GEMM itself (GemmShrink).
//
// Pointers lead to memory of the device. A stride is the numbers from one row to the next; along a row they lie side by
// side, and rows start at multiples of 16 bytes. Nothing is allocated, nothing waits for the GPU, and nothing is read
// that a graph could not capture. The same inputs give the same bits on one kind of GPU: sums have a fixed order.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fedms::cuda {

// An error of CUDA; what() names the launch.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Element { bf16, fp16 };

struct Stream {
  int device;
  void* handle;  // a cudaStream_t
};

// The mask is philox_mask(seed, m, columns, p) of fedms_ext/reference.py, bit for bit; p = 0 drops nothing.
struct Dropout {
  double p = 0;
  uint64_t seed = 0;
  const int64_t* seed_at = nullptr;  // memory of the device, read as the kernel runs in the place of `seed`; null: `seed`
};

// The total rank R: the experts lie side by side.
struct Factors {
  const float* scale;    // (E,)
  const int32_t* expert;  // (R,), the number of each rank's expert; nobody looks at it in segments
  const float* gate;     // gate[i * row_stride + e * expert_stride]; null means 1
  int64_t row_stride, expert_stride;
};

// Rows in segments, each with one expert of its own; a count of 0: all rows take all experts. In segments the experts'
// ranks begin at multiples of 16 in a, b and f, whose numbers behind an expert's last rank, up to the next multiple of
// 16, are zeros; R is the largest rank, and s, t and ds have zeros behind that of a row's own expert.
constexpr int MOST_SEGMENTS = 8;
struct Segments {
  int count = 0;
  int32_t ends[MOST_SEGMENTS];    // the row where each one ends, and the next one begins
  int32_t ranks[MOST_SEGMENTS];   // of its expert; may be 0
  int32_t firsts[MOST_SEGMENTS];  // the expert's first rank in a, b and f
};

// What a device can do, as far as the choice of a tile needs it.
struct DeviceProperties {
  int capability;      // 80 is 8.0
  int multiprocessors;
  int shared_memory;   // bytes that a block may have
};

// How t is made for a gemm, on compute capability 9.0: by a launch of few blocks ahead of it, and the gemm starts while that runs
// and waits for it before it comes to the ranks (programmatic dependent launch); or `inside`, by the gemm itself. Forward it
// makes s and t from the gemm's x, as shrink does. For a gemm that is `transposed`, whose x is dy and whose t is ds, it makes ds
// = dy a with scale and gate, and dgate as RowGrads has it, from the s that is there. r is at least 1; without dropout and an
// int8 w; for the tiles and ranks of overlaps_shrink or, inside, of has_shrink_inside. A gemm that is transposed or has siblings
// has no shrink inside.
struct GemmShrink {
  const void* a = nullptr;  // (r, k), or (k, r) if the gemm is transposed; null: there is no such launch, t is there already
  int64_t a_stride = 0;
  void* s = nullptr;        // (m, r), dense; if the gemm is transposed it is read, for dgate alone
  float* dgate = nullptr;   // null: it is not wanted
  int experts = 0;
  Factors factors{};
  bool inside = false;
};

// The operands as the tensor memory accelerator sees them. It takes the driver a while to make them, so whoever calls again with
// the same addresses keeps them.
struct TensorMaps;
std::shared_ptr<TensorMaps> make_tensor_maps();

// One of several products that share an operand and run in one launch, those of layers that have the same input. `gemm` has their
// sum over n, or, if it is transposed, over k. The ranks of a sibling begin in t at a multiple of 16; where the numbers of the
// next one begin, b has zeros.
constexpr int MOST_SIBLINGS = 4;
struct GemmSibling {
  int64_t width;              // of its weight: n, or, transposed, k
  const void* w;
  int64_t w_stride;
  int first_rank, ranks;      // of its experts in t; ranks counts up to a multiple of 16
  int first_expert, experts;  // in the factors
  const void* b;              // (width, ranks): f, or, transposed, what the shrink that runs ahead multiplies x with
  int64_t b_stride;
  const void* bias;           // (width,) or null; not transposed
  void* y;                    // (m, width), dense; not transposed
  const void* x;              // (m, width); transposed
  int64_t x_stride;
};

// y (m, n), dense, = x w + t f + bias, in one fp32 accumulator. x is (m, k), t (m, r), and r may be 0. w and f are given
// as (n, k) and (n, r), or, with `transposed`, as (k, n) and (r, n): then dropout masks t f. k and n are multiples of 8.
// `w_scale` (n,) or null: w is int8, not transposed, with one scale a column of y; k is a multiple of 16. Dropout may mask t f
// there too.
//
// With siblings, one launch makes the y of all of them from one x and their parts of t; or, transposed, the one y = the sum of
// all x w, + t f, whose t the shrink that runs ahead makes from all x. For the tiles of wgmma; without segments.
struct Gemm {
  Element element;
  int64_t m, n, k, r;
  const void* x;
  int64_t x_stride;
  const void* w;
  int64_t w_stride;
  const float* w_scale;
  const void* bias;  // (n,) or null
  void* t;
  int64_t t_stride;
  const void* f;
  int64_t f_stride;
  void* y;
  bool transposed;
  Dropout dropout;
  Segments segments;
  GemmShrink shrink;
  TensorMaps* maps;  // kept from call to call, or null
  // In the place of w, f, bias and y, or, transposed, of x, w and the shrink's a; may be empty.
  std::vector<GemmSibling> siblings;
};

// The shrink that runs ahead of a product, alone.
void shrink_ahead(const Gemm& gemm, const DeviceProperties& chip, const Stream& stream);

// The numbers of the tiles that can run on the chip, the one that the cost model expects to be the fastest first. `full_tiles`:
// no segment is shorter than 128 rows.
std::vector<int> gemm_tiles(const DeviceProperties& chip, int64_t m, int64_t n, int64_t k, int64_t r, bool int8,
                            bool has_dropout, bool full_tiles);
std::string gemm_tile_name(int tile);
bool overlaps_shrink(int tile, int64_t r);
bool has_shrink_inside(int tile, int64_t r);
void gemm(const Gemm& gemm, int tile, const DeviceProperties& chip, const Stream& stream);

// s (m, r), dense, = drop(x) a^T with x (m, k) and a (r, k), and t (m, r) = s with scale and gate; zeros in t up to its
// stride. k is a multiple of 8.
struct Shrink {
  Element element;
  int64_t m, k, r;
  const void* x;
  int64_t x_stride;
  const void* a;
  int64_t a_stride;
  void* s;
  void* t;
  int64_t t_stride;
  Factors factors;
  Segments segments;
  Dropout dropout;
};
void shrink(const Shrink& shrink, const Stream& stream);

// t (m, r) from a dense s (m, r), as shrink makes it.
struct ScaleAndGate {
  Element element;
  int64_t m, r;
  const void* s;
  void* t;
  int64_t t_stride;
  Factors factors;
  Segments segments;
};
void apply_scale_and_gate(const ScaleAndGate& call, const Stream& stream);

// One pass over z (m, c), which is dy or x:
//   parts of drop(z)^T t, (splits, c, r), one of every `rows_a_split` rows of z, or of a segment, with t (m, r); and
//   parts of z b, (lora_grad_partials_blocks(c), m, r), one of every block of columns of z, with b (c, r).
// Null pointers (g, or u) leave either out. c is a multiple of 8, rows_a_split of 64.
struct LoraGradPartials {
  Element element;
  int64_t m, c, r, rows_a_split;
  const void* z;
  int64_t z_stride;
  const void* t;
  int64_t t_stride;
  float* g;
  const void* b;
  int64_t b_stride;
  float* u;
  Segments segments;
  Dropout dropout;
};
int64_t lora_grad_partials_blocks(int64_t c);
void lora_grad_partials(const LoraGradPartials& call, const Stream& stream);

// From the parts of u = dy B (parts, m, r): ds (m, r) = u with scale and gate (zeros up to its stride), and dgate
// (m, experts), or (m, 1) in segments, = scale * the sum of s * u over the ranks of an expert, with a dense s (m, r). Null
// leaves either out.
struct RowGrads {
  Element element;
  int64_t m, r, experts, parts;
  const float* u;
  const void* s;
  void* ds;
  int64_t ds_stride;
  float* dgate;
  Factors factors;
  Segments segments;
};
void finalize_row_grads(const RowGrads& call, const Stream& stream);

// Where an expert's columns first .. first + count - 1 of a sum (c, r) go: out[i * row_stride + j * column_stride], for i < c.
struct ExpertGrad {
  int32_t first, count;
  void* out;
  int64_t row_stride, column_stride;
};

// `to` = the sum over the parts, in order, of g (parts, c, r).
struct PartialSum {
  const float* g;
  int32_t c, parts;
  ExpertGrad to;

  // That of an expert's dA (rank, c) or dB (c, rank), whose ranks begin with `first`.
  static PartialSum of(const float* g, int64_t c, int64_t parts, int32_t first, int32_t rank, void* out, bool is_a) {
    // A sum is (c, rank): so lies dB, and dA the other way round.
    return {g, static_cast<int32_t>(c), static_cast<int32_t>(parts), {first, rank, out, is_a ? 1 : rank, is_a ? c : 1}};
  }
};
// All sums of a backward pass in one launch for every 32 of them; r is that of all, and the outputs are of the element's type
// or, with `fp32`, float.
void reduce_partials(Element element, bool fp32, int64_t r, const std::vector<PartialSum>& sums, const Stream& stream);

// z^T t over all rows, (c, r), with z (m, c) and t (m, r), of all sides in one launch: dB from dy and T, which siblings have one
// each of, and dA from x and dS. A block has 64 columns of a side, and of the rows, or those of a segment, `rows_a_split`, a
// multiple of 128. Sums over all rows go where `out` says; parts of splits and of segments are left to reduce_partials. For
// compute capability 9.0; r is 64 at most; without dropout.
struct LoraGradStrips {
  static constexpr int64_t MOST_OUTPUTS = 16;  // of dA, and of all sides of dB
  static constexpr int OF_DA = MOST_SIBLINGS, SIDES = MOST_SIBLINGS + 1;
  struct Side {
    const void* z;
    int64_t c, z_stride;          // c: a multiple of 8; 0 leaves the side out
    const void* t;
    float* parts;                 // (splits, c, r), or null
    std::vector<ExpertGrad> out;  // of the element's type or, with `fp32`, float; nobody looks at it if there are parts
  };
  Element element;
  bool fp32;
  int64_t m, r, rows_a_split, t_stride;
  Segments segments;
  Side sides[SIDES];  // of the dB of each sibling, the only one's first, and of dA
  TensorMaps* maps;   // kept from call to call, or null

  // Sets a side and, from the sums of its gradients, where they go; those of its parts, if it has parts, join what is `left`.
  void add(int number, Side side, const std::vector<PartialSum>& gradients, std::vector<PartialSum>& left) {
    if (side.parts) {
      left.insert(left.end(), gradients.begin(), gradients.end());
    } else {
      for (const PartialSum& sum : gradients) side.out.push_back(sum.to);
    }
    sides[number] = std::move(side);
  }
};
int64_t lora_grad_strips_blocks(int64_t c);
void lora_grad_strips(const LoraGradStrips& call, const Stream& stream);

// dx (m, k), dense, = dy w + ds a with ds = dy b with scale and gate, and parts of both gradients over the rows, (parts, k, r) of
// x^T ds and (parts, n, r) of dy^T t; reduce_partials adds them up. w is (n, k), a (r, k), b (n, r), t (m, r). For compute
// capability 9.0; r is from 1 to 32; n, k and what narrow_backward_parts says of them; without dropout, segments, and an int8 w.
// With dgate (m, experts), or null, the gate's gradient from a dense s (m, r), as finalize_row_grads makes it.
struct NarrowBackward {
  Element element;
  int64_t m, n, k, r;
  const void *dy, *x, *w, *a, *b, *t, *s;
  int64_t dy_stride, x_stride, w_stride, a_stride, b_stride, t_stride, experts;
  Factors factors;
  void* dx;
  float *dgate, *da_parts, *db_parts;
  TensorMaps* maps;  // kept from call to call, or null
};
// How many parts there are; 0 where it cannot run: n may not be much larger than k, whose tiles share the columns of dy.
int64_t narrow_backward_parts(const DeviceProperties& chip, int64_t m, int64_t n, int64_t k, int64_t r);
void narrow_backward(const NarrowBackward& call, const DeviceProperties& chip, const Stream& stream);

// An expert's A (rank, k) and B (n, rank) with any strides, of the element's type or float32. `first`: its first rank among
// all; `end`: where the next expert's begin, with zeros from `first` + rank on. Of siblings each B has `rows` rows of its own,
// from `first_row` on, and those of others nobody writes to.
struct Expert {
  const void* a;
  int64_t a_row_stride, a_column_stride;
  const void* b;
  int64_t b_row_stride, b_column_stride;
  int32_t rank, first, end, rows, first_row;
};
// The experts side by side, rounded to the element's type: a (ranks, k), dense, and b (n, ranks) and, where it is not null,
// a_t (k, ranks), whose rows are `pitch` numbers apart. The last expert's `end` may be the pitch: there are zeros up to it.
struct JoinExperts {
  Element element;
  bool fp32;  // the experts are
  int64_t n, k, ranks, pitch;
  void *a, *b, *a_t;
};
// In one launch for every 32 experts.
void join_experts(const JoinExperts& call, const std::vector<Expert>& experts, const Stream& stream);

// Throws if this device cannot run the kernels of this build.
void check_device(int device);

}  // namespace fedms::cuda
