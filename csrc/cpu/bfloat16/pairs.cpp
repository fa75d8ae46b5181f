#include "pairs.h"

#include "fedms/isa.h"

namespace fedms {

const PairKernels* pair_kernels() {
#ifdef FEDMS_X86
  static const bool has_instruction = avx512_has_bf16();
  if (has_instruction && isa() == Isa::avx512) return &pair_kernels_avx512bf16;
#endif
  return nullptr;
}

}  // namespace fedms
