// Whether a device can run the kernels of this build at all.
#include <climits>

#include "device.h"

namespace fedms::cuda {
namespace {

__global__ void nothing() {}

}  // namespace

void check_device(int device) {
  const Stream stream{device, nullptr};
  const Launch what{"asking for the kernels of this build", 0, 0, 0, 0, stream};
  const DeviceGuard guard(what);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, nothing), what);
}

}  // namespace fedms::cuda
