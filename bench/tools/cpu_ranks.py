"""At which ranks the CPU kernels are faster than the eager backend: the measurement behind fedms_ext/backends/cpu_thresholds.py.

    python -m bench.tools.cpu_ranks [--write]

Prints the kernels' time over the eager backend's, one expert, forward / backward (of x, A and B), the geometric mean over
the layers, and the rule that follows: for so many rows, the largest rank up to which the kernels take no more time.
`--write` puts it into that file, for the instruction set in use. About two minutes; for a quiet machine, with the number
of threads that runs use.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bench.harness.timing import interleaved
from torch import Tensor

import fedms_ext
from fedms_ext.backends import Backend, cpu, cpu_thresholds, eager
from fedms_ext.backends.base import FLOATING, BackwardCall, ForwardCall, Lora, Needs, Weight

LAYERS = ((384, 384), (768, 3072), (3072, 768))
ROWS = (1, 16, 64, 256, 1576)
RANKS = (8, 16, 32, 48, 64, 128)


def operands(rows: int, k: int, n: int, rank: int) -> tuple[Tensor, Tensor, Tensor, Lora]:
    a, b = torch.randn(rank, k), torch.randn(n, rank)
    lora = Lora([a], [b], torch.tensor([2.0], dtype=torch.float64), None, None, 0.0, 0)
    return torch.randn(rows, k), torch.randn(n, k), torch.randn(rows, n), lora


def kernels_over_eager(rows: int, k: int, n: int, rank: int) -> tuple[float, float]:
    """Of the forward and of the backward pass."""
    x, weight, dy, lora = operands(rows, k, n, rank)
    s = x @ lora.a[0].t()
    needs = Needs(True, False, [True], [True])

    frozen = Weight(weight, None, FLOATING, 0, n, k)
    forward_call, backward_call = ForwardCall(x, frozen, None, lora), BackwardCall(dy, x, frozen, lora, s, needs)

    def forward(backend: Backend) -> Callable[[], object]:
        return lambda: backend.forward(forward_call)

    def backward(backend: Backend) -> Callable[[], object]:
        return lambda: backend.backward(backward_call)

    def ratio(call: Callable[[Backend], Callable[[], object]]) -> float:
        seconds = interleaved({"kernels": call(cpu), "eager": call(eager)}, seconds=0.3)
        return float(np.median(seconds["kernels"] / seconds["eager"]))

    with torch.no_grad():
        return ratio(forward), ratio(backward)


def largest(ratios: np.ndarray) -> int:
    """The last of RANKS before the first at which the kernels are slower."""
    slower = np.flatnonzero(ratios > 1)
    count = slower[0] if len(slower) else len(RANKS)
    return RANKS[count - 1] if count else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the rule into the package")
    write = parser.parse_args().write
    isa = fedms_ext.build_info()["isa_used"]
    print(f"{isa}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| rows | " + " | ".join(f"r = {rank}" for rank in RANKS) + " |\n" + "| --- " * (len(RANKS) + 1) + "|")
    rule = []
    for rows in ROWS:
        grid = np.array([[kernels_over_eager(rows, k, n, rank) for k, n in LAYERS] for rank in RANKS])
        means = np.exp(np.log(grid).mean(axis=1))
        print(f"| {rows} | " + " | ".join(f"{f:.2f} / {b:.2f}" for f, b in means) + " |", flush=True)
        rule.append((rows, largest(means[:, 0]), largest(means[:, 1])))
    print(f"\n{isa}: {tuple(rule)}")
    if write:
        rules = {**cpu_thresholds.LARGEST_RANK, isa: tuple(rule)}
        file = Path(cpu_thresholds.__file__)
        head = file.read_text().partition("LARGEST_RANK = ")[0]
        lines = "".join(f'    "{name}": {limits},\n' for name, limits in rules.items())
        file.write_text(f"{head}LARGEST_RANK = {{\n{lines}}}\n")


if __name__ == "__main__":
    main()
