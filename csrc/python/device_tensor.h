// Tensors of a GPU for the length of a call, through DLPack's C exchange API or, from a torch that lacks it, through their Python
// attributes.
#pragma once

#include <array>

#include "tensor_view.h"

namespace fedms::python {

// A tensor that a kernel cannot read where it is. In Python it is a ValueError that says which one and why.
struct Declined : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Type {
  uint8_t code, bits;
  const char* name;

  bool operator==(const Type& other) const { return code == other.code && bits == other.bits; }
};
constexpr Type BF16{dlpack::brain_floating, 16, "bfloat16"}, FP16{dlpack::floating, 16, "float16"};
constexpr Type FP32{dlpack::floating, 32, "float32"}, INT8{dlpack::signed_integer, 8, "int8"};
constexpr Type INT32{dlpack::signed_integer, 32, "int32"}, INT64{dlpack::signed_integer, 64, "int64"};
constexpr Type TYPES[] = {BF16, FP16, FP32, INT8, INT32, INT64};

inline bool operator==(const dlpack::Device& a, const dlpack::Device& b) { return a.type == b.type && a.id == b.id; }

class DeviceTensor {
 public:
  DeviceTensor(const char* name, py::handle tensor, Origin origin = Origin::outside) : name_(name) {
    const PyTypeObject* const type = Py_TYPE(tensor.ptr());
    if (type != tensor_type && type != parameter_type) decline(std::string("is a ") + type->tp_name + ", not a torch.Tensor");
    if (origin == Origin::outside) refuse_negated(tensor);
    if (exchange) {
      if (exchange->tensor_from_py_object(tensor.ptr(), &view_.tensor) != 0) throw py::error_already_set();
    } else {
      read_attributes(tensor);
    }
    data_ = static_cast<char*>(view_.tensor.data) + view_.tensor.byte_offset;
  }
  DeviceTensor(const DeviceTensor&) = delete;

  void refuse_negated(py::handle tensor) const {
    if (is_negated(tensor)) decline("is negated when it is read; pass .resolve_neg()");
  }

  dlpack::Device device() const { return view_.tensor.device; }
  int64_t size(int d) const { return view_.size(d); }
  int64_t stride(int d) const { return view_.stride(d); }
  void* data() const { return data_; }

  bool is(const Type& type) const { return view_.tensor.dtype.code == type.code && view_.tensor.dtype.bits == type.bits; }

  const DeviceTensor& expect(const dlpack::Device& device, const Type& type) const {
    if (!(view_.tensor.device == device)) decline("is on another device than the plan");
    if (!is(type) || view_.tensor.dtype.lanes != 1) decline(std::string("is not ") + type.name);
    return *this;
  }

  // A matrix with any strides.
  const DeviceTensor& matrix(int64_t rows, int64_t columns) const {
    if (view_.dimensions() != 2 || size(0) != rows || size(1) != columns) decline("has another shape than the plan's");
    return *this;
  }
  // (..., columns) as a matrix with numbers side by side in rows that begin at multiples of 16 bytes; returns their stride.
  int64_t rows(int64_t rows, int64_t columns) const {
    if (view_.dimensions() == 0 || view_.columns() != columns || view_.rows() != rows) {
      decline("has another shape than the plan's");
    }
    const bool plain = view_.dimensions() == 2 && (columns == 1 || stride(1) == 1) && (rows == 1 || stride(0) >= columns);
    if (!plain && !view_.dense()) decline("has no rows of numbers side by side");
    const int64_t pitch = plain && rows > 1 ? stride(0) : columns, bytes = view_.tensor.dtype.bits / 8;
    if (pitch * bytes % 16 || reinterpret_cast<uintptr_t>(data_) % 16) {
      decline("has rows that do not begin at multiples of 16 bytes");
    }
    return pitch;
  }
  // At least so many numbers, one after the other.
  const DeviceTensor& dense(int64_t numbers) const {
    if (view_.dimensions() == 0 || !view_.dense() || view_.rows() * view_.columns() < numbers) {
      decline("is not dense, or too small");
    }
    return *this;
  }

 private:
  [[noreturn]] void decline(const std::string& what) const { throw Declined(name_ + (" " + what)); }

  void read_attributes(py::handle tensor) {
    dlpack::Tensor& t = view_.tensor;
    const py::object device = tensor.attr("device"), index = device.attr("index");
    t.device.type = device.attr("type").cast<std::string>() == "cuda" ? dlpack::cuda : dlpack::cpu;
    t.device.id = index.is_none() ? 0 : index.cast<int32_t>();
    const std::string type = py::str(tensor.attr("dtype"));
    for (const Type& known : TYPES) {
      if (type == std::string("torch.") + known.name) t.dtype = {known.code, known.bits, 1};
    }
    t.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    const py::tuple shape = tensor.attr("shape"), strides = tensor.attr("stride")();
    if (shape.size() > shape_.size()) decline("has more than 16 dimensions");
    t.ndim = static_cast<int32_t>(shape.size());
    for (size_t d = 0; d < shape.size(); ++d) {
      shape_[d] = shape[d].cast<int64_t>();
      strides_[d] = strides[d].cast<int64_t>();
    }
    t.shape = shape_.data();
    t.strides = strides_.data();
  }

  const char* name_;
  void* data_ = nullptr;
  View view_;
  std::array<int64_t, 16> shape_, strides_;  // of read_attributes
};

// Memory that kernels use during a call: numbers of 16 bits, allocated by torch on the device of `like`, a tensor of that type.
// Through the exchange API no Python object is made for it.
class Scratch {
 public:
  Scratch(py::handle like, const Type& type, const dlpack::Device& device, int64_t numbers) {
    if (exchange) {
      dlpack::Tensor prototype{};
      prototype.device = device;
      prototype.ndim = 1;
      prototype.dtype = {type.code, type.bits, 1};
      prototype.shape = &numbers;
      if (exchange->allocate(&prototype, &managed_, nullptr, [](void*, const char*, const char*) {}) == 0) {
        data_ = managed_->tensor.data;
        return;
      }
      managed_ = nullptr;  // what torch raises below names the reason
    }
    tensor_ = like.attr("new_empty")(numbers);
    data_ = reinterpret_cast<void*>(tensor_.attr("data_ptr")().cast<uintptr_t>());
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    if (managed_) managed_->deleter(managed_);
  }

  void* data() const { return data_; }

 private:
  dlpack::ManagedTensor* managed_ = nullptr;
  py::object tensor_;
  void* data_ = nullptr;
};

}  // namespace fedms::python
