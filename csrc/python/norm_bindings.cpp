// The norm of plain rows (see plain_bindings.cpp) in one call; whatever else comes in is declined (None).
#include "fedms/rms_norm.h"

#include "tensor_view.h"

namespace fedms::python {
namespace {

py::object rms_norm(py::handle x, py::handle weight, double epsilon) {
  View rows, factors;
  if (!exchange || !look<float>(x, rows) || !rows.dense() || rows.rows() * rows.columns() == 0) return py::none();
  if (!look<float>(weight, factors) || !factors.dense() || factors.dimensions() != 1) return py::none();
  if (factors.columns() != rows.columns()) return py::none();
  NewTensor y = new_like(rows, rows.columns());
  fedms::rms_norm(rows.rows(), rows.columns(), rows.data<float>(), factors.data<float>(), epsilon, y.data);
  return y.object;
}

}  // namespace

void define_norm(py::module_& m) {
  m.def("rms_norm", &rms_norm, py::arg("x"), py::arg("weight"), py::arg("epsilon"),
        "weight x / sqrt(mean(x^2) + epsilon) of every row of x, a new tensor, or None where an operand is not plain.");
}

}  // namespace fedms::python
