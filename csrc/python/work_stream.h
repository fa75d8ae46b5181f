// Where work on tensors of a GPU is queued.
#pragma once

#include "device_tensor.h"
#include "fedms/cuda.h"

namespace fedms::python {

// The stream that torch queues work of a device on now.
inline cuda::Stream current_stream(const dlpack::Device& device) {
  if (device.type == dlpack::cpu) return {0, nullptr};  // the emulator
  void* handle = nullptr;
  if (exchange && exchange->current_work_stream) {
    if (exchange->current_work_stream(device.type, device.id, &handle) != 0) throw py::error_already_set();
  } else {
    const py::object stream = py::module_::import("torch").attr("cuda").attr("current_stream")(device.id);
    handle = reinterpret_cast<void*>(stream.attr("cuda_stream").cast<uintptr_t>());
  }
  return {device.id, handle};
}

}  // namespace fedms::python
