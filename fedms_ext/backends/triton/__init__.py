"""The Triton kernels, and cuBLAS where it is faster.

They take bf16 and fp16 layers with a total rank of 256 at most, on GPUs from compute capability 8.0 on. Experts in float32 are
rounded to x's dtype for the products; their gradients are summed and returned in float32. Layers with few rows are left to the
eager backend, which is cuBLAS: they wait for W to arrive, and cuBLAS reads it as fast as anything.

`gemm.py` has the frozen product joined by the ranks, `lora.py` the narrow products, `dropout.py` the mask, `tiles.py` the legal
tiles, `operands.py` what kernels are given, `launch.py` grids and arguments, `plan.py` which rows a backward pass reads.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...quantization.formats import HALVES, dequantize
from ...reference import LEVELS
from .. import device as devices
from ..autotune import Choices
from ..base import FLOATING, BackwardCall, Call, ForwardCall, Gradients, Lora, Weight, dense_rows, empty_gradients, spans
from .plan import plan_backward

name = "triton"

FEW_ROWS = 64
LARGEST_RANK = 256  # of all experts together; above it the branch is no longer narrow


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Return why this backend cannot run here, or None; see `Backend.unavailable`."""
    return devices.no_triton()


if unavailable() is None:
    from . import launch
    from .operands import Dropout, Experts, FrozenMatrix, concatenate, new_rows
    from .tiles import DESCRIPTOR_ROWS, Gemm, Tile, legal_tiles


def supports(call: Call) -> str | None:
    """Return why this backend cannot compute a call, or None; see `Backend.supports`."""
    x, lora, weight = call.input, call.lora, call.weight
    if (reason := devices.unfit_input(x, devices.runs_triton(x.device))) is not None:
        return reason
    if not lora.a or lora.rank > LARGEST_RANK or weight.n == 0 or weight.k == 0:
        return f"it takes a total rank from 1 to {LARGEST_RANK} and a weight that is not empty"
    if lora.a[0].dtype not in (x.dtype, torch.float32):
        return f"it takes experts in {x.dtype} or torch.float32, but they are in {lora.a[0].dtype}"
    if isinstance(call, BackwardCall) and not call.needs.dx:
        return None
    if weight.kind == FLOATING:
        return None if weight.data.dtype == x.dtype else f"the weight is {weight.data.dtype}, but x is {x.dtype}"
    wanted = torch.uint8 if weight.kind in LEVELS else torch.int8 if weight.kind == "int8" else x.dtype
    return None if weight.data.dtype == wanted and weight.data.dim() == 2 else (
        f"it cannot load a weight of {weight.kind} that is stored as {weight.data.dtype} next to {x.dtype}")


def prefers(call: Call) -> bool:
    """Tell whether this backend is expected to be the fastest for a call; see `Backend.prefers`."""
    return call.input.shape[:-1].numel() > FEW_ROWS


@lru_cache(maxsize=None)
def _choices(capability: tuple[int, int]) -> Choices[Tile | None]:
    major, minor = capability
    return Choices(f"gemm-sm{major}{minor}-triton{importlib.import_module('triton').__version__}.json")


def forward(call: ForwardCall) -> tuple[Tensor, Tensor]:
    """Compute y (..., N) and S, the experts' inner products that the backward pass needs; see `Backend.forward`."""
    x, weight, bias, lora = call
    device = x.device
    with devices.guard(device):
        rows, chip = dense_rows(x), devices.properties(device)
        experts = concatenate(lora.a, lora.b, lora.scale, lora.segments, x.dtype)
        w, f = _forward_matrix(weight), experts.b.t()
        gates, dropout = _gates(lora), _dropout(lora)

        def run(tile: Tile | None) -> tuple[Tensor, Tensor]:
            if tile is not None and tile.kind == "inline":
                return launch.gemm_inline(rows, w.data.t(), bias, experts, gates, tile, chip)
            s, t = launch.shrink(rows, experts.a.t(), experts, gates, dropout)
            if tile is None:
                return _cublas(rows, w, bias, t, f, experts), s
            return launch.gemm(rows, w, bias, t, f, experts, tile, chip), s

        (m, k), n = rows.shape, f.shape[1]
        gemm = Gemm(m, n, k, experts.rank)
        y, s = run(_choose("forward", gemm, rows, w, f, experts, gates is not None, dropout is not None, run))
    return y if rows is x else y.view(*x.shape[:-1], n), s


def backward(call: BackwardCall) -> Gradients:
    """Compute the gradients that a call asks for; see `Backend.backward`."""
    dy, x, weight, lora, s, needs = call
    plan = plan_backward(needs.dx, needs.dgate, tuple(needs.da), tuple(needs.db), lora.segments is not None)
    with devices.guard(dy.device):
        rows, chip = dense_rows(dy), devices.properties(dy.device)
        experts = concatenate(lora.a, lora.b, lora.scale, lora.segments, dy.dtype)
        gates, dropout = _gates(lora), _dropout(lora)
        dgate = gates.new_empty(gates.shape) if needs.dgate else None
        da, db = empty_gradients(lora, needs)
        ds = new_rows(rows, experts.rank) if plan.needs_ds else None

        if any(plan.from_dy_pass):
            u, partials = launch.lora_grad_partials_dy(
                rows, s, experts, gates, plan.projects, any(needs.db), chip, plan.from_dy_pass)
            if u is not None:
                launch.finalize_row_grads(u, s, experts, gates, dgate, ds, plan.from_dy_pass)
            _reduce(partials, db, experts.starts)
        if any(plan.shrink_only):
            launch.shrink(rows, experts.b, experts, gates, None, keep_s=False, t=ds, wanted=plan.shrink_only)
        if any(plan.from_x_pass):
            first, last = _columns_of(experts, plan.from_x_pass)
            own = ds if last - first == experts.rank else ds[:, first:last]
            partials = launch.lora_grad_partials_x(dense_rows(x), own, experts, dropout, chip, plan.from_x_pass)
            _reduce(partials, [None if grad is None else grad.t() for grad in da], [start - first for start in experts.starts])
        dx = _dx(rows, weight, ds, experts, dropout) if needs.dx else None
    if dx is not None and rows is not dy:
        dx = dx.view(*dy.shape[:-1], weight.k)
    return dx, None if dgate is None else dgate.view(lora.gate.shape), da, db


def _dx(dy: Tensor, weight: Weight, ds: Tensor, experts: Experts, dropout: Dropout | None) -> Tensor:
    """Return dy W + dS A, (M, K), with dropout on the second product."""
    w, chip = _backward_matrix(weight), devices.properties(dy.device)

    def run(tile: Tile | None) -> Tensor:
        if tile is None:
            return _cublas(dy, w, None, ds, experts.a, experts)
        return launch.gemm(dy, w, None, ds, experts.a, experts, tile, chip, dropout)

    gemm = Gemm(dy.shape[0], weight.k, weight.n, experts.rank)
    return run(_choose("dx", gemm, dy, w, experts.a, experts, False, dropout is not None, run))


def _reduce(partials: list[Tensor] | None, gradients: Sequence[Tensor | None], starts: Sequence[int]) -> None:
    """Write every gradient (C, r_e) that is not None. It is the sum of its expert's partial sums, in the columns from its start on."""
    for e, gradient in enumerate(gradients):
        if gradient is not None:
            launch.reduce_partials(partials[e], gradient, starts[e])


def _columns_of(experts: Experts, chosen: Sequence[bool]) -> tuple[int, int]:
    """Return the first column of S that belongs to a chosen expert, and the one after the last."""
    own = [e for e, is_chosen in enumerate(chosen) if is_chosen]
    return min([experts.starts[e] for e in own]), max([experts.starts[e] + experts.ranks[e] for e in own])


def _gates(lora: Lora) -> Tensor | None:
    """Return the gate as (M, E), or with segments (M, 1)."""
    return None if lora.gate is None else lora.gate.reshape(-1, lora.gate.shape[-1])


def _dropout(lora: Lora) -> Dropout | None:
    return Dropout(lora.dropout_p, lora.seed) if lora.dropout_p > 0 else None


def _forward_matrix(weight: Weight) -> FrozenMatrix:
    """Return W^T as the frozen operand (K, N) of a forward pass. x is not quantized: W is expanded where a tile is loaded."""
    rows = dense_rows(weight.data)
    if weight.kind == FLOATING or weight.kind in HALVES:
        return FrozenMatrix(rows.t(), transposed=False)
    if weight.kind == "int8":
        return FrozenMatrix(rows.t(), False, weight.scale, weight.kind)
    return FrozenMatrix(rows, False, weight.scale, weight.kind, weight.group)


def _backward_matrix(weight: Weight) -> FrozenMatrix:
    """Return W as the frozen operand (N, K) of the gradient of x."""
    rows = dense_rows(weight.data)
    if weight.kind == FLOATING or weight.kind in HALVES:
        return FrozenMatrix(rows, transposed=True)
    if weight.kind == "int8":  # it is the transposed weight, quantized apart
        return FrozenMatrix(rows.t(), False, weight.scale, weight.kind)
    return FrozenMatrix(rows, True, weight.scale, weight.kind, weight.group)


def _choose(
    name: str, gemm: Gemm, x: Tensor, w: FrozenMatrix, f: Tensor, experts: Experts, gated: bool, drop: bool,
    run: Callable[[Tile | None], object],
) -> Tile | None:  # fmt: skip
    """Choose the tile to run a GEMM with, or None for cuBLAS.

    Args:
        name: "forward" or "dx".
        gemm: The sizes of the product. The number of rows is rounded up to a power of two.
        x, w, f, experts: The operands.
        gated: Whether there is a gate.
        drop: Whether there is dropout.
        run: Computes the whole of the pass with a given tile.
    """
    m = 1 << (gemm.m - 1).bit_length()
    segmented = experts.segments is not None
    aligned = _describable(x, w, f, gemm.n, experts.segments)
    shape = (name, w.kind, w.group, x.dtype, m, gemm.n, gemm.k, gemm.rank, gated, drop, aligned, segmented)
    chip = devices.properties(x.device)

    def ways() -> dict[str, Tile | None]:
        is_forward = name == "forward"
        tiles = legal_tiles(
            gemm._replace(m=m), chip, aligned=aligned, inline=is_forward and w.scale is None and not drop,
            drop=drop and not is_forward, is_4bit=w.is_4bit,
        )  # fmt: skip
        named: dict[str, Tile | None] = {str(tile): tile for tile in tiles}
        if is_forward or not drop:  # cuBLAS cannot mask the ranks' part of dx
            named["cublas"] = None
        return named

    return _choices(chip.capability).choose(x.device, shape, ways, run)


def _describable(x: Tensor, w: FrozenMatrix, f: Tensor, columns: int, segments: Sequence[int] | None) -> bool:
    """Return whether tensor descriptors can describe the operands: rows are dense and start at multiples of 16 bytes, and each segment is
    empty or at least as large as its tiles.
    """
    width = 16 // x.element_size()
    if w.scale is not None or columns % width != 0:
        return False
    for tensor in (x, w.data, f):
        if tensor.data_ptr() % 16 != 0 or max(tensor.stride()) % width != 0:
            return False
    return segments is None or all(rows == 0 or rows >= DESCRIPTOR_ROWS for rows in segments)


def _cublas(x: Tensor, w: FrozenMatrix, bias: Tensor | None, t: Tensor, f: Tensor, experts: Experts) -> Tensor:
    """Return x w + t f + bias by cuBLAS. The small product comes first, so that the large one adds to it while a tile is written."""
    bias = None if bias is None else bias.to(x.dtype)
    y = x.new_empty(x.shape[0], f.shape[1])
    products = [(t, f, y)]
    if experts.segments is not None:
        owned = enumerate(zip(experts.ranks, spans(experts.segments)))
        products = [(t[own, :rank], f[e * experts.pitch :][:rank], y[own]) for e, (rank, own) in owned]
    for t_own, f_own, y_own in products:
        if bias is None:
            torch.mm(t_own, f_own, out=y_own)
        else:
            torch.addmm(bias, t_own, f_own, out=y_own)
    return y.addmm_(x, _expanded(w, x, f.shape[1]))


def _expanded(w: FrozenMatrix, x: Tensor, n: int) -> Tensor:
    """Return the frozen operand (K, N) in x's dtype."""
    if w.scale is None:
        return w.data
    if w.kind == "int8":
        return (w.data * w.scale).to(x.dtype)
    rows = dequantize(w.data, w.scale, w.kind, w.group, n if w.transposed else x.shape[1]).to(x.dtype)
    return rows if w.transposed else rows.t()
