// The passes of layers that share their input: which launches, and where their operands lie.
#include "fedms/cuda_group.h"

#include <algorithm>
#include <utility>

namespace fedms::cuda {
namespace {

int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Numbers of 16 bits at a place in some room.
void* after(void* room, int64_t numbers) { return static_cast<uint16_t*>(room) + numbers; }

bool any(const std::vector<void*>& all) {
  return std::any_of(all.begin(), all.end(), [](void* one) { return one != nullptr; });
}

}  // namespace

struct GroupPlan::Needs {
  bool da, db;
};

std::vector<int32_t> owners_of(const GroupShape& shape) {
  std::vector<int32_t> owners;
  int32_t expert = 0;
  for (const GroupShape::Layer& layer : shape.layers) {
    for (int rank : layer.ranks) owners.insert(owners.end(), rank, expert++);
    owners.resize(rounded_up(static_cast<int64_t>(owners.size()), 16), expert - 1);
  }
  return owners;
}

GroupPlan::GroupPlan(const GroupShape& shape, const DeviceProperties& chip, const int32_t* owners)
    : shape_(shape), chip_(chip), owners_(owners) {
  if (shape.layers.size() < 2 || shape.layers.size() > MOST_SIBLINGS) throw Error("a group is of 2 to 4 layers");
  int first = 0, row = 0;
  for (const GroupShape::Layer& layer : shape.layers) {
    if (layer.ranks.empty() || *std::min_element(layer.ranks.begin(), layer.ranks.end()) < 1) {
      throw Error("each layer of a group has experts, of rank 1 or more");
    }
    layer_firsts_.push_back(first);
    first_experts_.push_back(static_cast<int>(ranks_.size()));
    first_rows_.push_back(row);
    for (int rank : layer.ranks) {
      layer_of_.push_back(static_cast<int>(layer_firsts_.size()) - 1);
      ranks_.push_back(rank);
      firsts_.push_back(first);
      first += rank;
    }
    first = static_cast<int>(rounded_up(first, 16));
    row += static_cast<int>(layer.n);
  }
  layer_firsts_.push_back(first);
  first_experts_.push_back(static_cast<int>(ranks_.size()));
  first_rows_.push_back(row);
  n_ = row;
  rank_ = first;
  for (int tile : gemm_tiles(chip, shape.m, n_, shape.k, rank_, false, false, true)) {
    if (overlaps_shrink(tile, rank_)) tiles_.push_back(tile);
  }
  if (tiles_.empty()) {
    throw Error("a group needs wgmma, and 64 ranks at most, each layer's rounded up to a multiple of 16; these have " +
                std::to_string(rank_));
  }
  const auto place = [&](int64_t numbers) { return std::exchange(room_.size, room_.size + rounded_up(numbers, 128)); };
  room_.size = 0;
  room_.t = place(shape.m * rank_);
  room_.a = place(rank_ * shape.k);
  room_.b = place(n_ * rank_);
  room_.s = place(shape.m * rank_);
}

Gemm GroupPlan::product(void* room, const Factors& factors, const std::vector<GroupLayer>& layers, bool transposed,
                        TensorMaps* maps) const {
  Gemm call{};
  call.element = shape_.element;
  call.m = shape_.m;
  call.n = transposed ? shape_.k : n_;
  call.k = transposed ? n_ : shape_.k;
  call.r = rank_;
  call.t_stride = rank_;
  call.transposed = transposed;
  call.maps = maps;
  call.shrink.s = after(room, room_.s);
  call.shrink.experts = static_cast<int>(experts());
  call.shrink.factors = factors;
  call.shrink.factors.expert = owners_;
  for (size_t i = 0; i < layers.size(); ++i) {
    const GroupLayer& layer = layers[i];
    const int first = layer_firsts_[i], expert = first_experts_[i];
    call.siblings.push_back({shape_.layers[i].n, layer.w, layer.w_stride, first, layer_firsts_[i + 1] - first, expert,
                             first_experts_[i + 1] - expert, after(room, room_.b + first_rows_[i] * rank_ + first), rank_,
                             layer.bias, layer.y, layer.dy, layer.dy_stride});
  }
  return call;
}

void GroupPlan::forward(const GroupForward& call, int tile, const Stream& stream) const {
  std::vector<Expert> experts = call.experts;
  for (size_t e = 0; e < experts.size(); ++e) {
    const int layer = layer_of_[e];
    const bool last = e + 1 == experts.size() || layer_of_[e + 1] != layer;
    experts[e].rank = ranks_[e];
    experts[e].first = firsts_[e];
    experts[e].end = last ? layer_firsts_[layer + 1] : firsts_[e + 1];
    experts[e].rows = static_cast<int32_t>(shape_.layers[layer].n);
    experts[e].first_row = first_rows_[layer];
  }
  void* const a = after(call.room, room_.a);
  join_experts({shape_.element, shape_.fp32_experts, n_, shape_.k, rank_, rank_, a, after(call.room, room_.b), nullptr},
               experts, stream);
  Gemm ys = product(call.room, call.factors, call.layers, false, forward_maps_.get());
  ys.x = call.x;
  ys.x_stride = call.x_stride;
  ys.t = after(call.room, room_.t);
  ys.shrink.a = a;
  ys.shrink.a_stride = shape_.k;
  gemm(ys, tile, chip_, stream);
}

int64_t GroupPlan::splits(bool of_da, bool of_db) const {
  int64_t strips = of_da ? lora_grad_strips_blocks(shape_.k) : 0;
  for (const GroupShape::Layer& layer : shape_.layers) strips += of_db ? lora_grad_strips_blocks(layer.n) : 0;
  const int64_t wanted = std::max<int64_t>(1, chip_.multiprocessors / std::max<int64_t>(1, strips));
  const int64_t rows = rounded_up((shape_.m + wanted - 1) / wanted, 128);
  return (shape_.m + rows - 1) / rows;
}

int64_t GroupPlan::workspace_size() const {
  const int64_t most = std::max({splits(true, true), splits(true, false), splits(false, true)});
  return rounded_up(shape_.m * rank_, 128) + 2 * most * (n_ + shape_.k) * rank_;
}

void GroupPlan::backward(const GroupBackward& call, int tile, const Stream& stream) const {
  void* const ds = call.workspace;
  Gemm dx = product(call.room, call.factors, call.layers, true, backward_maps_.get());
  dx.f = after(call.room, room_.a);
  dx.f_stride = shape_.k;
  dx.t = ds;
  dx.y = call.dx;
  dx.shrink.dgate = call.dgate;
  const Needs needs{any(call.da), any(call.db)};
  if (call.dx) {
    gemm(dx, tile, chip_, stream);
  } else if (call.dgate || needs.da) {
    shrink_ahead(dx, chip_, stream);
  }
  if (needs.da || needs.db) {
    float* const parts = static_cast<float*>(after(call.workspace, rounded_up(shape_.m * rank_, 128)));
    compute_da_and_db(call, needs, ds, parts, stream);
  }
}

void GroupPlan::compute_da_and_db(const GroupBackward& call, const Needs& needs, const void* ds, float* parts,
                                  const Stream& stream) const {
  const int64_t count = splits(needs.da, needs.db);
  const bool in_parts = count > 1 || experts() > LoraGradStrips::MOST_OUTPUTS;
  LoraGradStrips pass{};
  pass.element = shape_.element;
  pass.fp32 = shape_.fp32_experts;
  pass.m = shape_.m;
  pass.r = rank_;
  pass.t_stride = rank_;
  pass.rows_a_split = rounded_up((shape_.m + count - 1) / count, 128);
  pass.maps = backward_maps_.get();
  std::vector<PartialSum> sums;
  const auto add = [&](int number, int64_t columns, const void* z, int64_t z_stride, const void* t, const std::vector<void*>& out,
                       int first, int end) {
    std::vector<PartialSum> gradients;
    for (int e = first; e < end; ++e) {
      const bool is_a = number == LoraGradStrips::OF_DA;
      if (out[e]) gradients.push_back(PartialSum::of(parts, columns, count, firsts_[e], ranks_[e], out[e], is_a));
    }
    pass.add(number, {z, columns, z_stride, t, in_parts ? parts : nullptr, {}}, gradients, sums);
    if (in_parts) parts += count * columns * rank_;
  };
  for (size_t i = 0; needs.db && i < call.layers.size(); ++i) {
    const GroupLayer& layer = call.layers[i];
    add(static_cast<int>(i), shape_.layers[i].n, layer.dy, layer.dy_stride, after(call.room, room_.t), call.db, first_experts_[i],
        first_experts_[i + 1]);
  }
  if (needs.da) add(LoraGradStrips::OF_DA, shape_.k, call.x, call.x_stride, ds, call.da, 0, static_cast<int>(experts()));
  lora_grad_strips(pass, stream);
  reduce_partials(shape_.element, shape_.fp32_experts, rank_, sums, stream);
}

}  // namespace fedms::cuda
