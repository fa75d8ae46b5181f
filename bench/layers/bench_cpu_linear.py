"""A frozen int8 linear layer with one LoRA expert on the CPU, beside fp32 and its peers.

    make bench        or        pytest -q -s -o addopts= -o python_files='bench_*.py' bench/layers/bench_cpu_linear.py

Candidates take turns in one process. Figures are how often faster than the bare fp32 `F.linear` a candidate is: medians
over the turns, for ours with the 20th and the 80th percentile. The backward pass is for x, A and B; that of the bare
layer for x alone. `test_phases` tells where the time of ours goes, by what less work would take.
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
from bench.harness.timing import interleaved, ratio
from bench.peers import SHAPES, expert_linear, layer_pass, peft_linear
from torch import Tensor, nn

import fedms_ext
from fedms_ext import ExpertLinear, FrozenLinear, QuantizedWeight
from fedms_ext.backends import cpu
from fedms_ext.reference import quantize_weight


def int_mm(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """torch's integer product with the same symmetric scales, a row of x and a row of the weight each."""
    q, scale = quantize_weight(weight)
    q_t = q.to(torch.int8).t()

    def call(x: Tensor) -> Tensor:
        row = x.abs().amax(1, keepdim=True) / 127
        return torch._int_mm(torch.round(x / row).to(torch.int8), q_t).mul(row * scale).add_(bias)

    return call


def quantized(k: int, n: int, rank: int, kind: str) -> ExpertLinear:
    return expert_linear(nn.Linear(k, n), rank, kind)


def candidates(rows: int, k: int, n: int, rank: int, backward: bool) -> dict[str, Callable[[], object]]:
    base = nn.Linear(k, n).requires_grad_(False)
    in_peft = peft_linear(nn.Linear(k, n).requires_grad_(False), rank)
    ours = quantized(k, n, rank, "int8")
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
        layers["ours, fp16"] = (quantized(k, n, rank, "fp16"), [])
        layers["ours, nf4"] = (quantized(k, n, rank, "nf4"), [])
        low = nn.Linear(k, n).requires_grad_(False).bfloat16()
        layers["bf16 F.linear, no LoRA"] = (lambda x: low(x.bfloat16()).float(), [])
    x, dy = torch.randn(rows, k), torch.randn(rows, n)

    return {name: layer_pass(*layer, x, dy, backward) for name, layer in layers.items()}


COLUMNS = ("ours, fp16", "ours, nf4", "PEFT", "PEFT compiled", "quantize_dynamic, no LoRA", "_int_mm, no LoRA",
           "bf16 F.linear, no LoRA")  # fmt: skip


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, list[str]]]:
    lines: dict[str, list[str]] = {
        f"rows; K -> N | r | pass | F.linear, us | ours, int8 | PEFT over ours | {' | '.join(COLUMNS)}": [],
        "rows; K -> N | quantize x and the call itself, % | S = x A^T | products | expansion | products, GMAC/s | F.linear, GMAC/s": [],
    }
    yield lines
    info = fedms_ext.build_info()
    print(f"\n\nint8 on {info['isa_used']}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for head, rows in lines.items():
        if rows:
            print("\n".join(["", f"| {head} |", "| --- " * (head.count("|") + 1) + "|", *(f"| {row} |" for row in rows)]))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("rank", [8, 32], ids="r{}".format)
@pytest.mark.parametrize("name", SHAPES)
def test_layer(benchmark, table, name, rank, backward):
    rows, k, n = SHAPES[name]
    calls = candidates(rows, k, n, rank, backward)
    turns = interleaved(calls, seconds=1.0)
    seconds = {name: float(np.median(taken)) for name, taken in turns.items()}
    gains = {peer: seconds["F.linear"] / taken for peer, taken in seconds.items()}
    ours, over_peft = ratio(turns["F.linear"], turns["ours"]), ratio(turns["PEFT"], turns["ours"])
    benchmark.extra_info.update(
        rows=rows, k=k, n=n, rank=rank, backward=backward, seconds=seconds, over_linear=gains, over_peft=over_peft.median,
        frozen_gops=(4 if backward else 2) * rows * k * n / seconds["ours"] / 1e9,
    )  # fmt: skip
    head, _ = table
    peers = [f"{gains[peer]:.2f}" if peer in gains else "" for peer in COLUMNS]
    table[head].append(" | ".join([
        f"{rows}; {k} -> {n}", str(rank), "fwd+bwd" if backward else "forward", f"{1e6 * seconds['F.linear']:.0f}",
        str(ours), str(over_peft), *peers]))  # fmt: skip
    benchmark.pedantic(calls["ours"], rounds=3)


@pytest.mark.parametrize("rows", [16, 64, 128, 256])
def test_few_rows(benchmark, rows):
    """A weight of fp16 made float32 in the registers, or written out: what `_FEW_ROWS` of the CPU backend decides."""
    layer, x = FrozenLinear(QuantizedWeight(torch.randn(768, 768), "fp16")), torch.randn(rows, 768)

    def call(few_rows: int) -> Callable[[], object]:
        def forward() -> object:
            cpu._FEW_ROWS = few_rows
            return layer(x)

        return forward

    before = cpu._FEW_ROWS
    try:
        with torch.no_grad():
            turns = interleaved({"registers": call(rows), "written out": call(0)}, seconds=1.0)
    finally:
        cpu._FEW_ROWS = before
    gain = ratio(turns["written out"], turns["registers"])
    benchmark.extra_info.update(rows=rows, gain=gain.median)
    print(f"\nfp16, {rows} rows; 768 -> 768: the time written out over that in the registers {gain}")
    benchmark.pedantic(lambda: layer(x), rounds=3)


@pytest.mark.parametrize("name", SHAPES)
def test_phases(benchmark, table, name):
    """Of a forward pass at r = 8. With one panel of columns there is hardly anything but what is done with x."""
    rows, k, n = SHAPES[name]
    x, base = torch.randn(rows, k), nn.Linear(k, n).requires_grad_(False)
    layers = {
        "F.linear": base,
        "all": quantized(k, n, 8, "int8"),
        "no LoRA": FrozenLinear(QuantizedWeight(base.weight)),
        "x alone": quantized(k, 16, 8, "int8"),
        "x alone, no LoRA": FrozenLinear(QuantizedWeight(base.weight[:16])),
    }
    with torch.no_grad():
        turns = interleaved({what: lambda layer=layer: layer(x) for what, layer in layers.items()}, seconds=1.0)
    taken = {what: float(np.median(values)) for what, values in turns.items()}
    # Without what the products of that one panel take, of which the whole has n / 16.
    one_panel = (taken["no LoRA"] - taken["x alone, no LoRA"]) / (n / 16 - 1)
    quantize = taken["x alone, no LoRA"] - one_panel
    shrink = taken["x alone"] - taken["x alone, no LoRA"]
    products = taken["no LoRA"] - quantize
    expand = taken["all"] - taken["no LoRA"] - shrink
    macs = rows * k * n / 1e9
    benchmark.extra_info.update(rows=rows, k=k, n=n, seconds=taken)
    _, head = table
    table[head].append(" | ".join([
        f"{rows}; {k} -> {n}", *(f"{100 * part / taken['all']:.0f}" for part in (quantize, shrink, products, expand)),
        f"{macs / products:.0f}", f"{macs / taken['F.linear']:.0f}"]))  # fmt: skip
    benchmark.pedantic(lambda: layers["all"](x), rounds=3)
