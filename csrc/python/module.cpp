// fedms_ext._C: the only file that knows Python. It knows no torch: tensors come in through DLPack's C exchange
// API, or, from a torch that lacks it, through their Python attributes.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "fedms/cuda.h"
#include "fedms/dlpack.h"
#include "fedms/half.h"
#include "fedms/int8.h"
#include "fedms/isa.h"
#include "fedms/lora.h"

namespace py = pybind11;

namespace {

PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;
const fedms::dlpack::ExchangeApi* exchange = nullptr;

// Returns whether the exchange API is used.
bool set_tensor_types(py::type type, py::type parameter, bool use_exchange) {
  tensor_type = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  exchange = nullptr;
  if (use_exchange && py::hasattr(type, "__dlpack_c_exchange_api__")) {
    const py::object capsule = type.attr("__dlpack_c_exchange_api__");
    const auto* api =
        static_cast<const fedms::dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    if (api->version.major == 1 && api->tensor_from_py_object) exchange = api;
  }
  return exchange != nullptr;
}

// How DLPack and torch name an element type.
template <class T>
struct Element;
template <>
struct Element<float> {
  static constexpr uint8_t code = fedms::dlpack::floating;
  static constexpr const char* name = "float32";
};
template <>
struct Element<int8_t> {
  static constexpr uint8_t code = fedms::dlpack::signed_integer;
  static constexpr const char* name = "int8";
};
template <>
struct Element<uint8_t> {
  static constexpr uint8_t code = fedms::dlpack::unsigned_integer;
  static constexpr const char* name = "uint8";
};
template <>
struct Element<fedms::Fp16> {
  static constexpr uint8_t code = fedms::dlpack::floating;
  static constexpr const char* name = "float16";
};
template <>
struct Element<fedms::Bf16> {
  static constexpr uint8_t code = fedms::dlpack::brain_floating;
  static constexpr const char* name = "bfloat16";
};

// A CPU tensor as a matrix: its last dimension, and all others as rows. It must be dense, that is row-major without
// gaps, or, where `dense` is false, have two dimensions and any strides.
template <class T>
class MatrixOf {
 public:
  MatrixOf(const char* name, py::handle tensor, bool dense = true) : name_(name) {
    if (!PyObject_TypeCheck(tensor.ptr(), tensor_type)) {
      throw py::type_error(std::string(name) + " is not a tensor but " + Py_TYPE(tensor.ptr())->tp_name);
    }
    if (exchange) {
      read_exchange(tensor);
    } else {
      read_attributes(tensor);
    }
    const int dimensions = static_cast<int>(shape_.size());
    if (dimensions == 0 || (!dense && dimensions != 2)) fail("has " + std::to_string(dimensions) + " dimensions");
    columns_ = shape_.back();
    for (int d = 0; d < dimensions - 1; ++d) rows_ *= shape_[d];
    int64_t expected = 1;
    for (int d = dimensions - 1; dense && d >= 0 && rows_ * columns_ > 0; --d) {
      if (shape_[d] > 1 && strides_[d] != expected) fail("is not contiguous; pass .contiguous()");
      expected *= shape_[d];
    }
  }

  T* data() const { return data_; }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t stride(int d) const { return strides_[d]; }

  const MatrixOf& expect(int64_t rows, int64_t columns) const {
    if (rows_ != rows || columns_ != columns) {
      fail("has the shape (" + std::to_string(rows_) + ", " + std::to_string(columns_) + "), expected (" +
           std::to_string(rows) + ", " + std::to_string(columns) + ")");
    }
    return *this;
  }

 private:
  void read_exchange(py::handle tensor) {
    fedms::dlpack::Tensor view;
    if (exchange->tensor_from_py_object(tensor.ptr(), &view) != 0) throw py::error_already_set();
    if (view.device.type != fedms::dlpack::cpu) fail("is not on the CPU");
    if (view.dtype.code != Element<T>::code || view.dtype.bits != 8 * sizeof(T) || view.dtype.lanes != 1) {
      fail(std::string("is not ") + Element<T>::name);
    }
    data_ = reinterpret_cast<T*>(static_cast<char*>(view.data) + view.byte_offset);
    shape_.assign(view.shape, view.shape + view.ndim);
    strides_.resize(shape_.size());
    int64_t dense = 1;
    for (int d = view.ndim - 1; d >= 0; --d) {
      strides_[d] = view.strides ? view.strides[d] : dense;
      dense *= shape_[d];
    }
  }

  void read_attributes(py::handle tensor) {
    if (tensor.attr("device").attr("type").cast<std::string>() != "cpu") fail("is not on the CPU");
    if (py::str(tensor.attr("dtype")).cast<std::string>() != std::string("torch.") + Element<T>::name) {
      fail(std::string("is not ") + Element<T>::name);
    }
    data_ = reinterpret_cast<T*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    shape_ = py::tuple(tensor.attr("shape")).cast<std::vector<int64_t>>();
    strides_ = py::tuple(tensor.attr("stride")()).cast<std::vector<int64_t>>();
  }

  [[noreturn]] void fail(const std::string& what) const { throw py::value_error(name_ + (" " + what)); }

  const char* name_;
  T* data_ = nullptr;
  int64_t rows_ = 1, columns_ = 1;
  std::vector<int64_t> shape_, strides_;
};
using Matrix = MatrixOf<float>;

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

void forward(py::handle x, const py::sequence& a, const py::sequence& b, const std::vector<double>& scale,
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

void backward(py::handle dy, const py::object& x, const py::sequence& a, const py::sequence& b,
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

void int8_pack(py::handle weight, py::handle packed) {
  const MatrixOf<int8_t> from("weight", weight);
  const MatrixOf<uint8_t> to("packed", packed);
  to.expect(1, fedms::int8_packed_size(from.rows(), from.columns()));
  const py::gil_scoped_release unlocked;
  fedms::int8_pack(from.rows(), from.columns(), from.data(), to.data());
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


// The plain case of an operator, in one call: every tensor is a float32 torch.Tensor or Parameter itself (no subclass), on the
// CPU and dense, and the shapes fit. Whatever else comes in is declined (None), and the caller goes the general way, which
// converts what can be converted and names what is wrong. Only with the exchange API: by attributes it would be slower.

struct View {
  fedms::dlpack::Tensor tensor{};

  int64_t dimensions() const { return tensor.ndim; }
  int64_t size(int d) const { return tensor.shape[d]; }
  int64_t stride(int d) const {
    if (tensor.strides) return tensor.strides[d];
    int64_t dense = 1;
    for (int i = tensor.ndim - 1; i > d; --i) dense *= tensor.shape[i];
    return dense;
  }
  int64_t rows() const {  // of the tensor as a matrix
    int64_t rows = 1;
    for (int d = 0; d < tensor.ndim - 1; ++d) rows *= tensor.shape[d];
    return rows;
  }
  int64_t columns() const { return tensor.shape[tensor.ndim - 1]; }
  bool dense() const {
    int64_t expected = 1;
    for (int d = tensor.ndim - 1; tensor.strides && d >= 0; --d) {
      if (tensor.shape[d] != 1 && tensor.strides[d] != expected) return false;
      expected *= tensor.shape[d];
    }
    return true;
  }
  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(tensor.data) + tensor.byte_offset);
  }
};

// Whether it is a plain tensor of this element type.
template <class T>
bool look(py::handle object, View& view) {
  if (Py_TYPE(object.ptr()) != tensor_type && Py_TYPE(object.ptr()) != parameter_type) return false;
  if (exchange->tensor_from_py_object(object.ptr(), &view.tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  const fedms::dlpack::Tensor& t = view.tensor;
  return t.device.type == fedms::dlpack::cpu && t.ndim > 0 && t.dtype.code == Element<T>::code &&
         t.dtype.bits == 8 * sizeof(T) && t.dtype.lanes == 1;
}

// Points at a dense float32 tensor that has these rows and columns as a matrix; null stands for None.
bool dense_matrix(py::handle object, int64_t rows, int64_t columns, float*& data) {
  View view;
  if (!look<float>(object, view) || !view.dense() || view.rows() != rows || view.columns() != columns) return false;
  data = view.data<float>();
  return true;
}
bool dense_or_none(py::handle object, int64_t rows, int64_t columns, float*& data) {
  data = nullptr;
  return object.is_none() || dense_matrix(object, rows, columns, data);
}

// A new uninitialized float32 tensor, allocated by torch.
struct NewTensor {
  py::object object;
  float* data;
};

void raise_allocation_error(void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); }

NewTensor new_tensor(int64_t* shape, int64_t dimensions) {
  fedms::dlpack::Tensor prototype{};
  prototype.device = {fedms::dlpack::cpu, 0};
  prototype.ndim = static_cast<int32_t>(dimensions);
  prototype.dtype = {Element<float>::code, 32, 1};
  prototype.shape = shape;
  fedms::dlpack::ManagedTensor* managed = nullptr;
  if (exchange->allocate(&prototype, &managed, nullptr, raise_allocation_error) != 0) throw py::error_already_set();
  float* const data = static_cast<float*>(managed->tensor.data);
  void* object = nullptr;
  if (exchange->managed_to_py_object(managed, &object) != 0) throw py::error_already_set();
  return {py::reinterpret_steal<py::object>(static_cast<PyObject*>(object)), data};
}

NewTensor new_matrix(int64_t rows, int64_t columns) {
  int64_t shape[] = {rows, columns};
  return new_tensor(shape, 2);
}

// Like another tensor, but for the length of the last dimension.
NewTensor new_like(const View& like, int64_t columns) {
  std::vector<int64_t> shape(like.tensor.shape, like.tensor.shape + like.tensor.ndim);
  shape.back() = columns;
  return new_tensor(shape.data(), like.tensor.ndim);
}

// The experts and, if x has two dimensions, a gate (m, E).
bool plain_experts(const View& x, int64_t n, int64_t k, const py::sequence& a, const py::sequence& b,
                   const py::sequence& scale, py::handle gate, fedms::Lora& lora) {
  lora.m = x.rows();
  lora.n = n;
  lora.k = k;
  const size_t experts = a.size();
  for (size_t e = 0; e < experts; ++e) {
    View view;
    if (!look<float>(a[e], view) || !view.dense() || view.dimensions() != 2 || view.columns() != k) return false;
    const int64_t rank = view.rows();
    float* b_data;
    if (rank == 0 || !dense_matrix(b[e], n, rank, b_data)) return false;
    lora.experts.push_back({rank, scale[e].cast<float>(), view.data<float>(), b_data});
  }
  if (gate.is_none()) return true;
  View view;
  if (!look<float>(gate, view) || view.dimensions() != 2 || x.dimensions() != 2) return false;
  if (view.size(0) != lora.m || view.size(1) != static_cast<int64_t>(experts)) return false;
  lora.gate = view.data<float>();
  lora.gate_row_stride = view.stride(0);
  lora.gate_expert_stride = view.stride(1);
  return true;
}

// A frozen weight (n, k): float32, or packed with its scale, which is (n,) for int8 and (n, groups) for 4 bits.
struct PlainWeight {
  const float* full = nullptr;
  fedms::Int8Weight packed{};
  int64_t n = 0;

  bool read(py::handle weight, py::handle scale, int64_t k) {
    View view;
    if (scale.is_none()) {
      if (!look<float>(weight, view) || !view.dense() || view.dimensions() != 2 || view.columns() != k) return false;
      full = view.data<float>();
      n = view.rows();
      return true;
    }
    View scales;
    if (!look<uint8_t>(weight, view) || !view.dense() || view.dimensions() != 1) return false;
    if (!look<float>(scale, scales) || !scales.dense() || scales.dimensions() > 2) return false;
    n = scales.size(0);
    packed = {view.data<uint8_t>(), view.columns(), scales.dimensions() == 1 ? scales.data<float>() : nullptr, nullptr};
    return true;
  }
};

py::object linear_forward(py::handle x, py::handle weight, py::handle weight_scale, py::handle bias, const py::sequence& a,
                          const py::sequence& b, const py::sequence& scale, py::handle gate) {
  View x_view;
  PlainWeight w;
  fedms::Lora lora;
  float* bias_data;
  if (!exchange || !look<float>(x, x_view) || !x_view.dense() || x_view.rows() == 0) return py::none();
  const int64_t k = x_view.columns();
  if (!w.read(weight, weight_scale, k) || !dense_or_none(bias, 1, w.n, bias_data)) return py::none();
  if (!plain_experts(x_view, w.n, k, a, b, scale, gate, lora)) return py::none();
  if (w.full && lora.m > fedms::few_rows()) return py::none();
  const NewTensor y = new_like(x_view, w.n), s = new_matrix(lora.m, lora.total_rank());
  const float* const from = x_view.data<float>();
  {
    const py::gil_scoped_release unlocked;
    if (w.full) {
      fedms::few_rows_forward(lora.m, w.n, k, from, w.full, bias_data, y.data);
      fedms::lora_forward(lora, from, s.data, y.data);
    } else {
      w.packed.bias = bias_data;
      fedms::int8_forward(w.packed, lora, from, s.data, y.data);
    }
  }
  return py::make_tuple(y.object, s.object);
}

// `weight` and its scale are what dx is computed from (n of it are k), None if dx is not needed. `needs`: dx, dgate, every da,
// every db. The result has the same order, None for what is not needed.
py::object linear_backward(py::handle dy, py::handle x, py::handle weight, py::handle weight_scale, const py::sequence& a,
                           const py::sequence& b, const py::sequence& scale, py::handle gate, py::handle s,
                           const py::sequence& needs) {
  View dy_view, a_view;
  fedms::Lora lora;
  if (!exchange || !look<float>(dy, dy_view) || !dy_view.dense() || dy_view.rows() == 0) return py::none();
  const int64_t n = dy_view.columns(), m = dy_view.rows(), experts = static_cast<int64_t>(a.size());
  if (experts == 0 || !look<float>(a[0], a_view)) return py::none();
  const int64_t k = a_view.columns();
  if (!plain_experts(dy_view, n, k, a, b, scale, gate, lora)) return py::none();
  float *x_data, *s_data;
  if (!dense_or_none(x, m, k, x_data) || !dense_or_none(s, m, lora.total_rank(), s_data)) return py::none();

  PlainWeight w;
  const bool needs_dx = needs[0].cast<bool>();
  if (needs_dx) {
    if (!w.read(weight, weight_scale, weight_scale.is_none() ? k : n)) return py::none();
    if (w.n != (w.full ? n : k) || (w.full && m > fedms::few_rows()) || (!w.full && !w.packed.scale)) return py::none();
  }
  py::tuple result(2 + 2 * experts);
  fedms::LoraGradients out;
  const auto make = [&](int64_t place, const auto& allocate) -> float* {
    if (!needs[place].cast<bool>()) {
      result[place] = py::none();
      return nullptr;
    }
    NewTensor made = allocate();
    result[place] = std::move(made.object);
    return made.data;
  };
  out.dx = make(0, [&] { return new_like(dy_view, k); });
  out.dgate = make(1, [&] { return new_matrix(m, experts); });
  for (int64_t e = 0; e < experts; ++e) {
    out.da.push_back(make(2 + e, [&] { return new_matrix(lora.experts[e].rank, k); }));
    if (out.da.back() && !x_data) return py::none();
  }
  for (int64_t e = 0; e < experts; ++e) {
    out.db.push_back(make(2 + experts + e, [&] { return new_matrix(n, lora.experts[e].rank); }));
    if (out.db.back() && !s_data) return py::none();
  }
  if (out.dgate && !s_data) return py::none();
  const float* const from = dy_view.data<float>();
  {
    const py::gil_scoped_release unlocked;
    if (w.full) {
      fedms::few_rows_backward(m, n, k, from, w.full, out.dx);
      fedms::lora_backward(lora, from, x_data, s_data, out);
    } else {
      fedms::int8_backward(w.packed, lora, from, x_data, s_data, out);
    }
  }
  return result;
}

#ifdef FEDMS_CUDA_ARCHS
// Addresses on the device are numbers here: 0 is null. fedms_ext/backends/cuda.py checks the tensors behind them.
void define_cuda(py::module_ m) {
  namespace cuda = fedms::cuda;
  using Address = uintptr_t;
  m.doc() = "The launchers of csrc/include/fedms/cuda.h on addresses; an error of CUDA is a RuntimeError that names the launch.";
  const auto element = [](bool bf16) { return bf16 ? cuda::Element::bf16 : cuda::Element::fp16; };
  const auto at = [](Address address) { return reinterpret_cast<void*>(address); };
  const auto floats = [](Address address) { return reinterpret_cast<float*>(address); };

  py::class_<cuda::Stream>(m, "Stream").def(py::init([at](int device, Address handle) {
    return cuda::Stream{device, at(handle)};
  }), py::arg("device"), py::arg("handle"));
  py::class_<cuda::DeviceProperties>(m, "DeviceProperties").def(
      py::init([](int capability, int multiprocessors, int shared_memory) {
        return cuda::DeviceProperties{capability, multiprocessors, shared_memory};
      }), py::arg("capability"), py::arg("multiprocessors"), py::arg("shared_memory"))
      .def_readonly("multiprocessors", &cuda::DeviceProperties::multiprocessors);
  py::class_<cuda::Dropout>(m, "Dropout").def(py::init([](double p, uint64_t seed) {
    return cuda::Dropout{p, seed};
  }), py::arg("p"), py::arg("seed"));
  py::class_<cuda::Factors>(m, "Factors").def(
      py::init([floats](Address scale, Address expert, Address gate, int64_t row_stride, int64_t expert_stride) {
        return cuda::Factors{floats(scale), reinterpret_cast<const int32_t*>(expert), floats(gate), row_stride,
                             expert_stride};
      }), py::arg("scale"), py::arg("expert"), py::arg("gate"), py::arg("row_stride"), py::arg("expert_stride"));

  py::class_<cuda::Segments>(m, "Segments").def(
      py::init([](const std::vector<int>& ends, const std::vector<int>& ranks, const std::vector<int>& firsts) {
        if (ends.size() > cuda::MOST_SEGMENTS || ranks.size() != ends.size() || firsts.size() != ends.size()) {
          throw py::value_error("segments: expected as many ranks and firsts as ends, and 8 at most");
        }
        cuda::Segments segments;
        segments.count = int(ends.size());
        std::copy(ends.begin(), ends.end(), segments.ends);
        std::copy(ranks.begin(), ranks.end(), segments.ranks);
        std::copy(firsts.begin(), firsts.end(), segments.firsts);
        return segments;
      }), py::arg("ends"), py::arg("ranks"), py::arg("firsts"));
  py::class_<cuda::FusedShrink>(m, "FusedShrink")
      .def(py::init([at](Address a, int64_t a_stride, Address s, const cuda::Factors& factors, Address ready) {
        return cuda::FusedShrink{at(a), a_stride, at(s), factors, reinterpret_cast<int32_t*>(ready)};
      }), py::arg("a"), py::arg("a_stride"), py::arg("s"), py::arg("factors"), py::arg("ready"))
      .def(py::init([] { return cuda::FusedShrink{}; }));
  m.attr("MOST_SEGMENTS") = cuda::MOST_SEGMENTS;

  m.def("check_device", &cuda::check_device, py::arg("device"));
  m.def("gemm_tiles", &cuda::gemm_tiles, py::arg("chip"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("r"),
        py::arg("int8"), py::arg("has_dropout"), py::arg("full_tiles"));
  m.def("shrinks_inside", &cuda::shrinks_inside, py::arg("tile"), py::arg("r"));
  m.def("gemm_tile_name", &cuda::gemm_tile_name, py::arg("tile"));
  m.def("gemm", [=](bool bf16, int64_t m, int64_t n, int64_t k, int64_t r, Address x, int64_t x_stride, Address w,
                    int64_t w_stride, Address w_scale, Address bias, Address t, int64_t t_stride, Address f,
                    int64_t f_stride, Address y, bool transposed, const cuda::Dropout& dropout,
                    const cuda::Segments& segments, const cuda::FusedShrink& inside, int tile, const cuda::DeviceProperties& chip, const cuda::Stream& stream) {
    cuda::gemm({element(bf16), m, n, k, r, at(x), x_stride, at(w), w_stride, floats(w_scale), at(bias), at(t), t_stride,
                at(f), f_stride, at(y), transposed, dropout, segments, inside}, tile, chip, stream);
  }, py::arg("bf16"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("r"), py::arg("x"), py::arg("x_stride"),
        py::arg("w"), py::arg("w_stride"), py::arg("w_scale"), py::arg("bias"), py::arg("t"), py::arg("t_stride"),
        py::arg("f"), py::arg("f_stride"), py::arg("y"), py::arg("transposed"), py::arg("dropout"), py::arg("segments"),
        py::arg("inside"), py::arg("tile"), py::arg("chip"), py::arg("stream"));
  m.def("shrink", [=](bool bf16, int64_t m, int64_t k, int64_t r, Address x, int64_t x_stride, Address a,
                      int64_t a_stride, Address s, Address t, int64_t t_stride, const cuda::Factors& factors,
                      const cuda::Segments& segments, const cuda::Dropout& dropout, const cuda::Stream& stream) {
    cuda::shrink(element(bf16), m, k, r, at(x), x_stride, at(a), a_stride, at(s), at(t), t_stride, factors, segments,
                 dropout, stream);
  }, py::arg("bf16"), py::arg("m"), py::arg("k"), py::arg("r"), py::arg("x"), py::arg("x_stride"), py::arg("a"),
        py::arg("a_stride"), py::arg("s"), py::arg("t"), py::arg("t_stride"), py::arg("factors"), py::arg("segments"),
        py::arg("dropout"), py::arg("stream"));
  m.def("apply_scale_and_gate", [=](bool bf16, int64_t m, int64_t r, Address s, Address t, int64_t t_stride,
                     const cuda::Factors& factors, const cuda::Segments& segments, const cuda::Stream& stream) {
    cuda::apply_scale_and_gate(element(bf16), m, r, at(s), at(t), t_stride, factors, segments, stream);
  }, py::arg("bf16"), py::arg("m"), py::arg("r"), py::arg("s"), py::arg("t"), py::arg("t_stride"), py::arg("factors"),
        py::arg("segments"), py::arg("stream"));
  m.def("lora_grad_partials_blocks", &cuda::lora_grad_partials_blocks, py::arg("c"));
  m.def("lora_grad_partials", [=](bool bf16, int64_t m, int64_t c, int64_t r, int64_t rows_a_split, Address z, int64_t z_stride,
                     Address t, int64_t t_stride, Address g, Address b, int64_t b_stride, Address u,
                     const cuda::Segments& segments, const cuda::Dropout& dropout, const cuda::Stream& stream) {
    cuda::lora_grad_partials(element(bf16), m, c, r, rows_a_split, at(z), z_stride, at(t), t_stride, floats(g), at(b), b_stride,
                floats(u), segments, dropout, stream);
  }, py::arg("bf16"), py::arg("m"), py::arg("c"), py::arg("r"), py::arg("rows_a_split"), py::arg("z"),
        py::arg("z_stride"), py::arg("t"), py::arg("t_stride"), py::arg("g"), py::arg("b"), py::arg("b_stride"),
        py::arg("u"), py::arg("segments"), py::arg("dropout"), py::arg("stream"));
  m.def("finalize_row_grads", [=](bool bf16, int64_t m, int64_t r, int64_t experts, int64_t parts, Address u, Address s,
                           Address ds, int64_t ds_stride, Address dgate, const cuda::Factors& factors,
                           const cuda::Segments& segments, const cuda::Stream& stream) {
    cuda::finalize_row_grads(element(bf16), m, r, experts, parts, floats(u), at(s), at(ds), ds_stride, floats(dgate), factors,
                      segments, stream);
  }, py::arg("bf16"), py::arg("m"), py::arg("r"), py::arg("experts"), py::arg("parts"), py::arg("u"), py::arg("s"),
        py::arg("ds"), py::arg("ds_stride"), py::arg("dgate"), py::arg("factors"), py::arg("segments"),
        py::arg("stream"));
  m.def("reduce_partials", [=](bool bf16, int64_t c, int64_t r, int64_t parts, int64_t first, int64_t count, Address g,
                         Address out, int64_t row_stride, int64_t column_stride, const cuda::Stream& stream) {
    cuda::reduce_partials(element(bf16), c, r, parts, first, count, floats(g), at(out), row_stride, column_stride, stream);
  }, py::arg("bf16"), py::arg("c"), py::arg("r"), py::arg("parts"), py::arg("first"), py::arg("count"), py::arg("g"),
        py::arg("out"), py::arg("row_stride"), py::arg("column_stride"), py::arg("stream"));
}
#endif

}  // namespace

void define_token_loss(py::module_ m);  // loss_bindings.cpp

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of fedms_ext. Tensors are dense and on the CPU, float32 unless said otherwise, their last "
            "dimension the columns; anything else is a ValueError.";
  m.def("set_tensor_types", &set_tensor_types, py::arg("tensor"), py::arg("parameter"), py::arg("use_exchange") = true);
  m.def("linear_forward", &linear_forward, py::arg("x"), py::arg("weight"), py::arg("weight_scale"), py::arg("bias"),
        py::arg("a"), py::arg("b"), py::arg("scale"), py::arg("gate"),
        "(y, s) of a plain call on a weight that is float32 (weight_scale None) or packed, or None if it is not plain.");
  m.def("linear_backward", &linear_backward, py::arg("dy"), py::arg("x"), py::arg("weight"), py::arg("weight_scale"),
        py::arg("a"), py::arg("b"), py::arg("scale"), py::arg("gate"), py::arg("s"), py::arg("needs"),
        "The gradients of linear_forward: (dx, dgate, *da, *db), None for what is not needed; None if it is not plain.");
  m.def("build_info", [] {
    py::dict info;
    info["version"] = FEDMS_VERSION;
#ifdef FEDMS_CUDA_ARCHS
    info["cuda"] = FEDMS_CUDA_ARCHS;
#else
    info["cuda"] = py::none();
#endif
    info["isa_detected"] = fedms::name(fedms::detected_isa());
    info["isa_used"] = fedms::name(fedms::isa());
    py::list available;
    for (fedms::Isa isa : fedms::ALL_ISAS) {
      if (fedms::available(isa)) available.append(fedms::name(isa));
    }
    info["isa_available"] = available;
    info["openmp"] = _OPENMP;
    return info;
  });
#ifdef FEDMS_CUDA_ARCHS
  define_cuda(m.def_submodule("cuda"));
#endif
  define_token_loss(m);
  m.def("set_isa", [](const std::string& name) { fedms::set_isa(name.c_str()); }, py::arg("name"));
  m.def("int8_packed_size", &int8_packed_size, py::arg("n"), py::arg("k"), "Bytes of a packed int8 weight (n, k).");
  m.def("int8_pack", &int8_pack, py::arg("weight"), py::arg("packed"),
        "Packs weight (n, k) int8 into packed (int8_packed_size(n, k),) uint8, for the instruction set used now.");
  m.def("int8_unpack", &int8_unpack, py::arg("packed"), py::arg("weight"), "The inverse of int8_pack.");
  m.def("int8_steps", &int8_steps, py::arg("packed"),
        "In how many steps x is quantized for this packed weight of int8 or 4 bits.");
  m.def("nibbles_packed_size", &nibbles_packed_size, py::arg("n"), py::arg("k"), py::arg("group"),
        "Bytes of a packed 4-bit weight (n, k).");
  m.def("nibbles_pack", &nibbles_pack, py::arg("k"), py::arg("group"), py::arg("levels"), py::arg("q"),
        py::arg("scale"), py::arg("packed"),
        "Packs q (n, ceil(k / 2)) uint8 and scale (n, ceil(k / group)); see csrc/include/fedms/int8.h.");
  m.def("nibbles_unpack", &nibbles_unpack, py::arg("k"), py::arg("packed"), py::arg("q"), "The inverse: q alone.");
  m.def("nibbles_dequantize", &nibbles_dequantize, py::arg("group"), py::arg("packed"), py::arg("scale"),
        py::arg("weight"), "Writes the weight (n, k).");
  m.def("int8_forward", &int8_forward, py::arg("x"), py::arg("packed"), py::arg("weight_scale"), py::arg("bias"),
        py::arg("a"), py::arg("b"), py::arg("scale"), py::arg("gate"), py::arg("dropout_p"), py::arg("seed"),
        py::arg("s"), py::arg("y"), "Writes s and y; see csrc/include/fedms/int8.h.");
  m.def("fp16_forward", &half_forward<fedms::Fp16>, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("y"),
        "Writes y from weight (n, k) float16; see csrc/include/fedms/half.h.");
  m.def("bf16_forward", &half_forward<fedms::Bf16>, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("y"),
        "The same from bfloat16.");
  m.def("int8_backward", &int8_backward, py::arg("dy"), py::arg("x"), py::arg("k"), py::arg("packed_t"),
        py::arg("weight_t_scale"), py::arg("a"), py::arg("b"), py::arg("scale"), py::arg("gate"), py::arg("s"),
        py::arg("dropout_p"), py::arg("seed"), py::arg("dx"), py::arg("dgate"), py::arg("da"), py::arg("db"),
        "Writes the gradients; None is one that is not needed, and packed_t is one too if dx is.");
  m.def("lora_forward", &forward, py::arg("x"), py::arg("a"), py::arg("b"), py::arg("scale"), py::arg("gate"),
        py::arg("dropout_p"), py::arg("seed"), py::arg("s"), py::arg("y"), py::arg("first_row") = 0,
        "Writes s and adds to y; see csrc/include/fedms/lora.h.");
  m.def("lora_backward", &backward, py::arg("dy"), py::arg("x"), py::arg("a"), py::arg("b"), py::arg("scale"),
        py::arg("gate"), py::arg("s"), py::arg("dropout_p"), py::arg("seed"), py::arg("dx"), py::arg("dgate"),
        py::arg("da"), py::arg("db"), py::arg("first_row") = 0,
        "Adds to dx and writes the other gradients; None is one that is not needed.");
}
