// The group plans of fedms/cuda_group.h, on tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "device_tensor.h"
#include "fast_call.h"
#include "fedms/cuda_group.h"
#include "work_stream.h"

namespace fedms::python {
namespace {

class GroupPlan {
 public:
  GroupPlan(bool bf16, bool fp32_experts, int64_t m, int64_t k, const std::vector<int64_t>& ns,
            const std::vector<std::vector<int>>& ranks, const cuda::DeviceProperties& chip, py::object owners)
      : owners_(std::move(owners)), type_(bf16 ? BF16 : FP16), device_(DeviceTensor("owners", owners_).device()),
        plan_(shape_of(bf16, fp32_experts, m, k, ns, ranks), chip,
              static_cast<const int32_t*>(DeviceTensor("owners", owners_).expect(device_, INT32).dense(1).data())) {}

  static cuda::GroupShape shape_of(bool bf16, bool fp32_experts, int64_t m, int64_t k, const std::vector<int64_t>& ns,
                                   const std::vector<std::vector<int>>& ranks) {
    if (ns.size() != ranks.size()) throw py::value_error("ns and ranks have to be of every layer");
    cuda::GroupShape shape{bf16 ? cuda::Element::bf16 : cuda::Element::fp16, fp32_experts, m, k, {}};
    for (size_t i = 0; i < ns.size(); ++i) shape.layers.push_back({ns[i], ranks[i]});
    return shape;
  }

  const cuda::GroupPlan& plan() const { return plan_; }

  void forward(py::handle x, const Items& weights, const Items& biases, const Items& a, const Items& b, py::handle scale,
               py::handle gate, const Items& ys, py::handle room) const {
    const cuda::GroupShape& shape = plan_.shape();
    if (weights.size() != layers() || biases.size() != layers() || ys.size() != layers() || a.size() != experts() ||
        b.size() != experts()) {
      throw Declined("there are more or fewer layers or experts than the plan's");
    }
    cuda::GroupForward call{};
    for (size_t i = 0; i < layers(); ++i) {
      const int64_t n = shape.layers[i].n;
      cuda::GroupLayer layer = weight(weights[i], n, Origin::outside);
      if (!biases[i].is_none()) layer.bias = DeviceTensor("bias", biases[i]).expect(device_, type_).dense(n).data();
      layer.y = own("y", ys[i], type_, shape.m * n);
      call.layers.push_back(layer);
      for (size_t of_layer = 0; of_layer < shape.layers[i].ranks.size(); ++of_layer) {
        const size_t e = call.experts.size();
        call.experts.push_back(expert(a[e], b[e], shape.layers[i].ranks[of_layer], n));
      }
    }
    const DeviceTensor x_tensor("x", x);
    call.x = x_tensor.expect(device_, type_).data();
    call.x_stride = x_tensor.rows(shape.m, shape.k);
    call.factors = factors(scale, gate, Origin::outside);
    call.room = own("room", room, type_, plan_.room_size());
    plan_.forward(call, forward_tile, current_stream(device_));
  }

  // All tensors but the dys went into the forward pass or came out of it.
  void backward(const Items& dys, py::handle x, const Items& weights, py::handle scale, py::handle gate, py::handle room,
                py::handle dx, py::handle dgate, const Items& da, const Items& db) const {
    const cuda::GroupShape& shape = plan_.shape();
    if (dys.size() != layers() || weights.size() != layers() || da.size() != experts() || db.size() != experts()) {
      throw py::value_error("dys and weights have to be of every layer, da and db of every expert");
    }
    cuda::GroupBackward call{};
    bool needs_da = false;
    for (size_t i = 0; i < layers(); ++i) {
      const int64_t n = shape.layers[i].n;
      cuda::GroupLayer layer = dx.is_none() ? cuda::GroupLayer{} : weight(weights[i], n, Origin::known);
      const DeviceTensor dy("dy", dys[i]);
      layer.dy = dy.expect(device_, type_).data();
      layer.dy_stride = dy.rows(shape.m, n);
      call.layers.push_back(layer);
      for (int rank : shape.layers[i].ranks) {
        const size_t e = call.da.size();
        call.da.push_back(gradient("da", da[e], rank * shape.k));
        call.db.push_back(gradient("db", db[e], rank * n));
        needs_da |= call.da.back() != nullptr;
      }
    }
    if (needs_da) {
      const DeviceTensor x_tensor("x", x, Origin::known);
      call.x = x_tensor.expect(device_, type_).data();
      call.x_stride = x_tensor.rows(shape.m, shape.k);
    }
    call.factors = factors(scale, gate, Origin::known);
    call.room = own("room", room, type_, plan_.room_size());
    if (!dx.is_none()) call.dx = own("dx", dx, type_, shape.m * shape.k);
    if (!dgate.is_none()) call.dgate = static_cast<float*>(own("dgate", dgate, FP32, shape.m * experts()));
    const Scratch workspace(dys[0], type_, device_, plan_.workspace_size());
    call.workspace = workspace.data();
    plan_.backward(call, dx_tile, current_stream(device_));
  }

  int forward_tile = 0, dx_tile = 0;

 private:
  size_t layers() const { return plan_.shape().layers.size(); }
  size_t experts() const { return static_cast<size_t>(plan_.experts()); }
  const Type& experts_type() const { return plan_.shape().fp32_experts ? FP32 : type_; }

  void* own(const char* name, py::handle tensor, const Type& type, int64_t numbers) const {
    return DeviceTensor(name, tensor, Origin::known).expect(device_, type).dense(numbers).data();
  }
  void* gradient(const char* name, py::handle tensor, int64_t numbers) const {
    return tensor.is_none() ? nullptr : own(name, tensor, experts_type(), numbers);
  }
  cuda::GroupLayer weight(py::handle w, int64_t n, Origin origin) const {
    const DeviceTensor tensor("weight", w, origin);
    cuda::GroupLayer layer{};
    layer.w = tensor.expect(device_, type_).data();
    layer.w_stride = tensor.rows(n, plan_.shape().k);
    return layer;
  }
  cuda::Expert expert(py::handle a, py::handle b, int64_t rank, int64_t n) const {
    const DeviceTensor a_tensor("lora_a", a), b_tensor("lora_b", b);
    a_tensor.expect(device_, experts_type()).matrix(rank, plan_.shape().k);
    b_tensor.expect(device_, experts_type()).matrix(n, rank);
    return {a_tensor.data(), a_tensor.stride(0), a_tensor.stride(1), b_tensor.data(), b_tensor.stride(0), b_tensor.stride(1),
            0, 0, 0, 0, 0};
  }
  cuda::Factors factors(py::handle scale, py::handle gate, Origin origin) const {
    cuda::Factors factors{};
    factors.scale = static_cast<float*>(own("scale", scale, FP32, experts()));
    if (gate.is_none()) return factors;
    const DeviceTensor tensor("gate", gate, origin);
    tensor.expect(device_, FP32).matrix(plan_.shape().m, experts());
    factors.gate = static_cast<float*>(tensor.data());
    factors.row_stride = tensor.stride(0);
    factors.expert_stride = tensor.stride(1);
    return factors;
  }

  py::object owners_;
  Type type_;
  dlpack::Device device_;
  cuda::GroupPlan plan_;
};

}  // namespace

void define_cuda_group(py::module_& m) {
  m.attr("MOST_SIBLINGS") = cuda::MOST_SIBLINGS;
  m.def("owners_of_group", [](const std::vector<std::vector<int>>& ranks) {
    return cuda::owners_of(GroupPlan::shape_of(true, false, 0, 0, std::vector<int64_t>(ranks.size()), ranks));
  }, py::arg("ranks"));
  py::class_<GroupPlan> plan(m, "GroupPlan",
                             "The passes of layers that share their input, for all calls of one shape; see "
                             "fedms_ext/backends/cuda_group.py.");
  plan.def(py::init<bool, bool, int64_t, int64_t, const std::vector<int64_t>&, const std::vector<std::vector<int>>&,
                    const cuda::DeviceProperties&, py::object>(),
           py::kw_only(), py::arg("bf16"), py::arg("fp32_experts"), py::arg("m"), py::arg("k"), py::arg("ns"), py::arg("ranks"),
           py::arg("chip"), py::arg("owners"))
      .def_property_readonly("tiles", [](const GroupPlan& plan) { return plan.plan().tiles(); })
      .def_property_readonly("room_size", [](const GroupPlan& plan) { return plan.plan().room_size(); })
      .def_property_readonly("s_at", [](const GroupPlan& plan) { return plan.plan().s_at(); })
      .def_property_readonly("rank", [](const GroupPlan& plan) { return plan.plan().rank(); })
      .def_property_readonly("first_ranks", [](const GroupPlan& plan) { return plan.plan().first_ranks(); })
      .def_readwrite("forward_tile", &GroupPlan::forward_tile)
      .def_readwrite("dx_tile", &GroupPlan::dx_tile);
  define_fast_method<&GroupPlan::forward>(plan, "forward", "forward(x, weights, biases, a, b, scale, gate, ys, room)");
  define_fast_method<&GroupPlan::backward>(plan, "backward",
                                           "backward(dys, x, weights, scale, gate, room, dx, dgate, da, db)");
}

}  // namespace fedms::python
