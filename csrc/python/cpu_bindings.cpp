// The CPU kernels, one function each: outputs are tensors that the caller made.
#include "tensor_view.h"

#include "fedms/half.h"
#include "fedms/int8.h"
#include "fedms/lora.h"

namespace fedms::python {
namespace {

fedms::Lora read_lora(int64_t m, int64_t n, int64_t k, const py::sequence& a, const py::sequence& b,
                      const std::vector<double>& scale, const py::object& gate, double dropout_p, uint64_t seed) {
  fedms::Lora lora;
  lora.m = m;
  lora.n = n;
  lora.k = k;
  if (a.size() != b.size() || a.size() != scale.size()) throw py::value_error("a, b and scale differ in length");
  for (size_t e = 0; e < scale.size(); ++e) {
    const Matrix a_e("a", a[e]), b_e("b", b[e]);
    const int64_t rank = a_e.rows();
    a_e.expect(rank, k);
    b_e.expect(n, rank);
    lora.experts.push_back({rank, static_cast<float>(scale[e]), a_e.data(), b_e.data()});
  }
  if (!gate.is_none()) {
    const Matrix view("gate", gate, false);
    view.expect(m, static_cast<int64_t>(scale.size()));
    lora.gate = view.data();
    lora.gate_row_stride = view.stride(0);
    lora.gate_expert_stride = view.stride(1);
  }
  if (!(dropout_p >= 0 && dropout_p < 1)) throw py::value_error("dropout_p is not in [0, 1)");
  lora.dropout_p = dropout_p;
  lora.seed = seed;
  return lora;
}

void lora_forward(py::handle x, const py::sequence& a, const py::sequence& b, const std::vector<double>& scale,
             const py::object& gate, double dropout_p, uint64_t seed, py::handle s, py::handle y, int64_t first_row) {
  const Matrix x_view("x", x), y_view("y", y), s_view("s", s);
  const int64_t m = x_view.rows(), k = x_view.columns(), n = y_view.columns();
  fedms::Lora lora = read_lora(m, n, k, a, b, scale, gate, dropout_p, seed);
  lora.first_row = first_row;
  y_view.expect(m, n);
  s_view.expect(m, lora.total_rank());
  const py::gil_scoped_release unlocked;
  fedms::lora_forward(lora, x_view.data(), s_view.data(), y_view.data());
}

// What `backward` and `int8_backward` have in common.
struct BackwardOperands {
  fedms::Lora lora;
  const float *x, *s;
  fedms::LoraGradients out;
};

BackwardOperands read_backward(int64_t m, int64_t n, int64_t k, const py::object& x, const py::sequence& a,
                               const py::sequence& b, const std::vector<double>& scale, const py::object& gate,
                               const py::object& s, double dropout_p, uint64_t seed, const py::object& dx,
                               const py::object& dgate, const py::sequence& da, const py::sequence& db) {
  BackwardOperands operands{read_lora(m, n, k, a, b, scale, gate, dropout_p, seed), nullptr, nullptr, {}};
  const fedms::Lora& lora = operands.lora;
  const auto optional = [](const char* name, const py::object& tensor, int64_t rows, int64_t columns) -> float* {
    return tensor.is_none() ? nullptr : Matrix(name, tensor).expect(rows, columns).data();
  };
  const int64_t experts = static_cast<int64_t>(lora.experts.size());
  operands.x = optional("x", x, m, k);
  operands.s = optional("s", s, m, lora.total_rank());
  fedms::LoraGradients& out = operands.out;
  out.dx = optional("dx", dx, m, k);
  out.dgate = optional("dgate", dgate, m, experts);
  if (da.size() != lora.experts.size() || db.size() != lora.experts.size()) {
    throw py::value_error("da and db must have one entry an expert");
  }
  bool needs_x = false, needs_s = out.dgate != nullptr;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t rank = lora.experts[e].rank;
    out.da.push_back(optional("da", py::object(da[e]), rank, k));
    out.db.push_back(optional("db", py::object(db[e]), n, rank));
    needs_x |= out.da.back() != nullptr;
    needs_s |= out.db.back() != nullptr;
  }
  if (needs_x && x.is_none()) throw py::value_error("da needs x");
  if (needs_s && s.is_none()) throw py::value_error("db and dgate need s");
  return operands;
}

void lora_backward(py::handle dy, const py::object& x, const py::sequence& a, const py::sequence& b,
              const std::vector<double>& scale, const py::object& gate, const py::object& s, double dropout_p,
              uint64_t seed, const py::object& dx, const py::object& dgate, const py::sequence& da,
              const py::sequence& db, int64_t first_row) {
  if (a.size() == 0) throw py::value_error("there are no experts");
  const Matrix dy_view("dy", dy);
  BackwardOperands operands =
      read_backward(dy_view.rows(), dy_view.columns(), Matrix("a", a[0]).columns(), x, a, b, scale, gate, s, dropout_p,
                    seed, dx, dgate, da, db);
  operands.lora.first_row = first_row;
  const py::gil_scoped_release unlocked;
  fedms::lora_backward(operands.lora, dy_view.data(), operands.x, operands.s, operands.out);
}

int64_t int8_packed_size(int64_t n, int64_t k) {
  if (n < 0 || k < 0) throw py::value_error("n and k must be at least 0");
  return fedms::int8_packed_size(n, k);
}

void int8_pack(py::handle weight, py::handle packed, int64_t rotated) {
  const MatrixOf<int8_t> from("weight", weight);
  const MatrixOf<uint8_t> to("packed", packed);
  to.expect(1, fedms::int8_packed_size(from.rows(), from.columns()));
  const py::gil_scoped_release unlocked;
  fedms::int8_pack(from.rows(), from.columns(), from.data(), rotated, to.data());
}

void int8_unpack(py::handle packed, py::handle weight) {
  const MatrixOf<uint8_t> from("packed", packed);
  const MatrixOf<int8_t> to("weight", weight);
  const py::gil_scoped_release unlocked;
  fedms::int8_unpack(to.rows(), to.columns(), from.data(), from.columns(), to.data());
}

int32_t int8_steps(py::handle packed) {
  const MatrixOf<uint8_t> from("packed", packed);
  return fedms::int8_steps(from.data(), from.columns());
}

int64_t nibbles_packed_size(int64_t n, int64_t k, int64_t group) {
  if (n < 0 || k < 0) throw py::value_error("n and k must be at least 0");
  if (group != 32 && group != 64) throw py::value_error("group must be 32 or 64");
  return fedms::nibbles_packed_size(n, k, group);
}

void nibbles_pack(int64_t k, int64_t group, const std::vector<float>& levels, py::handle q, py::handle scale,
                  py::handle packed) {
  const MatrixOf<uint8_t> from("q", q), to("packed", packed);
  const Matrix scales("scale", scale);
  const int64_t n = from.rows();
  if (levels.size() != 16) throw py::value_error("levels must be 16 numbers");
  to.expect(1, nibbles_packed_size(n, k, group));
  from.expect(n, (k + 1) / 2);
  scales.expect(n, (k + group - 1) / group);
  const py::gil_scoped_release unlocked;
  fedms::nibbles_pack(n, k, group, levels.data(), from.data(), scales.data(), to.data());
}

void nibbles_unpack(int64_t k, py::handle packed, py::handle q) {
  const MatrixOf<uint8_t> from("packed", packed), to("q", q);
  to.expect(to.rows(), (k + 1) / 2);
  const py::gil_scoped_release unlocked;
  fedms::nibbles_unpack(to.rows(), k, from.data(), from.columns(), to.data());
}

void nibbles_dequantize(int64_t group, py::handle packed, py::handle scale, py::handle weight) {
  const MatrixOf<uint8_t> from("packed", packed);
  const Matrix scales("scale", scale), to("weight", weight);
  scales.expect(to.rows(), (to.columns() + group - 1) / group);
  const py::gil_scoped_release unlocked;
  fedms::nibbles_dequantize(to.rows(), to.columns(), group, from.data(), from.columns(), scales.data(), to.data());
}

void nibbles_input_gradient(py::handle dy, py::handle packed, py::handle scale, py::handle dx) {
  const MatrixOf<uint8_t> from("packed", packed);
  const Matrix dy_view("dy", dy), scales("scale", scale), to("dx", dx);
  const int64_t m = dy_view.rows(), n = dy_view.columns(), k = to.columns();
  to.expect(m, k);
  scales.expect(n, scales.columns());
  const py::gil_scoped_release unlocked;
  fedms::nibbles_input_gradient(m, n, k, from.data(), from.columns(), scales.columns(), scales.data(), dy_view.data(),
                                to.data());
}

// A weight of 4 bits has its scale inside.
fedms::Int8Weight read_weight(int64_t n, py::handle packed, const py::object& scale, const py::object& bias) {
  const MatrixOf<uint8_t> view("packed", packed);
  const float* scales = scale.is_none() ? nullptr : Matrix("weight_scale", scale).expect(1, n).data();
  return {view.data(), view.columns(), scales, bias.is_none() ? nullptr : Matrix("bias", bias).expect(1, n).data()};
}

void int8_forward(py::handle x, py::handle packed, const py::object& weight_scale, const py::object& bias,
                  const py::sequence& a, const py::sequence& b, const std::vector<double>& scale,
                  const py::object& gate, double dropout_p, uint64_t seed, py::handle s, py::handle y) {
  const Matrix x_view("x", x), y_view("y", y), s_view("s", s);
  const int64_t m = x_view.rows(), k = x_view.columns(), n = y_view.columns();
  const fedms::Lora lora = read_lora(m, n, k, a, b, scale, gate, dropout_p, seed);
  const fedms::Int8Weight weight = read_weight(n, packed, weight_scale, bias);
  y_view.expect(m, n);
  s_view.expect(m, lora.total_rank());
  const py::gil_scoped_release unlocked;
  fedms::int8_forward(weight, lora, x_view.data(), s_view.data(), y_view.data());
}

void int8_backward(py::handle dy, const py::object& x, int64_t k, const py::object& packed_t,
                   const py::object& weight_t_scale, const py::sequence& a, const py::sequence& b,
                   const std::vector<double>& scale, const py::object& gate, const py::object& s, double dropout_p,
                   uint64_t seed, const py::object& dx, const py::object& dgate, const py::sequence& da,
                   const py::sequence& db) {
  const Matrix dy_view("dy", dy);
  const BackwardOperands operands = read_backward(dy_view.rows(), dy_view.columns(), k, x, a, b, scale, gate, s,
                                                  dropout_p, seed, dx, dgate, da, db);
  fedms::Int8Weight transposed{};
  if (operands.out.dx) transposed = read_weight(k, packed_t, weight_t_scale, py::none());
  const py::gil_scoped_release unlocked;
  fedms::int8_backward(transposed, operands.lora, dy_view.data(), operands.x, operands.s, operands.out);
}

template <class Half>
void half_forward(py::handle x, py::handle weight, const py::object& bias, py::handle y) {
  const Matrix x_view("x", x), y_view("y", y);
  const MatrixOf<Half> w_view("weight", weight);
  const int64_t m = x_view.rows(), n = w_view.rows(), k = x_view.columns();
  w_view.expect(n, k);
  y_view.expect(m, n);
  const float* const b = bias.is_none() ? nullptr : Matrix("bias", bias).expect(1, n).data();
  const py::gil_scoped_release unlocked;
  fedms::half_forward(m, n, k, x_view.data(), w_view.data(), b, y_view.data());
}

void define_lora(py::module_& m) {
  m.def("lora_forward", &python::lora_forward, py::arg("x"), py::arg("a"), py::arg("b"), py::arg("scale"), py::arg("gate"),
        py::arg("dropout_p"), py::arg("seed"), py::arg("s"), py::arg("y"), py::arg("first_row") = 0,
        "Writes s and adds to y; see csrc/include/fedms/lora.h.");
  m.def("lora_backward", &python::lora_backward, py::arg("dy"), py::arg("x"), py::arg("a"), py::arg("b"), py::arg("scale"),
        py::arg("gate"), py::arg("s"), py::arg("dropout_p"), py::arg("seed"), py::arg("dx"), py::arg("dgate"),
        py::arg("da"), py::arg("db"), py::arg("first_row") = 0,
        "Adds to dx and writes the other gradients; None is one that is not needed.");
  m.def("fp16_forward", &python::half_forward<Fp16>, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("y"),
        "Writes y from weight (n, k) float16; see csrc/include/fedms/half.h.");
  m.def("bf16_forward", &python::half_forward<Bf16>, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("y"),
        "The same from bfloat16.");
}

void define_packed(py::module_& m) {
  m.def("int8_packed_size", &python::int8_packed_size, py::arg("n"), py::arg("k"), "Bytes of a packed int8 weight (n, k).");
  m.def("int8_pack", &python::int8_pack, py::arg("weight"), py::arg("packed"), py::arg("rotated") = 0,
        "Packs weight (n, k) int8 into packed (int8_packed_size(n, k),) uint8, for the instruction set used now.");
  m.def("int8_unpack", &python::int8_unpack, py::arg("packed"), py::arg("weight"), "The inverse of int8_pack.");
  m.def("int8_steps", &python::int8_steps, py::arg("packed"),
        "In how many steps x is quantized for this packed weight of int8 or 4 bits.");
  m.def("nibbles_packed_size", &python::nibbles_packed_size, py::arg("n"), py::arg("k"), py::arg("group"),
        "Bytes of a packed 4-bit weight (n, k).");
  m.def("nibbles_pack", &python::nibbles_pack, py::arg("k"), py::arg("group"), py::arg("levels"), py::arg("q"),
        py::arg("scale"), py::arg("packed"),
        "Packs q (n, ceil(k / 2)) uint8 and scale (n, ceil(k / group)); see csrc/include/fedms/int8.h.");
  m.def("nibbles_unpack", &python::nibbles_unpack, py::arg("k"), py::arg("packed"), py::arg("q"), "The inverse: q alone.");
  m.def("nibbles_dequantize", &python::nibbles_dequantize, py::arg("group"), py::arg("packed"), py::arg("scale"),
        py::arg("weight"), "Writes the weight (n, k).");
  m.def("nibbles_few_rows", &fedms::nibbles_few_rows, "Up to how many rows nibbles_input_gradient is faster than a product.");
  m.def("nibbles_input_gradient", &python::nibbles_input_gradient, py::arg("dy"), py::arg("packed"), py::arg("scale"),
        py::arg("dx"), "Writes dx (m, k) = dy (m, n) times the weight.");
  m.def("int8_forward", &python::int8_forward, py::arg("x"), py::arg("packed"), py::arg("weight_scale"), py::arg("bias"),
        py::arg("a"), py::arg("b"), py::arg("scale"), py::arg("gate"), py::arg("dropout_p"), py::arg("seed"),
        py::arg("s"), py::arg("y"), "Writes s and y; see csrc/include/fedms/int8.h.");
  m.def("int8_backward", &python::int8_backward, py::arg("dy"), py::arg("x"), py::arg("k"), py::arg("packed_t"),
        py::arg("weight_t_scale"), py::arg("a"), py::arg("b"), py::arg("scale"), py::arg("gate"), py::arg("s"),
        py::arg("dropout_p"), py::arg("seed"), py::arg("dx"), py::arg("dgate"), py::arg("da"), py::arg("db"),
        "Writes the gradients; None is one that is not needed, and packed_t is one too if dx is.");
}

}  // namespace

void define_cpu(py::module_& m) {
  define_lora(m);
  define_packed(m);
}

}  // namespace fedms::python
