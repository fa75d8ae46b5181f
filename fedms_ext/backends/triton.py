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
    from ..triton_kernels.launch import Dropout
    from ..triton_kernels.choices import Choices
    from ..triton_kernels.tiles import Chip, Gemm, Tile, legal_tiles


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
        properties.shared_memory_per_block_optin,
    )


@lru_cache(maxsize=None)
def _choices(chip: Chip) -> Choices:
    return Choices(chip)


def _in_kernels(x: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]) -> bool:
    return (
        x.shape[:-1].numel() > FEW_ROWS
        and len(lora_a) > 0
        and lora_a[0].dtype == x.dtype
        and lora_a[0].numel() > 0
        and lora_b[0].numel() > 0
        and sum([a.shape[0] for a in lora_a]) <= LARGEST_RANK
    )


def _described(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can describe them: dense rows that start at multiples of 16 bytes."""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in tensors)


_kept: dict[tuple[object, ...], Tile | None] = {}


def _choose(
    name: str, gemm: Gemm, x: Tensor, aligned: bool, gated: bool, drop: bool, run: Callable[[Tile | None], object]
) -> Tile | None:
    """The tile to run a GEMM with, or None for cuBLAS. `name`: forward or dx, perhaps with int8 behind it. `run` runs
    the whole of it. Rows count up to a power of two."""
    m = 1 << (gemm.m - 1).bit_length()
    shape = (name, str(x.dtype)[6:], m, gemm.n, gemm.k, gemm.rank, gated, drop, aligned)
    if (x.device, shape) not in _kept:
        chip = _chip(x.device)
        forward = name.startswith("forward")
        tiles = legal_tiles(
            replace(gemm, m=m),
            chip,
            aligned=aligned,
            inline=name == "forward" and not drop,
            drop=drop and not forward,
        )
        ways: dict[str, Tile | None] = {str(tile): tile for tile in tiles}
        if forward or not drop:  # cuBLAS cannot mask the ranks' part of dx
            ways["cublas"] = None
        way = _choices(chip).choose(" ".join(map(str, shape)), list(ways), lambda way: run(ways[way]))
        _kept[x.device, shape] = ways[way]
    return _kept[x.device, shape]


def _cublas(x: Tensor, w: Tensor, bias: Tensor | None, t: Tensor, f: Tensor) -> Tensor:
    # The small product first: the large one then adds to it while its tile is written.
    y = t @ f if bias is None else torch.addmm(bias.to(x.dtype), t, f)
    return y.addmm_(x, w)


def _expanded(weight: Tensor, w_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return weight if w_scale is None else (weight * w_scale.unsqueeze(1)).to(dtype)


def _dense_rows(x: Tensor) -> Tensor:
    """x (..., K) as (M, K) with stride 1 along K and rows that do not overlap."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] else rows.contiguous()


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Tensor,
    gate: Tensor | None,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    if not _in_kernels(x, lora_a, lora_b) or weight.dtype != x.dtype:
        return eager.forward(x, weight, bias, lora_a, lora_b, scale, gate, dropout_p, seed)
    return _forward(x, weight, None, bias, lora_a, lora_b, scale, gate, dropout_p, seed)


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
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """`forward` on an int8 weight (N, K), made wide where a tile is loaded; x is not quantised."""
    if not _in_kernels(x, lora_a, lora_b) or weight.dtype != torch.int8:
        return eager.frozen_forward(
            x, weight, weight_scale, kind, group, bias, lora_a, lora_b, scale, gate, dropout_p, seed
        )
    return _forward(x, weight, weight_scale, bias, lora_a, lora_b, scale, gate, dropout_p, seed)


def _forward(
    x: Tensor,
    weight: Tensor,
    w_scale: Tensor | None,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Tensor,
    gate: Tensor | None,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    rows, weight = _dense_rows(x), _dense_rows(weight)
    (m, k), n = rows.shape, weight.shape[0]
    experts = launch.pack(lora_a, lora_b, scale)
    gates = None if gate is None else gate.reshape(-1, len(lora_a))
    dropout = Dropout(dropout_p, seed) if dropout_p > 0 else None

    def run(tile: Tile | None) -> tuple[Tensor, Tensor]:
        if tile is not None and tile.kind == "inline":
            return launch.gemm_inline(rows, weight, bias, experts, gates, tile)
        s, t = launch.shrink(rows, experts.a.t(), experts, gates, dropout)
        if tile is None:
            return _cublas(rows, _expanded(weight, w_scale, x.dtype).t(), bias, t, experts.b.t()), s
        return launch.gemm(rows, weight.t(), bias, t, experts.b.t(), tile, _chip(x.device), w_scale=w_scale), s

    aligned = w_scale is None and _described(rows, weight, experts.b) and n * x.element_size() % 16 == 0
    tile = _choose(
        "forward" if w_scale is None else "forward int8",
        Gemm(m, n, k, experts.rank),
        rows,
        aligned,
        gate is not None,
        dropout is not None,
        run,
    )
    y, s = run(tile)
    return y.view(*x.shape[:-1], n), s


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Tensor,
    gate: Tensor | None,
    s: Tensor | None,
    dropout_p: float,
    seed: int,
    needs_dx: bool,
    needs_dgate: bool,
    needs_da: Sequence[bool],
    needs_db: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    if not _in_kernels(dy, lora_a, lora_b) or weight.dtype != dy.dtype:
        return eager.backward(
            dy, x, weight, lora_a, lora_b, scale, gate, s, dropout_p, seed, needs_dx, needs_dgate, needs_da, needs_db
        )
    return _backward(
        dy, x, _dense_rows(weight), None, lora_a, lora_b, scale, gate, s, dropout_p, seed,
        needs_dx, needs_dgate, needs_da, needs_db,
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
    s: Tensor | None,
    dropout_p: float,
    seed: int,
    needs_dx: bool,
    needs_dgate: bool,
    needs_da: Sequence[bool],
    needs_db: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """`backward` on the int8 transpose (K, N) of the weight; None where dx is not needed."""
    if not _in_kernels(dy, lora_a, lora_b) or (needs_dx and weight.dtype != torch.int8):
        return eager.frozen_backward(
            dy, x, k, weight, weight_scale, kind, group, lora_a, lora_b, scale, gate, s, dropout_p, seed,
            needs_dx, needs_dgate, needs_da, needs_db,
        )  # fmt: skip
    return _backward(
        dy, x, _dense_rows(weight).t() if needs_dx else None, weight_scale, lora_a, lora_b, scale, gate, s,
        dropout_p, seed, needs_dx, needs_dgate, needs_da, needs_db,
    )  # fmt: skip


def _backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    w_scale: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Tensor,
    gate: Tensor | None,
    s: Tensor | None,
    dropout_p: float,
    seed: int,
    needs_dx: bool,
    needs_dgate: bool,
    needs_da: Sequence[bool],
    needs_db: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    # `weight` is (N, K); `w_scale` (K,) if it is int8.
    rows = _dense_rows(dy)
    experts = launch.pack(lora_a, lora_b, scale)
    gates = None if gate is None else gate.reshape(-1, len(lora_a))
    dropout = Dropout(dropout_p, seed) if dropout_p > 0 else None
    dgate = gates.new_empty(gates.shape) if needs_dgate else None
    da = [torch.empty_like(a, memory_format=torch.contiguous_format) if n else None for a, n in zip(lora_a, needs_da)]
    db = [torch.empty_like(b, memory_format=torch.contiguous_format) if n else None for b, n in zip(lora_b, needs_db)]

    # dS, and what comes out of the same pass over dy.
    needs_ds = needs_dx or any(needs_da)
    ds = None
    if needs_dgate or any(needs_db):
        u, parts = launch.sweep_dy(rows, s, experts, gates, needs_ds or needs_dgate, any(needs_db))
        if u is not None:
            ds = launch.finish_rows(u, s, experts, gates, dgate, rows if needs_ds else None)
        for e, out in enumerate(db):
            if out is not None:
                launch.add_parts(parts, out, experts.starts[e])
    elif needs_ds:
        _, ds = launch.shrink(rows, experts.b, experts, gates, None, keep_s=False)

    if any(needs_da):
        trained = [e for e, needed in enumerate(needs_da) if needed]
        first, last = experts.starts[trained[0]], experts.starts[trained[-1]] + experts.ranks[trained[-1]]
        parts = launch.sweep_x(_dense_rows(x), ds[:, first:last], dropout)
        for e in trained:
            launch.add_parts(parts, da[e].t(), experts.starts[e] - first)

    dx = None
    if needs_dx:

        def run(tile: Tile | None) -> Tensor:
            if tile is None:
                wide = weight if w_scale is None else _expanded(weight.t(), w_scale, dy.dtype).t()
                return _cublas(rows, wide, None, ds, experts.a)
            return launch.gemm(
                rows, weight, None, ds, experts.a, tile, _chip(dy.device), dropout, w_scale, across=w_scale is None
            )

        n, k = weight.shape
        aligned = w_scale is None and _described(rows, weight, experts.a)
        name = "dx" if w_scale is None else "dx int8"
        dx = run(_choose(name, Gemm(rows.shape[0], k, n, experts.rank), rows, aligned, False, dropout is not None, run))
        dx = dx.view(*dy.shape[:-1], k)
    return dx, None if dgate is None else dgate.view(gate.shape), da, db
