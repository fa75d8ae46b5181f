// fedms_ext._C: this folder is the only one that knows Python. It knows no torch.
#include <omp.h>

#include "../cpu/bfloat16/pairs.h"
#include "fedms/isa.h"
#include "tensor_view.h"

namespace fedms::python {

void define_cpu(py::module_& m);    // cpu_bindings.cpp
void define_plain(py::module_& m);  // plain_bindings.cpp
void define_attention(py::module_& m);  // attention_bindings.cpp
void define_norm(py::module_& m);  // norm_bindings.cpp
void define_cuda(py::module_ m);    // cuda_bindings.cpp

namespace {

// Returns whether the exchange API is used.
bool set_tensor_types(py::type type, py::type parameter, bool use_exchange) {
  tensor_type = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  exchange = nullptr;
  if (use_exchange && py::hasattr(type, "__dlpack_c_exchange_api__")) {
    const py::object capsule = type.attr("__dlpack_c_exchange_api__");
    const auto* api =
        static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    if (api->version.major == 1 && api->tensor_from_py_object) exchange = api;
  }
  return exchange != nullptr;
}

py::dict build_info() {
  py::dict info;
  info["version"] = FEDMS_VERSION;
#ifdef FEDMS_CUDA_ARCHS
  info["cuda"] = FEDMS_CUDA_ARCHS;
#else
  info["cuda"] = py::none();
#endif
  info["isa_detected"] = name(detected_isa());
  info["isa_used"] = name(isa());
  py::list found;
  for (Isa set : ALL_ISAS) {
    if (available(set)) found.append(name(set));
  }
  info["isa_available"] = found;
  info["bf16_products"] = pair_kernels() != nullptr;
  info["openmp"] = _OPENMP;
  return info;
}

}  // namespace
}  // namespace fedms::python

void define_token_loss(pybind11::module_ m);  // loss_bindings.cpp

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  using namespace fedms::python;
  m.doc() = "CPU kernels of fedms_ext. Tensors are dense and on the CPU, float32 unless said otherwise, their last "
            "dimension the columns; anything else is a ValueError.";
  m.attr("INTERFACE") = FEDMS_INTERFACE;      // see fedms_ext/interface.py
  m.def("set_tensor_types", &set_tensor_types, py::arg("tensor"), py::arg("parameter"), py::arg("use_exchange") = true,
        "Tells torch.Tensor and nn.Parameter; returns whether tensors come in through the exchange API.");
  m.def("build_info", &build_info, "The version, the CUDA targets, the instruction sets and OpenMP's date of this build.");
  m.def("set_isa", [](const std::string& name) { fedms::set_isa(name.c_str()); }, py::arg("name"),
        "The instruction set that CPU kernels use from now on; ValueError where it is unknown or not available.");
  define_cpu(m);
  define_plain(m);
  define_attention(m);
  define_norm(m);
  define_token_loss(m);
#ifdef FEDMS_CUDA_ARCHS
  define_cuda(m.def_submodule("cuda"));
#endif
}
