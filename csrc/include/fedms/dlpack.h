// The part of DLPack 1.x that is needed to look at a tensor for the length of a call: the same layout in memory as
// dlpack.h of github.com/dmlc/dlpack, which the C exchange API of `type(tensor).__dlpack_c_exchange_api__` fixes.
#pragma once

#include <cstdint>

namespace fedms::dlpack {

enum DeviceType : int32_t { cpu = 1 };
enum TypeCode : uint8_t { signed_integer = 0, unsigned_integer = 1, floating = 2, brain_floating = 4 };

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null means row-major and dense
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void* allocate;
  void* managed_from_py_object;
  void* managed_to_py_object;
  // Describes a tensor without taking part in its ownership. 0, or -1 with a Python exception set. May be null.
  int (*tensor_from_py_object)(void* py_object, Tensor* out);
  void* current_work_stream;
};

}  // namespace fedms::dlpack
