"""The table of every CPU kernel: its program follows the kernels' interfaces, and its functions are found in what was compiled."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from bench.kernels import roofline

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_its_program_compiles():
    x86 = ["-DFEDMS_X86"] if platform.machine() in ("x86_64", "AMD64") else []
    done = subprocess.run([COMPILER, "-std=c++17", "-fopenmp", "-fsyntax-only", "-I", ROOT / "csrc", "-I", ROOT / "csrc/include", *x86,
                           ROOT / "bench/kernels/roofline.cpp"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_kernel_of_the_table_has_a_source_file():
    kernels = re.findall(r'report\("([^"]+)"', (ROOT / "bench/kernels/roofline.cpp").read_text())
    assert len(kernels) > 10
    for kernel in kernels:
        prefix = next(name for name in roofline.FUNCTIONS if kernel.startswith(name))
        start = next(name for name in roofline.OBJECTS if prefix.startswith(name))
        for unit in ("fp32", "bf16"):
            name = roofline.object_of(start, "avx512", unit)
            assert (ROOT / "csrc/cpu" / f"{name}.cpp").exists(), name
