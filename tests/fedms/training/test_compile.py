"""A client's training step below `torch.compile`: one graph, with the fused operators inside."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled_steps import CASES, ROWS, assert_fused, compiled, loss_of

HERE, HELPERS = Path(__file__).parent, Path(__file__).parents[2] / "helpers"
COMPILER = os.environ.get("CXX", "g++")
FULL = "FEDMS_FULL" in os.environ
LONG = pytest.mark.skipif(not FULL, reason="40 seconds in all: make test-full")


def gradients(loss, compute, batch):
    torch.manual_seed(3)    # of dropout
    return torch.autograd.grad(compute(*batch), loss.params)


@pytest.mark.parametrize("name", [name if name == "classification" else pytest.param(name, marks=LONG) for name in CASES])
def test_a_training_step_is_one_graph_with_the_fused_operators_inside(name, tmp_path):
    loss = loss_of(CASES[name], tmp_path)
    batch = loss.read(ROWS)
    wanted = gradients(loss, loss.compute, batch)
    with compiled(loss.compute) as (compute, graphs):
        for _ in range(2):
            found = gradients(loss, compute, batch)
            for got, want in zip(found, wanted, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert any(g.abs().max() > 0 for g in found)
    assert_fused(CASES[name], graphs)


@pytest.mark.skipif(not FULL, reason="35 seconds: make test-full")
@pytest.mark.skipif(torch.version.cuda is not None, reason="the stand-in for a GPU takes the place that PyTorch's CUDA build has filled")
def test_a_training_step_for_a_gpu_is_one_graph_on_the_gpu(tmp_path):
    if shutil.which(COMPILER) is None:
        pytest.skip(f"LEFT OUT: steps that are compiled for a GPU, since {COMPILER} is not there")
    where, hooks = Path(torch.__file__).parent, tmp_path / "absent_gpu.so"
    subprocess.run([COMPILER, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{where / 'include'}", HELPERS / "absent_gpu.cpp", "-o", hooks,
                    f"-L{where / 'lib'}", "-lc10", "-ltorch_cpu"], check=True)
    python = os.pathsep.join([str(HELPERS), *sys.path])
    done = subprocess.run([sys.executable, HERE / "compiled_for_cuda.py", hooks, tmp_path], env={**os.environ, "PYTHONPATH": python},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "5 steps are compiled for cuda:0"
