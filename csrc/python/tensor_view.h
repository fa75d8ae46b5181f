// How tensors cross from Python: looked at in place for the length of a call, through DLPack's C exchange API or, from a torch
// that lacks it, through their Python attributes; and new ones, allocated by torch.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "fedms/dlpack.h"
#include "fedms/half.h"

namespace fedms::python {

namespace py = pybind11;

// What `set_tensor_types` was given: torch.Tensor, nn.Parameter, and the exchange API, null where it is not used.
inline PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;
inline const dlpack::ExchangeApi* exchange = nullptr;

// How DLPack and torch name an element type.
template <class T>
struct Element;
template <>
struct Element<float> {
  static constexpr uint8_t code = dlpack::floating;
  static constexpr const char* name = "float32";
};
template <>
struct Element<int8_t> {
  static constexpr uint8_t code = dlpack::signed_integer;
  static constexpr const char* name = "int8";
};
template <>
struct Element<uint8_t> {
  static constexpr uint8_t code = dlpack::unsigned_integer;
  static constexpr const char* name = "uint8";
};
template <>
struct Element<Fp16> {
  static constexpr uint8_t code = dlpack::floating;
  static constexpr const char* name = "float16";
};
template <>
struct Element<Bf16> {
  static constexpr uint8_t code = dlpack::brain_floating;
  static constexpr const char* name = "bfloat16";
};

// Whether the values of a tensor are to be negated when they are read, which its memory does not say.
inline bool is_negated(py::handle tensor) {
  static PyObject* const method = PyObject_GetAttrString(reinterpret_cast<PyObject*>(tensor_type), "is_neg");
  PyObject* const arguments[] = {tensor.ptr()};
  const py::object found = py::reinterpret_steal<py::object>(PyObject_Vectorcall(method, arguments, 1, nullptr));
  if (!found) throw py::error_already_set();
  return found.ptr() == Py_True;
}

// A CPU tensor as a matrix: its last dimension, and all others as rows. It must be dense, that is row-major without
// gaps, or, where `dense` is false, have two dimensions and any strides.
template <class T>
class MatrixOf {
 public:
  MatrixOf(const char* name, py::handle tensor, bool dense = true) : name_(name) {
    if (!PyObject_TypeCheck(tensor.ptr(), tensor_type)) {
      throw py::type_error(std::string(name) + " is not a tensor but " + Py_TYPE(tensor.ptr())->tp_name);
    }
    if (Py_TYPE(tensor.ptr()) != tensor_type && Py_TYPE(tensor.ptr()) != parameter_type) {
      throw py::type_error(std::string(name) + " is a " + Py_TYPE(tensor.ptr())->tp_name +
                           ", whose values need not lie in its own memory; pass a torch.Tensor");
    }
    if (is_negated(tensor)) fail("is negated when it is read; pass .resolve_neg()");
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
    dlpack::Tensor view;
    if (exchange->tensor_from_py_object(tensor.ptr(), &view) != 0) throw py::error_already_set();
    if (view.device.type != dlpack::cpu) fail("is not on the CPU");
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

// A tensor as it is, whatever its type. `look` fills it in without raising an error; it needs the exchange API.
struct View {
  dlpack::Tensor tensor{};

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

// Whether a tensor comes from outside, or was made by this package or looked at before, so that it cannot be negated.
enum class Origin { outside, known };

// Whether it is a plain tensor of this element type.
template <class T>
bool look(py::handle object, View& view, Origin origin = Origin::outside) {
  if (Py_TYPE(object.ptr()) != tensor_type && Py_TYPE(object.ptr()) != parameter_type) return false;
  if (origin == Origin::outside && is_negated(object)) return false;
  if (exchange->tensor_from_py_object(object.ptr(), &view.tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  const dlpack::Tensor& t = view.tensor;
  return t.device.type == dlpack::cpu && t.ndim > 0 && t.dtype.code == Element<T>::code &&
         t.dtype.bits == 8 * sizeof(T) && t.dtype.lanes == 1;
}

// Points at a dense float32 tensor, one of a forward pass, that has these rows and columns as a matrix; null stands for None.
inline bool dense_matrix(py::handle object, int64_t rows, int64_t columns, float*& data) {
  View view;
  if (!look<float>(object, view, Origin::known) || !view.dense() || view.rows() != rows || view.columns() != columns) {
    return false;
  }
  data = view.data<float>();
  return true;
}
inline bool dense_or_none(py::handle object, int64_t rows, int64_t columns, float*& data) {
  data = nullptr;
  return object.is_none() || dense_matrix(object, rows, columns, data);
}

// A new uninitialized float32 tensor, allocated by torch.
struct NewTensor {
  py::object object;
  float* data;
};

inline void raise_allocation_error(void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); }

inline NewTensor new_tensor(int64_t* shape, int64_t dimensions) {
  dlpack::Tensor prototype{};
  prototype.device = {dlpack::cpu, 0};
  prototype.ndim = static_cast<int32_t>(dimensions);
  prototype.dtype = {Element<float>::code, 32, 1};
  prototype.shape = shape;
  dlpack::ManagedTensor* managed = nullptr;
  if (exchange->allocate(&prototype, &managed, nullptr, raise_allocation_error) != 0) throw py::error_already_set();
  float* const data = static_cast<float*>(managed->tensor.data);
  void* object = nullptr;
  if (exchange->managed_to_py_object(managed, &object) != 0) throw py::error_already_set();
  return {py::reinterpret_steal<py::object>(static_cast<PyObject*>(object)), data};
}

inline NewTensor new_matrix(int64_t rows, int64_t columns) {
  int64_t shape[] = {rows, columns};
  return new_tensor(shape, 2);
}

// Like another tensor, but for the length of the last dimension.
inline NewTensor new_like(const View& like, int64_t columns) {
  std::vector<int64_t> shape(like.tensor.shape, like.tensor.shape + like.tensor.ndim);
  shape.back() = columns;
  return new_tensor(shape.data(), like.tensor.ndim);
}

}  // namespace fedms::python
