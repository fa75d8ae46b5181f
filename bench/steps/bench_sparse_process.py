"""How much a process grows by training with Sparsely Activated LoRA, beside PEFT.

    make bench        or        pytest -q -s -o addopts= -o python_files='bench_*.py' bench/steps/bench_sparse_process.py

Each candidate has a process of its own, which imports torch and transformers, notes its resident size, makes the model
(`bench/cases.py`) and trains four steps. The growth is its largest resident size above what it noted, the weights and
the loading of them included. glibc gives freed blocks of 1 MiB or more back to the system in all of them, as in a run.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

PEFT = "PEFT, all blocks"
CANDIDATES = {PEFT: ("peft", "fp32", False), "ours, fp32": ("ours", "fp32", False),
              "ours, fp32, cached": ("ours", "fp32", True), "ours, int8": ("ours", "int8", False),
              "ours, int8, cached": ("ours", "int8", True)}
ROOT = Path(__file__).parents[2]
MODULE = "bench.steps.bench_sparse_process"


def growth(case_name: str, candidate: str) -> int:
    """Bytes, in this process, which has imported nothing yet."""
    import torch
    from transformers import BertModel, ViTModel  # noqa: F401  a model's module is imported when it is asked for

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    from bench.cases import MINILM, VIT_B, CachedStep, Step

    case = MINILM if case_name == MINILM.name else VIT_B
    whose, frozen, cached = CANDIDATES[candidate]
    model = case.theirs(case.blocks) if whose == "peft" else case.ours(case.trained, frozen)
    step = (CachedStep if cached else Step)(case, model, case.batch())
    for _ in range(4):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case_name", ["MiniLM", "ViT-B"])
def test_process(benchmark, case_name):
    environment = {**os.environ, "GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={2**20}"}

    def grown() -> dict[str, int]:
        return {name: int(subprocess.run([sys.executable, "-m", MODULE, case_name, name], check=True, text=True,
                                         capture_output=True, env=environment, cwd=ROOT).stdout.split()[-1])
                for name in CANDIDATES}

    found = benchmark.pedantic(grown, rounds=1)
    benchmark.extra_info.update(found)
    print(f"\n\n{case_name}\n| | growth, MiB | of PEFT's |\n| --- | ---: | ---: |")
    for name, size in found.items():
        print(f"| {name} | {size / 2**20:.0f} | {size / found[PEFT]:.2f} |")


if __name__ == "__main__":
    print(growth(*sys.argv[1:]))
