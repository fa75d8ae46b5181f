"""Turn tensors into kernel launches. Every function here works on rows, x (M, K) and dy (M, N), all on the current device.

Tensors are allocated here, and the kernels write every element of them. x and dy have dense rows (stride 1 within a row). R is the
total rank of the experts, or the largest one with segments. S and T are (M, R), and T is S with scale and gate applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...reference import dropout_scale, dropout_threshold
from ..device import DeviceProperties
from . import gemm as gemm_kernels
from . import lora as lora_kernels
from .operands import Blocks, Dropout, Experts, FrozenMatrix, blocks, ceil_div, levels, new_rows
from .tiles import Tile, band, rank_block


def _seed(dropout: Dropout | None, like: Tensor) -> Tensor:
    """Return the tensor from which a kernel reads the seed. A kernel that is given the seed as a number gets any tensor instead."""
    return dropout.seed if dropout is not None and isinstance(dropout.seed, Tensor) else like


def _drop(dropout: Dropout | None) -> tuple[int, int, float]:
    """Return the arguments that kernels take for dropout: seed, threshold and kept_scale."""
    if dropout is None:
        return 0, 0, 1.0
    seed = 0 if isinstance(dropout.seed, Tensor) else dropout.seed
    return seed, dropout_threshold(dropout.p), dropout_scale(dropout.p)


def _drop_options(dropout: Dropout | None) -> dict[str, bool]:
    return dict(DROP=dropout is not None, SEED_IN_MEMORY=dropout is not None and isinstance(dropout.seed, Tensor))


def _table(rows: Blocks, like: Tensor) -> Tensor:
    return like if rows.table is None else rows.table


def _gate(gate: Tensor | None, like: Tensor) -> tuple[Tensor, int, int]:
    # A kernel that reads no gate gets any pointer in its place. With segments the one column that there is serves all.
    return (like, 0, 0) if gate is None else (gate, gate.stride(0), gate.stride(1) if gate.shape[1] > 1 else 0)


# Compiled kernels, by all that Triton compiles them for.
_compiled: dict[tuple[object, ...], tuple[Any, list[object]]] = {}


def _specialization(operand: Tensor | TensorDescriptor) -> tuple[object, ...]:
    """Return what Triton specializes a kernel on for an operand."""
    if isinstance(operand, Tensor):
        return operand.dtype, operand.data_ptr() % 16
    return operand.base.dtype, *operand.block_shape


def _run(
    kernel: Any, grid: tuple[int, int, int], device: torch.device, operands: Sequence[Tensor | TensorDescriptor],
    sizes: tuple[int, ...], drop: tuple[int, int, float] | tuple[()] = (), *, num_warps: int, num_stages: int = 1,
    **constants: object,
) -> None:  # fmt: skip
    """Launch a kernel whose parameters come in this order: operands, sizes, dropout, constants.

    At each launch Triton searches anew for the compiled kernel that fits the arguments, which takes longer than launching it. So the
    compiled kernels are kept here, by all sizes, which distinguishes more cases than Triton compiles. The arguments of dropout are not
    part of the key.
    """
    key = (kernel.fn, device, sizes, num_warps, num_stages, *constants.values(), *map(_specialization, operands))
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
    """Return S = drop(x) A^T and T.

    Args:
        x: (M, K).
        a: A^T, (K, R), with any strides. If x is dy, this is B, and T is then dS.
        experts: The experts, whose scale and segments are used.
        gate: (M, E), or (M, 1) with segments, or None.
        dropout: The dropout of x, or None.
        keep_s: Whether S is written; otherwise None is returned for it.
        t: The tensor to write T to; by default a new one.
        wanted: With segments, the experts whose rows are written.
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
        lora_kernels.shrink, (rows.count, ceil_div(r, br), 1), x.device,
        (x, a, experts.scale, experts.expert, g[0], _table(rows, x), _seed(dropout, x), x if s is None else s, t),
        (m, k, r, experts.pitch, x.stride(0), *a.stride(), t.stride(0), g[1], g[2]), _drop(dropout),
        BM=bm, BK=bk, BR=br, EVEN_K=k % bk == 0, GATE=gate is not None, **_drop_options(dropout),
        OCTETS=k % 8 == 0, KEEP_S=keep_s, SEGMENTS=rows.table is not None, num_warps=4, num_stages=4,
    )  # fmt: skip
    return s, t


def gemm(
    x: Tensor, w: FrozenMatrix, bias: Tensor | None, t: Tensor, f: Tensor, experts: Experts, tile: Tile, chip: DeviceProperties,
    dropout: Dropout | None = None,
) -> Tensor:  # fmt: skip
    """Return x w + t f + bias, (M, N), where f (R, N) is B^T or A of all experts. `dropout` masks t f.

    Tiles that use descriptors require a dense w.
    """
    (m, k), n, r = x.shape, f.shape[1], experts.rank
    y = x.new_empty(m, n)
    rows = blocks(experts, m, tile.bm, full=tile.kind == "descriptor")
    step = rank_block(r)
    options = dict(
        BM=tile.bm, BN=tile.bn, BK=tile.bk, BR=step, BAND=band(tile, chip), BIAS=bias is not None,
        SEGMENTS=rows.table is not None, **_drop_options(dropout), OCTETS=n % 8 == 0, num_warps=tile.warps,
        num_stages=tile.stages, TRANSPOSED=w.transposed,
    )  # fmt: skip
    tiles = rows.count * ceil_div(n, tile.bn)
    if tile.kind == "pointer":
        # The bytes of a 4-bit w lie as the weight does, whose rows are the other side.
        strides = (w.data.stride(0),) * 2 if w.is_4bit else w.data.stride()
        _run(
            gemm_kernels.gemm_pointer, (tiles, 1, 1), x.device,
            (x, w.data, x if w.scale is None else w.scale, levels(w.kind, x.device) if w.is_4bit else x,
             x if bias is None else bias, t, f, _table(rows, x), _seed(dropout, x), y),
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
            _seed(dropout, x),
            describe(y, [m, n], [n, 1], [tile.bm, tile.bn // 2 if tile.halves else tile.bn]),
        ),
        (m, n, k, rows.count, experts.pitch), _drop(dropout), RANKS=r, HALVES=tile.halves, **options,
    )  # fmt: skip
    return y


def gemm_inline(
    x: Tensor, weight: Tensor, bias: Tensor | None, experts: Experts, gate: Tensor | None, tile: Tile, chip: DeviceProperties
) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and S from one kernel that does the whole forward pass."""
    (m, k), n, r = x.shape, weight.shape[0], experts.rank
    y, s = x.new_empty(m, n), x.new_empty(m, r)
    rows, g = blocks(experts, m, tile.bm), _gate(gate, x)
    _run(
        gemm_kernels.gemm_inline, (rows.count * ceil_div(n, tile.bn), 1, 1), x.device,
        (x, weight, x if bias is None else bias, experts.a, experts.b, experts.scale, experts.expert, g[0],
         _table(rows, x), s, y),
        (m, n, k, r, rows.count, experts.pitch, x.stride(0), weight.stride(0), experts.a.stride(0),
         experts.b.stride(0), g[1], g[2]),
        BM=tile.bm, BN=tile.bn, BK=tile.bk, BR=rank_block(r), BAND=band(tile, chip), EVEN_K=k % tile.bk == 0,
        BIAS=bias is not None, GATE=gate is not None, SEGMENTS=rows.table is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y, s


def _splits(
    experts: Experts, m: int, bm: int, programs: int, chip: DeviceProperties, wanted: Sequence[bool] | None
) -> tuple[Blocks, int]:
    """Return into how many splits the rows are divided for partial sums, and how many rows each one has, a multiple of `bm`.

    A split takes `programs` programs. Two programs fit on a multiprocessor at a time, and there are as many as fit, so that none waits
    for a second turn. With segments there may be a few more.
    """
    parts = max(1, 2 * chip.multiprocessors // programs)
    rows = max(1, ceil_div(ceil_div(m, parts), bm)) * bm
    return blocks(experts, m, rows, wanted), rows


def lora_grad_partials_dy(
    dy: Tensor, s: Tensor | None, experts: Experts, gate: Tensor | None, project: bool, outer: bool, chip: DeviceProperties,
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor | None, list[Tensor] | None]:  # fmt: skip
    """Read dy once, and return partial sums of U = dy B and of the gradient of B.

    Args:
        dy: (M, N).
        s: S, or None without `outer`.
        experts: The experts.
        gate: (M, E), or (M, 1) with segments, or None.
        project: Whether to return partial sums of U, (partials, M, R); otherwise None is returned for them.
        outer: Whether to return partial sums of dB, (partials, N, R), of which each expert has the columns from its start on; otherwise
            None is returned for them.
        chip: The GPU.
        wanted: With segments, the experts whose rows are read.
    """
    (m, n), r = dy.shape, experts.rank
    # Wide blocks of columns make fewer partial sums of U; a narrow layer would leave multiprocessors idle, and many
    # ranks would not fit into the shared memory of small chips. With these stages two programs fit.
    bm, bc, br = 64, 256 if n >= 2048 and r <= 32 else 128, rank_block(r, 64)
    columns, steps = ceil_div(n, bc), ceil_div(r, br)
    parts, size = _splits(experts, m, bm, columns * steps, chip, wanted)
    u = dy.new_empty(columns, m, r, dtype=torch.float32) if project else None
    g = dy.new_empty(parts.count, n, r, dtype=torch.float32) if outer else None
    gates = _gate(gate, dy)
    _run(
        lora_kernels.lora_grad_partials, (columns, parts.count, steps), dy.device,
        (dy, dy if s is None else s, experts.b, experts.scale, experts.expert, gates[0], _table(parts, dy), dy,
         dy if u is None else u, dy if g is None else g),
        (m, n, r, experts.pitch, size, dy.stride(0), 0 if s is None else s.stride(0), experts.b.stride(0), *gates[1:]),
        _drop(None),
        BM=bm, BC=bc, BR=br, PROJECT=project, OUTER=outer, FACTOR=True, GATE=gate is not None, **_drop_options(None),
        OCTETS=False, SEGMENTS=parts.table is not None, num_warps=8,
        num_stages=2 if bc == 256 or br > 32 else 3,
    )  # fmt: skip
    return u, None if g is None else _of_experts(g, parts, experts)


def lora_grad_partials_x(
    x: Tensor, ds: Tensor, experts: Experts, dropout: Dropout | None, chip: DeviceProperties, wanted: Sequence[bool]
) -> list[Tensor]:
    """Return partial sums of dA^T = drop(x)^T dS, (partials, K, R), of which each expert has the columns from its start on.

    With segments only the rows of the `wanted` experts are read.
    """
    (m, k), r = x.shape, ds.shape[1]
    bm, bc, br = 64, 128, rank_block(r, 64)
    columns, steps = ceil_div(k, bc), ceil_div(r, br)
    parts, size = _splits(experts, m, bm, columns * steps, chip, wanted)
    g = x.new_empty(parts.count, k, r, dtype=torch.float32)
    _run(
        lora_kernels.lora_grad_partials, (columns, parts.count, steps), x.device,
        (x, ds, x, x, x, x, _table(parts, x), _seed(dropout, x), x, g),
        (m, k, r, 0, size, x.stride(0), ds.stride(0), 0, 0, 0), _drop(dropout),
        BM=bm, BC=bc, BR=br, PROJECT=False, OUTER=True, FACTOR=False, GATE=False, **_drop_options(dropout),
        OCTETS=k % 8 == 0, SEGMENTS=parts.table is not None, num_warps=8, num_stages=3 if dropout is None else 2,
    )  # fmt: skip
    return _of_experts(g, parts, experts)


def _of_experts(g: Tensor, parts: Blocks, experts: Experts) -> list[Tensor]:
    return list(g.split(list(parts.counts))) if parts.counts else [g] * len(experts.ranks)


def finalize_row_grads(
    u: Tensor, s: Tensor | None, experts: Experts, gate: Tensor | None, dgate: Tensor | None, ds: Tensor | None,
    wanted: Sequence[bool] | None = None,
) -> None:  # fmt: skip
    """Compute `ds` (M, R), which `new_rows` made, and `dgate` (M, E), or (M, 1) with segments, from the partial sums of U.

    Either of them may be None. With segments only the rows of the `wanted` experts are written.
    """
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
    """Write out (C, r): the sum of the partial sums g (partials, C, R), in their columns from `first` on, added in a fixed order."""
    parts, c, r = g.shape
    rank = out.shape[1]
    bc, br = 8, rank_block(rank)  # small, for enough programs; 16 loads of 16 bytes a thread on their way
    _run(
        lora_kernels.reduce_partials, (ceil_div(c, bc), ceil_div(rank, br), 1), g.device, (g, out),
        (c, r, parts, first, rank, *out.stride()), BC=bc, BR=br, TOGETHER=16, num_warps=br // 16,
    )  # fmt: skip
