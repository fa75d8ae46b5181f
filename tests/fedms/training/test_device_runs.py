"""Whole commands on the GPU that is not there: a run that goes on elsewhere, and a plan."""
from __future__ import annotations

import pytest
import torch
from fake_device import FakeCuda

from fedms.config import load_config, with_run
from fedms.errors import Interrupted
from fedms.runs.plan import plan
from fedms.runs.run import run
from fedms.storage.records import RunRecords

CONFIG = load_config("digits", ["data.max_samples=24", 'model.targets=["fc1"]', "clients.count=1", "clients.unseen=0",
                                "data.partition=iid", "stage1.rounds=2", "stage2.rounds=0", "run.method=fedavg", "lora.rank=2",
                                "sal.schedule=fixed", "sal.depth=1", "sal.max_depth=1", "run.threads=1", "run.device=cpu"])
ON_GPU = with_run(CONFIG, device="cuda")


def test_a_run_goes_on_on_another_device_and_says_so(tmp_path):
    asked = iter([False, True])
    with FakeCuda(), pytest.raises(Interrupted):
        run(ON_GPU, tmp_path / "run", stop=lambda: next(asked))
    found = run(CONFIG, tmp_path / "run", resume=True)
    note = "the run began on cuda and went on on cpu: the same within rounding, not bit for bit"
    assert note in found["notes"] and not any("computed on" in line for line in found["notes"])
    run(CONFIG, tmp_path / "undisturbed")
    there, here = (RunRecords.read(tmp_path / name).rounds for name in ("run", "undisturbed"))
    assert [r["round"] for r in there] == [1, 2]
    assert [r["loss"] for r in there] == pytest.approx([r["loss"] for r in here], rel=1e-4)


def test_a_plan_counts_the_memory_of_the_gpu():
    with FakeCuda() as fake:
        found = plan(ON_GPU, flops=1e9)
        assert torch.cuda.is_available()
    here = plan(CONFIG, flops=1e9)
    (there,), (on_cpu,) = found.options, here.options
    assert there.work == on_cpu.work and there.memory["weights"] == on_cpu.memory["weights"]
    assert there.memory["cached features"] == on_cpu.memory["cached features"]
    # Of the process nothing lies in the GPU's memory, whose peak is what the driver says.
    assert found.chosen is there and there.peak >= fake.MEMORY
