#include "pairs.h"

#include "fedms/isa.h"

namespace fedms {

const PairKernels* pair_kernels() {
#ifdef FEDMS_X86
  static const bool available = avx512_has_bf16();
  if (available && isa() == Isa::avx512) return &pair_kernels_avx512bf16;
#endif
  return nullptr;
}

}  // namespace fedms
