"""What Sparsely Activated LoRA saves: a training step with the last blocks trained, beside PEFT.

    make bench        or        pytest -q -s -o addopts= -o python_files='bench_*.py' bench/steps/bench_sparse_step.py

A step is forward, backward and AdamW on the CPU (`bench/cases.py`). Figures say how often faster than PEFT, turn by turn:
the median and, in brackets, the 20th and 80th percentile. Beside them, and as shares of PEFT's on all blocks: what a step
keeps for its backward pass, and the most that it makes at once (traced, above the weights). A second table says where the
time of our steps goes, by PyTorch's profiler. All steps, PEFT's too, find the memory that an earlier one freed
(`fedms_ext.keep_freed_memory`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from bench.cases import MINILM, VIT_B, CachedStep, Case, Step
from bench.harness.timing import interleaved, ratio, summarize
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fedms_ext
from fedms_ext.budget import PeakMemory
from fedms_ext.nn.quantized_weight import QuantizedWeight

ALL, SAME = "PEFT, all blocks", "PEFT, the same blocks"


def kept_bytes(step: Step) -> int:
    """Bytes of the tensors that a step keeps for its backward pass, each storage counted once. The model's weights are
    not among them: they are there anyway."""
    transposed = [t for m in step.model.modules() if isinstance(m, QuantizedWeight) for t in m.for_dx()]
    weights = {t.untyped_storage().data_ptr()
               for t in (*step.model.parameters(), *step.model.buffers(), *transposed) if t is not None}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(storages.values())


def peak_bytes(step: Step) -> int:
    with PeakMemory() as memory:
        step()
    return memory.peak


# What PyTorch's profiler calls the operators, ours and its own, by what they are for.
KINDS = {
    "Linear layers, forward": ("aten::linear", "fedms_ext::expert_linear"),
    "Linear layers, backward": ("fedms_ext::expert_linear_backward",),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",
                  "aten::_scaled_dot_product_flash_attention_for_cpu_backward"),
    "GELU": ("aten::gelu", "aten::gelu_backward"),
    "update": ("Optimizer.step#AdamW.step",),
}


def where_time_goes(step: Callable[[], object], repeats: int = 5) -> dict[str, float]:
    """Share of a step's time by kind of operator, and the rest: LayerNorm, sums, copies, embeddings, Python."""
    kind_of = {name: kind for kind, names in KINDS.items() for name in names}
    with profile(activities=[ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        whole = 1e6 * (time.perf_counter() - start)
    shares = dict.fromkeys(KINDS, 0.0)
    for event in found.events():
        parent = event.cpu_parent
        while parent is not None and parent.name not in kind_of:
            parent = parent.cpu_parent
        if event.name in kind_of and parent is None:        # what an operator calls is a part of it
            shares[kind_of[event.name]] += event.cpu_time_total / whole
    return {**shares, "rest": 1 - sum(shares.values())}


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
    fedms_ext.keep_freed_memory()
    steps = candidates(case)
    seconds = interleaved(steps, seconds=60.0)
    print(f"\n\n{case.name}: {case.samples} x {case.tokens} tokens, {case.trained} of {case.blocks} blocks, ", end="")
    print(f"{fedms_ext.build_info()['isa_used']}, {torch.get_num_threads()} threads, torch {torch.__version__}, ", end="")
    print(f"{len(seconds[ALL])} turns")
    print("| | ms | over PEFT, all blocks | over PEFT, the same blocks | kept, MiB | of PEFT's | peak, MiB | of PEFT's |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    kept, peak = ({name: of(step) for name, step in steps.items()} for of in (kept_bytes, peak_bytes))
    for name in steps:
        over_all, over_same = (ratio(seconds[peer], seconds[name]) for peer in (ALL, SAME))
        benchmark.extra_info[name] = {"seconds": asdict(summarize(seconds[name])), "over_all": asdict(over_all),
                                      "over_same": asdict(over_same), "kept": kept[name], "peak": peak[name]}
        print(f"| {name} | {1e3 * summarize(seconds[name]).median:.0f} | {over_all} | {over_same} "
              f"| {kept[name] / 2**20:.1f} | {kept[name] / kept[ALL]:.2f} | {peak[name] / 2**20:.1f} "
              f"| {peak[name] / peak[ALL]:.2f} |")
    print(f"\n| share of the time | {' | '.join([*KINDS, 'rest'])} |\n| --- |{' ---: |' * (len(KINDS) + 1)}")
    for name, step in steps.items():
        if name not in (ALL, SAME):
            benchmark.extra_info[name]["shares"] = shares = where_time_goes(step)
            print(f"| {name} | {' | '.join(f'{100 * share:.0f} %' for share in shares.values())} |")
    benchmark.pedantic(steps["ours, fp32, cached"], rounds=3)
