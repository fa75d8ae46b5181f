// Starts a kernel, and makes an exception that names the launch out of every error.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "grid.h"

namespace fedms::cuda {

[[noreturn]] inline void fail(const Launch& launch, const std::string& reason) {
  throw Error(name_of(launch) + " on device " + std::to_string(launch.stream.device) + ": " + reason);
}

inline void check(cudaError_t error, const Launch& launch) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it has been reported; the next launch starts anew
  fail(launch, std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")");
}

// Makes a device the current one for the length of a launch.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Launch& launch) {
    check(cudaGetDevice(&previous_), launch);
    if (previous_ != launch.stream.device) {
      check(cudaSetDevice(launch.stream.device), launch);
      changed_ = true;
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Lets a kernel have so much shared memory, once on each device: the driver takes a microsecond to be told.
template <class Kernel>
void allow_shared_memory(const Launch& what, Kernel* kernel, int bytes) {
  constexpr int STANDARD = 48 << 10;  // what every kernel may have
  if (bytes <= STANDARD) return;
  static std::mutex mutex;
  static std::set<std::pair<Kernel*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, what.stream.device})) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), what);
  allowed.insert({kernel, what.stream.device});
}

template <class... Parameters>
void launch(const Launch& what, void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes,
            const Parameters&... arguments) {
  const DeviceGuard guard(what);
  allow_shared_memory(what, kernel, shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(what.stream.handle);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = grid.early ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

// A matrix (rows, columns) of 16-bit numbers for the tensor memory accelerator, in boxes of `box_rows` x 64, which
// come with the 128-byte swizzle, or x 32 with the 64-byte one. The driver makes it; it is asked for by name, so that nothing
// links to libcuda.
inline CUtensorMap tensor_map(const Launch& what, bool bf16, const void* data, int64_t rows, int64_t columns,
                              int64_t stride, int box_rows, int box_columns) {
  static const auto encode = [&] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result), what);
    if (result != cudaDriverEntryPointSuccess) fail(what, "the driver has no cuTensorMapEncodeTiled; it is too old");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[] = {cuuint64_t(stride) * 2};
  const cuuint32_t box[] = {cuuint32_t(box_columns), cuuint32_t(box_rows)}, steps[] = {1, 1};
  const CUresult error = encode(
      &map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(data),
      sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) {
    fail(what, "cuTensorMapEncodeTiled gave " + std::to_string(error) + " for a matrix (" + std::to_string(rows) + ", " +
                   std::to_string(columns) + ") with " + std::to_string(stride) + " numbers from row to row");
  }
  return map;
}

}  // namespace fedms::cuda
