"""From tensors to kernel launches. Every function here works on rows: x (M, K), dy (M, N), all on one device.

Tensors are allocated here and written whole by the kernels. x and dy have dense rows (stride 1 along them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import gemm as gemm_kernels
from . import ranks as rank_kernels
from .tiles import Chip, Tile, rank_block

_GROUP = 8  # row blocks in a band of tiles


@dataclass(frozen=True)
class Dropout:
    """Dropout with probability p, drawn from the seed."""

    p: float
    seed: int

    @property
    def launch(self) -> dict[str, int | float]:
        return dict(seed=self.seed, threshold=int(self.p * 2.0**32), kept_scale=1.0 / (1.0 - self.p))


@dataclass(frozen=True)
class Experts:
    """The applied experts side by side: a (R, K), b (N, R), scale (E,), expert (R,) the number of a rank's expert."""

    a: Tensor
    b: Tensor
    scale: Tensor
    expert: Tensor
    ranks: tuple[int, ...]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def starts(self) -> list[int]:
        return [sum(self.ranks[:e]) for e in range(len(self.ranks))]


def _aligned(columns: int, like: Tensor) -> int:
    """The columns of a row that ends at a multiple of 16 bytes, so that tensor descriptors can describe the rows."""
    unit = 16 // like.element_size()
    return -(-columns // unit) * unit


@lru_cache(maxsize=64)
def _zeros(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(rows, columns, dtype=dtype, device=device)


@lru_cache(maxsize=256)
def _numbers(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def pack(lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scale: Tensor) -> Experts:
    """Puts the experts side by side. One expert whose tensors are dense and aligned is taken as it is."""
    ranks = tuple(a.shape[0] for a in lora_a)
    device = lora_a[0].device
    if len(ranks) == 1 and lora_a[0].is_contiguous():
        a = lora_a[0]
    else:
        a = torch.cat(list(lora_a))
    if len(ranks) == 1 and lora_b[0].is_contiguous() and ranks[0] * a.element_size() % 16 == 0:
        b = lora_b[0]
    else:
        rank, n = sum(ranks), lora_b[0].shape[0]
        b = torch.cat([*lora_b, _zeros(n, _aligned(rank, a) - rank, a.dtype, device)], dim=1)[:, :rank]
    if scale.device != device:
        scale = _numbers(tuple(scale.tolist()), torch.float32, device)
    owners = tuple(e for e, rank in enumerate(ranks) for _ in range(rank))
    return Experts(a, b, scale, _numbers(owners, torch.int32, device), ranks)


def _gate(gate: Tensor | None, like: Tensor) -> tuple[Tensor, int, int]:
    # A kernel that reads no gate gets any pointer in its place.
    return (like, 0, 0) if gate is None else (gate, gate.stride(0), gate.stride(1))


def _drop(dropout: Dropout | None) -> dict[str, int | float]:
    return Dropout(0.0, 0).launch if dropout is None else dropout.launch


def shrink(
    x: Tensor, a: Tensor, experts: Experts, gate: Tensor | None, dropout: Dropout | None, keep_s: bool = True
) -> tuple[Tensor | None, Tensor]:
    """s = drop(x) A^T (M, R) and t, which is s with scale and gate. `a` is A^T (K, R), of any strides."""
    (m, k), r = x.shape, a.shape[1]
    s = x.new_empty(m, r) if keep_s else None
    t = x.new_empty(m, _aligned(r, x))
    # Bound by the pass over x: enough programs to keep the memory busy come before large tiles.
    bm = 64 if m >= 4096 else 32
    br = rank_block(r, 128)
    rank_kernels.shrink[triton.cdiv(m, bm), triton.cdiv(r, br)](
        x, a, experts.scale, experts.expert, (g := _gate(gate, x))[0], x if s is None else s, t, m, k, r,
        x.stride(0), a.stride(0), a.stride(1), t.stride(0), g[1], g[2], **_drop(dropout),
        BM=bm, BK=64, BR=br, EVEN_K=k % 64 == 0, GATE=gate is not None, DROP=dropout is not None,
        QUADS=k % 4 == 0, KEEP_S=keep_s, num_warps=4, num_stages=3 if dropout is None else 2,
    )  # fmt: skip
    return s, t[:, :r]


def gemm(
    x: Tensor, w: Tensor, bias: Tensor | None, t: Tensor, f: Tensor, tile: Tile, chip: Chip,
    dropout: Dropout | None = None, w_scale: Tensor | None = None, across: bool = False,
) -> Tensor:  # fmt: skip
    """x w + t f + bias with w (K, N) and f (R, N), each of which has stride 1 along one of its sides.

    `dropout` masks t f. `w_scale` (N,) float32: w is int8 with one scale a column; for pointer tiles. `across`, for
    descriptor tiles: the columns of w and f are the side with stride 1.
    """
    (m, k), n, r = x.shape, w.shape[1], t.shape[1]
    y = x.new_empty(m, n)
    options = dict(
        BM=tile.bm, BN=tile.bn, BK=tile.bk, BR=rank_block(r), GROUP=_GROUP, BIAS=bias is not None,
        DROP=dropout is not None, QUADS=n % 4 == 0, num_warps=tile.warps, num_stages=tile.stages,
        **_drop(dropout),
    )  # fmt: skip
    if tile.kind == "pointer":
        gemm_kernels.gemm_pointer[triton.cdiv(m, tile.bm) * triton.cdiv(n, tile.bn),](
            x, w, x if w_scale is None else w_scale, x if bias is None else bias, t, f, y, m, n, k, r,
            x.stride(0), w.stride(0), w.stride(1), t.stride(0), f.stride(0), f.stride(1),
            EVEN_K=k % tile.bk == 0, INT8=w_scale is not None,
            **options,
        )  # fmt: skip
        return y
    blocks = {
        "w": [tile.bk, tile.bn] if across else [tile.bn, tile.bk],
        "f": [rank_block(r), tile.bn] if across else [tile.bn, rank_block(r)],
        "y": [tile.bm, tile.bn // 2 if tile.halves else tile.bn],
    }
    describe = TensorDescriptor.from_tensor
    tiles = triton.cdiv(m, tile.bm) * triton.cdiv(n, tile.bn)
    gemm_kernels.gemm_descriptor[min(chip.multiprocessors * tile.resident(chip, r), tiles),](
        describe(x, [tile.bm, tile.bk]), describe(w if across else w.t(), blocks["w"]),
        x if bias is None else bias, describe(t, [tile.bm, rank_block(r)]),
        describe(f if across else f.t(), blocks["f"]), describe(y, blocks["y"]), m, n, k,
        RANKS=r, ACROSS=across, HALVES=tile.halves, **options,
    )  # fmt: skip
    return y


def gemm_inline(
    x: Tensor, weight: Tensor, bias: Tensor | None, experts: Experts, gate: Tensor | None, tile: Tile
) -> tuple[Tensor, Tensor]:
    """The whole forward pass in one kernel: y (M, N) and s (M, R)."""
    (m, k), n, r = x.shape, weight.shape[0], experts.rank
    y, s = x.new_empty(m, n), x.new_empty(m, r)
    g, gate_stride_m, gate_stride_e = _gate(gate, x)
    gemm_kernels.gemm_inline[triton.cdiv(m, tile.bm) * triton.cdiv(n, tile.bn),](
        x, weight, x if bias is None else bias, experts.a, experts.b, experts.scale, experts.expert, g, s, y,
        m, n, k, r, x.stride(0), weight.stride(0), experts.a.stride(0), experts.b.stride(0),
        gate_stride_m, gate_stride_e,
        BM=tile.bm, BN=tile.bn, BK=tile.bk, BR=rank_block(r), GROUP=_GROUP, EVEN_K=k % tile.bk == 0,
        BIAS=bias is not None, GATE=gate is not None, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y, s


def _splits(m: int, bm: int) -> tuple[int, int]:
    """Into how many parts the rows are split for partial sums, at most 16, and how many rows each has."""
    rows = -(-max(-(-m // 16), bm) // bm) * bm
    return -(-m // rows), rows


def sweep_dy(
    dy: Tensor, s: Tensor | None, experts: Experts, gate: Tensor | None, project: bool, outer: bool
) -> tuple[Tensor | None, Tensor | None]:
    """One pass over dy: partial sums of U = dy B (parts, M, R) if `project`, and of dB (parts, N, R) if `outer`."""
    (m, n), r = dy.shape, experts.rank
    # Wide blocks of columns make fewer partial sums of U; a narrow layer would leave multiprocessors idle, and many
    # ranks would not fit into the shared memory of small chips.
    bm, bc, br = 64, 256 if n >= 2048 and r <= 32 else 128, rank_block(r, 64)
    parts, rows = _splits(m, bm)
    u = dy.new_empty(triton.cdiv(n, bc), m, r, dtype=torch.float32) if project else None
    g = dy.new_empty(parts, n, r, dtype=torch.float32) if outer else None
    gates = _gate(gate, dy)
    rank_kernels.sweep[triton.cdiv(n, bc), parts, triton.cdiv(r, br)](
        dy, dy if s is None else s, experts.b, experts.scale, experts.expert, gates[0],
        dy if u is None else u, dy if g is None else g, m, n, r, rows,
        dy.stride(0), 0 if s is None else s.stride(0), experts.b.stride(0), gates[1], gates[2], **_drop(None),
        BM=bm, BC=bc, BR=br, PROJECT=project, OUTER=outer, FACTOR=True, GATE=gate is not None, DROP=False,
        QUADS=False, num_warps=8, num_stages=3,
    )  # fmt: skip
    return u, g


def sweep_x(x: Tensor, ds: Tensor, dropout: Dropout | None) -> Tensor:
    """Partial sums of dA^T = drop(x)^T dS, (parts, K, R), for the columns of dS that are given."""
    (m, k), r = x.shape, ds.shape[1]
    bm, bc, br = 64, 128, rank_block(r, 64)
    parts, rows = _splits(m, bm)
    g = x.new_empty(parts, k, r, dtype=torch.float32)
    rank_kernels.sweep[triton.cdiv(k, bc), parts, triton.cdiv(r, br)](
        x, ds, x, x, x, x, x, g, m, k, r, rows, x.stride(0), ds.stride(0), 0, 0, 0, **_drop(dropout),
        BM=bm, BC=bc, BR=br, PROJECT=False, OUTER=True, FACTOR=False, GATE=False, DROP=dropout is not None,
        QUADS=k % 4 == 0, num_warps=8, num_stages=3 if dropout is None else 2,
    )  # fmt: skip
    return g


def finish_rows(
    u: Tensor, s: Tensor | None, experts: Experts, gate: Tensor | None, dgate: Tensor | None, like: Tensor | None
) -> Tensor | None:
    """From the partial sums of U: dS (M, R) in the dtype of `like` if that is given; fills `dgate` (M, E) if given."""
    parts, m, r = u.shape
    ds = None if like is None else like.new_empty(m, _aligned(r, like))
    bm = 32
    gates = _gate(gate, u)
    rank_kernels.finish_rows[triton.cdiv(m, bm),](
        u, u if s is None else s, experts.scale, experts.expert, gates[0], u if ds is None else ds,
        u if dgate is None else dgate, m, r, len(experts.ranks), parts,
        0 if s is None else s.stride(0), 0 if ds is None else ds.stride(0), gates[1], gates[2],
        BM=bm, BR=rank_block(r, 256), GATE=gate is not None, DGATE=dgate is not None, DS=ds is not None,
        num_warps=4,
    )  # fmt: skip
    return None if ds is None else ds[:, :r]


def add_parts(g: Tensor, out: Tensor, first: int) -> None:
    """out (C, r) = the ordered sum over the parts of g (parts, C, R), its columns from `first` on."""
    parts, c, r = g.shape
    bc, br = 64, 16
    rank_kernels.add_parts[triton.cdiv(c, bc), triton.cdiv(out.shape[1], br)](
        g, out, c, r, parts, first, out.shape[1], out.stride(0), out.stride(1), BC=bc, BR=br, num_warps=4
    )
