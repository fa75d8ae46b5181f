// The launchers of fedms/cuda.h. Addresses on the device are numbers here: 0 is null. fedms_ext/backends/cuda.py checks the
// tensors behind them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "fedms/cuda.h"

namespace fedms::python {

namespace py = pybind11;

namespace {

using Address = uintptr_t;

cuda::Element element(bool bf16) { return bf16 ? cuda::Element::bf16 : cuda::Element::fp16; }
void* at(Address address) { return reinterpret_cast<void*>(address); }
float* floats(Address address) { return reinterpret_cast<float*>(address); }

cuda::Segments segments_of(const std::vector<int>& ends, const std::vector<int>& ranks, const std::vector<int>& firsts) {
  if (ends.size() > cuda::MOST_SEGMENTS || ranks.size() != ends.size() || firsts.size() != ends.size()) {
    throw py::value_error("segments: expected as many ranks and firsts as ends, and 8 at most");
  }
  cuda::Segments segments;
  segments.count = static_cast<int>(ends.size());
  std::copy(ends.begin(), ends.end(), segments.ends);
  std::copy(ranks.begin(), ranks.end(), segments.ranks);
  std::copy(firsts.begin(), firsts.end(), segments.firsts);
  return segments;
}

cuda::Factors factors_of(Address scale, Address expert, Address gate, int64_t row_stride, int64_t expert_stride) {
  cuda::Factors factors{};
  factors.scale = floats(scale);
  factors.expert = reinterpret_cast<const int32_t*>(expert);
  factors.gate = floats(gate);
  factors.row_stride = row_stride;
  factors.expert_stride = expert_stride;
  return factors;
}

cuda::FusedShrink fused_shrink_of(Address a, int64_t a_stride, Address s, const cuda::Factors& factors, Address ready) {
  cuda::FusedShrink inside{};
  inside.a = at(a);
  inside.a_stride = a_stride;
  inside.s = at(s);
  inside.factors = factors;
  inside.ready = reinterpret_cast<int32_t*>(ready);
  return inside;
}

void define_arguments(py::module_& m) {
  py::class_<cuda::Stream>(m, "Stream").def(
      py::init([](int device, Address handle) { return cuda::Stream{device, at(handle)}; }), py::arg("device"),
      py::arg("handle"));
  py::class_<cuda::DeviceProperties>(m, "DeviceProperties")
      .def(py::init([](int capability, int multiprocessors, int shared_memory) {
             return cuda::DeviceProperties{capability, multiprocessors, shared_memory};
           }),
           py::arg("capability"), py::arg("multiprocessors"), py::arg("shared_memory"))
      .def_readonly("multiprocessors", &cuda::DeviceProperties::multiprocessors);
  py::class_<cuda::Dropout>(m, "Dropout")
      .def(py::init([](double p, uint64_t seed) { return cuda::Dropout{p, seed}; }), py::arg("p"), py::arg("seed"));
  py::class_<cuda::Factors>(m, "Factors")
      .def(py::init(&factors_of), py::arg("scale"), py::arg("expert"), py::arg("gate"), py::arg("row_stride"),
           py::arg("expert_stride"));
  py::class_<cuda::Segments>(m, "Segments")
      .def(py::init(&segments_of), py::arg("ends"), py::arg("ranks"), py::arg("firsts"));
  py::class_<cuda::FusedShrink>(m, "FusedShrink")
      .def(py::init(&fused_shrink_of), py::arg("a"), py::arg("a_stride"), py::arg("s"), py::arg("factors"), py::arg("ready"))
      .def(py::init([] { return cuda::FusedShrink{}; }));
  m.attr("MOST_SEGMENTS") = cuda::MOST_SEGMENTS;
}

void gemm(bool bf16, int64_t m, int64_t n, int64_t k, int64_t r, Address x, int64_t x_stride, Address w, int64_t w_stride,
          Address w_scale, Address bias, Address t, int64_t t_stride, Address f, int64_t f_stride, Address y, bool transposed,
          const cuda::Dropout& dropout, const cuda::Segments& segments, const cuda::FusedShrink& inside, int tile,
          const cuda::DeviceProperties& chip, const cuda::Stream& stream) {
  cuda::Gemm call{};
  call.element = element(bf16);
  call.m = m;
  call.n = n;
  call.k = k;
  call.r = r;
  call.x = at(x);
  call.x_stride = x_stride;
  call.w = at(w);
  call.w_stride = w_stride;
  call.w_scale = floats(w_scale);
  call.bias = at(bias);
  call.t = at(t);
  call.t_stride = t_stride;
  call.f = at(f);
  call.f_stride = f_stride;
  call.y = at(y);
  call.transposed = transposed;
  call.dropout = dropout;
  call.segments = segments;
  call.inside = inside;
  cuda::gemm(call, tile, chip, stream);
}

void define_gemm(py::module_& m) {
  m.def("check_device", &cuda::check_device, py::arg("device"));
  m.def("gemm_tiles", &cuda::gemm_tiles, py::arg("chip"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("r"),
        py::arg("int8"), py::arg("has_dropout"), py::arg("full_tiles"));
  m.def("shrinks_inside", &cuda::shrinks_inside, py::arg("tile"), py::arg("r"));
  m.def("gemm_tile_name", &cuda::gemm_tile_name, py::arg("tile"));
  m.def("gemm", &gemm, py::arg("bf16"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("r"), py::arg("x"), py::arg("x_stride"),
        py::arg("w"), py::arg("w_stride"), py::arg("w_scale"), py::arg("bias"), py::arg("t"), py::arg("t_stride"),
        py::arg("f"), py::arg("f_stride"), py::arg("y"), py::arg("transposed"), py::arg("dropout"), py::arg("segments"),
        py::arg("inside"), py::arg("tile"), py::arg("chip"), py::arg("stream"));
}

void define_ranks(py::module_& m) {
  m.def("shrink", [](bool bf16, int64_t m, int64_t k, int64_t r, Address x, int64_t x_stride, Address a,
                      int64_t a_stride, Address s, Address t, int64_t t_stride, const cuda::Factors& factors,
                      const cuda::Segments& segments, const cuda::Dropout& dropout, const cuda::Stream& stream) {
    cuda::shrink(element(bf16), m, k, r, at(x), x_stride, at(a), a_stride, at(s), at(t), t_stride, factors, segments,
                 dropout, stream);
  }, py::arg("bf16"), py::arg("m"), py::arg("k"), py::arg("r"), py::arg("x"), py::arg("x_stride"), py::arg("a"),
        py::arg("a_stride"), py::arg("s"), py::arg("t"), py::arg("t_stride"), py::arg("factors"), py::arg("segments"),
        py::arg("dropout"), py::arg("stream"));
  m.def("apply_scale_and_gate", [](bool bf16, int64_t m, int64_t r, Address s, Address t, int64_t t_stride,
                     const cuda::Factors& factors, const cuda::Segments& segments, const cuda::Stream& stream) {
    cuda::apply_scale_and_gate(element(bf16), m, r, at(s), at(t), t_stride, factors, segments, stream);
  }, py::arg("bf16"), py::arg("m"), py::arg("r"), py::arg("s"), py::arg("t"), py::arg("t_stride"), py::arg("factors"),
        py::arg("segments"), py::arg("stream"));
  m.def("lora_grad_partials_blocks", &cuda::lora_grad_partials_blocks, py::arg("c"));
  m.def("lora_grad_partials", [](bool bf16, int64_t m, int64_t c, int64_t r, int64_t rows_a_split, Address z, int64_t z_stride,
                     Address t, int64_t t_stride, Address g, Address b, int64_t b_stride, Address u,
                     const cuda::Segments& segments, const cuda::Dropout& dropout, const cuda::Stream& stream) {
    cuda::lora_grad_partials(element(bf16), m, c, r, rows_a_split, at(z), z_stride, at(t), t_stride, floats(g), at(b), b_stride,
                floats(u), segments, dropout, stream);
  }, py::arg("bf16"), py::arg("m"), py::arg("c"), py::arg("r"), py::arg("rows_a_split"), py::arg("z"),
        py::arg("z_stride"), py::arg("t"), py::arg("t_stride"), py::arg("g"), py::arg("b"), py::arg("b_stride"),
        py::arg("u"), py::arg("segments"), py::arg("dropout"), py::arg("stream"));
  m.def("finalize_row_grads", [](bool bf16, int64_t m, int64_t r, int64_t experts, int64_t parts, Address u, Address s,
                           Address ds, int64_t ds_stride, Address dgate, const cuda::Factors& factors,
                           const cuda::Segments& segments, const cuda::Stream& stream) {
    cuda::finalize_row_grads(element(bf16), m, r, experts, parts, floats(u), at(s), at(ds), ds_stride, floats(dgate), factors,
                      segments, stream);
  }, py::arg("bf16"), py::arg("m"), py::arg("r"), py::arg("experts"), py::arg("parts"), py::arg("u"), py::arg("s"),
        py::arg("ds"), py::arg("ds_stride"), py::arg("dgate"), py::arg("factors"), py::arg("segments"),
        py::arg("stream"));
  m.def("reduce_partials", [](bool bf16, bool fp32, int64_t c, int64_t r, int64_t parts, int64_t first, int64_t count, Address g,
                         Address out, int64_t row_stride, int64_t column_stride, const cuda::Stream& stream) {
    cuda::reduce_partials(element(bf16), fp32, c, r, parts, first, count, floats(g), at(out), row_stride, column_stride, stream);
  }, py::arg("bf16"), py::arg("fp32"), py::arg("c"), py::arg("r"), py::arg("parts"), py::arg("first"), py::arg("count"), py::arg("g"),
        py::arg("out"), py::arg("row_stride"), py::arg("column_stride"), py::arg("stream"));
}

}  // namespace

void define_cuda(py::module_ m) {
  m.doc() = "The launchers of csrc/include/fedms/cuda.h on addresses; an error of CUDA is a RuntimeError that names the "
            "launch.";
  define_arguments(m);
  define_gemm(m);
  define_ranks(m);
}

}  // namespace fedms::python
