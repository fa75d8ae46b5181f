// The passes of a layer: which launches, in which order, and where their operands lie.
#include "fedms/cuda_layer.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace fedms::cuda {
namespace {

int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Numbers of 16 bits at a place in some room.
void* after(void* room, int64_t numbers) { return static_cast<uint16_t*>(room) + numbers; }

}  // namespace

// How one pass over dy or x is split along its rows for partial sums.
struct LayerPlan::Side {
  int64_t columns, blocks, rows_a_split;
  std::vector<int> splits;  // of each expert in segments, otherwise of all rows together

  int64_t parts() const { return std::accumulate(splits.begin(), splits.end(), int64_t(0)); }
};

// The experts side by side, in the room that they were joined in, or the only expert where it is.
struct LayerPlan::Joined {
  const void *a, *b, *a_t;
  int64_t a_stride, b_stride;
};

// Where in a workspace things begin, in numbers of 16 bits; each at a multiple of 256 bytes.
struct LayerPlan::Workspace {
  int64_t size = 0, u = -1, ds = -1, db_parts = -1, da_parts = -1;

  int64_t add(int64_t numbers) { return std::exchange(size, size + rounded_up(numbers, 128)); }
};

LayerPlan::LayerPlan(const LayerShape& shape, const DeviceProperties& chip, const int32_t* owner)
    : shape_(shape), chip_(chip), owner_(owner) {
  const bool in_segments = !shape.rows.empty();
  if (shape.ranks.empty() || (in_segments && shape.rows.size() != shape.ranks.size()) || shape.rows.size() > MOST_SEGMENTS) {
    throw Error("a plan needs experts, as many as segments if there are any, and 8 segments at most");
  }
  segments_.count = static_cast<int>(shape.rows.size());
  int first = 0, end = 0;
  for (size_t e = 0; e < shape.ranks.size(); ++e) {
    firsts_.push_back(first);
    first += in_segments ? static_cast<int>(rounded_up(shape.ranks[e], 16)) : shape.ranks[e];
    if (!in_segments) continue;
    segments_.ends[e] = end += shape.rows[e];
    segments_.ranks[e] = shape.ranks[e];
    segments_.firsts[e] = firsts_[e];
  }
  ranks_ = first;
  rank_ = in_segments ? *std::max_element(shape.ranks.begin(), shape.ranks.end()) : ranks_;
  pitch_ = rounded_up(ranks_, 8);
  t_pitch_ = rounded_up(rank_, 8);
}

int64_t LayerPlan::t_size() const { return shape_.m * t_pitch_; }

int64_t LayerPlan::joined_size() const {
  const bool in_place = shape_.ranks.size() == 1 && segments_.count == 0 && !shape_.fp32_experts && !shape_.int8 &&
                        ranks_ % 8 == 0;
  return in_place ? 0 : ranks_ * shape_.k + (shape_.n + (shape_.int8 ? shape_.k : 0)) * pitch_;
}

LayerPlan::Joined LayerPlan::joined(const LayerOperands& of) const {
  if (joined_size() == 0) {
    const Expert& only = of.experts[0];
    return {only.a, only.b, nullptr, only.a_row_stride, only.b_row_stride};
  }
  void* const b = after(of.joined, ranks_ * shape_.k);
  return {of.joined, b, shape_.int8 ? after(b, shape_.n * pitch_) : nullptr, shape_.k, pitch_};
}

void LayerPlan::join(const LayerOperands& of, const Stream& stream) const {
  if (joined_size() == 0) return;
  std::vector<Expert> experts = of.experts;
  for (size_t e = 0; e < experts.size(); ++e) {
    experts[e].rank = shape_.ranks[e];
    experts[e].first = firsts_[e];
    experts[e].end = e + 1 < experts.size() ? firsts_[e + 1] : static_cast<int32_t>(pitch_);
    experts[e].rows = static_cast<int32_t>(shape_.n);
  }
  const Joined to = joined(of);
  join_experts({shape_.element, shape_.fp32_experts, shape_.n, shape_.k, ranks_, pitch_, const_cast<void*>(to.a),
                const_cast<void*>(to.b), const_cast<void*>(to.a_t)},
               experts, stream);
}

Factors LayerPlan::factors(const LayerOperands& of) const {
  Factors factors = of.factors;
  factors.expert = owner_;
  return factors;
}

Gemm LayerPlan::gemm(const LayerOperands& of, const std::shared_ptr<TensorMaps>& maps) const {
  Gemm call{};
  call.element = shape_.element;
  call.m = shape_.m;
  call.r = rank_;
  call.w = of.w;
  call.w_stride = of.w_stride;
  call.w_scale = of.w_scale;
  call.t_stride = t_pitch_;
  call.segments = segments_;
  call.maps = maps.get();
  return call;
}

void LayerPlan::forward(const LayerForward& call, const GemmChoice& choice, const Stream& stream) const {
  const LayerOperands& of = call.of;
  join(of, stream);
  const Joined experts = joined(of);
  Gemm product = gemm(of, forward_maps_);
  product.n = shape_.n;
  product.k = shape_.k;
  product.x = call.x;
  product.x_stride = call.x_stride;
  product.bias = call.bias;
  product.t = of.t;
  product.f = experts.b;
  product.f_stride = experts.b_stride;
  product.y = call.y;
  if (choice.shrink != ShrinkPlace::apart) {
    product.shrink = {experts.a, experts.a_stride, call.s, nullptr, 0, factors(of), choice.shrink == ShrinkPlace::inside};
  } else {
    shrink({shape_.element, shape_.m, shape_.k, rank_, call.x, call.x_stride, experts.a, experts.a_stride, call.s, of.t, t_pitch_,
            factors(of), segments_, of.dropout},
           stream);
  }
  cuda::gemm(product, choice.tile, chip_, stream);
}

LayerPlan::Side LayerPlan::side(int64_t columns) const {
  // Two blocks of threads for each multiprocessor, as far as the columns and the ranks do not make them already.
  const int64_t blocks = lora_grad_partials_blocks(columns), each = blocks * (rounded_up(rank_, 32) / 32);
  const int64_t splits = std::max<int64_t>(1, 2 * chip_.multiprocessors / each);
  const int64_t rows_a_split = rounded_up(shape_.m, 64 * splits) / splits;
  return {columns, blocks, rows_a_split, splits_of(rows_a_split)};
}

std::vector<int> LayerPlan::splits_of(int64_t rows_a_split) const {
  const auto of = [&](int64_t rows) { return static_cast<int>((rows + rows_a_split - 1) / rows_a_split); };
  if (segments_.count == 0) return {of(shape_.m)};
  std::vector<int> splits;
  for (int64_t rows : shape_.rows) splits.push_back(of(rows));
  return splits;
}

bool LayerPlan::runs_in_strips(const Needs& needs, const GemmChoice& choice) const {
  return needs.dx && choice.shrink == ShrinkPlace::overlapped;
}

bool LayerPlan::runs_inside(const Needs& needs, const GemmChoice& choice) const {
  return choice.shrink == ShrinkPlace::inside && needs.dx && needs.da && needs.db && segments_.count == 0 &&
         narrow_backward_parts(chip_, shape_.m, shape_.n, shape_.k, rank_) > 0;
}

LayerPlan::Side LayerPlan::strips(int64_t columns, const Needs& needs) const {
  const int64_t blocks = lora_grad_strips_blocks(columns);
  const int64_t all = (needs.db ? lora_grad_strips_blocks(shape_.n) : 0) + (needs.da ? lora_grad_strips_blocks(shape_.k) : 0);
  // As many splits as there are multiprocessors for the strips of both sides.
  const int64_t splits = std::max<int64_t>(1, chip_.multiprocessors / all);
  const int64_t rows_a_split = rounded_up((shape_.m + splits - 1) / splits, 128);
  return {columns, blocks, rows_a_split, splits_of(rows_a_split)};
}

LayerPlan::Side LayerPlan::inside(int64_t columns) const {
  return {columns, 0, 0, {static_cast<int>(narrow_backward_parts(chip_, shape_.m, shape_.n, shape_.k, rank_))}};
}

bool LayerPlan::needs_parts(const Side& strips) const {
  return segments_.count > 0 || strips.parts() > 1 || static_cast<int64_t>(shape_.ranks.size()) > LoraGradStrips::MOST_OUTPUTS;
}

LayerPlan::Workspace LayerPlan::workspace(const Needs& needs, const GemmChoice& choice) const {
  Workspace at;
  const auto parts = [&](const Side& side) { return at.add(2 * side.parts() * side.columns * rank_); };
  if (runs_inside(needs, choice)) {
    at.db_parts = parts(inside(shape_.n));
    at.da_parts = parts(inside(shape_.k));
    return at;
  }
  if (needs.dx || needs.da) at.ds = at.add(shape_.m * t_pitch_);
  if ((needs.dx || needs.da || needs.dgate) && !runs_in_strips(needs, choice)) {
    at.u = at.add(2 * lora_grad_partials_blocks(shape_.n) * shape_.m * rank_);
  }
  const auto add_parts = [&](int64_t columns) {
    if (!runs_in_strips(needs, choice)) return parts(side(columns));
    const Side in_strips = strips(columns, needs);
    return needs_parts(in_strips) ? parts(in_strips) : -1;
  };
  if (needs.db) at.db_parts = add_parts(shape_.n);
  if (needs.da) at.da_parts = add_parts(shape_.k);
  return at;
}

int64_t LayerPlan::workspace_size(const Needs& needs, const GemmChoice& choice) const { return workspace(needs, choice).size; }

void LayerPlan::add_sums(std::vector<PartialSum>& sums, const Side& side, const float* parts, const std::vector<void*>& out,
                         bool is_a) const {
  for (size_t e = 0; e < out.size(); ++e) {
    const int32_t rank = shape_.ranks[e], count = segments_.count ? side.splits[e] : side.splits[0];
    if (out[e] && rank > 0) {
      sums.push_back(PartialSum::of(parts, side.columns, count, segments_.count ? 0 : firsts_[e], rank, out[e], is_a));
    }
    if (segments_.count) parts += int64_t(count) * side.columns * rank_;
  }
}

LoraGradPartials LayerPlan::partials(const Side& side, const void* z, int64_t z_stride, const void* t, float* g) const {
  LoraGradPartials pass{};
  pass.element = shape_.element;
  pass.m = shape_.m;
  pass.c = side.columns;
  pass.r = rank_;
  pass.rows_a_split = side.rows_a_split;
  pass.z = z;
  pass.z_stride = z_stride;
  pass.t = t;
  pass.t_stride = t_pitch_;
  pass.g = g;
  pass.segments = segments_;
  return pass;
}

void LayerPlan::compute_dx(const LayerBackward& call, void* ds, const GemmChoice& choice, const Stream& stream) const {
  const Joined experts = joined(call.of);
  Gemm product = gemm(call.of, backward_maps_);
  product.n = shape_.k;
  product.k = shape_.n;
  product.x = call.dy;
  product.x_stride = call.dy_stride;
  product.t = ds;
  product.f = shape_.int8 ? experts.a_t : experts.a;  // an int8 W is given as its transpose, and the ranks lie along it too
  product.f_stride = shape_.int8 ? pitch_ : experts.a_stride;
  product.y = call.dx;
  product.transposed = !shape_.int8;
  product.dropout = call.of.dropout;
  if (choice.shrink == ShrinkPlace::overlapped) {
    product.shrink = {experts.b, experts.b_stride, const_cast<void*>(call.s), call.dgate, static_cast<int>(shape_.ranks.size()),
                      factors(call.of)};
  }
  cuda::gemm(product, choice.tile, chip_, stream);
}

// dx, the gate's gradient, dA and dB in one launch, and the sums of its parts.
void LayerPlan::narrow_backward(const LayerBackward& call, float* da_parts, float* db_parts, const Stream& stream) const {
  const LayerOperands& of = call.of;
  const Joined experts = joined(of);
  cuda::narrow_backward({shape_.element, shape_.m, shape_.n, shape_.k, rank_, call.dy, call.x, of.w, experts.a, experts.b, of.t,
                         call.s, call.dy_stride, call.x_stride, of.w_stride, experts.a_stride, experts.b_stride, t_pitch_,
                         static_cast<int64_t>(shape_.ranks.size()), factors(of), call.dx, call.dgate, da_parts, db_parts,
                         backward_maps_.get()},
                        chip_, stream);
  std::vector<PartialSum> sums;
  add_sums(sums, inside(shape_.n), db_parts, call.db, false);
  add_sums(sums, inside(shape_.k), da_parts, call.da, true);
  reduce_partials(shape_.element, shape_.fp32_experts, rank_, sums, stream);
}

// dA and dB in strips, which all gradients come out of without a sum of parts if there are enough of them.
void LayerPlan::compute_da_and_db(const LayerBackward& call, const Needs& needs, const void* ds, float* da_parts, float* db_parts,
                                  const Stream& stream) const {
  LoraGradStrips pass{};
  pass.element = shape_.element;
  pass.fp32 = shape_.fp32_experts;
  pass.m = shape_.m;
  pass.r = rank_;
  pass.t_stride = t_pitch_;
  pass.segments = segments_;
  pass.maps = backward_maps_.get();
  std::vector<PartialSum> sums;
  const auto add = [&](int number, int64_t columns, const void* z, int64_t z_stride, const void* t, float* parts,
                       const std::vector<void*>& out) {
    const Side side = strips(columns, needs);
    std::vector<PartialSum> gradients;
    add_sums(gradients, side, parts, out, number == LoraGradStrips::OF_DA);
    pass.rows_a_split = side.rows_a_split;
    pass.add(number, {z, columns, z_stride, t, parts, {}}, gradients, sums);
  };
  if (needs.db) add(0, shape_.n, call.dy, call.dy_stride, call.of.t, db_parts, call.db);
  if (needs.da) add(LoraGradStrips::OF_DA, shape_.k, call.x, call.x_stride, ds, da_parts, call.da);
  if (needs.da || needs.db) lora_grad_strips(pass, stream);
  reduce_partials(shape_.element, shape_.fp32_experts, rank_, sums, stream);
}

void LayerPlan::backward(const LayerBackward& call, const GemmChoice& choice, const Stream& stream) const {
  const LayerOperands& of = call.of;
  const auto any = [](const std::vector<void*>& all) {
    return std::any_of(all.begin(), all.end(), [](void* one) { return one; });
  };
  const Needs needs{call.dx != nullptr, call.dgate != nullptr, any(call.da), any(call.db)};
  const Workspace at = workspace(needs, choice);
  const auto room = [&](int64_t place) { return place < 0 ? nullptr : after(call.workspace, place); };
  const auto floats = [&](int64_t place) { return static_cast<float*>(room(place)); };
  void* const ds = room(at.ds);
  std::vector<PartialSum> sums;

  if (!call.room_is_filled) join(of, stream);
  if (needs.db && !call.room_is_filled) {
    apply_scale_and_gate({shape_.element, shape_.m, rank_, call.s, of.t, t_pitch_, factors(of), segments_}, stream);
  }
  if (runs_inside(needs, choice)) return narrow_backward(call, floats(at.da_parts), floats(at.db_parts), stream);
  if (runs_in_strips(needs, choice)) {
    compute_dx(call, ds, choice, stream);
    return compute_da_and_db(call, needs, ds, floats(at.da_parts), floats(at.db_parts), stream);
  }
  // One pass over dy: dB from T, and U = dy B, from which dS and the gate's gradient come.
  const Side of_dy = side(shape_.n);
  LoraGradPartials pass = partials(of_dy, call.dy, call.dy_stride, of.t, floats(at.db_parts));
  pass.b = joined(of).b;
  pass.b_stride = joined(of).b_stride;
  pass.u = floats(at.u);
  if (pass.g || pass.u) lora_grad_partials(pass, stream);
  if (needs.db) add_sums(sums, of_dy, pass.g, call.db, false);
  if (pass.u) {
    finalize_row_grads({shape_.element, shape_.m, rank_, static_cast<int64_t>(shape_.ranks.size()), of_dy.blocks, pass.u,
                        call.s, ds, t_pitch_, call.dgate, factors(of), segments_},
                       stream);
  }
  if (needs.dx) compute_dx(call, ds, choice, stream);
  if (needs.da) {
    const Side of_x = side(shape_.k);
    pass = partials(of_x, call.x, call.x_stride, ds, floats(at.da_parts));
    pass.dropout = of.dropout;
    lora_grad_partials(pass, stream);
    add_sums(sums, of_x, pass.g, call.da, true);
  }
  reduce_partials(shape_.element, shape_.fp32_experts, rank_, sums, stream);
}

}  // namespace fedms::cuda
