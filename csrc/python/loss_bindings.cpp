// The Python side of fedms/token_loss.h. A call takes milliseconds, so tensors are read through their attributes.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "fedms/token_loss.h"

namespace py = pybind11;

namespace {

// The data of a dense CPU tensor of this dtype and number of values; null for None.
template <class T>
T* data_of(const char* name, const py::object& tensor, const char* dtype, int64_t size) {
  if (tensor.is_none()) return nullptr;
  const auto fail = [&](const std::string& what) { throw py::value_error(std::string(name) + " " + what); };
  if (tensor.attr("device").attr("type").cast<std::string>() != "cpu") fail("is not on the CPU");
  if (py::str(tensor.attr("dtype")).cast<std::string>() != dtype) fail(std::string("is not ") + dtype);
  if (!tensor.attr("is_contiguous")().cast<bool>()) fail("is not contiguous; pass .contiguous()");
  const int64_t found = tensor.attr("numel")().cast<int64_t>();
  if (found != size) fail("has " + std::to_string(found) + " values, expected " + std::to_string(size));
  return reinterpret_cast<T*>(tensor.attr("data_ptr")().cast<uintptr_t>());
}

void token_log_prob(const py::object& hidden, const py::object& weight, const py::object& packed,
                    const py::object& weight_scale, const py::object& bias, const py::object& labels, float scale,
                    float cap, int64_t chunk, const py::object& work, const py::object& log_p,
                    const py::object& confidence, const py::object& best, const py::object& gradient) {
  const int64_t v = weight.attr("shape").attr("__getitem__")(0).cast<int64_t>();
  const int64_t d = weight.attr("shape").attr("__getitem__")(1).cast<int64_t>();
  const int64_t n = labels.attr("numel")().cast<int64_t>();
  fedms::TokenHead head{};
  head.vocabulary = v;
  head.width = d;
  head.weight = data_of<float>("weight", weight, "torch.float32", v * d);
  head.bias = data_of<float>("bias", bias, "torch.float32", v);
  if (!packed.is_none()) {
    const int64_t size = packed.attr("numel")().cast<int64_t>();
    head.quantized = {data_of<uint8_t>("packed", packed, "torch.uint8", size), size,
                      data_of<float>("weight_scale", weight_scale, "torch.float32", v), head.bias};
  }
  head.scale = scale;
  head.cap = cap;
  const float* states = data_of<float>("hidden", hidden, "torch.float32", n * d);
  const int64_t* tokens = data_of<int64_t>("labels", labels, "torch.int64", n);
  float* logits = data_of<float>("work", work, "torch.float32", chunk * fedms::TOKEN_STRETCH);
  const fedms::TokenLogProb out{data_of<float>("log_p", log_p, "torch.float32", n),
                                data_of<float>("confidence", confidence, "torch.float32", 2 * n),
                                data_of<int64_t>("best", best, "torch.int64", n),
                                data_of<float>("gradient", gradient, "torch.float32", n * d)};
  const py::gil_scoped_release unlocked;
  fedms::token_log_prob(head, n, states, tokens, chunk, logits, out);
}

}  // namespace

void define_token_loss(py::module_ m) {
  m.def("token_log_prob", &token_log_prob, py::arg("hidden"), py::arg("weight"), py::arg("packed"),
        py::arg("weight_scale"), py::arg("bias"), py::arg("labels"), py::arg("scale"), py::arg("cap"), py::arg("chunk"),
        py::arg("work"), py::arg("log_p"), py::arg("confidence"), py::arg("best"), py::arg("gradient"),
        "Writes log_p, confidence, best and, unless it is None, gradient; see csrc/include/fedms/token_loss.h.");
  m.attr("TOKEN_STRETCH") = fedms::TOKEN_STRETCH;
}
