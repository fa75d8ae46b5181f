"""A whole run on the CUDA kernels without a GPU: `python federated_round.py OUT`, with FEDMS_CUDA_EMULATED set.

`fedms run digits --device cuda` on `fake_device.FakeCuda`, whose tensors are the CPU's, and on the CUDA backend, whose kernels the
emulator computes. Then the same run on the CPU. Prints as JSON the accuracies of both, the loss of every round, and how often each
backend computed a layer in the first.
"""
from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))

from fake_device import FakeCuda

from fedms.cli import app
from fedms.storage.records import RunRecords
from fedms_ext import backends
from fedms_ext.backends import cuda

SETS = ["data.max_samples=120", 'model.targets=["fc1"]', "clients.count=1", "clients.unseen=0", "data.global_test=0",
        "data.partition=iid", "stage1.rounds=1", "stage2.rounds=0", "run.method=fedavg", "lora.rank=4", "sal.schedule=fixed",
        "sal.depth=1", "stage1.epochs=12", "stage1.lr=0.02", "run.threads=1", "run.dtype=bf16"]


def carry_out(out: Path, device: str) -> RunRecords:
    arguments = ["run", "digits", "--device", device, "--out", str(out / device)]
    for setting in SETS:
        arguments += ["--set", setting]
    app(arguments, standalone_mode=False)
    return RunRecords.read(out / device)


def on_the_emulator(out: Path) -> tuple[RunRecords, Counter[str]]:
    chosen: Counter[str] = Counter()
    choose = backends.choose

    def counting(call):
        backend = choose(call)
        chosen[f"{backend.name} {type(call).__name__} {call.input.dtype}"] += 1
        return backend

    with FakeCuda(), mock.patch.object(cuda, "prefers", lambda call: True), mock.patch.object(backends, "choose", counting):
        records = carry_out(out, "cuda")
    return records, chosen


def figures(records: RunRecords) -> dict[str, object]:
    return {"accuracy": records.clients[0]["accuracy"], "losses": [line["loss"] for line in records.rounds],
            "device": json.loads((records.path / "data.json").read_text())["device"]}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    emulated, chosen = on_the_emulator(folder)
    print(json.dumps({"cuda": figures(emulated), "cpu": figures(carry_out(folder, "cpu")), "chosen": chosen}))
