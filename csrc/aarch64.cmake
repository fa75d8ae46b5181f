# For CMAKE_TOOLCHAIN_FILE: compiles the kernels for 64-bit Arm on another machine, with Debian's g++-aarch64-linux-gnu.
# `make wheels AARCH64=1` does so. Python's headers are taken to be the same on both machines, as both have 64 bits.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
