"""What the kernels of a layer take on a GPU, one by one: the GEMM with every tile, and all launches of a step.

    python -m bench.kernels.bench_gpu_kernels [--quick] [--seconds S] [--json FILE] [--rehearse]

"tiles": the frozen GEMM with the ranks in it, forward and dx, with every legal tile of Triton's and the CUDA kernels, beside
cuBLAS without ranks; the CUDA kernels without ranks too. "passes": the forward and the backward pass of narrow layers on
the CUDA kernels, with S or dS made before the GEMM, by a launch that overlaps it, and inside of it. "launches": what each kernel of
forward and backward takes, by PyTorch's profiler, on each backend.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bench.harness.gpu_clock import Report
from bench.kernels.work import Work
from bench.layers.bench_gpu_linear import both, on_backend
from torch import Tensor

import fedms_ext
from fedms_ext import expert_linear
from fedms_ext.backends import cuda, cuda_plan
from fedms_ext.backends import device as devices
from fedms_ext.backends import triton as backend

# (K, N, rows, total rank)
SHAPES = [(4096, 4096, 8192, 32), (768, 768, 12608, 32), (8192, 8192, 8192, 32), (4096, 14336, 8192, 32)]
QUICK = SHAPES[:2]
NARROW = [(768, 768, 12608, 32), (384, 384, 2048, 8), (3072, 768, 12608, 32), (1024, 1024, 8192, 16)]
REHEARSAL = [(64, 48, 70, 8)]
Call = Callable[[], object]


@dataclass
class Operands:
    """Of a GEMM x w^T + t f^T, or `transposed`: x w + t f, as dx has it: x (rows, k), t (rows, rank)."""

    x: Tensor
    w: Tensor
    t: Tensor
    a: Tensor
    b: Tensor
    transposed: bool

    @staticmethod
    def random(shape: tuple[int, int, int, int], transposed: bool, like: dict[str, object]) -> Operands:
        k, n, rows, rank = shape
        torch.manual_seed(0)
        x = torch.randn(rows, n if transposed else k, **like)
        w = torch.randn(n, k, **like) / k**0.5
        return Operands(x, w, torch.randn(rows, rank, **like), torch.randn(rank, k, **like), torch.randn(n, rank, **like), transposed)

    @property
    def gemm(self) -> tuple[int, int, int, int]:
        """m, n, k and the ranks, of the GEMM at hand."""
        n, k = self.w.shape
        return (len(self.x), k, n, len(self.a)) if self.transposed else (len(self.x), n, k, len(self.a))


def bare(o: Operands) -> Call:
    return (lambda: o.x @ o.w) if o.transposed else (lambda: F.linear(o.x, o.w))


def of_triton(o: Operands) -> dict[str, Call]:
    if backend.unavailable():
        return {}
    from fedms_ext.backends.triton import launch
    from fedms_ext.backends.triton.operands import FrozenMatrix, concatenate
    from fedms_ext.backends.triton.tiles import Gemm, legal_tiles

    chip = devices.properties(o.x.device)
    experts = concatenate([o.a], [o.b], torch.ones(1, device=o.x.device), None, o.x.dtype)
    w, f = (FrozenMatrix(o.w, transposed=True), experts.a) if o.transposed else (FrozenMatrix(o.w.t(), False), experts.b.t())
    tiles = legal_tiles(Gemm(*o.gemm), chip, aligned=True, inline=False, drop=False)
    calls: dict[str, Call] = {
        f"Triton, {tile}": lambda tile=tile: launch.gemm(o.x, w, None, o.t, f, experts, tile, chip) for tile in tiles
    }
    calls["cuBLAS, the ranks first"] = lambda: backend._cublas(o.x, w, None, o.t, f, experts)
    return calls


def of_cuda(o: Operands) -> dict[str, Call]:
    if cuda.unavailable():
        return {}
    kernels, chip = cuda._kernels, cuda_plan.chip_of(o.x.device)
    m, n, k, rank = o.gemm
    f = o.a if o.transposed else o.b

    def call(tile: int, ranks: int) -> Tensor:
        y = o.x.new_empty(m, n)
        kernels.gemm(o.x, o.w, o.t, f, y, o.transposed, ranks, tile, chip)
        return y

    calls: dict[str, Call] = {}
    for tile in kernels.gemm_tiles(chip, m, n, k, rank, False, False, True):
        name = f"CUDA C++, {kernels.gemm_tile_name(tile)}"
        calls[name] = lambda tile=tile: call(tile, rank)
        calls[f"{name}, no ranks"] = lambda tile=tile: call(tile, 0)
    return calls


def tiles(report: Report, shapes: list[tuple[int, int, int, int]]) -> None:
    like = dict(dtype=report.dtype, device=report.clock.device)
    for shape in shapes:
        for transposed in (False, True):
            operands = Operands.random(shape, transposed, like)
            calls = {"bare GEMM": bare(operands)}
            if operands.x.is_cuda:
                calls |= of_triton(operands) | of_cuda(operands)
            (m, n, k, rank), work = operands.gemm, Work(*shape)
            what = "dx" if transposed else "forward"
            facts = dict(m=m, n=n, k=k, rank=rank, dtype=str(report.dtype), what=what, flops=work.gemm_flops)
            report.add(f"GEMM of {what}, {k} -> {n}, {m} rows, rank {rank}", facts, calls, "bare GEMM")


def passes(report: Report, shapes: list[tuple[int, int, int, int]]) -> None:
    """The passes of a layer in every configuration, which is what is measured at the first call of a shape."""
    like = dict(dtype=report.dtype, device=report.clock.device)
    for k, n, rows, rank in shapes:
        o = Operands.random((k, n, rows, rank), False, like)
        if cuda.unavailable() or not devices.runs_cuda(o.x.device):
            return
        a, b, dy, scale = o.a.float(), o.b.float(), torch.randn(rows, n, **like), torch.ones(1, device=o.x.device)
        plan = cuda_plan.Plan(cuda_plan.Shape(o.x.device, report.dtype, True, False, False, rows, n, k, (rank,), None))
        y, dx, room, da, db = dy.new_empty(rows, n), o.x.new_empty(rows, k), o.x.new_empty(plan.room_size), a.clone(), b.clone()
        kernels, chip = plan._kernels, cuda_plan.chip_of(o.x.device)

        def forward(config: cuda_plan.GemmConfig) -> None:
            kernels.choose_forward(config.tile, config.shrink)
            kernels.forward(o.x, o.w, None, None, [a], [b], scale, None, 0.0, 0, y, None, room)

        def backward(config: cuda_plan.GemmConfig) -> None:
            kernels.choose_dx(config.tile, config.shrink)
            kernels.backward(dy, o.x, o.w, None, [a], [b], scale, None, 0.0, 0, None, room, dx, None, [da], [db])

        for name, run, base in (("forward", forward, lambda: F.linear(o.x, o.w)), ("dx", backward, lambda: dy @ o.w)):
            sizes = (rows, n, k) if name == "forward" else (rows, k, n)
            fits = name == "forward" or cuda._kernels.narrow_backward_parts(chip, rows, n, k, rank) > 0
            configs = cuda_plan.gemm_configs(chip, *sizes, rank, False, False, True, True, fits)
            calls = {"bare GEMM": base} | {str(config): lambda config=config: run(config) for config in configs}
            forward(cuda_plan.GemmConfig(configs[0].tile, "apart"))  # fills the room
            what = "forward" if name == "forward" else "backward"
            facts = dict(m=rows, n=n, k=k, rank=rank, dtype=str(report.dtype), what=what)
            report.add(f"The {what} pass of {k} -> {n}, {rows} rows, rank {rank}, float32 experts", facts, calls, "bare GEMM")


def launches(report: Report, shapes: list[tuple[int, int, int, int]]) -> None:
    from torch.profiler import ProfilerActivity, profile

    like = dict(dtype=report.dtype, device=report.clock.device)
    activity = ProfilerActivity.CUDA if like["device"] == "cuda" else ProfilerActivity.CPU
    count = 10
    for k, n, rows, rank in shapes:
        torch.manual_seed(0)
        x, dy = torch.randn(rows, k, **like), torch.randn(rows, n, **like)
        weight = torch.randn(n, k, **like) / k**0.5
        a = (torch.randn(rank, k, **like) / k**0.5).requires_grad_()
        b = torch.randn(n, rank, **like).requires_grad_()
        for name in fedms_ext.available():
            if name == "cpu" and like["device"] == "cuda":
                continue
            call = on_backend(name, both(lambda x: expert_linear(x, weight, None, [a], [b], [0.5]), x, dy, [a, b]))
            call()
            with profile(activities=[activity]) as profiled:
                for _ in range(count):
                    call()
                if like["device"] == "cuda":
                    torch.cuda.synchronize()
            spent: dict[str, list[float]] = defaultdict(list)
            for event in profiled.events():
                spent[event.name].append(event.device_time if like["device"] == "cuda" else event.self_cpu_time_total)
            rows_of = [(sum(times) / count, len(times) / count, kernel[:110]) for kernel, times in spent.items()]
            print(f"### Launches of forward + backward on {name}: {k} -> {n}, {rows} rows, rank {rank}\n\n"
                  "| microseconds a call | launches | kernel |\n| --- | --- | --- |")  # fmt: skip
            for spent_here, times, kernel in sorted(rows_of, reverse=True)[:14]:
                print(f"| {spent_here:.1f} | {times:.1f} | {kernel} |")
            print(f"| {sum(row[0] for row in rows_of):.1f} | {sum(row[1] for row in rows_of):.1f} | all |\n", flush=True)
            found = [dict(kernel=kernel, microseconds=spent_here, launches=times) for spent_here, times, kernel in rows_of]
            report.keep(dict(k=k, n=n, rows=rows, rank=rank, dtype=str(report.dtype), backend=name, launches=found))


def main() -> None:
    report = Report(__doc__, seconds=0.3, quick_seconds=0.05)
    shapes = REHEARSAL if report.rehearse else QUICK if report.quick else SHAPES
    launches(report, shapes[:2])
    passes(report, REHEARSAL if report.rehearse else NARROW[:2] if report.quick else NARROW)
    tiles(report, shapes)
    report.close()


if __name__ == "__main__":
    main()
