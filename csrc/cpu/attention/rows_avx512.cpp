#include <cstring>

#include "rows.h"

namespace fedms {
namespace {

#include "rows.inc"

}  // namespace

const AttentionRows attention_rows_avx512 = {exponentials, gradients};

}  // namespace fedms
