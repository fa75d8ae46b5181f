"""Single operators of the CPU beside PyTorch's: attention of short sequences, dx of a 4-bit weight, and what else a step computes.

    OMP_NUM_THREADS=1 pytest -q -s -o addopts= -o python_files='bench_*.py' bench/kernels/bench_cpu_kernels.py

Candidates take turns; the median and, in brackets, the 20th and 80th percentile. With one thread the time is that of the processor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bench.harness.timing import interleaved, summarize
from torch import Tensor

import fedms_ext
from fedms_ext import QuantizedWeight
from fedms_ext.backends.base import Weight


def report(benchmark, title: str, candidates: dict[str, Callable[[], object]], seconds: float = 4.0) -> None:
    """Time the candidates; print a row for each and keep it for the JSON file, in milliseconds."""
    taken = {name: summarize(1e3 * values) for name, values in interleaved(candidates, seconds=seconds).items()}
    print(f"\n{title}; {fedms_ext.build_info()['isa_used']}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, spread in taken.items():
        print(f"| {name} | {spread.median:.3f} ms ({spread.p20:.3f}-{spread.p80:.3f}) |")
        benchmark.extra_info[f"{title}: {name}"] = asdict(spread)
    if benchmark.stats is None:     # pytest-benchmark times one call a test itself
        benchmark.pedantic(next(iter(candidates.values())), rounds=3)


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """Return a call of the forward and the backward pass."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    upstream = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


@pytest.mark.parametrize("batch, heads, tokens, width", [(32, 12, 64, 32), (4, 12, 197, 64)], ids=["MiniLM", "ViT-B"])
def test_attention(benchmark, batch, heads, tokens, width):
    q, k, v = torch.randn(3, batch, heads, tokens, width)
    mask = torch.zeros(batch, 1, 1, tokens)
    ways: dict[str, Callable[..., Tensor]] = {
        "ours": lambda *qkv: fedms_ext.attention(*qkv, mask),
        "ours, operands in bfloat16": lambda *qkv: fedms_ext.attention(*qkv, mask, rounded=True),
        "PyTorch": lambda *qkv: F.scaled_dot_product_attention(*qkv, attn_mask=mask),
    }
    with torch.no_grad():
        report(benchmark, f"attention {batch} x {heads} x {tokens} x {width}, forward",
               {name: partial(way, q, k, v) for name, way in ways.items()})
    report(benchmark, "forward and backward", {name: with_gradients(way, q, k, v) for name, way in ways.items()})


@pytest.mark.parametrize("rows", [1, 4, 8, 16, 32])
def test_input_gradient_of_4_bits(benchmark, rows):
    n = k = 768
    full, dy = torch.randn(n, k), torch.randn(rows, n)
    quantized = QuantizedWeight(full, "nf4")
    layer = fedms_ext.FrozenLinear(quantized)
    weight = Weight(*quantized.operands, "nf4", quantized.group, n, k)
    x = torch.randn(rows, k, requires_grad=True)
    y = layer(x)
    report(benchmark, f"dx, {rows} rows, {n} x {k}", {
        "the layer's backward pass": lambda: torch.autograd.grad(y, x, dy, retain_graph=True),
        "written out as fp32, then a product": lambda: dy @ weight.expanded_for_dx(torch.float32),
        "the fp32 product alone": lambda: dy @ full,
    })


def test_the_rest_of_a_block(benchmark):
    """What a block of MiniLM computes beside Linear layers and attention, on 32 x 64 tokens."""
    wide, narrow = torch.randn(2048, 1536), torch.randn(2048, 384)
    norm = torch.nn.LayerNorm(384).requires_grad_(False)
    with torch.no_grad():
        report(benchmark, "forward", {"GELU": lambda: F.gelu(wide), "any operator over GELU's values": lambda: F.relu(wide),
                                      "LayerNorm": lambda: norm(narrow)})
    report(benchmark, "forward and backward", {"GELU": with_gradients(F.gelu, wide), "LayerNorm": with_gradients(norm, narrow)})
