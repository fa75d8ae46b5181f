// A linear layer with gated LoRA experts on an NVIDIA GPU, one call a pass. A plan is made once for all calls of a shape; cuda.h
// has the launches that it is made of, what pointers and strides are, and what is true of all of them.
#pragma once

#include <memory>
#include <vector>

#include "fedms/cuda.h"

namespace fedms::cuda {

struct LayerShape {
  Element element;         // of x, y, dy, s, and of a W that is not int8
  bool fp32_experts;       // A and B are float32, otherwise of the element's type
  bool int8;               // W is
  int64_t m, n, k;         // x (m, k), y (m, n)
  std::vector<int> ranks;  // of each expert, R in all
  std::vector<int> rows;   // of each expert, one after the other; empty: every row takes all experts
};

// Where T, or dS, is made for a GEMM: in a launch before it, in one that overlaps it (overlaps_shrink), or in the GEMM itself
// (has_shrink_inside). Backward the last one is narrow_backward, if dx, dA and dB are needed and dgate is not, outside of
// segments; otherwise it is as apart.
enum class ShrinkPlace { apart, overlapped, inside };

// How a GEMM runs: the number of its tile, and where T, or dS, is made. Where that overlaps it in a backward pass, dA and dB are
// made in strips.
struct GemmChoice {
  int tile = 0;
  ShrinkPlace shrink = ShrinkPlace::apart;
};

// What both passes read. `t` and `joined` are room for LayerPlan::t_size() and joined_size() numbers of the element's type: the
// forward pass writes T and the experts side by side there, and a backward pass that gets them need not make them again.
struct LayerOperands {
  const void* w;           // (n, k); an int8 one backward (k, n)
  int64_t w_stride;
  const float* w_scale;    // of an int8 W, one for each of its rows; otherwise null
  std::vector<Expert> experts;  // their tensors and strides; the plan knows their ranks
  Factors factors;
  Dropout dropout;
  void *t, *joined;
};

struct LayerForward {
  LayerOperands of;
  const void* x;
  int64_t x_stride;
  const void* bias;  // (n,) or null
  void *y, *s;       // (m, n) and (m, rank()), dense
};

// A gradient that is null is not needed. Then x may be null if no dA is needed, and s if neither dgate nor a dB is.
struct LayerBackward {
  LayerOperands of;
  bool room_is_filled;  // of.t and of.joined: the forward pass wrote them
  const void* dy;
  int64_t dy_stride;
  const void* x;
  int64_t x_stride;
  const void* s;
  void* dx;                   // (m, k), dense
  float* dgate;               // (m, experts), or (m, 1) in segments
  std::vector<void*> da, db;  // of each expert, dense and of its type
  void* workspace;            // workspace_size() numbers of the element's type
};

// Which gradients are needed: of x, the gate, any A and any B.
struct Needs {
  bool dx, dgate, da, db;
};

class LayerPlan {
 public:
  // `owner`: (R,) on the device, the number of each rank's expert; see Factors.
  LayerPlan(const LayerShape& shape, const DeviceProperties& chip, const int32_t* owner);

  const LayerShape& shape() const { return shape_; }
  int64_t rank() const { return rank_; }
  int64_t t_size() const;
  int64_t joined_size() const;  // 0: the only expert is read where it is, its rows at multiples of 16 bytes
  int64_t workspace_size(const Needs& needs, const GemmChoice& choice) const;

  void forward(const LayerForward& call, const GemmChoice& choice, const Stream& stream) const;
  void backward(const LayerBackward& call, const GemmChoice& choice, const Stream& stream) const;

 private:
  struct Side;
  struct Joined;
  struct Workspace;

  Factors factors(const LayerOperands& of) const;
  Joined joined(const LayerOperands& of) const;
  void join(const LayerOperands& of, const Stream& stream) const;
  Gemm gemm(const LayerOperands& of, const std::shared_ptr<TensorMaps>& maps) const;
  Side side(int64_t columns) const;
  std::vector<int> splits_of(int64_t rows_a_split) const;
  Workspace workspace(const Needs& needs, const GemmChoice& choice) const;
  LoraGradPartials partials(const Side& side, const void* z, int64_t z_stride, const void* t, float* g) const;
  void compute_dx(const LayerBackward& call, void* ds, const GemmChoice& choice, const Stream& stream) const;
  bool runs_inside(const Needs& needs, const GemmChoice& choice) const;
  void narrow_backward(const LayerBackward& call, float* da_parts, float* db_parts, const Stream& stream) const;
  bool runs_in_strips(const Needs& needs, const GemmChoice& choice) const;
  Side strips(int64_t columns, const Needs& needs) const;
  Side inside(int64_t columns) const;
  bool needs_parts(const Side& strips) const;
  void compute_da_and_db(const LayerBackward& call, const Needs& needs, const void* ds, float* da_parts, float* db_parts,
                         const Stream& stream) const;
  void add_sums(std::vector<PartialSum>& sums, const Side& side, const float* parts, const std::vector<void*>& out,
                bool is_a) const;

  LayerShape shape_;
  DeviceProperties chip_;
  const int32_t* owner_;
  Segments segments_;
  std::vector<int> firsts_;           // the first rank of each expert, side by side
  int64_t ranks_, rank_, pitch_, t_pitch_;  // ranks with the gaps between experts; columns of S; of rows of B and of T
  std::shared_ptr<TensorMaps> forward_maps_ = make_tensor_maps(), backward_maps_ = make_tensor_maps();
};

}  // namespace fedms::cuda
