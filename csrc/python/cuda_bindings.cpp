// The layer plans of fedms/cuda_layer.h, on tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "device_tensor.h"
#include "fast_call.h"
#include "work_stream.h"
#include "fedms/cuda_layer.h"

namespace fedms::python {
namespace {

// As fedms_ext/backends/cuda_plan.py names them.
cuda::ShrinkPlace place_of(const std::string& name) {
  if (name == "apart") return cuda::ShrinkPlace::apart;
  if (name == "overlapped") return cuda::ShrinkPlace::overlapped;
  if (name == "inside") return cuda::ShrinkPlace::inside;
  throw py::value_error("a shrink is apart, overlapped or inside, not " + name);
}

// A plan as Python has it: how its GEMMs run is chosen there.
class Plan {
 public:
  Plan(bool bf16, bool fp32_experts, bool int8, int64_t m, int64_t n, int64_t k, std::vector<int> ranks, std::vector<int> rows,
       const cuda::DeviceProperties& chip, py::object owner)
      : checked_(1 + 2 * ranks.size()), owner_(std::move(owner)), type_(bf16 ? BF16 : FP16),
        device_(DeviceTensor("owner", owner_).device()),
        plan_({bf16 ? cuda::Element::bf16 : cuda::Element::fp16, fp32_experts, int8, m, n, k, std::move(ranks), std::move(rows)},
              chip, static_cast<const int32_t*>(DeviceTensor("owner", owner_).expect(device_, INT32).dense(1).data())) {}

  const cuda::LayerPlan& plan() const { return plan_; }

  void forward(py::handle x, py::handle w, py::handle w_scale, py::handle bias, const Items& a, const Items& b,
               py::handle scale, py::handle gate, double dropout_p, py::handle seed, py::handle y, py::handle s,
               py::handle room) const {
    const cuda::LayerShape& shape = plan_.shape();
    cuda::LayerForward call{};
    std::optional<Scratch> own_room;
    void* const place = find_room(room, x, s.is_none(), own_room);
    call.of = operands(a, b, scale, gate, dropout_p, seed, place, Origin::outside);
    read_weight(call.of, w, w_scale, shape.n, shape.k, Origin::outside);
    const DeviceTensor x_tensor("x", x);
    call.x = x_tensor.expect(device_, type_).data();
    call.x_stride = x_tensor.rows(shape.m, shape.k);
    if (!bias.is_none()) call.bias = dense("bias", bias, type_, shape.n);
    call.y = own("y", y, type_, shape.m * shape.n);
    call.s = read_s(s, place);
    plan_.forward(call, forward_choice, current_stream(device_));
  }

  // All tensors but dy went into the forward pass or came out of it.
  void backward(py::handle dy, py::handle x, py::handle w, py::handle w_scale, const Items& a, const Items& b,
                py::handle scale, py::handle gate, double dropout_p, py::handle seed, py::handle s,
                py::handle room, py::handle dx, py::handle dgate, const Items& da, const Items& db) const {
    const cuda::LayerShape& shape = plan_.shape();
    cuda::LayerBackward call{};
    std::optional<Scratch> own_room;
    void* const place = find_room(room, dy, false, own_room);
    call.of = operands(a, b, scale, gate, dropout_p, seed, place, Origin::known);
    call.room_is_filled = !room.is_none();
    const DeviceTensor dy_tensor("dy", dy);
    call.dy = dy_tensor.expect(device_, type_).data();
    call.dy_stride = dy_tensor.rows(shape.m, shape.n);
    cuda::Needs needs{!dx.is_none(), !dgate.is_none(), false, false};
    if (needs.dx) {
      read_weight(call.of, w, w_scale, shape.int8 ? shape.k : shape.n, shape.int8 ? shape.n : shape.k, Origin::known);
      call.dx = own("dx", dx, type_, shape.m * shape.k);
    }
    if (needs.dgate) {
      call.dgate = static_cast<float*>(own("dgate", dgate, FP32, shape.m * (shape.rows.empty() ? shape.ranks.size() : 1)));
    }
    if (da.size() != shape.ranks.size() || db.size() != shape.ranks.size()) {
      throw py::value_error("da and db have to be of every expert");
    }
    for (size_t e = 0; e < shape.ranks.size(); ++e) {
      call.da.push_back(gradient("da", da[e], shape.ranks[e] * shape.k));
      call.db.push_back(gradient("db", db[e], shape.ranks[e] * shape.n));
      needs.da |= call.da.back() != nullptr;
      needs.db |= call.db.back() != nullptr;
    }
    if (needs.da) {
      const DeviceTensor x_tensor("x", x, Origin::known);
      call.x = x_tensor.expect(device_, type_).data();
      call.x_stride = x_tensor.rows(shape.m, shape.k);
    }
    if (needs.dgate || needs.db) call.s = read_s(s, place);
    const Scratch workspace(dy, type_, device_, plan_.workspace_size(needs, dx_choice));
    call.workspace = workspace.data();
    plan_.backward(call, dx_choice, current_stream(device_));
  }

  // Numbers of x's type that T, behind it the experts side by side, and behind them S take.
  int64_t room_size() const { return s_at() + plan_.shape().m * plan_.rank(); }
  int64_t s_at() const { return joined_at() + plan_.joined_size(); }

  cuda::GemmChoice forward_choice, dx_choice;

 private:
  int64_t joined_at() const { return (plan_.t_size() + 127) / 128 * 128; }
  void* dense(const char* name, py::handle tensor, const Type& type, int64_t numbers) const {
    return DeviceTensor(name, tensor).expect(device_, type).dense(numbers).data();
  }
  void* own(const char* name, py::handle tensor, const Type& type, int64_t numbers) const {
    return DeviceTensor(name, tensor, Origin::known).expect(device_, type).dense(numbers).data();
  }
  // The room of a call: a tensor, or (None) one that lasts as long as the call.
  void* find_room(py::handle room, py::handle like, bool with_s, std::optional<Scratch>& own_room) const {
    if (!room.is_none()) return own("room", room, type_, room_size());
    return own_room.emplace(like, type_, device_, with_s ? room_size() : s_at()).data();
  }
  // S has a tensor of its own, or (None) lies behind what else is in the room.
  void* read_s(py::handle s, void* room) const {
    if (s.is_none()) return static_cast<uint16_t*>(room) + s_at();
    return dense("s", s, type_, plan_.shape().m * plan_.rank());
  }
  const Type& experts_type() const { return plan_.shape().fp32_experts ? FP32 : type_; }
  void* gradient(const char* name, py::handle tensor, int64_t numbers) const {
    return tensor.is_none() ? nullptr : own(name, tensor, experts_type(), numbers);
  }

  void read_weight(cuda::LayerOperands& of, py::handle w, py::handle w_scale, int64_t rows, int64_t columns,
                   Origin origin) const {
    const bool int8 = plan_.shape().int8;
    const DeviceTensor weight("weight", w, Origin::known);
    if (origin == Origin::outside) check_once(weight, w, 0);
    of.w = weight.expect(device_, int8 ? INT8 : type_).data();
    of.w_stride = weight.rows(rows, columns);
    if (int8) of.w_scale = static_cast<float*>(dense("weight_scale", w_scale, FP32, rows));
  }

  cuda::LayerOperands operands(const Items& a, const Items& b, py::handle scale, py::handle gate, double dropout_p,
                               py::handle seed, void* room, Origin origin) const {
    const cuda::LayerShape& shape = plan_.shape();
    const size_t experts = shape.ranks.size();
    cuda::LayerOperands of{};
    if (a.size() != experts || b.size() != experts) throw Declined("there are more or fewer experts than the plan's");
    for (size_t e = 0; e < experts; ++e) of.experts.push_back(expert(a[e], b[e], e, origin));
    of.factors.scale = static_cast<float*>(own("scale", scale, FP32, experts));
    if (!gate.is_none()) {
      const DeviceTensor tensor("gate", gate, origin);
      tensor.expect(device_, FP32).matrix(shape.m, experts);
      of.factors.gate = static_cast<float*>(tensor.data());
      of.factors.row_stride = tensor.stride(0);
      of.factors.expert_stride = tensor.stride(1);
    }
    of.dropout.p = dropout_p;
    if (dropout_p > 0) {
      if (PyLong_Check(seed.ptr())) {
        of.dropout.seed = seed.cast<uint64_t>();
      } else {
        of.dropout.seed_at = static_cast<int64_t*>(dense("seed", seed, INT64, 1));
      }
    }
    of.t = room;
    of.joined = static_cast<uint16_t*>(of.t) + joined_at();
    return of;
  }

  cuda::Expert expert(py::handle a, py::handle b, size_t number, Origin origin) const {
    const cuda::LayerShape& shape = plan_.shape();
    const int64_t rank = shape.ranks[number];
    const DeviceTensor a_tensor("lora_a", a, Origin::known), b_tensor("lora_b", b, Origin::known);
    if (origin == Origin::outside) {
      check_once(a_tensor, a, 1 + 2 * number);
      check_once(b_tensor, b, 2 + 2 * number);
    }
    a_tensor.expect(device_, experts_type()).matrix(rank, shape.k);
    b_tensor.expect(device_, experts_type()).matrix(shape.n, rank);
    if (plan_.joined_size() == 0) {  // the GEMMs read them where they are
      return {a_tensor.data(), a_tensor.rows(rank, shape.k), 1, b_tensor.data(), b_tensor.rows(shape.n, rank), 1, 0, 0, 0, 0, 0};
    }
    return {a_tensor.data(), a_tensor.stride(0), a_tensor.stride(1), b_tensor.data(), b_tensor.stride(0), b_tensor.stride(1),
            0, 0, 0, 0, 0};
  }

  // Asks whether a tensor is negated when it is read. Of a parameter that is asked once for each place in memory, since to ask
  // takes twice as long as all else: a place in memory whose values lie there negated is made by `z.conj().imag` alone, which
  // begins where no parameter does.
  void check_once(const DeviceTensor& tensor, py::handle object, size_t slot) const {
    const Place now{object.ptr(), tensor.data()};
    if (Py_TYPE(object.ptr()) == parameter_type && checked_[slot] == now) return;
    tensor.refuse_negated(object);
    checked_[slot] = now;
  }

  using Place = std::pair<const PyObject*, const void*>;
  mutable std::vector<Place> checked_;  // the weight, and A and B of each expert
  py::object owner_;
  Type type_;
  dlpack::Device device_;
  cuda::LayerPlan plan_;
};

// The GEMM alone, y = x w^T + t f^T or, transposed, x w + t f, which bench/kernels times tile by tile.
void gemm(py::handle x, py::handle w, py::handle t, py::handle f, py::handle y, bool transposed, int64_t rank, int tile,
          const cuda::DeviceProperties& chip) {
  const DeviceTensor x_tensor("x", x), w_tensor("weight", w), t_tensor("t", t), f_tensor("f", f), y_tensor("y", y);
  const dlpack::Device device = x_tensor.device();
  const bool bf16 = x_tensor.is(BF16);
  cuda::Gemm call{};
  call.element = bf16 ? cuda::Element::bf16 : cuda::Element::fp16;
  for (const DeviceTensor* tensor : {&x_tensor, &w_tensor, &t_tensor, &f_tensor, &y_tensor}) {
    tensor->expect(device, bf16 ? BF16 : FP16);
  }
  call.m = x_tensor.size(0);
  call.k = x_tensor.size(1);
  call.n = w_tensor.size(transposed ? 1 : 0);
  call.r = rank;
  call.x = x_tensor.data();
  call.x_stride = x_tensor.rows(call.m, call.k);
  call.w = w_tensor.data();
  call.w_stride = transposed ? w_tensor.rows(call.k, call.n) : w_tensor.rows(call.n, call.k);
  call.t = t_tensor.data();
  call.t_stride = t_tensor.rows(call.m, t_tensor.size(1));
  call.f = f_tensor.data();
  call.f_stride = transposed ? f_tensor.rows(f_tensor.size(0), call.n) : f_tensor.rows(call.n, f_tensor.size(1));
  call.y = y_tensor.dense(call.m * call.n).data();
  call.transposed = transposed;
  cuda::gemm(call, tile, chip, current_stream(device));
}

void define_plan(py::module_& m) {
  py::class_<Plan> plan(m, "Plan", "The passes of a layer for all calls of one shape; see fedms_ext/backends/cuda_plan.py.");
  plan.def(py::init<bool, bool, bool, int64_t, int64_t, int64_t, std::vector<int>, std::vector<int>,
                    const cuda::DeviceProperties&, py::object>(),
           py::kw_only(), py::arg("bf16"), py::arg("fp32_experts"), py::arg("int8"), py::arg("m"), py::arg("n"), py::arg("k"),
           py::arg("ranks"), py::arg("rows"), py::arg("chip"), py::arg("owner"))
      .def_property_readonly("rank", [](const Plan& plan) { return plan.plan().rank(); })
      .def_property_readonly("room_size", &Plan::room_size)
      .def_property_readonly("s_at", &Plan::s_at)
      .def_property_readonly("reads_expert_in_place", [](const Plan& plan) { return plan.plan().joined_size() == 0; })
      .def("choose_forward",
           [](Plan& plan, int tile, const std::string& shrink) { plan.forward_choice = {tile, place_of(shrink)}; },
           py::arg("tile"), py::arg("shrink"))
      .def("choose_dx",
           [](Plan& plan, int tile, const std::string& shrink) { plan.dx_choice = {tile, place_of(shrink)}; },
           py::arg("tile"), py::arg("shrink"));
  define_fast_method<&Plan::forward>(
      plan, "forward", "forward(x, weight, weight_scale, bias, a, b, scale, gate, dropout_p, seed, y, s, room)");
  define_fast_method<&Plan::backward>(
      plan, "backward",
      "backward(dy, x, weight, weight_scale, a, b, scale, gate, dropout_p, seed, s, room, dx, dgate, da, db)");
}

}  // namespace

void define_cuda_group(py::module_& m);  // cuda_group_bindings.cpp

void define_cuda(py::module_ m) {
  m.doc() = "The layer plans of csrc/include/fedms/cuda_layer.h; an error of CUDA is a RuntimeError that names the launch.";
  py::register_local_exception<Declined>(m, "Declined", PyExc_ValueError);
  py::class_<cuda::DeviceProperties>(m, "DeviceProperties")
      .def(py::init([](int capability, int multiprocessors, int shared_memory) {
             return cuda::DeviceProperties{capability, multiprocessors, shared_memory};
           }),
           py::arg("capability"), py::arg("multiprocessors"), py::arg("shared_memory"))
      .def_readonly("multiprocessors", &cuda::DeviceProperties::multiprocessors);
  m.attr("MOST_SEGMENTS") = cuda::MOST_SEGMENTS;
  m.def("check_device", &cuda::check_device, py::arg("device"));
  m.def("gemm_tiles", &cuda::gemm_tiles, py::arg("chip"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("r"),
        py::arg("int8"), py::arg("has_dropout"), py::arg("full_tiles"));
  m.def("overlaps_shrink", &cuda::overlaps_shrink, py::arg("tile"), py::arg("r"));
  m.def("has_shrink_inside", &cuda::has_shrink_inside, py::arg("tile"), py::arg("r"));
  m.def("narrow_backward_parts", &cuda::narrow_backward_parts, py::arg("chip"), py::arg("m"), py::arg("n"), py::arg("k"),
        py::arg("r"));
  m.def("gemm_tile_name", &cuda::gemm_tile_name, py::arg("tile"));
  m.def("gemm", &gemm, py::arg("x"), py::arg("weight"), py::arg("t"), py::arg("f"), py::arg("y"), py::arg("transposed"),
        py::arg("rank"), py::arg("tile"), py::arg("chip"));
  define_plan(m);
  define_cuda_group(m);
}

}  // namespace fedms::python
