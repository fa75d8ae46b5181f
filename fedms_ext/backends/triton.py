"""The GPU backend: the kernels of `fedms_ext.triton_kernels`, and cuBLAS where it wins.

For bf16 and fp16 layers with more than 64 rows. Everything else on a GPU (other dtypes, experts in another dtype than
the base, few rows) goes to `eager`, which is cuBLAS. Under Triton's interpreter (TRITON_INTERPRET=1) it takes tensors
on the CPU, so that its numerics can be tested without a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ..formats import HALVES, dequantise
from ..reference import LEVELS
from . import eager

FEW_ROWS = 64  # up to here the layer waits for W to arrive, and cuBLAS reads it as fast as anything
LARGEST_RANK = 256  # of all experts together; above it the branch is no longer narrow

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if _INTERPRETED:
        return None
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA; install a CUDA build of it"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU; see torch.cuda.is_available()"
    version = importlib.import_module("triton").__version__
    if tuple(map(int, version.split(".")[:2])) < (3, 6):
        return f"Triton {version} is too old; 3.6 or newer is needed, which comes with PyTorch 2.10"
    return None


if unavailable() is None:
    from ..triton_kernels import launch
    from ..triton_kernels.choices import Choices
    from ..triton_kernels.launch import Dropout, Experts, Weight
    from ..triton_kernels.tiles import DESCRIPTOR_ROWS, Chip, Gemm, Tile, legal_tiles


def supports(x: Tensor) -> bool:
    if x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return x.device.type == "cpu" if _INTERPRETED else x.is_cuda and _chip(x.device).capability >= (8, 0)


@lru_cache(maxsize=None)
def _chip(device: torch.device) -> Chip:
    if _INTERPRETED:
        return Chip((9, 0), multiprocessors=4, shared_memory=232448)
    properties = torch.cuda.get_device_properties(device)
    return Chip(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # missing in torch's stubs
    )


@lru_cache(maxsize=None)
def _choices(chip: Chip) -> Choices:
    return Choices(chip)


def _in_kernels(
    x: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], segments: Sequence[int] | None
) -> bool:
    if x.shape[:-1].numel() <= FEW_ROWS or not lora_a:
        return False
    ranks = [a.shape[0] for a in lora_a]
    return (
        lora_a[0].dtype == x.dtype
        and lora_a[0].shape[1] > 0
        and lora_b[0].shape[0] > 0
        and (sum(ranks) if segments is None else max(ranks)) <= LARGEST_RANK
    )


def _dense_rows(x: Tensor) -> Tensor:
    """x (..., K) as (M, K) with stride 1 along K and rows that do not overlap."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] else rows.contiguous()


def _describable(x: Tensor, w: Weight, f: Tensor, columns: int, segments: Sequence[int] | None) -> bool:
    """Whether tensor descriptors can describe the operands, which are then dense rows that start at multiples of 16 bytes,
    and the segments are none or large enough for their tiles."""
    width = 16 // x.element_size()
    return (
        w.scale is None
        and columns % width == 0
        and all(t.data_ptr() % 16 == 0 and max(t.stride()) % width == 0 for t in (x, w.data, f))
        and all(rows == 0 or rows >= DESCRIPTOR_ROWS for rows in segments or ())
    )


_kept: dict[tuple[object, ...], Tile | None] = {}


def _choose(
    name: str, gemm: Gemm, x: Tensor, w: Weight, f: Tensor, experts: Experts, gated: bool, drop: bool,
    run: Callable[[Tile | None], object],
) -> Tile | None:  # fmt: skip
    """The tile to run a GEMM with, or None for cuBLAS. `name`: forward or dx. `run` runs the whole of it. Rows count up to
    a power of two."""
    m = 1 << (gemm.m - 1).bit_length()
    segmented = experts.segments is not None
    aligned = _describable(x, w, f, gemm.n, experts.segments)
    shape = (
        name, w.kind, w.group, str(x.dtype)[6:], m, gemm.n, gemm.k, gemm.rank, gated, drop, aligned, segmented,
    )  # fmt: skip
    if (x.device, shape) not in _kept:
        chip = _chip(x.device)
        forward = name == "forward"
        tiles = legal_tiles(
            replace(gemm, m=m),
            chip,
            aligned=aligned,
            inline=forward and w.scale is None and not drop,
            drop=drop and not forward,
            nibbles=w.nibbles,
        )
        ways: dict[str, Tile | None] = {str(tile): tile for tile in tiles}
        if forward or not drop:  # cuBLAS cannot mask the ranks' part of dx
            ways["cublas"] = None
        way = _choices(chip).choose(" ".join(map(str, shape)), list(ways), lambda way: run(ways[way]))
        _kept[x.device, shape] = ways[way]
    return _kept[x.device, shape]


def _cublas(x: Tensor, w: Weight, bias: Tensor | None, t: Tensor, f: Tensor, experts: Experts) -> Tensor:
    """x w + t f + bias. The small product first: the large one then adds to it while its tile is written."""
    bias = None if bias is None else bias.to(x.dtype)
    y = x.new_empty(x.shape[0], f.shape[1])
    for e, own in enumerate(eager.spans(experts.segments, 1 if experts.segments is None else len(experts.ranks))):
        t_own, f_own, y_own = t, f, y
        if own is not None:
            rank = experts.ranks[e]
            t_own, f_own, y_own = t[own, :rank], f[e * experts.pitch :][:rank], y[own]
        if bias is None:
            torch.mm(t_own, f_own, out=y_own)
        else:
            torch.addmm(bias, t_own, f_own, out=y_own)
    return y.addmm_(x, _wide(w, x, f.shape[1]))


def _wide(w: Weight, x: Tensor, n: int) -> Tensor:
    """The frozen operand (K, N) in x's dtype."""
    if w.scale is None:
        return w.data
    if w.kind == "int8":
        return (w.data * w.scale).to(x.dtype)
    rows = dequantise(w.data, w.scale, w.kind, w.group, n if w.across else x.shape[1]).to(x.dtype)
    return rows if w.across else rows.t()


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Tensor,
    gate: Tensor | None,
    segments: Sequence[int] | None,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    if not _in_kernels(x, lora_a, lora_b, segments) or weight.dtype != x.dtype:
        return eager.forward(x, weight, bias, lora_a, lora_b, scale, gate, segments, dropout_p, seed)
    w = Weight(_dense_rows(weight).t(), across=False)
    return _forward(x, w, bias, lora_a, lora_b, scale, gate, segments, dropout_p, seed)


def frozen_forward(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    kind: str,
    group: int,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Tensor,
    gate: Tensor | None,
    segments: Sequence[int] | None,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """`forward` on the data of a QuantisedWeight, made wide where a tile is loaded; x is not quantised."""
    if not _in_kernels(x, lora_a, lora_b, segments) or not _loadable(weight, kind, x):
        return eager.frozen_forward(
            x, weight, weight_scale, kind, group, bias, lora_a, lora_b, scale, gate, segments, dropout_p, seed
        )
    rows = _dense_rows(weight)
    if kind in HALVES:
        w = Weight(rows.t(), across=False)
    elif kind == "int8":
        w = Weight(rows.t(), False, weight_scale, kind)
    else:
        w = Weight(rows, False, weight_scale, kind, group)
    return _forward(x, w, bias, lora_a, lora_b, scale, gate, segments, dropout_p, seed)


def _loadable(weight: Tensor, kind: str, x: Tensor) -> bool:
    """Whether the kernels can load the data of a QuantisedWeight for a product with x: on the CPU int8 is packed."""
    return weight.dtype == {"int8": torch.int8}.get(kind, torch.uint8 if kind in LEVELS else x.dtype)


def _forward(
    x: Tensor,
    w: Weight,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Tensor,
    gate: Tensor | None,
    segments: Sequence[int] | None,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    rows = _dense_rows(x)
    experts = launch.pack(lora_a, lora_b, scale, segments)
    f = experts.b.t()
    gates = None if gate is None else gate.reshape(-1, gate.shape[-1])
    dropout = Dropout(dropout_p, seed) if dropout_p > 0 else None

    def run(tile: Tile | None) -> tuple[Tensor, Tensor]:
        if tile is not None and tile.kind == "inline":
            return launch.gemm_inline(rows, w.data.t(), bias, experts, gates, tile)
        s, t = launch.shrink(rows, experts.a.t(), experts, gates, dropout)
        if tile is None:
            return _cublas(rows, w, bias, t, f, experts), s
        return launch.gemm(rows, w, bias, t, f, experts, tile, _chip(x.device)), s

    (m, k), n = rows.shape, f.shape[1]
    gemm = Gemm(m, n, k, experts.rank)
    y, s = run(_choose("forward", gemm, rows, w, f, experts, gate is not None, dropout is not None, run))
    return y.view(*x.shape[:-1], n), s


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Tensor,
    gate: Tensor | None,
    segments: Sequence[int] | None,
    s: Tensor | None,
    dropout_p: float,
    seed: int,
    needs_dx: bool,
    needs_dgate: bool,
    needs_da: Sequence[bool],
    needs_db: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    if not _in_kernels(dy, lora_a, lora_b, segments) or weight.dtype != dy.dtype:
        return eager.backward(
            dy, x, weight, lora_a, lora_b, scale, gate, segments, s, dropout_p, seed, needs_dx, needs_dgate, needs_da,
            needs_db,
        )  # fmt: skip
    return _backward(
        dy, x, Weight(_dense_rows(weight), across=True) if needs_dx else None, lora_a, lora_b, scale, gate, segments,
        s, dropout_p, seed, needs_dgate, needs_da, needs_db,
    )  # fmt: skip


def frozen_backward(
    dy: Tensor,
    x: Tensor | None,
    k: int,
    weight: Tensor | None,
    weight_scale: Tensor | None,
    kind: str,
    group: int,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Tensor,
    gate: Tensor | None,
    segments: Sequence[int] | None,
    s: Tensor | None,
    dropout_p: float,
    seed: int,
    needs_dx: bool,
    needs_dgate: bool,
    needs_da: Sequence[bool],
    needs_db: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """`backward` on what QuantisedWeight.for_dx gave; None where dx is not needed."""
    if not _in_kernels(dy, lora_a, lora_b, segments) or (needs_dx and not _loadable(weight, kind, dy)):
        return eager.frozen_backward(
            dy, x, k, weight, weight_scale, kind, group, lora_a, lora_b, scale, gate, segments, s, dropout_p, seed,
            needs_dx, needs_dgate, needs_da, needs_db,
        )  # fmt: skip
    w = None
    if needs_dx:
        rows = _dense_rows(weight)
        if kind in HALVES:
            w = Weight(rows, across=True)
        elif kind == "int8":  # of the transposed weight, which is quantised apart
            w = Weight(rows.t(), False, weight_scale, kind)
        else:
            w = Weight(rows, True, weight_scale, kind, group)
    return _backward(
        dy, x, w, lora_a, lora_b, scale, gate, segments, s, dropout_p, seed, needs_dgate, needs_da, needs_db
    )


def _backward(
    dy: Tensor,
    x: Tensor | None,
    w: Weight | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Tensor,
    gate: Tensor | None,
    segments: Sequence[int] | None,
    s: Tensor | None,
    dropout_p: float,
    seed: int,
    needs_dgate: bool,
    needs_da: Sequence[bool],
    needs_db: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    # Without `w` dx is not needed.
    rows = _dense_rows(dy)
    experts = launch.pack(lora_a, lora_b, scale, segments)
    gates = None if gate is None else gate.reshape(-1, gate.shape[-1])
    dropout = Dropout(dropout_p, seed) if dropout_p > 0 else None
    dgate = gates.new_empty(gates.shape) if needs_dgate else None
    da = [torch.empty_like(a, memory_format=torch.contiguous_format) if n else None for a, n in zip(lora_a, needs_da)]
    db = [torch.empty_like(b, memory_format=torch.contiguous_format) if n else None for b, n in zip(lora_b, needs_db)]
    needs_dx = w is not None
    ds = launch.new_rows(rows, experts.rank) if needs_dx or any(needs_da) else None

    # The rows that one pass over dy sweeps for all that comes out of it, and those that only need dS.
    swept = [needs_dgate or (needed if segments else any(needs_db)) for needed in needs_db]
    if any(swept):
        u, parts = launch.sweep_dy(rows, s, experts, gates, ds is not None or needs_dgate, any(needs_db), swept)
        if u is not None:
            launch.finish_rows(u, s, experts, gates, dgate, ds, swept)
        for e, out in enumerate(db):
            if out is not None:
                launch.add_parts(parts[e], out, experts.starts[e])
    if ds is not None and not all(swept):
        rest = [(needs_dx or needed) and not done for needed, done in zip(needs_da, swept)]
        launch.shrink(rows, experts.b, experts, gates, None, keep_s=False, t=ds, wanted=rest)

    if any(needs_da):
        trained = [e for e, needed in enumerate(needs_da) if needed]
        first = min(experts.starts[e] for e in trained)
        last = max(experts.starts[e] + experts.ranks[e] for e in trained)
        parts = launch.sweep_x(_dense_rows(x), ds[:, first:last], experts, dropout, needs_da)
        for e in trained:
            launch.add_parts(parts[e], da[e].t(), experts.starts[e] - first)

    dx = None
    if needs_dx:

        def run(tile: Tile | None) -> Tensor:
            if tile is None:
                return _cublas(rows, w, None, ds, experts.a, experts)
            return launch.gemm(rows, w, None, ds, experts.a, experts, tile, _chip(dy.device), dropout)

        (m, n), k = rows.shape, experts.a.shape[1]
        gemm = Gemm(m, k, n, experts.rank)
        dx = run(_choose("dx", gemm, rows, w, experts.a, experts, False, dropout is not None, run))
        dx = dx.view(*dy.shape[:-1], k)
    return dx, None if dgate is None else dgate.view(gate.shape), da, db
