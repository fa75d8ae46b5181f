"""What `--benchmark-json FILE` keeps of the machine: the processor and the versions, not its name."""

from __future__ import annotations

import torch

import fedms_ext


def pytest_benchmark_update_machine_info(config, machine_info):
    for name in ("node", "release"):
        machine_info.pop(name, None)
    cpu = machine_info["cpu"]
    machine_info["cpu"] = {name: cpu[name] for name in ("brand_raw", "family", "model", "count") if name in cpu}
    machine_info |= {"torch": torch.__version__, "threads": torch.get_num_threads(),
                     "instructions": fedms_ext.build_info()["isa_used"]}
