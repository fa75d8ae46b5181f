"""A frozen int8 linear layer with one LoRA expert on the CPU, beside fp32 and its peers.

    make bench        or        pytest -q -s -o addopts= -o python_files='bench_*.py' bench/bench_cpu_linear.py

Candidates take turns in one process. Figures are how often faster than the bare fp32 `F.linear` a candidate is, by the
medians over the turns. The backward pass is for x, A and B; that of the bare layer for x alone.
`FEDMS_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2` forces both sides to
one instruction set (AVX2_VNNI for oneDNN and avxvnni for ours).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cpu_layers import SHAPES, peft_linear
from timing import interleaved
from torch import Tensor, nn

import fedms_ext
from fedms_ext import ExpertLinear, LoRA, QuantisedWeight
from fedms_ext.reference import quantise_weight


def int_mm(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """torch's integer product with the same symmetric scales, a row of x and a row of the weight each."""
    q, scale = quantise_weight(weight)
    q_t = q.to(torch.int8).t()

    def call(x: Tensor) -> Tensor:
        row = x.abs().amax(1, keepdim=True) / 127
        return torch._int_mm(torch.round(x / row).to(torch.int8), q_t).mul(row * scale).add_(bias)

    return call


def candidates(rows: int, k: int, n: int, rank: int, backward: bool) -> dict[str, Callable[[], object]]:
    base = nn.Linear(k, n).requires_grad_(False)
    in_peft = peft_linear(nn.Linear(k, n).requires_grad_(False), rank)
    ours = ExpertLinear.from_linear(nn.Linear(k, n), {"e": LoRA(rank, 16)})
    nn.init.normal_(ours.lora_b["e"])
    ours.set_state("e", "trained")
    ours.freeze(QuantisedWeight(ours.weight))
    pair = [p for p in in_peft.parameters() if p.requires_grad]
    torch._dynamo.reset()
    layers: dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]] = {
        "F.linear": (lambda x: F.linear(x, base.weight, base.bias), []),
        "PEFT": (in_peft, pair),
        "PEFT compiled": (torch.compile(in_peft), pair),
        "ours": (ours, [ours.lora_a["e"], ours.lora_b["e"]]),
    }
    if not backward:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layers["quantize_dynamic, no LoRA"] = (torch.ao.quantization.quantize_dynamic(nn.Sequential(base)), [])
        if rows > 16:   # which is what it asks for
            layers["_int_mm, no LoRA"] = (int_mm(base.weight, base.bias), [])
        low = nn.Linear(k, n).requires_grad_(False).bfloat16()
        layers["bf16 F.linear, no LoRA"] = (lambda x: low(x.bfloat16()).float(), [])
    x, dy = torch.randn(rows, k), torch.randn(rows, n)

    def call(layer: Callable[[Tensor], Tensor], trained: list[Tensor]) -> Callable[[], object]:
        leaf = x.clone().requires_grad_(backward)

        def forward() -> object:
            with torch.no_grad():
                return layer(leaf)

        def both() -> object:
            return torch.autograd.grad(layer(leaf), [leaf, *trained], dy)

        return both if backward else forward

    return {name: call(*layer) for name, layer in layers.items()}


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    lines: list[str] = []
    yield lines
    info = fedms_ext.build_info()
    print(f"\n\nint8 on {info['isa_used']}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("\n".join(lines))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("rank", [8, 32])
@pytest.mark.parametrize("name", SHAPES)
def test_layer(benchmark, table, name, rank, backward):
    rows, k, n = SHAPES[name]
    calls = candidates(rows, k, n, rank, backward)
    seconds = {name: float(np.median(taken)) for name, taken in interleaved(calls, seconds=1.0).items()}
    gains = {peer: seconds["F.linear"] / taken for peer, taken in seconds.items()}
    over_peft = seconds["PEFT"] / seconds["ours"]
    gops = (4 if backward else 2) * rows * k * n / seconds["ours"] / 1e9
    benchmark.extra_info.update(
        rows=rows, k=k, n=n, rank=rank, backward=backward, seconds=seconds, over_linear=gains, over_peft=over_peft,
        frozen_gops=gops,
    )  # fmt: skip
    others = "  ".join(f"{peer} {gain:.2f}" for peer, gain in gains.items() if peer not in ("F.linear", "ours"))
    table.append(
        f"{name:16} {rows:4};{k:4}->{n:4} r{rank:<2} {'fwd+bwd' if backward else 'forward':7} "
        f"F.linear {1e6 * seconds['F.linear']:7.0f} us | ours {gains['ours']:5.2f}x, {over_peft:5.2f}x PEFT, "
        f"{gops:4.0f} GOP/s | {others}"
    )
    benchmark.pedantic(calls["ours"], rounds=3)
