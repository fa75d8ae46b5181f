"""A layer with one LoRA expert on one row to thousands, int8 and fp32, beside `F.linear` without LoRA and PEFT's layer.

    OMP_NUM_THREADS=1 pytest -q -s -o addopts= -o python_files='bench_*.py' bench/layers/bench_cpu_rows.py

Candidates take turns in one process, so that each figure is a ratio within a turn: the median, in brackets the 20th and the 80th
percentile. With one thread it is the thread's own CPU time. All of them keep the memory that they free
(`fedms_ext.keep_freed_memory`), because the system maps blocks of 3 MiB anew in one process and not in the next. Forward passes
need no gradient; backward passes are for x, A and B, that of the bare layer for x alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from bench.harness.timing import interleaved, ratio
from bench.peers import expert_linear, layer_pass, peft_linear
from torch import Tensor, nn

import fedms_ext

CASES = [(1, 768, 768, 8), (1, 576, 1536, 8), (16, 768, 768, 8), (64, 768, 768, 8), (2048, 384, 384, 8), (2048, 384, 384, 32)]
HEAD = ("rows; K -> N | r | forward over `F.linear`, int8 | fp32 | over PEFT, int8 | fwd + bwd over `F.linear`, int8 | fp32 "
        "| over PEFT, int8 | fp32")  # fmt: skip


def passes(layer: nn.Module, x: Tensor, dy: Tensor, backward: bool) -> Callable[[], object]:
    return layer_pass(layer, [p for p in layer.parameters() if p.requires_grad], x, dy, backward)


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    fedms_ext.keep_freed_memory()
    rows: list[str] = []
    yield rows
    print(f"\n\n{fedms_ext.build_info()['isa_used']}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("\n".join([f"| {HEAD} |", "| --- " * (HEAD.count("|") + 1) + "|", *(f"| {row} |" for row in rows)]))


@pytest.mark.parametrize("rows, k, n, rank", CASES)
def test_rows(benchmark, table, rows, k, n, rank):
    layers = {
        "F.linear": nn.Linear(k, n).requires_grad_(False),
        "PEFT": peft_linear(nn.Linear(k, n).requires_grad_(False), rank),
        "int8": expert_linear(nn.Linear(k, n), rank, "int8"),
        "fp32": expert_linear(nn.Linear(k, n), rank),
    }
    x, dy = torch.randn(rows, k), torch.randn(rows, n)
    forward, both = (
        interleaved({name: passes(layer, x, dy, backward) for name, layer in layers.items()}, seconds=1.5)
        for backward in (False, True)
    )
    table.append(" | ".join(map(str, (
        f"{rows}; {k} -> {n}", rank,
        *(ratio(forward["F.linear"], forward[kind]) for kind in ("int8", "fp32")), ratio(forward["PEFT"], forward["int8"]),
        *(ratio(both[peer], both[kind]) for peer in ("F.linear", "PEFT") for kind in ("int8", "fp32")),
    ))))  # fmt: skip
    benchmark.pedantic(passes(layers["int8"], x, dy, True), rounds=3)
