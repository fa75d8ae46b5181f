# For CMAKE_TOOLCHAIN_FILE: compiles the kernels for 64-bit Arm on another machine, with Debian's g++-aarch64-linux-gnu.
# `make wheels AARCH64=1` does so. The kernels include no header of Python that differs between 64-bit machines.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
