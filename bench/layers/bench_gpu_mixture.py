"""Two experts in one layer on a GPU: gates for each row, and the streams of the mixture in one batch.

    python -m bench.layers.bench_gpu_mixture [--quick] [--seconds S] [--json FILE] [--rehearse]

"gates": every row takes both experts, weighted. "streams": the first half of the rows takes the first expert, the
second half the second, as segments of one batch; beside a gate of zeros and ones, which computes both experts for every
row, and two layers called one after the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bench.harness.gpu_clock import Report
from bench.layers.bench_gpu_linear import both, forward_only
from torch import Tensor

from fedms_ext import expert_linear

# (K, N, rows, rank of each expert)
SHAPES = [(4096, 4096, 8192, 16), (768, 768, 12608, 16), (768, 3072, 12608, 8), (384, 384, 4096, 8)]
QUICK = SHAPES[:2]
REHEARSAL = [(64, 48, 70, 8)]


def operator_by_operator(x: Tensor, weight: Tensor, a: list[Tensor], b: list[Tensor], gate: Tensor) -> Tensor:
    """What a mixture of PEFT adapters computes: every product an operator of its own."""
    y = F.linear(x, weight)
    for e in range(len(a)):
        y = y + gate[:, e : e + 1] * (0.5 * F.linear(F.linear(x, a[e]), b[e]))
    return y


def run(report: Report, shapes: list[tuple[int, int, int, int]]) -> None:
    for number, (k, n, rows, rank) in enumerate(shapes):
        torch.manual_seed(0)
        like = dict(dtype=report.dtype, device=report.clock.device)
        x, dy = torch.randn(rows, k, **like), torch.randn(rows, n, **like)
        weight = torch.randn(n, k, **like) / k**0.5
        a = [(torch.randn(rank, k, **like) / k**0.5).requires_grad_() for _ in range(2)]
        b = [torch.randn(n, rank, **like).requires_grad_() for _ in range(2)]
        gates = torch.rand(rows, 2, device=x.device).to(x.dtype)
        half = rows // 2
        streams = torch.zeros(rows, 2, **like)
        streams[:half, 0], streams[half:, 1] = 1, 1
        scale = [0.5, 0.5]

        def apart(x):
            first = expert_linear(x[:half], weight, None, a[:1], b[:1], scale[:1])
            second = expert_linear(x[half:], weight, None, a[1:], b[1:], scale[1:])
            return torch.cat([first, second])

        peers = {
            "gates": {
                "bare GEMM": lambda x: F.linear(x, weight),
                "fedms": lambda x: expert_linear(x, weight, None, a, b, scale, gates),
                "operator by operator": lambda x: operator_by_operator(x, weight, a, b, gates),
            },
            "streams": {
                "bare GEMM": lambda x: F.linear(x, weight),
                "fedms, segments": lambda x: expert_linear(x, weight, None, a, b, scale, segments=(half, rows - half)),
                "fedms, zeros and ones": lambda x: expert_linear(x, weight, None, a, b, scale, streams),
                "fedms, two layers": apart,
            },
        }
        if x.is_cuda and (number == 0 or not report.quick):
            compiled = torch.compile(operator_by_operator, dynamic=False)
            peers["gates"]["operator by operator, compiled"] = lambda x: compiled(x, weight, a, b, gates)
        for case, operators in peers.items():
            for what in ("forward", "forward + backward"):
                calls = {
                    name: forward_only(peer, x) if what == "forward"
                    else both(peer, x, dy, [] if name == "bare GEMM" else [*a, *b])
                    for name, peer in operators.items()
                }  # fmt: skip
                facts = dict(case=case, k=k, n=n, rows=rows, rank=rank, what=what)
                report.add(f"{case}: {k} -> {n}, {rows} rows, 2 experts of rank {rank}, {what}", facts, calls, "bare GEMM")


def main() -> None:
    report = Report(__doc__, seconds=0.3, quick_seconds=0.05)
    run(report, REHEARSAL if report.rehearse else QUICK if report.quick else SHAPES)
    report.close()


if __name__ == "__main__":
    main()
