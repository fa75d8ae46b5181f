"""The CUDA kernels without a GPU: their arithmetic on an emulator, all index logic, machine code, and error paths."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fedms_ext
from fedms_ext.backends import cuda, device

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def run(command: list[str | Path], **environment: str) -> str:
    # An environment made for a GPU must not steer these: they force their backends themselves.
    inherited = {name: value for name, value in os.environ.items() if name not in ("FEDMS_BACKEND", "TRITON_INTERPRET")}
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


@needs_compiler
def test_index_logic(tmp_path):
    program = tmp_path / "layout"
    run([
        COMPILER, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-DFEDMS_WITH_SM90A", f"-I{ROOT}/csrc/include",
        f"-I{ROOT}/csrc/cuda", f"-I{HERE}", HERE / "layout.cpp", "-o", program,
    ])  # fmt: skip
    print(run([program]))


@pytest.fixture(scope="module")
def emulated() -> Path:
    build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
    if not (build / "build.ninja").exists():
        pytest.skip(f"LEFT OUT: the CUDA kernels on the emulator, since {build} is not there (an editable install makes it)")
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    run([cmake, "--build", build, "--target", "_C_emulated", "-j", "2"])
    return next((build / "emulated").glob("_C*.so"))


@pytest.mark.parametrize("pace", ["late", "early"])
def test_numerics_on_the_emulator(emulated, pace):
    print(run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "numerics.py"],
        FEDMS_CUDA_EMULATED=str(emulated), FEDMS_EMULATOR=pace,
    ))  # fmt: skip


def test_machine_code():
    if os.environ.get("FEDMS_CHECK_CUDA") != "1":
        pytest.skip("LEFT OUT: compiling the CUDA kernels for their targets takes minutes; make check-cuda does it")
    if shutil.which("nvcc") is None:
        pytest.skip("LEFT OUT: compiling the CUDA kernels for their targets, since there is no nvcc")
    print(run([sys.executable, HERE / "machine_code.py"]))


def test_a_build_or_a_machine_without_cuda_says_so():
    reason = fedms_ext.explain("cuda")
    if fedms_ext.build_info()["cuda"] is None:
        assert reason and "FEDMS_CUDA=1" in reason
    elif not torch.cuda.is_available():
        assert reason and "PyTorch" in reason
    if reason:
        assert "cuda" not in fedms_ext.available()
        with pytest.raises(RuntimeError, match="backend 'cuda' is not available"), fedms_ext.use_backend("cuda"):
            pass


def test_nothing_chooses_it_before_a_gpu_has_passed():
    call = SimpleNamespace(input=torch.empty(1))
    assert not cuda.prefers(call) or device.has_passed(device.properties(call.input.device).capability)


@pytest.mark.skipif(cuda._kernels is None, reason="this build has no CUDA kernels")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_launch_without_a_driver_is_an_error_that_names_it():
    kernels = cuda._kernels
    stream, nothing, whole = kernels.Stream(0, 0), kernels.Dropout(0.0, 0), kernels.Segments([], [], [])
    factors = kernels.Factors(0, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match=r"shrink \(m 5, n 0, k 8, total rank 3\) on device 0: .*\(cudaError"):
        kernels.shrink(True, 5, 8, 3, 0, 8, 0, 8, 0, 0, 8, factors, whole, nothing, stream)
    with pytest.raises(RuntimeError, match="cudaError"):
        kernels.check_device(0)
