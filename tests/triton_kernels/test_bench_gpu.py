"""The GPU benchmarks without a GPU: every peer computes the same, and all of them run in a rehearsal on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def linear(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(BENCH))
    import bench_gpu_linear

    return bench_gpu_linear


def test_peers_agree(linear):
    torch.manual_seed(0)
    double = dict(dtype=torch.float64)
    x, dy, weight = torch.randn(9, 12, **double), torch.randn(9, 7, **double), torch.randn(7, 12, **double)
    a = torch.randn(3, 12, **double).requires_grad_()
    b = torch.randn(7, 3, **double).requires_grad_()
    wide = x.clone().requires_grad_()
    want_y = wide @ (weight + 0.5 * b @ a).T
    want = torch.autograd.grad(want_y, [wide, a, b], dy)
    peers = linear.operators(weight, a, b, 0.5)
    assert {"Unsloth's operators", "LoRAFusion's operators", "PEFT", "fedms"} <= set(peers)
    for name in ("Unsloth's operators", "LoRAFusion's operators", "PEFT", "fedms"):
        operator, trained = peers[name]
        assert torch.allclose(linear.forward_only(operator, x)(), want_y), name
        for got, expected in zip(linear.both(operator, x, dy, trained)(), want):
            assert torch.allclose(got, expected), name
    assert torch.allclose(peers["merged W"][0](x), want_y)
    assert torch.equal(peers["fedms, none applied"][0](x), peers["bare GEMM"][0](x))


@pytest.mark.parametrize("name", ["linear", "mixture", "step"])
def test_rehearsal(name, tmp_path):
    file = tmp_path / "figures.json"
    command = [sys.executable, str(BENCH / f"bench_gpu_{name}.py"), "--rehearse", "--json", str(file)]
    # On sizes as small as these, two threads mostly wait for each other.
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    for case in json.loads(file.read_text()):
        for peer, row in case["results"].items():
            assert "failed" not in row, (peer, row)
            assert row["graph, warm"]["median"] > 0
