// Attention in one call a pass: every tensor is plain (see plain_bindings.cpp) and has the values of a row side by side. Whatever
// else comes in is declined (None).
#include "fedms/attention.h"

#include "tensor_view.h"

namespace fedms::python {
namespace {

// A tensor (batch, heads, rows, width); false where it is no plain one of that shape.
template <class Value>
bool heads_of(py::handle tensor, int64_t batch, int64_t heads, int64_t rows, int64_t width, Heads<Value>& found) {
  View view;
  if (!look<float>(tensor, view) || view.dimensions() != 4 || (width > 1 && view.stride(3) != 1)) return false;
  if (view.size(0) != batch || view.size(1) != heads || view.size(2) != rows || view.size(3) != width) return false;
  found = {view.data<float>(), view.stride(0), view.stride(1), view.stride(2)};
  return true;
}

bool read(py::handle q, py::handle k, py::handle v, py::handle mask, float scale, bool rounded, Attention& a) {
  View of_q, of_k, of_mask;  // heads_of asks below whether q and k are negated
  if (!exchange || !look<float>(q, of_q, Origin::known) || !look<float>(k, of_k, Origin::known) || of_q.dimensions() != 4 ||
      of_k.dimensions() != 4) {
    return false;
  }
  a.batch = of_q.size(0), a.heads = of_q.size(1), a.queries = of_q.size(2), a.keys = of_k.size(2), a.width = of_q.size(3);
  a.scale = scale, a.rounded = rounded;
  if (a.batch * a.heads * a.queries * a.keys * a.width == 0) return false;
  if (!heads_of(q, a.batch, a.heads, a.queries, a.width, a.q) || !heads_of(k, a.batch, a.heads, a.keys, a.width, a.k) ||
      !heads_of(v, a.batch, a.heads, a.keys, a.width, a.v)) {
    return false;
  }
  a.mask = {nullptr, 0, 0, 0};
  if (mask.is_none()) return true;
  if (!look<float>(mask, of_mask) || of_mask.dimensions() != 4 || of_mask.size(3) != a.keys) return false;
  if (a.keys > 1 && of_mask.stride(3) != 1) return false;
  const int64_t sizes[] = {a.batch, a.heads, a.queries};
  int64_t strides[3];
  for (int d = 0; d < 3; ++d) {
    if (of_mask.size(d) != sizes[d] && of_mask.size(d) != 1) return false;
    strides[d] = of_mask.size(d) == 1 ? 0 : of_mask.stride(d);
  }
  a.mask = {of_mask.data<float>(), strides[0], strides[1], strides[2]};
  return true;
}

// A new (batch, rows, heads, width): the order in which the next layer reads it.
NewTensor new_heads(const Attention& a, int64_t rows, Heads<float>& heads) {
  int64_t shape[] = {a.batch, rows, a.heads, a.width};
  NewTensor made = new_tensor(shape, 4);
  heads = {made.data, rows * a.heads * a.width, a.width, a.heads * a.width};
  return made;
}

py::object attention_forward(py::handle q, py::handle k, py::handle v, py::handle mask, float scale, bool rounded) {
  Attention a;
  if (!read(q, k, v, mask, scale, rounded, a)) return py::none();
  Heads<float> to;
  const NewTensor out = new_heads(a, a.queries, to), softmax = new_matrix(a.batch * a.heads * a.queries, 2);
  {
    const py::gil_scoped_release unlocked;
    fedms::attention_forward(a, to, reinterpret_cast<SoftmaxRow*>(softmax.data));
  }
  return py::make_tuple(out.object, softmax.object);
}

py::object attention_backward(py::handle dout, py::handle q, py::handle k, py::handle v, py::handle mask, float scale,
                              bool rounded, py::handle softmax) {
  Attention a;
  Heads<const float> from;
  float* sums;
  if (!read(q, k, v, mask, scale, rounded, a) || !heads_of(dout, a.batch, a.heads, a.queries, a.width, from)) return py::none();
  if (!dense_matrix(softmax, a.batch * a.heads * a.queries, 2, sums)) return py::none();
  Heads<float> dq, dk, dv;
  const NewTensor of_q = new_heads(a, a.queries, dq), of_k = new_heads(a, a.keys, dk), of_v = new_heads(a, a.keys, dv);
  {
    const py::gil_scoped_release unlocked;
    fedms::attention_backward(a, from, reinterpret_cast<const SoftmaxRow*>(sums), dq, dk, dv);
  }
  return py::make_tuple(of_q.object, of_k.object, of_v.object);
}

}  // namespace

void define_attention(py::module_& m) {
  m.def("attention_forward", &attention_forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("mask"), py::arg("scale"),
        py::arg("rounded"), "(out, softmax), or None where an operand is not plain; see csrc/include/fedms/attention.h.");
  m.def("attention_backward", &attention_backward, py::arg("dout"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("mask"),
        py::arg("scale"), py::arg("rounded"), py::arg("softmax"), "(dq, dk, dv), or None where an operand is not plain.");
}

}  // namespace fedms::python
