// Linear layers with gated LoRA experts that share their input x, such as the query, key and value of an attention layer: one
// call a pass for all of them, and one GEMM. Forward: the experts side by side (join_experts), S of all from one pass over x
// (shrink), and every y in one launch (gemm). Backward: every dS, one launch for the dx that is the sum over the layers, and one
// for all dA and dB (lora_grad_strips), with the sums of its parts (reduce_partials) if there are any.
//
// For compute capability 9.0, without dropout, segments and int8, up to 64 ranks in all. cuda_layer.h is the same for one layer
// and has all of those; cuda.h has the launches.
#pragma once

#include <memory>
#include <vector>

#include "fedms/cuda.h"

namespace fedms::cuda {

struct GroupShape {
  struct Layer {
    int64_t n;
    std::vector<int> ranks;  // of each of its experts; at least one
  };
  Element element;    // of x, W, y, dy
  bool fp32_experts;  // A and B are float32, otherwise of the element's type
  int64_t m, k;       // x (m, k)
  std::vector<Layer> layers;
};

struct GroupLayer {
  const void* w;     // (n, k); backward null where no dx is wanted
  int64_t w_stride;
  const void* bias;  // forward: (n,) or null
  void* y;           // forward: (m, n), dense
  const void* dy;    // backward: (m, n)
  int64_t dy_stride;
};

// The experts of all layers are in order, those of the first layer first; so are the scales and the columns of the gate, (m,
// experts).
struct GroupForward {
  std::vector<GroupLayer> layers;
  std::vector<Expert> experts;  // their tensors and strides; the plan knows their ranks
  Factors factors;
  const void* x;
  int64_t x_stride;
  void* room;  // room_size() numbers of the element's type, which a backward pass of the call is given
};

// A gradient that is null is not needed. Then x may be null if no dA is needed.
struct GroupBackward {
  std::vector<GroupLayer> layers;
  Factors factors;
  const void* x;
  int64_t x_stride;
  void* room;
  void* dx;                   // (m, k), dense
  float* dgate;               // (m, experts)
  std::vector<void*> da, db;  // of each expert, dense and of its type
  void* workspace;            // workspace_size() numbers of the element's type
};

class GroupPlan {
 public:
  // Throws if the kernels cannot compute such layers together on the chip. `owners`: (rank(),) on the device, the numbers of the
  // ranks' experts, as `owners_of` has them.
  GroupPlan(const GroupShape& shape, const DeviceProperties& chip, const int32_t* owners);

  const GroupShape& shape() const { return shape_; }
  int64_t rank() const { return rank_; }  // of all layers, each of which begins at a multiple of 16
  int64_t experts() const { return static_cast<int64_t>(ranks_.size()); }
  // The numbers of the tiles that both GEMMs can run with, the one that the cost model expects to be the fastest first.
  const std::vector<int>& tiles() const { return tiles_; }
  int64_t room_size() const { return room_.size; }
  int64_t s_at() const { return room_.s; }                              // where S of all, (m, rank()), begins in the room
  const std::vector<int>& first_ranks() const { return layer_firsts_; }  // of each layer, and of the end
  int64_t workspace_size() const;

  void forward(const GroupForward& call, int tile, const Stream& stream) const;
  void backward(const GroupBackward& call, int tile, const Stream& stream) const;

 private:
  struct Room {
    int64_t t, a, b, s, size;  // where in the room things begin
  };
  struct Needs;

  Gemm product(void* room, const Factors& factors, const std::vector<GroupLayer>& layers, bool transposed,
               TensorMaps* maps) const;
  void compute_da_and_db(const GroupBackward& call, const Needs& needs, const void* ds, float* parts, const Stream& stream) const;
  int64_t splits(bool of_da, bool of_db) const;

  GroupShape shape_;
  DeviceProperties chip_;
  const int32_t* owners_;
  std::vector<int> ranks_, firsts_, layer_of_;  // of each expert: its rank, its first one, and its layer
  // Of each layer, and of the end: its first rank, expert and row of B.
  std::vector<int> layer_firsts_, first_experts_, first_rows_;
  std::vector<int> tiles_;
  int64_t n_, rank_;
  Room room_;
  std::shared_ptr<TensorMaps> forward_maps_ = make_tensor_maps(), backward_maps_ = make_tensor_maps();
};

// The number of the expert that each rank of a group belongs to, with the gaps in front of the next layer.
std::vector<int32_t> owners_of(const GroupShape& shape);

}  // namespace fedms::cuda
