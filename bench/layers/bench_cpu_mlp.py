"""What GELU and requantization in the epilogue of the int8 product could gain, of a transformer block's MLP.

    pytest -q -s -o addopts= -o python_files='bench_*.py' bench/layers/bench_cpu_mlp.py

up-projection, GELU, down-projection, all frozen and without a gradient. Of GELU, a fused one saves the way of its input
and output through memory, that is all but what GELU takes on rows that lie in the cache; of the down-projection it saves the
quantization of its input, but only where that layer has no experts: S = x A^T reads x in fp32. Both are bounds: what the
epilogue itself would take is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bench.harness.timing import interleaved

import fedms_ext
from fedms_ext import FrozenLinear, QuantizedWeight

MLPS = {"MiniLM": (2048, 384, 1536), "ViT-B": (1576, 768, 3072)}
CACHED_ROWS = 24  # enough that PyTorch shares them among two threads


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    lines = ["| MLP | whole, ms | up, % | GELU | down | of GELU, memory | quantizing the input of down | bound with experts, x "
             "| without |", "| --- " * 9 + "|"]  # fmt: skip
    yield lines
    info = fedms_ext.build_info()
    print(f"\n\nint8 on {info['isa_used']}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("\n".join(lines))


@pytest.mark.parametrize("name", MLPS)
def test_mlp(benchmark, table, name):
    rows, width, inner = MLPS[name]
    up_weight, down_weight = torch.randn(inner, width), torch.randn(width, inner)
    up, down = (FrozenLinear(QuantizedWeight(weight)) for weight in (up_weight, down_weight))
    one_panel = FrozenLinear(QuantizedWeight(down_weight[:16]))
    x, h = torch.randn(rows, width), torch.randn(rows, inner)
    cached = torch.randn(CACHED_ROWS, inner)
    calls = {
        "whole": lambda: down(F.gelu(up(x))),
        "up": lambda: up(x),
        "GELU": lambda: F.gelu(h),
        "GELU, cached": lambda: F.gelu(cached),
        "down": lambda: down(h),
        "one panel of down": lambda: one_panel(h),
    }
    with torch.no_grad():
        turns = interleaved(calls, seconds=3.0)
    ms = {part: 1e3 * float(np.median(taken)) for part, taken in turns.items()}
    memory = ms["GELU"] - ms["GELU, cached"] * rows / CACHED_ROWS
    products_of_a_panel = (ms["down"] - ms["one panel of down"]) / (width / 16 - 1)
    quantize = ms["one panel of down"] - products_of_a_panel
    benchmark.extra_info.update(ms=ms, memory=memory, quantize=quantize)
    share = [f"{100 * part / ms['whole']:.0f}" for part in (ms["up"], ms["GELU"], ms["down"], memory, quantize)]
    bounds = [f"{ms['whole'] / (ms['whole'] - saved):.2f}" for saved in (memory, memory + quantize)]
    table.append(f"| {name} | {ms['whole']:.1f} | " + " | ".join([*share, *bounds]) + " |")
    benchmark.pedantic(calls["whole"], rounds=3)
