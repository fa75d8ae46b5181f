"""A linear layer with one fp32 LoRA expert on the CPU, beside the bare `F.linear` and PEFT.

    make bench        or        pytest -q -s -o addopts= -o python_files='bench_*.py' bench/layers/bench_cpu_lora.py

Every figure is the time of a call over that of the bare frozen layer in the same turn: the median and, in brackets,
the 20th and 80th percentile. The backward pass is for x, A and B; that of the bare layer for x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from bench.harness.timing import interleaved, ratio, summarize
from bench.peers import SHAPES, expert_linear, layer_pass, peft_linear
from torch import Tensor, nn

import fedms_ext
from fedms_ext import use_backend

PEERS = ("PEFT", "PEFT compiled", "ours, eager backend", "ours, cpu backend")


class Case:
    """The candidates for one layer and one input, by name: calls without arguments."""

    def __init__(self, rows: int, k: int, n: int, rank: int) -> None:
        base = nn.Linear(k, n).requires_grad_(False)
        self.peft = peft_linear(base, rank)
        self.ours = expert_linear(base, rank)
        torch._dynamo.reset()
        self.layers: dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor], str | None]] = {
            "bare": (lambda x: F.linear(x, base.weight, base.bias), [], None),
            "PEFT": (self.peft, [p for p in self.peft.parameters() if p.requires_grad], None),
            "ours, eager backend": (self.ours, [self.ours.lora_a["e"], self.ours.lora_b["e"]], "eager"),
            "ours, cpu backend": (self.ours, [self.ours.lora_a["e"], self.ours.lora_b["e"]], "cpu"),
        }
        self.layers["PEFT compiled"] = (torch.compile(self.peft), *self.layers["PEFT"][1:])
        self.x, self.dy = torch.randn(rows, k), torch.randn(rows, n)

    def candidates(self, backward: bool) -> dict[str, Callable[[], object]]:
        return {name: self._call(backward, *layer) for name, layer in self.layers.items()}

    def _call(
        self, backward: bool, layer: Callable[[Tensor], Tensor], pair: list[Tensor], backend: str | None
    ) -> Callable[[], object]:
        call = layer_pass(layer, pair, self.x, self.dy, backward)

        def call_on_backend() -> object:
            with use_backend(backend):
                return call()

        return call if backend is None else call_on_backend


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    lines: list[str] = []
    yield lines
    info = fedms_ext.build_info()
    print(f"\n\nfp32 on {info['isa_used']}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("times over the bare layer's; the last column is how often faster than PEFT ours is")
    print(f"{'':17}{'M':>5} {'K':>5} {'N':>5} {'r':>3}  {'pass':12} {'bare us':>8}", end="  ")
    print("".join(f"{peer:21}" for peer in PEERS) + "PEFT / ours")
    print("\n".join(lines))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rank", [8, 32])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_layer(benchmark, table, name, rank, backward):
    rows, k, n = SHAPES[name]
    candidates = Case(rows, k, n, rank).candidates(backward)
    seconds = interleaved(candidates)
    bare = summarize(seconds["bare"]).median
    over_bare = {peer: ratio(seconds[peer], seconds["bare"]) for peer in PEERS}
    gain = ratio(seconds["PEFT"], seconds["ours, cpu backend"])
    benchmark.extra_info.update(
        rows=rows, k=k, n=n, rank=rank, bare_seconds=bare, peft_over_ours=asdict(gain),
        over_bare={peer: asdict(spread) for peer, spread in over_bare.items()},
    )  # fmt: skip
    kind = "fwd + bwd" if backward else "forward"
    figures = "".join(f"{over_bare[peer]!s:21}" for peer in PEERS)
    table.append(f"{name:17}{rows:5} {k:5} {n:5} {rank:3}  {kind:12} {1e6 * bare:8.0f}  {figures}{gain}")
    benchmark.pedantic(candidates["ours, cpu backend"], rounds=5)
