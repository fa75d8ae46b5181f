"""The kernels for Arm, cross-compiled and run by an emulator: `int8_check.cpp` on the dot product and on I8MM."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TOOLS = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}  # and Debian's packages


def test_int8_on_arm(tmp_path):
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"THE ARM KERNELS ARE NOT TESTED HERE: install {' and '.join(missing)}")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    assert cmake, "cmake is not installed"

    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(cmake, "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", "-DFEDMS_CHECK=ON", "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++")  # fmt: skip
    run(cmake, "--build", str(tmp_path))
    assert "i8mm: 84 cases" in run(
        "qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", "max", str(tmp_path / "int8_check"), "dotprod", "i8mm"
    )
