// Which instruction set the CPU kernels run with.
#pragma once

namespace fedms {

// avxvnni is AVX2 and AVX-VNNI. avx512 is F, DQ, BW and VL, and VNNI and BF16 where the CPU has them. dotprod and i8mm are Arm's.
enum class Isa { portable, avx2, avxvnni, avx512, dotprod, i8mm };

// From the slowest to the fastest of a CPU.
constexpr Isa ALL_ISAS[] = {Isa::portable, Isa::avx2, Isa::avxvnni, Isa::avx512, Isa::dotprod, Isa::i8mm};

const char* name(Isa isa);

// Whether this CPU, its operating system and this build have it.
bool available(Isa isa);

// On x86 alone: whether the instructions of avx512 include these.
bool avx512_has_vnni();
bool avx512_has_bf16();

// The best one that is available.
Isa detected_isa();

// The one that the kernels use: detected_isa(), unless FEDMS_CPU_ISA=portable|avx2|avxvnni|avx512|dotprod|i8mm or
// set_isa() named one. Throws std::invalid_argument if FEDMS_CPU_ISA names none of them or one that the CPU lacks.
Isa isa();
void set_isa(const char* name);

}  // namespace fedms
