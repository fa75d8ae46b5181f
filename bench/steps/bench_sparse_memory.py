"""Ways to train all blocks of MiniLM in less memory: micro-batches, and checkpointing of the blocks' activations.

    make bench        or        pytest -q -s -o addopts= -o python_files='bench_*.py' bench/steps/bench_sparse_memory.py

Time of a step over that of the whole batch of 32, turn by turn (median, 20th and 80th percentile), and the most that it
makes at once (traced, above the weights).
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from bench.cases import MINILM, Step
from bench.harness.timing import interleaved, ratio, summarize
from torch import nn
from torch.utils.checkpoint import checkpoint

import fedms_ext
from fedms_ext.budget import PeakMemory
from fedms_ext.sparse.activation import blocks_of

WHOLE = "whole batch"


class MicroBatches(Step):
    """The gradient of the batch, added up over parts of it."""

    def __init__(self, parts: int) -> None:
        super().__init__(MINILM, MINILM.ours(MINILM.blocks), MINILM.batch())
        self.parts = parts

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        whole, labels = self.batch, self.labels
        for part in torch.arange(len(labels)).chunk(self.parts):
            self.batch = {name: value[part] for name, value in whole.items()}
            nn.functional.cross_entropy(self.head(self.hidden().mean(1)), labels[part], reduction="sum").backward()
        self.batch = whole
        self.optimizer.step()


def checkpointed() -> Step:
    step = Step(MINILM, MINILM.ours(MINILM.blocks), MINILM.batch())
    for block in blocks_of(step.model):
        block.forward = lambda *args, inner=block.forward, **kwargs: checkpoint(inner, *args, use_reentrant=False, **kwargs)
    return step


def test_memory(benchmark):
    steps = {WHOLE: MicroBatches(1), **{f"micro-batches of {32 // n}": MicroBatches(n) for n in (2, 4, 8, 16, 32)},
             "blocks checkpointed": checkpointed()}
    seconds = interleaved(steps, seconds=30.0, least_turns=3)
    print(f"\n\nMiniLM, 32 x 64 tokens, all blocks, {fedms_ext.build_info()['isa_used']}, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {len(seconds[WHOLE])} turns")
    print("| | time | peak, MiB |\n| --- | ---: | ---: |")
    for name, step in steps.items():
        with PeakMemory() as memory:
            step()
        over = ratio(seconds[name], seconds[WHOLE])
        benchmark.extra_info[name] = {"seconds": asdict(summarize(seconds[name])), "peak": memory.peak}
        print(f"| {name} | {over} | {memory.peak / 2**20:.0f} |")
    benchmark.pedantic(steps[WHOLE], rounds=2)
