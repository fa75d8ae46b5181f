"""Compiles what the GPU benchmarks run, in as many processes as there are cores: Triton keeps it on disk, and compilation
is most of the time of a first measurement.

    python -m bench.kernels.compile [--quick]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from dataclasses import dataclass

from bench.kernels import bench_gpu_kernels
from bench.layers import bench_gpu_linear
from bench.layers import bench_gpu_mixture
import torch

from fedms_ext import expert_linear, use_backend
from fedms_ext.backends import triton as backend

MOST_TILES = 9


@dataclass(frozen=True)
class Job:
    """One layer, forward and backward, with the tile of that number in both GEMMs, or the last one."""

    k: int
    n: int
    rows: int
    ranks: tuple[int, ...]
    gated: bool
    segmented: bool
    dropout_p: float
    tile: int

    def run(self) -> None:
        like = dict(dtype=torch.bfloat16, device="cuda")
        x = torch.randn(self.rows, self.k, **like, requires_grad=True)
        a = [torch.randn(r, self.k, **like, requires_grad=True) for r in self.ranks]
        b = [torch.randn(self.n, r, **like, requires_grad=True) for r in self.ranks]
        gate = torch.rand(self.rows, len(self.ranks), **like) if self.gated else None
        half = self.rows // 2
        segments = (half, self.rows - half) if self.segmented else None
        scale = [0.5] * len(self.ranks)
        weight = torch.randn(self.n, self.k, **like)
        with use_backend("triton"):
            y = expert_linear(x, weight, None, a, b, scale, gate, None, self.dropout_p, 7, segments=segments)
            torch.autograd.grad(y, [x, *a, *b], torch.ones_like(y))


def run(job: Job) -> None:
    backend.Choices.choose = lambda self, device, shape, ways, run: list(ways().values())[min(job.tile, len(ways()) - 1)]
    job.run()


def jobs(quick: bool) -> list[Job]:
    linear = bench_gpu_linear.QUICK if quick else bench_gpu_linear.SHAPES
    kernels = bench_gpu_kernels.QUICK if quick else bench_gpu_kernels.SHAPES
    mixture = bench_gpu_mixture.QUICK if quick else bench_gpu_mixture.SHAPES
    layers = {(k, n, rows, (rank,), False, False, 0.0) for k, n, rows, rank in [*linear, *kernels]}
    layers |= {(k, n, rows, (rank,), False, False, 0.1) for k, n, rows, rank in linear}
    for k, n, rows, rank in mixture:
        layers |= {(k, n, rows, (rank, rank), True, False, 0.0), (k, n, rows, (rank, rank), False, True, 0.0)}
    return [Job(*layer, tile) for tile in range(MOST_TILES) for layer in sorted(layers)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the shapes of the benchmarks' --quick")
    todo, start = jobs(parser.parse_args().quick), time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for _ in pool.imap_unordered(run, todo):
            pass
    print(f"{len(todo)} layers in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
