// The part of DLPack 1.x that is needed to look at a tensor for the length of a call: the same layout in memory as
// dlpack.h of github.com/dmlc/dlpack, which the C exchange API of `type(tensor).__dlpack_c_exchange_api__` fixes.
#pragma once

#include <cstdint>

namespace fedms::dlpack {

enum DeviceType : int32_t { cpu = 1, cuda = 2 };
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

struct Version {
  uint32_t major, minor;
};

// A tensor with its owner; whoever holds it calls `deleter`, unless it is given to managed_to_py_object.
struct ManagedTensor {
  Version version;
  void* owner;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  // Makes an uninitialized tensor of the prototype's device, dtype and shape. 0, or -1 after a call of set_error.
  int (*allocate)(Tensor* prototype, ManagedTensor** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  void* managed_from_py_object;
  // Gives the tensor to a new Python object. 0, or -1 with a Python exception set.
  int (*managed_to_py_object)(ManagedTensor* tensor, void** out_py_object);
  // Describes a tensor without taking part in its ownership. 0, or -1 with a Python exception set. May be null.
  int (*tensor_from_py_object)(void* py_object, Tensor* out);
  // The stream that work on a device is queued on now. 0, or -1 with a Python exception set. May be null.
  int (*current_work_stream)(int32_t device_type, int32_t device, void** out_stream);
};

}  // namespace fedms::dlpack
