"""What Sparsely Activated LoRA saves: a training step with the last blocks trained, beside PEFT.

    make bench        or        pytest -q -s -o addopts= -o python_files='bench_*.py' bench/bench_sal_step.py

A step is forward, backward and AdamW on the CPU (`sal_models.py`). Figures say how often faster than PEFT, turn by turn:
the median and, in brackets, the 20th and 80th percentile. Beside them: what a step keeps for its backward pass, and the
most that it makes at once (traced, above the weights).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from sal_models import MINILM, VIT_B, CachedStep, Case, Step
from timing import interleaved, ratio, summarise
from torch import Tensor, nn

import fedms_ext
from fedms_ext.budget import PeakMemory

ALL, SAME = "PEFT, all blocks", "PEFT, the same blocks"


def kept_bytes(step: Callable[[], object]) -> int:
    """Bytes of the tensors that a step keeps for its backward pass, each storage counted once. Parameters are not
    among them: they are there anyway."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(storages.values())


def peak_bytes(step: Callable[[], object]) -> int:
    with PeakMemory() as memory:
        step()
    return memory.peak


def candidates(case: Case) -> dict[str, Step]:
    batch, depth = case.batch(), case.trained
    steps = {
        ALL: Step(case, case.theirs(case.blocks), batch),
        SAME: Step(case, case.theirs(depth), batch),
        "ours, fp32, all blocks": Step(case, case.ours(case.blocks), batch),
        "ours, fp32": Step(case, case.ours(depth), batch),
        "ours, fp32, cached": CachedStep(case, case.ours(depth), batch),
        "ours, int8": Step(case, case.ours(depth, "int8"), batch),
        "ours, int8, cached": CachedStep(case, case.ours(depth, "int8"), batch),
    }
    assert steps["ours, fp32"].lora_parameters == steps[SAME].lora_parameters
    assert steps["ours, fp32, all blocks"].lora_parameters == steps[ALL].lora_parameters
    return steps


@pytest.mark.parametrize("case", [MINILM, VIT_B], ids=lambda case: case.name)
def test_step(benchmark, case):
    steps = candidates(case)
    seconds = interleaved(steps, seconds=40.0)
    print(f"\n\n{case.name}: {case.samples} x {case.tokens} tokens, {case.trained} of {case.blocks} blocks, ", end="")
    print(f"{fedms_ext.build_info()['isa_used']}, {torch.get_num_threads()} threads, torch {torch.__version__}, ", end="")
    print(f"{len(seconds[ALL])} turns")
    print("| | ms | over PEFT, all blocks | over PEFT, the same blocks | kept, MiB | peak, MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, step in steps.items():
        over_all, over_same = (ratio(seconds[peer], seconds[name]) for peer in (ALL, SAME))
        kept, peak = kept_bytes(step), peak_bytes(step)
        benchmark.extra_info[name] = {"seconds": asdict(summarise(seconds[name])), "over_all": asdict(over_all),
                                      "over_same": asdict(over_same), "kept": kept, "peak": peak}
        print(f"| {name} | {1e3 * summarise(seconds[name]).median:.0f} | {over_all} | {over_same} | {kept / 2**20:.1f} "
              f"| {peak / 2**20:.1f} |")
    benchmark.pedantic(steps["ours, fp32, cached"], rounds=3)
