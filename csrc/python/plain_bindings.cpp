// The plain case of an expert layer, in one call: every tensor is a float32 torch.Tensor or Parameter itself (no subclass), on
// the CPU, dense and not negated when it is read, and the shapes fit. Whatever else comes in is declined (None), and the caller
// goes the general way, which converts what can be converted and names what is wrong. Only with the exchange API: by attributes
// it would be slower.
#include <memory>

#include "tensor_view.h"

#include "fedms/half.h"
#include "fedms/int8.h"
#include "fedms/lora.h"

namespace fedms::python {
namespace {

// The LoRA branch of a call as Python gives it.
struct Branch {
  py::sequence a, b, scale;
  py::handle gate;  // of the rows' shape and one more dimension, of the experts; or None
  double dropout_p;
  uint64_t seed;
  Origin origin;  // of the tensors
};

// The gate as a matrix (m, E) without gaps, whatever its strides are: where it is expanded, some are 0.
bool plain_gate(const View& rows, const View& gate, int64_t experts, std::vector<float>& values) {
  const int last = static_cast<int>(gate.dimensions()) - 1;
  if (gate.dimensions() != rows.dimensions() || gate.size(last) != experts) return false;
  for (int d = 0; d < last; ++d) {
    if (gate.size(d) != rows.size(d)) return false;
  }
  values.resize(rows.rows() * experts);
  const float* const from = gate.data<float>();
  for (size_t i = 0; i < values.size(); ++i) {
    int64_t rest = static_cast<int64_t>(i), at = 0;
    for (int d = last; d >= 0; rest /= gate.size(d), --d) at += rest % gate.size(d) * gate.stride(d);
    values[i] = from[at];
  }
  return true;
}

// `rows` is x or dy; `gate_values` owns the values of the gate that `lora` points to.
bool plain_experts(const View& rows, int64_t n, int64_t k, const Branch& branch, Lora& lora, std::vector<float>& gate_values) {
  lora.m = rows.rows();
  lora.n = n;
  lora.k = k;
  lora.dropout_p = branch.dropout_p;
  lora.seed = branch.seed;
  const auto& [a, b, scale, gate, dropout_p, seed, origin] = branch;
  if (!(dropout_p >= 0 && dropout_p < 1)) return false;
  const size_t experts = a.size();
  if (b.size() != experts || scale.size() != experts) return false;
  for (size_t e = 0; e < experts; ++e) {
    View view;
    if (!look<float>(a[e], view, origin) || !view.dense() || view.dimensions() != 2 || view.columns() != k) return false;
    const int64_t rank = view.rows();
    const float* const a_data = view.data<float>();
    if (rank == 0 || !look<float>(b[e], view, origin) || !view.dense() || view.dimensions() != 2) return false;
    const py::object factor = scale[e];  // a tensor's value may change before the backward pass
    if (view.rows() != n || view.columns() != rank || !(PyFloat_Check(factor.ptr()) || PyLong_Check(factor.ptr()))) return false;
    lora.experts.push_back({rank, factor.cast<float>(), a_data, view.data<float>()});
  }
  if (gate.is_none()) return true;
  View view;
  if (!look<float>(gate, view, origin) || !plain_gate(rows, view, static_cast<int64_t>(experts), gate_values)) return false;
  lora.gate = gate_values.data();
  lora.gate_row_stride = static_cast<int64_t>(experts);
  lora.gate_expert_stride = 1;
  return true;
}

// A frozen weight (n, k): float32, or packed with its scale, which is (n,) for int8 and (n, groups) for 4 bits.
struct PlainWeight {
  const float* full = nullptr;
  Int8Weight packed{};
  const float* group_scales = nullptr;  // of a weight of 4 bits
  int64_t n = 0, groups = 0;

  bool read(py::handle weight, py::handle scale, int64_t k, Origin origin) {
    View view;
    if (scale.is_none()) {
      if (!look<float>(weight, view, origin) || !view.dense() || view.dimensions() != 2 || view.columns() != k) return false;
      full = view.data<float>();
      n = view.rows();
      return true;
    }
    View scales;
    if (!look<uint8_t>(weight, view, Origin::known) || !view.dense() || view.dimensions() != 1) return false;
    if (!look<float>(scale, scales, Origin::known) || !scales.dense() || scales.dimensions() > 2) return false;
    n = scales.size(0);
    packed = {view.data<uint8_t>(), view.columns(), nullptr, nullptr};
    (scales.dimensions() == 1 ? packed.scale : group_scales) = scales.data<float>();
    groups = scales.columns();
    return true;
  }
};

// The experts apart, each with the rows that it alone takes: segments[e] of them, one expert after the other. Moves them out of
// `lora`, which then has none. False where the segments do not fit.
bool split_by_segments(py::handle segments, Lora& lora, std::vector<Lora>& parts) {
  if (segments.is_none()) return true;
  const auto rows = segments.cast<std::vector<int64_t>>();
  if (rows.size() != lora.experts.size() || lora.gate || lora.dropout_p > 0) return false;
  int64_t total = 0;
  for (size_t e = 0; e < rows.size(); ++e) {
    if (rows[e] < 0) return false;
    total += rows[e];
    parts.push_back({rows[e], lora.n, lora.k, {lora.experts[e]}});
  }
  lora.experts.clear();
  return total == lora.m;
}

// Adds the branch of each segment to its rows of y (m, n).
void segments_forward(const std::vector<Lora>& parts, const float* x, float* y) {
  std::vector<float> s;
  for (const Lora& part : parts) {
    s.resize(part.m * part.total_rank());
    if (!s.empty()) fedms::lora_forward(part, x, s.data(), y);
    x += part.m * part.k;
    y += part.m * part.n;
  }
}

// The forward pass of one layer: its operands.
struct PlainLayer {
  PlainWeight w;
  Lora lora;
  std::vector<float> gate_values;

  bool read(const View& x, py::handle weight, py::handle weight_scale, py::handle bias, const Branch& branch) {
    if (!w.read(weight, weight_scale, x.columns(), Origin::outside)) return false;
    if (!bias.is_none()) {
      View view;
      if (!look<float>(bias, view) || !view.dense() || view.dimensions() != 1 || view.size(0) != w.n) return false;
      w.packed.bias = view.data<float>();
    }
    return plain_experts(x, w.n, x.columns(), branch, lora, gate_values);
  }
};

bool plain_rows(py::handle tensor, View& view) {
  return exchange && look<float>(tensor, view) && view.dense() && view.rows() * view.columns() > 0;
}

// A product with a float32 weight of more than few_rows() rows, which PyTorch computes: what `product` returns, dense and (m, n),
// or nothing where it returns None. The branch is added to it.
bool product_of(const py::object& made, int64_t m, int64_t n, NewTensor& to) {
  if (made.is_none()) return false;
  if (!dense_matrix(made, m, n, to.data)) throw py::value_error("the product of x and the weight is not a dense float32 matrix");
  to.object = made;
  return true;
}

// `segments`: see split_by_segments. S then is (m, 0): nothing has a gradient. `product`: see product_of; it is called with x,
// the weight, the bias and what tells how large the branch is.
py::object linear_forward(py::handle x, py::handle weight, py::handle weight_scale, py::handle bias, const py::sequence& a,
                          const py::sequence& b, const py::sequence& scale, py::handle gate, double dropout_p,
                          uint64_t seed, py::handle segments, bool keeps_s, py::handle product) {
  View x_view;
  PlainLayer layer;
  std::vector<Lora> parts;
  if (!plain_rows(x, x_view)) return py::none();
  if (!layer.read(x_view, weight, weight_scale, bias, {a, b, scale, gate, dropout_p, seed, Origin::outside})) return py::none();
  auto& [w, lora, gate_values] = layer;
  const int64_t rank = lora.total_rank(), experts = static_cast<int64_t>(lora.experts.size());
  if (!split_by_segments(segments, lora, parts)) return py::none();
  const bool few = !w.full || lora.m <= few_rows();
  NewTensor y, s{py::none(), nullptr};
  if (few) {
    y = new_like(x_view, w.n);
  } else if (product.is_none() || !product_of(product(x, weight, bias, lora.m, rank, experts, dropout_p), lora.m, w.n, y)) {
    return py::none();
  }
  std::unique_ptr<float[]> unkept;
  if (keeps_s) {
    s = new_matrix(lora.m, lora.total_rank());
  } else {
    unkept.reset(new float[lora.m * lora.total_rank()]);
    s.data = unkept.get();
  }
  const float* const from = x_view.data<float>();
  try {
    const py::gil_scoped_release unlocked;
    if (w.full) {
      if (few) fedms::few_rows_forward(lora.m, w.n, lora.k, from, w.full, w.packed.bias, y.data);
      fedms::lora_forward(lora, from, s.data, y.data);
    } else {
      fedms::int8_forward(w.packed, lora, from, s.data, y.data);
    }
    segments_forward(parts, from, y.data);
  } catch (const std::invalid_argument&) {  // x has not as many columns as the packed weight
    return py::none();
  }
  return py::make_tuple(y.object, s.object);
}

// Layers of one x, whose weights are all packed. Each of `layers` is (weight, weight_scale, bias, a, b, scale, gate, dropout_p,
// seed).
py::object siblings_forward(py::handle x, const py::sequence& layers) {
  View x_view;
  if (!plain_rows(x, x_view)) return py::none();
  std::vector<PlainLayer> read(layers.size());
  std::vector<Int8Layer> calls;
  py::list made;
  for (size_t i = 0; i < layers.size(); ++i) {
    const py::tuple given = layers[i];
    PlainLayer& layer = read[i];
    const Branch branch{given[3], given[4], given[5], given[6], given[7].cast<double>(), given[8].cast<uint64_t>(),
                        Origin::outside};
    if (!layer.read(x_view, given[0], given[1], given[2], branch) || layer.w.full) return py::none();
    const NewTensor y = new_like(x_view, layer.w.n), s = new_matrix(layer.lora.m, layer.lora.total_rank());
    calls.push_back({layer.w.packed, layer.lora, s.data, y.data});
    made.append(py::make_tuple(y.object, s.object));
  }
  try {
    const py::gil_scoped_release unlocked;
    fedms::int8_forward(calls, x_view.data<float>());
  } catch (const std::invalid_argument&) {
    return py::none();
  }
  return made;
}

// The backward pass of one layer: the operands of its branch, and new tensors for what `needs` asks for besides dx. `needs` and
// `made` are in the order dx, dgate, every da, every db; None is made for what is not needed, and for dx.
struct PlainGradients {
  Lora lora;
  std::vector<float> gate_values;
  float* s = nullptr;
  LoraGradients out;
  py::list made;

  bool read(const View& dy, int64_t k, bool has_x, const Branch& branch, py::handle s_tensor, const py::sequence& needs) {
    if (!plain_experts(dy, dy.columns(), k, branch, lora, gate_values)) return false;
    if (!dense_or_none(s_tensor, lora.m, lora.total_rank(), s)) return false;
    const size_t experts = lora.experts.size();
    made.append(py::none());
    const auto make = [&](const auto& allocate) -> float* {
      if (!needs[made.size()].template cast<bool>()) {
        made.append(py::none());
        return nullptr;
      }
      NewTensor tensor = allocate();
      made.append(std::move(tensor.object));
      return tensor.data;
    };
    bool needs_x = false, needs_s = false;
    out.dgate = make([&] { return new_like(dy, static_cast<int64_t>(experts)); });
    needs_s = out.dgate != nullptr;
    for (size_t e = 0; e < experts; ++e) {
      out.da.push_back(make([&] { return new_matrix(lora.experts[e].rank, k); }));
      needs_x |= out.da.back() != nullptr;
    }
    for (size_t e = 0; e < experts; ++e) {
      out.db.push_back(make([&] { return new_matrix(dy.columns(), lora.experts[e].rank); }));
      needs_s |= out.db.back() != nullptr;
    }
    return (has_x || !needs_x) && (s || !needs_s);
  }
};

// `weight` and its scale are what dx is computed from (n of it are k), None if dx is not needed. `needs`: dx, dgate, every da,
// every db. The result has the same order, None for what is not needed. All tensors but dy went into the forward pass or came
// out. `product`: as in linear_forward, of dy and the weight.
py::object linear_backward(py::handle dy, py::handle x, int64_t k, py::handle weight, py::handle weight_scale,
                           const py::sequence& a, const py::sequence& b, const py::sequence& scale, py::handle gate,
                           double dropout_p, uint64_t seed, py::handle s, const py::sequence& needs, py::handle product) {
  View dy_view;
  PlainGradients layer;
  if (!plain_rows(dy, dy_view)) return py::none();
  const int64_t n = dy_view.columns(), m = dy_view.rows();
  float* x_data;
  if (!dense_or_none(x, m, k, x_data)) return py::none();
  if (!layer.read(dy_view, k, x_data, {a, b, scale, gate, dropout_p, seed, Origin::known}, s, needs)) return py::none();

  PlainWeight w;
  NewTensor dx{py::none(), nullptr};
  bool few = true;
  if (needs[0].cast<bool>()) {
    if (!w.read(weight, weight_scale, k, Origin::known) || w.n != (w.packed.scale ? k : n)) return py::none();
    if (w.group_scales && m > nibbles_few_rows()) return py::none();
    few = !w.full || m <= few_rows();
    const int64_t rank = layer.lora.total_rank(), experts = static_cast<int64_t>(layer.lora.experts.size());
    if (few) {
      dx = new_like(dy_view, k);
    } else if (product.is_none() || !product_of(product(dy, weight, m, rank, experts, dropout_p), m, k, dx)) {
      return py::none();
    }
  }
  LoraGradients& out = layer.out;
  out.dx = dx.data;
  layer.made[0] = std::move(dx.object);
  const float* const from = dy_view.data<float>();
  {
    const py::gil_scoped_release unlocked;
    if (w.packed.scale) {
      fedms::int8_backward(w.packed, layer.lora, from, x_data, layer.s, out);
    } else {
      if (w.full && few) few_rows_backward(m, n, k, from, w.full, out.dx);
      if (w.group_scales) {
        nibbles_input_gradient(m, n, k, w.packed.packed, w.packed.packed_size, w.groups, w.group_scales, from, out.dx);
      }
      if (!layer.lora.experts.empty()) fedms::lora_backward(layer.lora, from, x_data, layer.s, out);
    }
  }
  return layer.made;
}

// The gradients of siblings_forward: dx, the sum over all layers, and the gradients of each layer as linear_backward returns
// them, without its dx. Each of `layers` is (dy, weight, weight_scale, a, b, scale, gate, dropout_p, seed, s, needs), with an
// int8 weight that dx is computed from.
py::object siblings_backward(py::handle x, int64_t k, const py::sequence& layers, bool needs_dx) {
  std::vector<PlainGradients> read(layers.size());
  std::vector<PlainWeight> weights(layers.size());
  std::vector<Int8LayerGradients> calls;
  py::list made;
  View dy_view;
  float* x_data = nullptr;
  for (size_t i = 0; i < layers.size(); ++i) {
    const py::tuple given = layers[i];
    if (!plain_rows(given[0], dy_view) || !dense_or_none(x, dy_view.rows(), k, x_data)) return py::none();
    if (i > 0 && dy_view.rows() != read[0].lora.m) return py::none();
    PlainWeight& w = weights[i];
    if (needs_dx && (!w.read(given[1], given[2], k, Origin::known) || !w.packed.scale || w.n != k)) return py::none();
    const Branch branch{given[3], given[4], given[5], given[6], given[7].cast<double>(), given[8].cast<uint64_t>(),
                        Origin::known};
    if (!read[i].read(dy_view, k, x_data, branch, given[9], given[10])) return py::none();
    calls.push_back({w.packed, read[i].lora, dy_view.data<float>(), read[i].s, read[i].out});
    made.append(read[i].made);
  }
  py::object dx = py::none();
  float* dx_data = nullptr;
  if (needs_dx) {
    NewTensor tensor = new_like(dy_view, k);
    dx_data = tensor.data;
    dx = std::move(tensor.object);
  }
  {
    const py::gil_scoped_release unlocked;
    fedms::int8_backward(calls, x_data, dx_data);
  }
  return py::make_tuple(dx, made);
}

}  // namespace

void define_plain(py::module_& m) {
  m.def("linear_forward", &linear_forward, py::arg("x"), py::arg("weight"), py::arg("weight_scale"), py::arg("bias"),
        py::arg("a"), py::arg("b"), py::arg("scale"), py::arg("gate"), py::arg("dropout_p"), py::arg("seed"),
        py::arg("segments") = py::none(), py::arg("keeps_s") = true, py::arg("product") = py::none(),
        "(y, s) of a plain call on a weight that is float32 (weight_scale None) or packed, or None if it is not plain.");
  m.def("linear_backward", &linear_backward, py::arg("dy"), py::arg("x"), py::arg("k"), py::arg("weight"),
        py::arg("weight_scale"), py::arg("a"), py::arg("b"), py::arg("scale"), py::arg("gate"), py::arg("dropout_p"),
        py::arg("seed"), py::arg("s"), py::arg("needs"), py::arg("product") = py::none(),
        "The gradients of linear_forward: [dx, dgate, *da, *db], None for what is not needed; None if it is not plain.");
  m.def("siblings_forward", &siblings_forward, py::arg("x"), py::arg("layers"),
        "[(y, s)] of layers that share x; see plain_bindings.cpp. None if a call is not plain or a weight is not packed.");
  m.def("siblings_backward", &siblings_backward, py::arg("x"), py::arg("k"), py::arg("layers"), py::arg("needs_dx"),
        "(dx, [[None, dgate, *da, *db]]) of siblings_forward; None if a gradient is not plain or a weight is not int8.");
}

}  // namespace fedms::python
