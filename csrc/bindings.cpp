// fedms_ext._C: the only file that knows Python.
#include <omp.h>
#include <pybind11/pybind11.h>

#include "fedms/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    py::dict info;
    info["version"] = FEDMS_VERSION;
    info["cuda"] = false;
    info["isa_detected"] = fedms::name(fedms::detected_isa());
    info["isa_used"] = fedms::name(fedms::isa());
    info["openmp"] = _OPENMP;
    return info;
  });
  m.def("set_isa", [](const std::string& name) { fedms::set_isa(name.c_str()); });
}
