"""The GPU backend: the kernels of `fedms_ext.backends.triton`, and cuBLAS where it wins.

For bf16 and fp16 layers with more than 64 rows. Everything else on a GPU (other dtypes, experts in another dtype than
the base, few rows) goes to `eager`, which is cuBLAS. Under Triton's interpreter (TRITON_INTERPRET=1) it takes tensors
on the CPU, so that its numerics can be tested without a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...quantization.formats import HALVES, dequantize
from ...reference import LEVELS
from .. import eager
from ..autotune import Choices
from ..base import Frozen, Gradients, Lora, Needs, dense_rows, empty_gradients, spans

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
    from . import launch
    from .launch import Dropout, Experts, Weight
    from .tiles import DESCRIPTOR_ROWS, DeviceProperties, Gemm, Tile, legal_tiles


def supports(x: Tensor) -> bool:
    if x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return x.device.type == "cpu" if _INTERPRETED else x.is_cuda and _chip(x.device).capability >= (8, 0)


@lru_cache(maxsize=None)
def _chip(device: torch.device) -> DeviceProperties:
    if _INTERPRETED:
        return DeviceProperties((9, 0), multiprocessors=4, shared_memory=232448)
    properties = torch.cuda.get_device_properties(device)
    return DeviceProperties(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # missing in torch's stubs
    )


@lru_cache(maxsize=None)
def _choices(chip: DeviceProperties) -> Choices:
    major, minor = chip.capability
    return Choices(f"gemm-sm{major}{minor}-triton{importlib.import_module('triton').__version__}.json")


def _in_kernels(x: Tensor, lora: Lora) -> bool:
    return (
        x.shape[:-1].numel() > FEW_ROWS
        and len(lora.a) > 0
        and lora.a[0].dtype == x.dtype
        and lora.a[0].shape[1] > 0
        and lora.b[0].shape[0] > 0
        and lora.rank <= LARGEST_RANK
    )


def _describable(x: Tensor, w: Weight, f: Tensor, columns: int, segments: Sequence[int] | None) -> bool:
    """Whether tensor descriptors can describe the operands, which are then dense rows that start at multiples of 16 bytes,
    and the segments are none or large enough for their tiles."""
    width = 16 // x.element_size()
    if w.scale is not None or columns % width != 0:
        return False
    for tensor in (x, w.data, f):
        if tensor.data_ptr() % 16 != 0 or max(tensor.stride()) % width != 0:
            return False
    return segments is None or all(rows == 0 or rows >= DESCRIPTOR_ROWS for rows in segments)


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
    shape = (name, w.kind, w.group, x.dtype, m, gemm.n, gemm.k, gemm.rank, gated, drop, aligned, segmented)
    key = (x.device, shape)
    if key not in _kept:
        chip = _chip(x.device)
        forward = name == "forward"
        tiles = legal_tiles(
            gemm._replace(m=m),
            chip,
            aligned=aligned,
            inline=forward and w.scale is None and not drop,
            drop=drop and not forward,
            is_4bit=w.is_4bit,
        )
        ways: dict[str, Tile | None] = {str(tile): tile for tile in tiles}
        if forward or not drop:  # cuBLAS cannot mask the ranks' part of dx
            ways["cublas"] = None
        on_disk = " ".join(map(str, shape)).replace("torch.", "")
        way = _choices(chip).choose(on_disk, list(ways), lambda way: run(ways[way]))
        _kept[key] = ways[way]
    return _kept[key]


def _cublas(x: Tensor, w: Weight, bias: Tensor | None, t: Tensor, f: Tensor, experts: Experts) -> Tensor:
    """x w + t f + bias. The small product first: the large one then adds to it while its tile is written."""
    bias = None if bias is None else bias.to(x.dtype)
    y = x.new_empty(x.shape[0], f.shape[1])
    parts = [(t, f, y)]
    if experts.segments is not None:
        owned = enumerate(zip(experts.ranks, spans(experts.segments)))
        parts = [(t[own, :rank], f[e * experts.pitch :][:rank], y[own]) for e, (rank, own) in owned]
    for t_own, f_own, y_own in parts:
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
    rows = dequantize(w.data, w.scale, w.kind, w.group, n if w.transposed else x.shape[1]).to(x.dtype)
    return rows if w.transposed else rows.t()


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora) -> tuple[Tensor, Tensor]:
    if not _in_kernels(x, lora) or weight.dtype != x.dtype:
        return eager.forward(x, weight, bias, lora)
    return _forward(x, Weight(dense_rows(weight).t(), transposed=False), bias, lora)


def frozen_forward(x: Tensor, frozen: Frozen, bias: Tensor | None, lora: Lora) -> tuple[Tensor, Tensor]:
    """`forward` on a quantized weight, made wide where a tile is loaded; x is not quantized."""
    if not _in_kernels(x, lora) or not _loadable(frozen, x):
        return eager.frozen_forward(x, frozen, bias, lora)
    rows = dense_rows(frozen.data)
    if frozen.kind in HALVES:
        w = Weight(rows.t(), transposed=False)
    elif frozen.kind == "int8":
        w = Weight(rows.t(), False, frozen.scale, frozen.kind)
    else:
        w = Weight(rows, False, frozen.scale, frozen.kind, frozen.group)
    return _forward(x, w, bias, lora)


def _loadable(frozen: Frozen, x: Tensor) -> bool:
    """Whether the kernels can load the data of a quantized weight for a product with x: on the CPU int8 is packed."""
    dtype = torch.uint8 if frozen.kind in LEVELS else torch.int8 if frozen.kind == "int8" else x.dtype
    return frozen.data.dtype == dtype


def _gates(lora: Lora) -> Tensor | None:
    """The gate as (M, E), or in segments (M, 1)."""
    return None if lora.gate is None else lora.gate.reshape(-1, lora.gate.shape[-1])


def _dropout(lora: Lora) -> Dropout | None:
    return Dropout(lora.dropout_p, lora.seed) if lora.dropout_p > 0 else None


def _forward(x: Tensor, w: Weight, bias: Tensor | None, lora: Lora) -> tuple[Tensor, Tensor]:
    rows = dense_rows(x)
    experts = launch.pack(lora.a, lora.b, lora.scale, lora.segments)
    f = experts.b.t()
    gates, dropout = _gates(lora), _dropout(lora)

    def run(tile: Tile | None) -> tuple[Tensor, Tensor]:
        if tile is not None and tile.kind == "inline":
            return launch.gemm_inline(rows, w.data.t(), bias, experts, gates, tile)
        s, t = launch.shrink(rows, experts.a.t(), experts, gates, dropout)
        if tile is None:
            return _cublas(rows, w, bias, t, f, experts), s
        return launch.gemm(rows, w, bias, t, f, experts, tile, _chip(x.device)), s

    (m, k), n = rows.shape, f.shape[1]
    gemm = Gemm(m, n, k, experts.rank)
    y, s = run(_choose("forward", gemm, rows, w, f, experts, gates is not None, dropout is not None, run))
    return y if rows is x else y.view(*x.shape[:-1], n), s


def backward(dy: Tensor, x: Tensor | None, weight: Tensor, lora: Lora, s: Tensor | None, needs: Needs) -> Gradients:
    if not _in_kernels(dy, lora) or weight.dtype != dy.dtype:
        return eager.backward(dy, x, weight, lora, s, needs)
    return _backward(dy, x, Weight(dense_rows(weight), transposed=True) if needs.dx else None, lora, s, needs)


def frozen_backward(
    dy: Tensor, x: Tensor | None, frozen: Frozen, lora: Lora, s: Tensor | None, needs: Needs
) -> Gradients:
    if not _in_kernels(dy, lora) or (needs.dx and not _loadable(frozen, dy)):
        return eager.frozen_backward(dy, x, frozen, lora, s, needs)
    w = None
    if needs.dx:
        rows = dense_rows(frozen.data)
        if frozen.kind in HALVES:
            w = Weight(rows, transposed=True)
        elif frozen.kind == "int8":  # of the transposed weight, which is quantized apart
            w = Weight(rows.t(), False, frozen.scale, frozen.kind)
        else:
            w = Weight(rows, True, frozen.scale, frozen.kind, frozen.group)
    return _backward(dy, x, w, lora, s, needs)


def _backward(
    dy: Tensor, x: Tensor | None, w: Weight | None, lora: Lora, s: Tensor | None, needs: Needs
) -> Gradients:
    # Without `w` dx is not needed.
    rows = dense_rows(dy)
    experts = launch.pack(lora.a, lora.b, lora.scale, lora.segments)
    starts = experts.starts
    gates, dropout, chip = _gates(lora), _dropout(lora), _chip(dy.device)
    dgate = gates.new_empty(gates.shape) if needs.dgate else None
    da, db = empty_gradients(lora, needs)
    needs_dx = w is not None
    ds = launch.new_rows(rows, experts.rank) if needs_dx or any(needs.da) else None

    # The rows that one pass over dy sweeps for all that comes out of it, and those that only need dS.
    swept = [needs.dgate or (needed if lora.segments else any(needs.db)) for needed in needs.db]
    if any(swept):
        u, parts = launch.lora_grad_partials_dy(rows, s, experts, gates, ds is not None or needs.dgate, any(needs.db), chip, swept)
        if u is not None:
            launch.finalize_row_grads(u, s, experts, gates, dgate, ds, swept)
        for e, out in enumerate(db):
            if out is not None:
                launch.reduce_partials(parts[e], out, starts[e])
    if ds is not None and not all(swept):
        rest = [(needs_dx or needed) and not done for needed, done in zip(needs.da, swept)]
        launch.shrink(rows, experts.b, experts, gates, None, keep_s=False, t=ds, wanted=rest)

    if any(needs.da):
        trained = [e for e, needed in enumerate(needs.da) if needed]
        first = min([starts[e] for e in trained])
        last = max([starts[e] + experts.ranks[e] for e in trained])
        own = ds if last - first == experts.rank else ds[:, first:last]
        parts = launch.lora_grad_partials_x(dense_rows(x), own, experts, dropout, chip, needs.da)
        for e in trained:
            launch.reduce_partials(parts[e], da[e].t(), starts[e] - first)

    dx = None
    if needs_dx:

        def run(tile: Tile | None) -> Tensor:
            if tile is None:
                return _cublas(rows, w, None, ds, experts.a, experts)
            return launch.gemm(rows, w, None, ds, experts.a, experts, tile, chip, dropout)

        (m, n), k = rows.shape, experts.a.shape[1]
        gemm = Gemm(m, k, n, experts.rank)
        dx = run(_choose("dx", gemm, rows, w, experts.a, experts, False, dropout is not None, run))
        dx = dx if rows is dy else dx.view(*dy.shape[:-1], k)
    return dx, None if dgate is None else dgate.view(lora.gate.shape), da, db
