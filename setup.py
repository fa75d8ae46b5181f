"""Builds `fedms_ext._C` with CMake and Ninja; everything else is in pyproject.toml.

Environment: FEDMS_CUDA=auto|0|1 (the CUDA kernels; auto: where there are an nvcc and a GPU), FEDMS_CUDA_ARCHS (their
targets, "80;90-real"), FEDMS_BUILD_TYPE (Release), FEDMS_SANITIZE (e.g. address,undefined), MAX_JOBS.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def run(what: str, command: list[str]) -> None:
    """Runs a command; if it fails, setup ends without a traceback, right below the command's own message."""
    if subprocess.run(command).returncode != 0:
        raise CompileError(f"{what} failed; the reason is above")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        # The build folder is fixed, so that editable installs rebuild only what changed. The module is copied to
        # where setuptools wants it: pip's folder is temporary, and CMake would remember it.
        toolchain = os.environ.get("CMAKE_TOOLCHAIN_FILE")          # of another machine: csrc/aarch64.cmake
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{f'-{Path(toolchain).stem}' if toolchain else ''}"
        # An environment's own cmake and ninja, also when it is not activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        cmake, ninja = (shutil.which(tool, path=path) or tool for tool in ("cmake", "ninja"))
        run(
            "configuring the kernels with CMake",
            [
                cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}",        # CMake does not ask it for another machine's
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DCMAKE_BUILD_TYPE={os.environ.get('FEDMS_BUILD_TYPE', 'Release')}",
                f"-DCMAKE_MAKE_PROGRAM={ninja}",
                f"-DFEDMS_CUDA={os.environ.get('FEDMS_CUDA', 'auto')}",
                f"-DFEDMS_CUDA_ARCHS={os.environ.get('FEDMS_CUDA_ARCHS', '80;90-real')}",
                f"-DFEDMS_SANITIZE={os.environ.get('FEDMS_SANITIZE', '')}",
                f"-DFEDMS_VERSION={self.distribution.get_version()}",
            ],
        )
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        run("compiling the kernels", [cmake, "--build", str(build), "-j", jobs])
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Remove first: writing into a module that a running process has mapped would crash that process.
        target.unlink(missing_ok=True)
        shutil.copy2(next(build.glob("_C*.so")), target)


setup(ext_modules=[Extension("fedms_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
