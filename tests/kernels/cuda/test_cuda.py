"""The CUDA kernels without a GPU: their arithmetic on an emulator, all index logic, machine code, and error paths."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fedms_ext
from fedms_ext.backends import cuda, device
from sampled import FULL

HERE = Path(__file__).parent
TIMES = 20  # as host_cost.py repeats each case
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
@pytest.mark.parametrize("file", ["layout", "overlap"])
def test_index_logic_and_launches_that_overlap(tmp_path, file):
    program = tmp_path / file
    run([
        COMPILER, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-DFEDMS_WITH_SM90A", f"-I{ROOT}/csrc/include",
        f"-I{ROOT}/csrc/cuda", f"-I{HERE}", HERE / f"{file}.cpp", "-o", program,
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


# The kernels of groups are those of the other files: both paces are for a long run.
@pytest.mark.parametrize("file, pace", [
    *itertools.product(["numerics.py", "planned*.py"], ["late", "early"]),
    *itertools.product(["siblings*.py"], ["late", "early"][: 1 + FULL])
])  # fmt: skip
def test_numerics_on_the_emulator(emulated, file, pace):
    print(run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sorted(HERE.glob(file))],
        FEDMS_CUDA_EMULATED=str(emulated), FEDMS_EMULATOR=pace,
    ))  # fmt: skip


def told_by(script: str, emulated: Path, folder: Path) -> dict:
    """What a script of this folder, run on the emulator, prints last."""
    printed = run(
        [sys.executable, HERE / script, folder],
        FEDMS_CUDA_EMULATED=str(emulated), FEDMS_TUNE="0", OMP_NUM_THREADS="1",
    )  # fmt: skip
    return json.loads(printed.splitlines()[-1])


def test_a_federated_run_on_the_emulator_trains_as_on_the_cpu(emulated, tmp_path):
    found = told_by("federated_round.py", emulated, tmp_path)
    there, here = found["cuda"], found["cpu"]
    assert (there["device"], here["device"]) == ("cuda", "cpu")
    # The layers ran on the CUDA kernels; in float32, which they do not take, is the self-check alone.
    passes = {name: count for name, count in found["chosen"].items() if "float32" not in name}
    assert set(passes) == {"cuda ForwardCall torch.bfloat16", "cuda BackwardCall torch.bfloat16"} and min(passes.values()) > 20
    assert there["losses"] == pytest.approx(here["losses"], rel=0.005)
    assert there["accuracy"]["personalized"] == pytest.approx(here["accuracy"]["personalized"], abs=0.11)  # three of 30 samples
    assert here["accuracy"]["personalized"] > 0.3  # of ten classes


def test_eight_clients_side_by_side_on_the_emulator_train_as_one_by_one(emulated, tmp_path):
    chosen = told_by("lockstep.py", emulated, tmp_path)
    # A step of eight clients is one call of each layer; where a client has no batch left, it has no rows.
    assert set(chosen) == {"cuda ForwardCall of 8", "cuda BackwardCall of 8"} and min(chosen.values()) >= 4


def host_cost(emulated: Path, *before: str | Path, toggle: Path | None = None) -> dict[str, dict[str, int]]:
    """What host_cost.py counts, by case."""
    printed = run(
        [*before, sys.executable, HERE / "host_cost.py", *([] if toggle is None else [toggle])],
        FEDMS_CUDA_EMULATED=str(emulated), FEDMS_EMULATOR="none", OMP_NUM_THREADS="1",
    )  # fmt: skip
    cases = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return {case.pop("case"): case for case in cases}


def test_a_pass_is_few_calls_of_python_and_few_launches(emulated):
    cases = host_cost(emulated)
    print(cases)
    # Experts side by side, S, y; then the pass over dy, dS, dx, the pass over x, and the sums of all gradients.
    assert cases["forward"]["launches"] == 3 and cases["forward and backward"]["launches"] == 3 + 5
    assert cases["forward"]["calls"] <= 18 and cases["forward and backward"]["calls"] <= 43
    # Three layers that share their input, one by one and in one call a pass.
    one_by_one, together = cases["three layers"], cases["a group of three"]
    assert one_by_one["launches"] == 3 * (3 + 5) and together["launches"] == 3 + 3
    assert together["calls"] <= one_by_one["calls"] + 75


def test_instructions_of_the_host(emulated, tmp_path):
    # 58 s here, nearly all of it to load PyTorch below valgrind.
    if os.environ.get("FEDMS_CHECK_CUDA") != "1":
        pytest.skip("LEFT OUT: counting the host's instructions takes a minute; make check-cuda does it")
    if shutil.which("valgrind") is None or not Path("/usr/include/valgrind/callgrind.h").exists():
        pytest.skip("LEFT OUT: counting the host's instructions, since there is no valgrind")
    toggle = tmp_path / "toggle.so"
    run([COMPILER, "-O2", "-shared", "-fPIC", HERE / "callgrind_toggle.cpp", "-o", toggle])
    profile = tmp_path / "profile"
    cases = host_cost(
        emulated, "valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={profile}", toggle=toggle
    )
    counted = {}
    for file in tmp_path.glob("profile.*"):
        text = file.read_text()
        name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)[1]
        counted[name] = int(re.search(r"^totals: (\d+)$", text, re.MULTILINE)[1]) // TIMES
    print(counted)
    assert counted.keys() == cases.keys()
    assert counted["forward"] <= 80_000 and counted["forward and backward"] <= 350_000


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
    plan = kernels.Plan(
        bf16=True, fp32_experts=False, int8=False, m=5, n=8, k=8, ranks=[8], rows=[], chip=kernels.DeviceProperties(80, 1, 101376),
        owner=torch.zeros(8, dtype=torch.int32),
    )  # fmt: skip
    x, w, room = torch.zeros(5, 8).bfloat16(), torch.zeros(8, 8).bfloat16(), torch.zeros(plan.room_size).bfloat16()
    with pytest.raises(RuntimeError, match=r"shrink \(m 5, n 0, k 8, total rank 8\) on device 0: .*\(cudaError"):
        plan.forward(x, w, None, None, [w], [w], torch.ones(1), None, 0.0, 0, x.clone(), x.clone(), room)
    with pytest.raises(RuntimeError, match="cudaError"):
        kernels.check_device(0)
