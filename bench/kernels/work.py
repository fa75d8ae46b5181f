"""What a layer of the GPU benchmarks has to do, by arithmetic, for docs/evidence/gpu.md.

    python -m bench.kernels.work
"""

from __future__ import annotations

from dataclasses import dataclass

# (K, N, rows, total rank): the shapes with goals first, then those where a narrow or a short layer may lose.
SHAPES = [
    (4096, 4096, 8192, 32),
    (768, 768, 12608, 32),
    (4096, 14336, 8192, 32),
    (768, 3072, 12608, 32),
    (3072, 768, 12608, 32),
    (14336, 4096, 8192, 32),
    (4096, 4096, 8192, 8),
    (4096, 4096, 8192, 128),
    (4096, 4096, 64, 32),
    (4096, 4096, 512, 32),
    (384, 384, 2048, 8),
]


@dataclass(frozen=True)
class Work:
    """Operations and bytes of a layer K -> N in 16 bits, and what it takes at least, as a multiple of its bare GEMM."""

    k: int
    n: int
    rows: int
    rank: int

    @property
    def gemm_flops(self) -> int:
        return 2 * self.rows * self.n * self.k

    @property
    def rank_flops(self) -> int:
        """Of S and S B^T; as many again are U and dS A, and as many again dA and dB."""
        return 2 * self.rows * self.rank * (self.k + self.n)

    @property
    def gemm_bytes(self) -> int:
        return 2 * (self.rows * self.k + self.n * self.k + self.rows * self.n)

    @property
    def extra_bytes(self) -> int:
        """x once more for S, S (or T) written and read, A and B."""
        return 2 * (self.rows * self.k + 2 * self.rows * self.rank + self.rank * (self.k + self.n))

    @property
    def floor(self) -> float:
        """All operations of the forward pass over those of its GEMM: every pass over memory is hidden."""
        return 1 + self.rank_flops / self.gemm_flops

    @property
    def floor_of_both(self) -> float:
        """The same of forward and backward, over two GEMMs."""
        return 1 + 3 * self.rank_flops / (2 * self.gemm_flops)


def main() -> None:
    print("| K -> N (rows), rank | GEMM, GFLOP | ranks, GFLOP | GEMM, MiB | extra, MiB | floor | floor, with backward |")
    print("| --- " * 7 + "|")
    for shape in SHAPES:
        work, (k, n, rows, rank) = Work(*shape), shape
        print(f"| {k} -> {n} ({rows}), {rank} | {work.gemm_flops / 1e9:.0f} | {work.rank_flops / 1e9:.1f} "
              f"| {work.gemm_bytes / 2**20:.0f} | {work.extra_bytes / 2**20:.0f} | {work.floor:.3f} "
              f"| {work.floor_of_both:.3f} |")  # fmt: skip


if __name__ == "__main__":
    main()
