#include <cmath>
#include <cstring>

#include "row_kernels.h"

namespace fedms {

#define NAME logit_row_avx512
#include "row_kernels.inc"

}  // namespace fedms
