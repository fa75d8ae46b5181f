"""From tensors to kernel launches. Every function here works on rows: x (M, K), dy (M, N), all on one device.

Tensors are allocated here and written whole by the kernels. x and dy have dense rows (stride 1 along them).

All of this runs at every call of a layer, and where layers are small the GPU waits for it. So what follows from ranks,
segments and shapes alone is made once and kept, and no view is made that is not needed: it takes 1 to 3 us.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...reference import LEVELS
from ..base import Scales, made_once, scale_on
from . import gemm as gemm_kernels
from . import lora as lora_kernels
from .tiles import DeviceProperties, Tile, rank_block

_BAND = 8  # row blocks in a band of tiles


class Dropout(NamedTuple):
    """Dropout with probability p, drawn from the seed."""

    p: float
    seed: int


def _drop(dropout: Dropout | None) -> tuple[int, int, float]:
    """What the kernels take: seed, threshold, kept_scale."""
    return (0, 0, 1.0) if dropout is None else (dropout.seed, int(dropout.p * 2.0**32), 1.0 / (1.0 - dropout.p))


class Experts(NamedTuple):
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
        return _columns(self.ranks, self.segments is not None)[0]

    @property
    def pitch(self) -> int:
        return _columns(self.ranks, self.segments is not None)[1]

    @property
    def starts(self) -> list[int]:
        """The first column of S that is an expert's."""
        return _columns(self.ranks, self.segments is not None)[2]


@lru_cache(maxsize=256)
def _columns(ranks: tuple[int, ...], segmented: bool) -> tuple[int, int, list[int]]:
    """`rank`, `pitch` and `starts` of Experts."""
    if not segmented:
        return sum(ranks), 0, [sum(ranks[:e]) for e in range(len(ranks))]
    step = rank_block(max(ranks))
    return max(ranks), _ceil(max(ranks), step) * step, [0] * len(ranks)


@made_once(256)
def _owners(ranks: tuple[int, ...], pitch: int, device: torch.device) -> Tensor:
    """The expert of each rank. In segments all have `pitch` ranks."""
    owners = [e for e, rank in enumerate(ranks) for _ in range(pitch or rank)]
    return torch.tensor(owners, dtype=torch.int32, device=device)


class Weight(NamedTuple):
    """The frozen operand w (K, N) of a GEMM, in any format; `transposed`: its side with stride 1 is N, as for dx.

    Without a scale it is dense: w itself. int8: w itself, with one scale a column, (N,). With a `kind` of 4 bits: the
    bytes (rows, ceil(columns / 2)) and the scales (rows, ceil(columns / group)) of a QuantizedWeight whose rows are the
    other side.
    """

    data: Tensor
    transposed: bool
    scale: Tensor | None = None
    kind: str = "dense"
    group: int = 0

    @property
    def is_4bit(self) -> bool:
        return self.kind in LEVELS


def _ceil(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` does it too, but takes 3 us of Python, a tenth of a launch."""
    return -(-a // b)


def _aligned(columns: int, like: Tensor) -> int:
    """The columns of a row that ends at a multiple of 16 bytes, so that tensor descriptors can describe the rows."""
    unit = 16 // like.element_size()
    return -(-columns // unit) * unit


@made_once(64)
def _zeros(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(rows, columns, dtype=dtype, device=device)


def pack(
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scale: Scales | Tensor, segments: Sequence[int] | None = None
) -> Experts:
    """Puts the experts side by side. One expert whose tensors are dense and aligned is taken as it is."""
    ranks = tuple([a.shape[0] for a in lora_a])
    device = lora_a[0].device
    scale = scale_on(scale, device)
    if segments is not None:
        pitch, (n, k) = _columns(ranks, True)[1], (lora_b[0].shape[0], lora_a[0].shape[1])
        gaps = [pitch - rank for rank in ranks]
        a = torch.cat([t for a, gap in zip(lora_a, gaps) for t in (a, _zeros(gap, k, a.dtype, device))])
        b = torch.cat([t for b, gap in zip(lora_b, gaps) for t in (b, _zeros(n, gap, b.dtype, device))], dim=1)
        return Experts(a, b, scale, _owners(ranks, pitch, device), ranks, tuple(segments))
    if len(ranks) == 1 and lora_a[0].is_contiguous():
        a = lora_a[0]
    else:
        a = torch.cat(list(lora_a))
    if len(ranks) == 1 and lora_b[0].is_contiguous() and ranks[0] * a.element_size() % 16 == 0:
        b = lora_b[0]
    else:
        rank, n = sum(ranks), lora_b[0].shape[0]
        b = torch.cat([*lora_b, _zeros(n, _aligned(rank, a) - rank, a.dtype, device)], dim=1)[:, :rank]
    return Experts(a, b, scale, _owners(ranks, 0, device), ranks)


@dataclass(frozen=True)
class Blocks:
    """The rows in blocks of `size`: how many blocks there are, and in segments the table of `row_block` in lora.py.
    `counts`: how many of them each expert owns."""

    count: int
    table: Tensor | None = None
    counts: tuple[int, ...] = ()


def blocks(experts: Experts, m: int, size: int, wanted: Sequence[bool] | None = None, full_tiles: bool = False) -> Blocks:
    """Blocks of `size` rows at most; in segments none lies in two of them, and only `wanted` experts have any.

    `full_tiles`: all blocks have just `size` rows, of which no segment may have fewer; the last block of a segment reaches
    back into the one before.
    """
    if experts.segments is None:
        return Blocks(_ceil(m, size))
    wanted = tuple(wanted or [True] * len(experts.ranks))
    return _blocks(experts.segments, experts.ranks, size, wanted, full_tiles, experts.a.device)


@made_once(256)
def _blocks(
    segments: tuple[int, ...], ranks: tuple[int, ...], size: int, wanted: tuple[bool, ...], full_tiles: bool,
    device: torch.device,
) -> Blocks:  # fmt: skip
    table, counts, end = [], [], 0
    for owner, (rows, rank) in enumerate(zip(segments, ranks)):
        start, end = end, end + rows
        firsts = range(start, end if wanted[owner] else start, size)
        table += [(min(row, end - size) if full_tiles else row, min(row + size, end), owner, rank) for row in firsts]
        counts.append(len(firsts))
    return Blocks(len(table), torch.tensor(table, dtype=torch.int32, device=device).view(-1, 4), tuple(counts))


def _table(rows: Blocks, like: Tensor) -> Tensor:
    return like if rows.table is None else rows.table


@made_once(8)
def _levels(kind: str, device: torch.device) -> Tensor:
    return torch.tensor(LEVELS[kind], device=device)


def _gate(gate: Tensor | None, like: Tensor) -> tuple[Tensor, int, int]:
    # A kernel that reads no gate gets any pointer in its place. The one column that there is in segments serves all.
    return (like, 0, 0) if gate is None else (gate, gate.stride(0), gate.stride(1) if gate.shape[1] > 1 else 0)


# Compiled kernels, by all that Triton compiles them for.
_compiled: dict[tuple[object, ...], tuple[Any, list[object]]] = {}


def _form(operand: Tensor | TensorDescriptor) -> tuple[object, ...]:
    """What Triton compiles a kernel for, of an operand."""
    if isinstance(operand, Tensor):
        return operand.dtype, operand.data_ptr() % 16
    return operand.base.dtype, *operand.block_shape


def _run(
    kernel: Any, grid: tuple[int, int, int], device: torch.device, operands: Sequence[Tensor | TensorDescriptor],
    sizes: tuple[int, ...], drop: tuple[int, int, float] | tuple[()] = (), *, num_warps: int, num_stages: int = 1,
    **constants: object,
) -> None:  # fmt: skip
    """Launches a kernel, whose parameters come in this order: operands, sizes, dropout, constants.

    Triton finds the compiled kernel that fits from the arguments of each launch anew, which takes 15 to 30 us. A launch
    of a compiled kernel itself takes 5, so those that Triton returned are kept here, by all sizes, which is more than
    Triton compiles them for. Dropout is no part of that.
    """
    key = (kernel.fn, device, sizes, num_warps, num_stages, *constants.values(), *map(_form, operands))
    found = _compiled.get(key)
    if found is not None:
        compiled, ordered = found
        compiled[grid](*operands, *sizes, *drop, *ordered)
        return
    compiled = kernel[grid](*operands, *sizes, *drop, num_warps=num_warps, num_stages=num_stages, **constants)
    if compiled is not None:  # the interpreter compiles none
        if len(_compiled) >= 4096:  # where the number of rows is a new one each time
            _compiled.clear()
        _compiled[key] = compiled, [constants[name] for name in kernel.arg_names[-len(constants) :]]


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
    # Bound by the pass over x: enough programs to keep the memory busy come before large tiles. A multiprocessor needs
    # some 32 KiB on their way from memory, and at 8192 rows has one program: with few ranks three tiles of x, 48 KiB.
    # Those of A lie in shared memory too, 99 KiB on the smallest chips, so with more ranks a step is shorter.
    bm = 64 if m >= 4096 else 32
    br = rank_block(r, 128)
    bk = 128 if br <= 32 and dropout is None else 64
    rows, g = blocks(experts, m, bm, wanted), _gate(gate, x)
    _run(
        lora_kernels.shrink, (rows.count, _ceil(r, br), 1), x.device,
        (x, a, experts.scale, experts.expert, g[0], _table(rows, x), x if s is None else s, t),
        (m, k, r, experts.pitch, x.stride(0), *a.stride(), t.stride(0), g[1], g[2]), _drop(dropout),
        BM=bm, BK=bk, BR=br, EVEN_K=k % bk == 0, GATE=gate is not None, DROP=dropout is not None,
        QUADS=k % 4 == 0, KEEP_S=keep_s, SEGMENTS=rows.table is not None, num_warps=4, num_stages=4,
    )  # fmt: skip
    return s, t


def new_rows(like: Tensor, columns: int) -> Tensor:
    """(M, columns), rows aligned for tensor descriptors. A kernel fills the gap behind the columns too."""
    width = _aligned(columns, like)
    rows = like.new_empty(like.shape[0], width)
    return rows if width == columns else rows[:, :columns]


def gemm(
    x: Tensor, w: Weight, bias: Tensor | None, t: Tensor, f: Tensor, experts: Experts, tile: Tile, chip: DeviceProperties,
    dropout: Dropout | None = None,
) -> Tensor:  # fmt: skip
    """x w + t f + bias, with f (R, N) all experts' B^T or A. `dropout` masks t f. Descriptor tiles take a dense w."""
    (m, k), n, r = x.shape, f.shape[1], experts.rank
    y = x.new_empty(m, n)
    rows = blocks(experts, m, tile.bm, full_tiles=tile.kind == "descriptor")
    step = rank_block(r)
    options = dict(
        BM=tile.bm, BN=tile.bn, BK=tile.bk, BR=step, BAND=_BAND, BIAS=bias is not None,
        SEGMENTS=rows.table is not None, DROP=dropout is not None, QUADS=n % 4 == 0, num_warps=tile.warps,
        num_stages=tile.stages, TRANSPOSED=w.transposed,
    )  # fmt: skip
    tiles = rows.count * _ceil(n, tile.bn)
    if tile.kind == "pointer":
        # The bytes of a 4-bit w lie as the weight does, whose rows are the other side.
        strides = (w.data.stride(0),) * 2 if w.is_4bit else w.data.stride()
        _run(
            gemm_kernels.gemm_pointer, (tiles, 1, 1), x.device,
            (x, w.data, x if w.scale is None else w.scale, _levels(w.kind, x.device) if w.is_4bit else x,
             x if bias is None else bias, t, f, _table(rows, x), y),
            (m, n, k, r, rows.count, experts.pitch, x.stride(0), *strides, w.scale.stride(0) if w.is_4bit else 0,
             t.stride(0), *f.stride()),
            _drop(dropout), EVEN_K=k % tile.bk == 0, INT8=w.kind == "int8", PER_SCALE=w.group if w.is_4bit else 0,
            **options,
        )  # fmt: skip
        return y
    # A descriptor wants rows with stride 1: those of w and f in dx, and otherwise of their transposes.
    w_shape, w_stride = ([k, n], w.data.stride(0)) if w.transposed else ([n, k], w.data.stride(1))
    f_shape, f_stride = (f.shape, f.stride(0)) if w.transposed else (f.shape[::-1], f.stride(1))
    describe = TensorDescriptor  # by hand: a transpose only to describe it would take as long as the description
    _run(
        gemm_kernels.gemm_descriptor, (min(chip.multiprocessors * tile.resident(chip, r), tiles), 1, 1), x.device,
        (
            describe(x, [m, k], [x.stride(0), 1], [tile.bm, tile.bk]),
            describe(w.data, w_shape, [w_stride, 1], [tile.bk, tile.bn] if w.transposed else [tile.bn, tile.bk]),
            x if bias is None else bias,
            describe(t, [m, r], [t.stride(0), 1], [tile.bm, step]),
            describe(f, f_shape, [f_stride, 1], [step, tile.bn] if w.transposed else [tile.bn, step]),
            _table(rows, x),
            describe(y, [m, n], [n, 1], [tile.bm, tile.bn // 2 if tile.halves else tile.bn]),
        ),
        (m, n, k, rows.count, experts.pitch), _drop(dropout), RANKS=r, HALVES=tile.halves, **options,
    )  # fmt: skip
    return y


def gemm_inline(
    x: Tensor, weight: Tensor, bias: Tensor | None, experts: Experts, gate: Tensor | None, tile: Tile
) -> tuple[Tensor, Tensor]:
    """The whole forward pass in one kernel: y (M, N) and s (M, R)."""
    (m, k), n, r = x.shape, weight.shape[0], experts.rank
    y, s = x.new_empty(m, n), x.new_empty(m, r)
    rows, g = blocks(experts, m, tile.bm), _gate(gate, x)
    _run(
        gemm_kernels.gemm_inline, (rows.count * _ceil(n, tile.bn), 1, 1), x.device,
        (x, weight, x if bias is None else bias, experts.a, experts.b, experts.scale, experts.expert, g[0],
         _table(rows, x), s, y),
        (m, n, k, r, rows.count, experts.pitch, x.stride(0), weight.stride(0), experts.a.stride(0),
         experts.b.stride(0), g[1], g[2]),
        BM=tile.bm, BN=tile.bn, BK=tile.bk, BR=rank_block(r), BAND=_BAND, EVEN_K=k % tile.bk == 0,
        BIAS=bias is not None, GATE=gate is not None, SEGMENTS=rows.table is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y, s


def _splits(
    experts: Experts, m: int, bm: int, programs: int, chip: DeviceProperties, wanted: Sequence[bool] | None
) -> tuple[Blocks, int]:
    """The parts that the rows are split into for partial sums, and how many rows each has, a multiple of `bm`. A part
    takes `programs` programs. There are two programs a multiprocessor: both fit, and none waits for a second turn. In
    segments there may be a few more."""
    parts = max(1, 2 * chip.multiprocessors // programs)
    rows = max(1, _ceil(_ceil(m, parts), bm)) * bm
    return blocks(experts, m, rows, wanted), rows


def lora_grad_partials_dy(
    dy: Tensor, s: Tensor | None, experts: Experts, gate: Tensor | None, project: bool, outer: bool, chip: DeviceProperties,
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor | None, list[Tensor] | None]:  # fmt: skip
    """One pass over dy: partial sums of U = dy B (parts, M, R) if `project`, and if `outer` of dB, (parts, N, R) for each
    expert, of which it has the columns from its start on. In segments only the rows of `wanted` experts are read."""
    (m, n), r = dy.shape, experts.rank
    # Wide blocks of columns make fewer partial sums of U; a narrow layer would leave multiprocessors idle, and many
    # ranks would not fit into the shared memory of small chips. With these stages two programs fit.
    bm, bc, br = 64, 256 if n >= 2048 and r <= 32 else 128, rank_block(r, 64)
    columns, steps = _ceil(n, bc), _ceil(r, br)
    parts, size = _splits(experts, m, bm, columns * steps, chip, wanted)
    u = dy.new_empty(columns, m, r, dtype=torch.float32) if project else None
    g = dy.new_empty(parts.count, n, r, dtype=torch.float32) if outer else None
    gates = _gate(gate, dy)
    _run(
        lora_kernels.lora_grad_partials, (columns, parts.count, steps), dy.device,
        (dy, dy if s is None else s, experts.b, experts.scale, experts.expert, gates[0], _table(parts, dy),
         dy if u is None else u, dy if g is None else g),
        (m, n, r, experts.pitch, size, dy.stride(0), 0 if s is None else s.stride(0), experts.b.stride(0), *gates[1:]),
        _drop(None),
        BM=bm, BC=bc, BR=br, PROJECT=project, OUTER=outer, FACTOR=True, GATE=gate is not None, DROP=False,
        QUADS=False, SEGMENTS=parts.table is not None, num_warps=8,
        num_stages=2 if bc == 256 or br > 32 else 3,
    )  # fmt: skip
    return u, None if g is None else _of_experts(g, parts, experts)


def lora_grad_partials_x(
    x: Tensor, ds: Tensor, experts: Experts, dropout: Dropout | None, chip: DeviceProperties, wanted: Sequence[bool]
) -> list[Tensor]:
    """Partial sums of dA^T = drop(x)^T dS, (parts, K, R) for each expert, of which it has the columns from its start on.
    In segments only the rows of `wanted` experts are read."""
    (m, k), r = x.shape, ds.shape[1]
    bm, bc, br = 64, 128, rank_block(r, 64)
    columns, steps = _ceil(k, bc), _ceil(r, br)
    parts, size = _splits(experts, m, bm, columns * steps, chip, wanted)
    g = x.new_empty(parts.count, k, r, dtype=torch.float32)
    _run(
        lora_kernels.lora_grad_partials, (columns, parts.count, steps), x.device, (x, ds, x, x, x, x, _table(parts, x), x, g),
        (m, k, r, 0, size, x.stride(0), ds.stride(0), 0, 0, 0), _drop(dropout),
        BM=bm, BC=bc, BR=br, PROJECT=False, OUTER=True, FACTOR=False, GATE=False, DROP=dropout is not None,
        QUADS=k % 4 == 0, SEGMENTS=parts.table is not None, num_warps=8, num_stages=3 if dropout is None else 2,
    )  # fmt: skip
    return _of_experts(g, parts, experts)


def _of_experts(g: Tensor, parts: Blocks, experts: Experts) -> list[Tensor]:
    return list(g.split(list(parts.counts))) if parts.counts else [g] * len(experts.ranks)


def finalize_row_grads(
    u: Tensor, s: Tensor | None, experts: Experts, gate: Tensor | None, dgate: Tensor | None, ds: Tensor | None,
    wanted: Sequence[bool] | None = None,
) -> None:  # fmt: skip
    """From the partial sums of U: `ds` (M, R), made by `new_rows`, and `dgate` (M, E), or (M, 1) in segments; those that
    are given. In segments only the rows of `wanted` experts are written."""
    parts, m, r = u.shape
    bm, br = 16, rank_block(r, 256)
    together = max(1, 256 // br)  # 16 KiB a program on their way, with registers for three or four programs
    rows, gates = blocks(experts, m, bm, wanted), _gate(gate, u)
    _run(
        lora_kernels.finalize_row_grads, (rows.count, 1, 1), u.device,
        (u, u if s is None else s, experts.scale, experts.expert, gates[0], _table(rows, u), u if ds is None else ds,
         u if dgate is None else dgate),
        (m, r, len(experts.ranks), parts, experts.pitch, 0 if s is None else s.stride(0),
         0 if ds is None else ds.stride(0), gates[1], gates[2]),
        BM=bm, BR=br, TOGETHER=together, GATE=gate is not None, DGATE=dgate is not None, DS=ds is not None,
        SEGMENTS=rows.table is not None, num_warps=4,
    )  # fmt: skip


def reduce_partials(g: Tensor, out: Tensor, first: int) -> None:
    """out (C, r) = the sum over the parts of g (parts, C, R), its columns from `first` on, in a fixed order."""
    parts, c, r = g.shape
    rank = out.shape[1]
    bc, br = 8, rank_block(rank)  # small, for enough programs; 16 loads of 16 bytes a thread on their way
    _run(
        lora_kernels.reduce_partials, (_ceil(c, bc), _ceil(rank, br), 1), g.device, (g, out),
        (c, r, parts, first, rank, *out.stride()), BC=bc, BR=br, TOGETHER=16, num_warps=br // 16,
    )  # fmt: skip
