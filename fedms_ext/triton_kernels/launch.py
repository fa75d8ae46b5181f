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

from ..backends.operands import numbers
from ..reference import LEVELS
from . import gemm as gemm_kernels
from . import ranks as rank_kernels
from .tiles import Chip, Tile, rank_block

_BAND = 8  # row blocks in a band of tiles


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
    """The applied experts side by side: a (R, K), b (N, R), scale (E,), expert (R,) the number of a rank's expert.

    `segments` are None, or the number of rows of each expert: then every row has the ranks of its own expert alone. The
    experts lie `pitch` ranks apart, so that a step of ranks never reaches into the next one: R is E * pitch.
    """

    a: Tensor
    b: Tensor
    scale: Tensor
    expert: Tensor
    ranks: tuple[int, ...]
    segments: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        """The columns of S, and the steps that the ranks add to a GEMM."""
        return sum(self.ranks) if self.segments is None else max(self.ranks)

    @property
    def pitch(self) -> int:
        return 0 if self.segments is None else _pitch(self.ranks)

    @property
    def starts(self) -> list[int]:
        """The first column of S that is an expert's."""
        return [sum(self.ranks[:e]) if self.segments is None else 0 for e in range(len(self.ranks))]


def _pitch(ranks: tuple[int, ...]) -> int:
    step = rank_block(max(ranks))
    return -(-max(ranks) // step) * step


@dataclass(frozen=True)
class Weight:
    """The frozen operand w (K, N) of a GEMM, in any format; `across`: its side with stride 1 is N, as for dx.

    Without a scale it is dense: w itself. int8: w itself, with one scale a column, (N,). With a `kind` of 4 bits: the
    bytes (rows, ceil(columns / 2)) and the scales (rows, ceil(columns / group)) of a QuantisedWeight whose rows are the
    other side.
    """

    data: Tensor
    across: bool
    scale: Tensor | None = None
    kind: str = "dense"
    group: int = 0

    @property
    def nibbles(self) -> bool:
        return self.kind in LEVELS


def _aligned(columns: int, like: Tensor) -> int:
    """The columns of a row that ends at a multiple of 16 bytes, so that tensor descriptors can describe the rows."""
    unit = 16 // like.element_size()
    return -(-columns // unit) * unit


@lru_cache(maxsize=64)
def _zeros(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(rows, columns, dtype=dtype, device=device)


def pack(
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scale: Tensor, segments: Sequence[int] | None = None
) -> Experts:
    """Puts the experts side by side. One expert whose tensors are dense and aligned is taken as it is."""
    ranks = tuple(a.shape[0] for a in lora_a)
    device = lora_a[0].device
    if scale.device != device:
        scale = numbers(tuple(scale.tolist()), torch.float32, device)
    if segments is not None:
        pitch, (n, k) = _pitch(ranks), (lora_b[0].shape[0], lora_a[0].shape[1])
        gaps = [pitch - rank for rank in ranks]
        a = torch.cat([t for a, gap in zip(lora_a, gaps) for t in (a, _zeros(gap, k, a.dtype, device))])
        b = torch.cat([t for b, gap in zip(lora_b, gaps) for t in (b, _zeros(n, gap, b.dtype, device))], dim=1)
        owners = tuple(e for e in range(len(ranks)) for _ in range(pitch))
        return Experts(a, b, scale, numbers(owners, torch.int32, device), ranks, tuple(segments))
    if len(ranks) == 1 and lora_a[0].is_contiguous():
        a = lora_a[0]
    else:
        a = torch.cat(list(lora_a))
    if len(ranks) == 1 and lora_b[0].is_contiguous() and ranks[0] * a.element_size() % 16 == 0:
        b = lora_b[0]
    else:
        rank, n = sum(ranks), lora_b[0].shape[0]
        b = torch.cat([*lora_b, _zeros(n, _aligned(rank, a) - rank, a.dtype, device)], dim=1)[:, :rank]
    owners = tuple(e for e, rank in enumerate(ranks) for _ in range(rank))
    return Experts(a, b, scale, numbers(owners, torch.int32, device), ranks)


@dataclass(frozen=True)
class Blocks:
    """The rows in blocks of `size`: how many blocks there are, and in segments the table of `row_block` in ranks.py.
    `counts`: how many of them each expert owns."""

    count: int
    table: Tensor | None = None
    counts: tuple[int, ...] = ()


def blocks(experts: Experts, m: int, size: int, wanted: Sequence[bool] | None = None, whole: bool = False) -> Blocks:
    """Blocks of `size` rows at most; in segments none lies in two of them, and only `wanted` experts have any.

    `whole`: all blocks have just `size` rows, of which no segment may have fewer; the last block of a segment reaches
    back into the one before.
    """
    if experts.segments is None:
        return Blocks(triton.cdiv(m, size))
    wanted = tuple(wanted or [True] * len(experts.ranks))
    return _blocks(experts.segments, experts.ranks, size, wanted, whole, experts.a.device)


@lru_cache(maxsize=256)
def _blocks(
    segments: tuple[int, ...], ranks: tuple[int, ...], size: int, wanted: tuple[bool, ...], whole: bool,
    device: torch.device,
) -> Blocks:  # fmt: skip
    table, counts, end = [], [], 0
    for owner, (rows, rank) in enumerate(zip(segments, ranks)):
        start, end = end, end + rows
        firsts = range(start, end if wanted[owner] else start, size)
        table += [(min(row, end - size) if whole else row, min(row + size, end), owner, rank) for row in firsts]
        counts.append(len(firsts))
    return Blocks(len(table), torch.tensor(table, dtype=torch.int32, device=device).view(-1, 4), tuple(counts))


def _table(rows: Blocks, like: Tensor) -> Tensor:
    return like if rows.table is None else rows.table


@lru_cache(maxsize=8)
def _levels(kind: str, device: torch.device) -> Tensor:
    return torch.tensor(LEVELS[kind], device=device)


def _gate(gate: Tensor | None, like: Tensor) -> tuple[Tensor, int, int]:
    # A kernel that reads no gate gets any pointer in its place. The one column that there is in segments serves all.
    return (like, 0, 0) if gate is None else (gate, gate.stride(0), gate.stride(1) if gate.shape[1] > 1 else 0)


def _drop(dropout: Dropout | None) -> dict[str, int | float]:
    return Dropout(0.0, 0).launch if dropout is None else dropout.launch


def shrink(
    x: Tensor, a: Tensor, experts: Experts, gate: Tensor | None, dropout: Dropout | None, keep_s: bool = True,
    t: Tensor | None = None, wanted: Sequence[bool] | None = None,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """s = drop(x) A^T (M, R) and t, which is s with scale and gate. `a` is A^T (K, .), of any strides.

    In segments only the rows of `wanted` experts are written, into `t` if that is given.
    """
    (m, k), r = x.shape, experts.rank
    s = x.new_empty(m, r) if keep_s else None
    t = new_rows(x, r) if t is None else t
    # Bound by the pass over x: enough programs to keep the memory busy come before large tiles.
    bm = 64 if m >= 4096 else 32
    br = rank_block(r, 128)
    rows, g = blocks(experts, m, bm, wanted), _gate(gate, x)
    rank_kernels.shrink[rows.count, triton.cdiv(r, br)](
        x, a, experts.scale, experts.expert, g[0], _table(rows, x), x if s is None else s, t, m, k, r, experts.pitch,
        x.stride(0), a.stride(0), a.stride(1), t.stride(0), g[1], g[2], **_drop(dropout),
        BM=bm, BK=64, BR=br, EVEN_K=k % 64 == 0, GATE=gate is not None, DROP=dropout is not None,
        QUADS=k % 4 == 0, KEEP_S=keep_s, SEGMENTS=rows.table is not None,
        num_warps=4, num_stages=3 if dropout is None else 2,
    )  # fmt: skip
    return s, t


def new_rows(like: Tensor, columns: int) -> Tensor:
    """(M, columns), rows aligned for tensor descriptors. A kernel fills the gap behind the columns too."""
    return like.new_empty(like.shape[0], _aligned(columns, like))[:, :columns]


def gemm(
    x: Tensor, w: Weight, bias: Tensor | None, t: Tensor, f: Tensor, experts: Experts, tile: Tile, chip: Chip,
    dropout: Dropout | None = None,
) -> Tensor:  # fmt: skip
    """x w + t f + bias, with f (R, N) all experts' B^T or A. `dropout` masks t f. Descriptor tiles take a dense w."""
    (m, k), n, r = x.shape, f.shape[1], experts.rank
    y = x.new_empty(m, n)
    rows = blocks(experts, m, tile.bm, whole=tile.kind == "descriptor")
    options = dict(
        BM=tile.bm, BN=tile.bn, BK=tile.bk, BR=rank_block(r), BAND=_BAND, BIAS=bias is not None,
        SEGMENTS=rows.table is not None, DROP=dropout is not None, QUADS=n % 4 == 0, num_warps=tile.warps,
        num_stages=tile.stages, ACROSS=w.across, **_drop(dropout),
    )  # fmt: skip
    tiles = rows.count * triton.cdiv(n, tile.bn)
    if tile.kind == "pointer":
        # The bytes of a 4-bit w lie as the weight does, whose rows are the other side.
        strides = (w.data.stride(0),) * 2 if w.nibbles else w.data.stride()
        gemm_kernels.gemm_pointer[tiles,](
            x, w.data, x if w.scale is None else w.scale, _levels(w.kind, x.device) if w.nibbles else x,
            x if bias is None else bias, t, f, _table(rows, x), y, m, n, k, r, rows.count, experts.pitch,
            x.stride(0), *strides, w.scale.stride(0) if w.nibbles else 0, t.stride(0), f.stride(0), f.stride(1),
            EVEN_K=k % tile.bk == 0, INT8=w.kind == "int8", PER_SCALE=w.group if w.nibbles else 0, **options,
        )  # fmt: skip
        return y
    step = rank_block(r)
    boxes = {
        "w": [tile.bk, tile.bn] if w.across else [tile.bn, tile.bk],
        "f": [step, tile.bn] if w.across else [tile.bn, step],
        "y": [tile.bm, tile.bn // 2 if tile.halves else tile.bn],
    }
    describe = TensorDescriptor.from_tensor
    gemm_kernels.gemm_descriptor[min(chip.multiprocessors * tile.resident(chip, r), tiles),](
        describe(x, [tile.bm, tile.bk]), describe(w.data if w.across else w.data.t(), boxes["w"]),
        x if bias is None else bias, describe(t, [tile.bm, step]), describe(f if w.across else f.t(), boxes["f"]),
        _table(rows, x), describe(y, boxes["y"]), m, n, k, rows.count, experts.pitch,
        RANKS=r, HALVES=tile.halves, **options,
    )  # fmt: skip
    return y


def gemm_inline(
    x: Tensor, weight: Tensor, bias: Tensor | None, experts: Experts, gate: Tensor | None, tile: Tile
) -> tuple[Tensor, Tensor]:
    """The whole forward pass in one kernel: y (M, N) and s (M, R)."""
    (m, k), n, r = x.shape, weight.shape[0], experts.rank
    y, s = x.new_empty(m, n), x.new_empty(m, r)
    rows, g = blocks(experts, m, tile.bm), _gate(gate, x)
    gemm_kernels.gemm_inline[rows.count * triton.cdiv(n, tile.bn),](
        x, weight, x if bias is None else bias, experts.a, experts.b, experts.scale, experts.expert, g[0],
        _table(rows, x), s, y, m, n, k, r, rows.count, experts.pitch,
        x.stride(0), weight.stride(0), experts.a.stride(0), experts.b.stride(0), g[1], g[2],
        BM=tile.bm, BN=tile.bn, BK=tile.bk, BR=rank_block(r), BAND=_BAND, EVEN_K=k % tile.bk == 0,
        BIAS=bias is not None, GATE=gate is not None, SEGMENTS=rows.table is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y, s


def _splits(experts: Experts, m: int, bm: int, wanted: Sequence[bool] | None) -> tuple[Blocks, int]:
    """The parts that the rows are split into for partial sums, 16 for all rows at most, or a few more in segments; and
    how many rows each has."""
    rows = -(-max(-(-m // 16), bm) // bm) * bm
    return blocks(experts, m, rows, wanted), rows


def sweep_dy(
    dy: Tensor, s: Tensor | None, experts: Experts, gate: Tensor | None, project: bool, outer: bool,
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor | None, list[Tensor] | None]:  # fmt: skip
    """One pass over dy: partial sums of U = dy B (parts, M, R) if `project`, and if `outer` of dB, (parts, N, R) for each
    expert, of which it has the columns from its start on. In segments only the rows of `wanted` experts are read."""
    (m, n), r = dy.shape, experts.rank
    # Wide blocks of columns make fewer partial sums of U; a narrow layer would leave multiprocessors idle, and many
    # ranks would not fit into the shared memory of small chips.
    bm, bc, br = 64, 256 if n >= 2048 and r <= 32 else 128, rank_block(r, 64)
    parts, size = _splits(experts, m, bm, wanted)
    u = dy.new_empty(triton.cdiv(n, bc), m, r, dtype=torch.float32) if project else None
    g = dy.new_empty(parts.count, n, r, dtype=torch.float32) if outer else None
    gates = _gate(gate, dy)
    rank_kernels.sweep[triton.cdiv(n, bc), parts.count, triton.cdiv(r, br)](
        dy, dy if s is None else s, experts.b, experts.scale, experts.expert, gates[0], _table(parts, dy),
        dy if u is None else u, dy if g is None else g, m, n, r, experts.pitch, size,
        dy.stride(0), 0 if s is None else s.stride(0), experts.b.stride(0), gates[1], gates[2], **_drop(None),
        BM=bm, BC=bc, BR=br, PROJECT=project, OUTER=outer, FACTOR=True, GATE=gate is not None, DROP=False,
        QUADS=False, SEGMENTS=parts.table is not None, num_warps=8, num_stages=3,
    )  # fmt: skip
    return u, None if g is None else _of_experts(g, parts, experts)


def sweep_x(
    x: Tensor, ds: Tensor, experts: Experts, dropout: Dropout | None, wanted: Sequence[bool]
) -> list[Tensor]:
    """Partial sums of dA^T = drop(x)^T dS, (parts, K, R) for each expert, of which it has the columns from its start on.
    In segments only the rows of `wanted` experts are read."""
    (m, k), r = x.shape, ds.shape[1]
    bm, bc, br = 64, 128, rank_block(r, 64)
    parts, size = _splits(experts, m, bm, wanted)
    g = x.new_empty(parts.count, k, r, dtype=torch.float32)
    rank_kernels.sweep[triton.cdiv(k, bc), parts.count, triton.cdiv(r, br)](
        x, ds, x, x, x, x, _table(parts, x), x, g, m, k, r, 0, size, x.stride(0), ds.stride(0), 0, 0, 0, **_drop(dropout),
        BM=bm, BC=bc, BR=br, PROJECT=False, OUTER=True, FACTOR=False, GATE=False, DROP=dropout is not None,
        QUADS=k % 4 == 0, SEGMENTS=parts.table is not None, num_warps=8, num_stages=3 if dropout is None else 2,
    )  # fmt: skip
    return _of_experts(g, parts, experts)


def _of_experts(g: Tensor, parts: Blocks, experts: Experts) -> list[Tensor]:
    return list(g.split(list(parts.counts))) if parts.counts else [g] * len(experts.ranks)


def finish_rows(
    u: Tensor, s: Tensor | None, experts: Experts, gate: Tensor | None, dgate: Tensor | None, ds: Tensor | None,
    wanted: Sequence[bool] | None = None,
) -> None:  # fmt: skip
    """From the partial sums of U: `ds` (M, R), made by `new_rows`, and `dgate` (M, E), or (M, 1) in segments; those that
    are given. In segments only the rows of `wanted` experts are written."""
    parts, m, r = u.shape
    bm = 32
    rows, gates = blocks(experts, m, bm, wanted), _gate(gate, u)
    rank_kernels.finish_rows[rows.count,](
        u, u if s is None else s, experts.scale, experts.expert, gates[0], _table(rows, u), u if ds is None else ds,
        u if dgate is None else dgate, m, r, len(experts.ranks), parts, experts.pitch,
        0 if s is None else s.stride(0), 0 if ds is None else ds.stride(0), gates[1], gates[2],
        BM=bm, BR=rank_block(r, 256), GATE=gate is not None, DGATE=dgate is not None, DS=ds is not None,
        SEGMENTS=rows.table is not None, num_warps=4,
    )  # fmt: skip


def add_parts(g: Tensor, out: Tensor, first: int) -> None:
    """out (C, r) = the ordered sum over the parts of g (parts, C, R), its columns from `first` on."""
    parts, c, r = g.shape
    bc, br = 64, 16
    rank_kernels.add_parts[triton.cdiv(c, bc), triton.cdiv(out.shape[1], br)](
        g, out, c, r, parts, first, out.shape[1], out.stride(0), out.stride(1), BC=bc, BR=br, num_warps=4
    )
