#include "fedms/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fedms {
namespace {

Isa parse(const char* text) {
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (std::strcmp(text, name(isa)) == 0) {
      if (isa > detected_isa()) {
        throw std::invalid_argument(std::string("instruction set '") + text + "' is not available here; the best is '" +
                                    name(detected_isa()) + "'");
      }
      return isa;
    }
  }
  throw std::invalid_argument(std::string("unknown instruction set '") + text +
                              "' (FEDMS_CPU_ISA); expected portable, avx2 or avx512");
}

Isa& current() {
  static Isa value = [] {
    const char* text = std::getenv("FEDMS_CPU_ISA");
    return text && *text ? parse(text) : detected_isa();
  }();
  return value;
}

}  // namespace

const char* name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable";
}

Isa detected_isa() {
#ifdef FEDMS_X86
  // __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa isa() { return current(); }

void set_isa(const char* text) { current() = parse(text); }

}  // namespace fedms
