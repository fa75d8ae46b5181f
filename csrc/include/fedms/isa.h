// Which instruction set the CPU kernels run with.
#pragma once

namespace fedms {

enum class Isa { portable, avx2, avx512 };

const char* name(Isa isa);

// The best instruction set that this CPU, its operating system and this build have.
Isa detected_isa();

// The one that the kernels use: detected_isa(), unless FEDMS_CPU_ISA=portable|avx2|avx512 or set_isa() named one.
// Throws std::invalid_argument if FEDMS_CPU_ISA names none of them or one that the CPU lacks.
Isa isa();
void set_isa(const char* name);

}  // namespace fedms
