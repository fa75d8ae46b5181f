"""Compiles Triton launches for a GPU on a machine that has none, and reads the machine code.

    with compiled_for(90) as kernels:
        launch(...)            # on meta tensors: nothing runs
    facts(kernels[0])
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
_INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "UTMASTG", "LDGSTS", "STL", "LDL", "WARPGROUP.DEPBAR")


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return dict(max_shared_mem=232448, multiprocessor_count=132, max_num_regs=65536, warpSize=32)


class _AbsentGpu:
    """What a launch asks of the driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = _Utils()

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by device: one place for each target

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@contextlib.contextmanager
def compiled_for(capability: int) -> Iterator[list]:
    """Within it, a launch compiles for that compute capability (90 is 9.0), and the kernel is added to the list."""
    kernels: list = []
    run, active = JITFunction.run, driver._active

    def compile_only(self, *args, grid, warmup, **options):
        # The launch is told of no compiled kernel, as there is none to keep for the next launch.
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run, driver._active = compile_only, _AbsentGpu(capability)
    try:
        yield kernels
    finally:
        JITFunction.run, driver._active = run, active


def facts(kernel) -> dict[str, int]:
    """How often the instructions of interest occur, REG and STACK a thread, and `shared` memory in bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        read = dict(capture_output=True, text=True, check=True)
        code = subprocess.run([f"{_TOOLS}/nvdisasm", "-c", file.name], **read).stdout
        usage = subprocess.run([f"{_TOOLS}/cuobjdump", "-res-usage", file.name], **read)
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in _INSTRUCTIONS}
    counts |= {name: int(n) for name, n in re.findall(r"(REG|STACK):(\d+)", usage.stdout + usage.stderr)}
    return counts | {"shared": kernel.metadata.shared}
