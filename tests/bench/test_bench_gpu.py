"""The GPU benchmarks without a GPU: every peer computes the same, and all of them run in a rehearsal on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu():
    pytest.importorskip("triton")
    from bench import run_gpu as gpu

    return gpu


@pytest.fixture
def linear():
    pytest.importorskip("triton")
    from bench.layers import bench_gpu_linear

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
    # NeMo AutoModel's wrappers compute what these stand-ins do; here is shown that we call them rightly.
    stand_in = SimpleNamespace(
        lora_forward_wrapper=lambda x, at, bt, res, scale, dtype: scale * (x @ at @ bt),
        lora_da_dx_update_wrapper=lambda xt, dy, b, a, scale, dtype: (scale * xt @ (dy @ b), scale * dy @ b @ a),
        lora_db_update_wrapper=lambda a, xt, dy, scale, dtype: (scale * a @ xt @ dy).t(),
    )
    for got, expected in zip(linear.both(lambda x: linear.nemo(stand_in, x, weight, a, b, 0.5), x, dy, [a, b])(), want):
        assert torch.allclose(got, expected)
    assert torch.equal(peers["fedms, none applied"][0](x), peers["bare GEMM"][0](x))


def test_nothing_begins_or_goes_on_when_the_time_is_over(gpu, monkeypatch, tmp_path):
    step = gpu.Steps(time.time() + gpu.RESERVE / 2, tmp_path).run("late", [sys.executable, "-c", "1 / 0"], 60)
    assert step["status"] == "left out: no time"
    monkeypatch.setattr(gpu, "RESERVE", 0)
    endless = "import subprocess, sys; print('began', flush=True); subprocess.run([sys.executable, '-c', 'while True: pass'])"
    steps = gpu.Steps(time.time() + 3, tmp_path)
    step = steps.run("long", [sys.executable, "-c", endless], 60)
    assert step["status"].startswith("timed out") and "began" in step["output"] and steps.left() < 0.5
    assert "## long: timed out" in (tmp_path / "report.md").read_text()     # whoever ends the whole run has this


def test_shards_run_every_test_once(gpu, tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_five.py").write_text(
        "import pytest\n\n@pytest.mark.parametrize('i', range(5))\ndef test(i): assert i != 3, f'ran {i}'"
    )
    step = gpu.Steps(float("inf"), tmp_path).run("five", [*gpu.PYTEST, str(tmp_path)], 60, shards=2)
    assert step["status"] == 1 and "ran 3" in step["output"]
    assert "3 passed" in step["last"] and "1 failed, 1 passed" in step["last"]


def test_tables_that_the_time_does_not_suffice_for_are_named(linear, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_gpu_linear.py", "--rehearse", "--seconds", "0"])
    linear.main()
    said = capsys.readouterr().out
    assert "Left out" in said and "70 rows, rank 8, forward + backward" in said and "###" not in said


def test_rehearsal(tmp_path):
    """All of `make gpu` but the tests on a GPU: the benchmarks, the files, the report."""
    command = [sys.executable, "-m", "bench.run_gpu", "--rehearse", "--dest", str(tmp_path)]
    # On sizes as small as these, two threads mostly wait for each other.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    names = ("linear", "mixture", "step")
    assert len(list(tmp_path.iterdir())) <= 8
    for name in names:
        for case in json.loads((tmp_path / f"{name}.json").read_text()):
            for peer, row in case["results"].items():
                assert "failed" not in row, (peer, row)
                assert row["graph, warm"]["median"] > 0
    report = (tmp_path / "report.md").read_text()
    federated = report.split("## benchmark federated digits")[1].split("##")[0]
    assert [line.split("|")[1].strip() for line in federated.splitlines() if line.startswith("| c")] == ["cuda", "cuda, graphs", "cpu"]
    together = report.split("## benchmark lockstep digits")[1].split("##")[0]
    assert [line.split("|")[1].strip() for line in together.splitlines() if line.startswith("| ")][1:] == ["---:", "1", "4"]
    assert report.index("benchmark federated digits") < report.index("benchmark lockstep digits") < report.index("benchmark linear")
    assert all(f"| benchmark {name} | 0 |" in report and f"## benchmark {name}" in report for name in names)
