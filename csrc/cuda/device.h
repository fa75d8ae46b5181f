// The GPU as the kernels see it: `ptx` for the instructions, `launch` for starting a kernel.
//
// A C++ compiler gets the emulator of tests/kernels/cuda instead, which gives the same names the meaning that the PTX manual
// gives them. So the very kernels and launchers of this folder run on a CPU, and are compared with float64 there.
#pragma once

#ifdef __CUDACC__
#define FEDMS_HD __host__ __device__ __forceinline__
#include "launch.h"
#include "ptx.h"
#else
#define FEDMS_HD inline
#include "emulator.h"
#endif
