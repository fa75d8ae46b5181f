#include "fedms/isa.h"

#if defined(FEDMS_X86)
#include <cpuid.h>
#elif defined(FEDMS_ARM64) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(FEDMS_ARM64)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fedms {
namespace {

Isa parse(const char* text) {
  for (Isa isa : ALL_ISAS) {
    if (std::strcmp(text, name(isa)) == 0) {
      if (!available(isa)) {
        throw std::invalid_argument(std::string("instruction set '") + text + "' is not available here; the best is '" +
                                    name(detected_isa()) + "'");
      }
      return isa;
    }
  }
  throw std::invalid_argument(std::string("unknown instruction set '") + text +
                              "' (FEDMS_CPU_ISA); expected portable, avx2, avxvnni, avx512, dotprod or i8mm");
}

Isa& current() {
  static Isa value = [] {
    const char* text = std::getenv("FEDMS_CPU_ISA");
    return text && *text ? parse(text) : detected_isa();
  }();
  return value;
}

#ifdef FEDMS_X86
// CPUID leaf 7.1: GCC 10's __builtin_cpu_supports does not know AVX-VNNI. The instruction is executed once, since in a virtual
// machine it takes some 20 us, and attention asks for the instruction set at every call.
bool cpu_has_avxvnni() {
  static const bool found = [] {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 4));
  }();
  return found;
}
#endif

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avxvnni: return "avxvnni";
    case Isa::avx2: return "avx2";
    case Isa::dotprod: return "dotprod";
    case Isa::i8mm: return "i8mm";
    default: return "portable";
  }
}

bool available(Isa isa) {
#ifdef FEDMS_X86
  // __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
  switch (isa) {
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    case Isa::avxvnni: return available(Isa::avx2) && cpu_has_avxvnni();
    case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    default: break;
  }
#elif defined(FEDMS_ARM64) && defined(__APPLE__)
  const auto has = [](const char* feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value;
  };
  if (isa == Isa::dotprod) return has("hw.optional.arm.FEAT_DotProd");
  if (isa == Isa::i8mm) return has("hw.optional.arm.FEAT_I8MM");
#elif defined(FEDMS_ARM64)
  if (isa == Isa::dotprod) return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
  if (isa == Isa::i8mm) return getauxval(AT_HWCAP2) & HWCAP2_I8MM;
#endif
  return isa == Isa::portable;
}

#ifdef FEDMS_X86
bool avx512_has_vnni() { return available(Isa::avx512) && __builtin_cpu_supports("avx512vnni"); }
bool avx512_has_bf16() { return available(Isa::avx512) && __builtin_cpu_supports("avx512bf16"); }
#endif

Isa detected_isa() {
  Isa best = Isa::portable;
  for (Isa isa : ALL_ISAS)
    if (available(isa)) best = isa;
  return best;
}

Isa isa() { return current(); }

void set_isa(const char* text) { current() = parse(text); }

}  // namespace fedms
