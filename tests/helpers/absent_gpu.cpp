// Makes a CPU build of PyTorch take fake CUDA tensors (torch._subclasses.fake_tensor) through autograd and torch.compile: it says that
// there is one GPU, on which nothing can be computed. To be loaded before PyTorch's Python module, which asks at its import.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {

constexpr auto kind = c10::DeviceType::CUDA;

struct AbsentGpu : c10::impl::NoOpDeviceGuardImpl<kind> {
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(kind, 0); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream getNewStream(Device device, int = 0) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

// PyTorch finds the class by this name.
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};

static const c10::impl::DeviceGuardImplRegistrar registrar(kind, new AbsentGpu);
REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at
