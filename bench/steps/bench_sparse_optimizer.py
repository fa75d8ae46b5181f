"""AdamW's update of LoRA pairs and the state that it keeps: PyTorch's own, and the 8-bit ones of other libraries.

    make bench        or        pytest -q -s -o addopts= -o python_files='bench_*.py' bench/steps/bench_sparse_optimizer.py

The pairs are those of `bench/cases.py`, at the depth that is trained there and on all blocks; the figures, the median
time of an update in ms (20th and 80th percentile) and the bytes of the state after it. Libraries that are not installed
(torchao, bitsandbytes) are left out.
"""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from bench.cases import MINILM, VIT_B, Step
from bench.harness.timing import interleaved, summarize
from torch.utils._pytree import tree_leaves

BLOCK = 256     # values that share a scale in both libraries' 8-bit state; smaller tensors stay in 32 bits


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state; a quantized tensor counts by what it is made of."""
    tensors = [t for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, torch.Tensor)]
    parts = [getattr(t, name) for t in tensors if hasattr(t, "__tensor_flatten__") for name in t.__tensor_flatten__()[0]]
    return sum(t.nbytes for t in (*parts, *(t for t in tensors if not hasattr(t, "__tensor_flatten__"))))


def optimizers() -> dict[str, type]:
    found = {"PyTorch": torch.optim.AdamW, "PyTorch, fused": lambda p: torch.optim.AdamW(p, fused=True)}
    try:
        from torchao.optim import AdamW8bit
        found["torchao, 8 bits"] = lambda p: AdamW8bit(p, block_size=BLOCK)
    except ImportError:
        pass
    try:
        from bitsandbytes.optim import AdamW8bit as BitsAndBytes
        found["bitsandbytes, 8 bits"] = lambda p: BitsAndBytes(p, min_8bit_size=BLOCK)
    except ImportError:
        pass
    return found


@pytest.mark.parametrize("case", [MINILM, VIT_B], ids=lambda case: case.name)
def test_update(benchmark, case):
    print(f"\n\n{case.name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| blocks | optimizer | update, ms | state, MiB |\n| ---: | --- | ---: | ---: |")
    for depth in (case.trained, case.blocks):
        shapes = [p.shape for p in case.ours(depth).parameters() if p.requires_grad]
        made = {}
        for name, make in optimizers().items():
            params = [torch.randn(shape, requires_grad=True) for shape in shapes]
            for p in params:
                p.grad = torch.randn_like(p)
            made[name] = make(params)
        seconds = interleaved({name: optimizer.step for name, optimizer in made.items()}, seconds=5.0)
        for name, optimizer in made.items():
            spread, held = summarize(1e3 * seconds[name]), state_bytes(optimizer)
            benchmark.extra_info[f"{depth} blocks, {name}"] = {"milliseconds": asdict(spread), "state": held}
            print(f"| {depth} | {name} | {spread} | {held / 2**20:.2f} |")
    benchmark.pedantic(made["PyTorch, fused"].step, rounds=3)
