"""The CUDA C++ kernels of csrc/cuda.

They take bf16 and fp16 layers whose sides are multiples of 8 (of 16 along K for an int8 weight), with a total rank of 256 at
most and up to eight segments. Experts in float32 are rounded to x's dtype for the products; their gradients are summed and
returned in float32.

They are chosen on a GPU on which this build has passed its tests, of which `make gpu` leaves a record, for the shapes at which
they were measured to be faster than the other backends: a kernel that never ran is no default. FEDMS_BACKEND=cuda forces them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import device as devices
from . import eager, fastest, triton
from .autotune import Choices
from .base import FLOATING, Backend, BackwardCall, Call, ForwardCall, Gradients, Lora, empty_gradients, scale_on
from .cuda_layout import GemmConfig, aligned_rows, concatenated, gemm_configs, layout_of, padded

name = "cuda"

LARGEST_RANK = 256  # of all experts together; above it the branch is no longer narrow

_kernels: Any = devices.cuda_kernels()


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Return why this backend cannot run here, or None; see `Backend.unavailable`."""
    return devices.no_cuda_kernels()


def supports(call: Call) -> str | None:
    """Return why this backend cannot compute a call, or None; see `Backend.supports`."""
    x, lora, weight = call.input, call.lora, call.weight
    if (reason := devices.unfit_input(x, devices.runs_cuda(x.device))) is not None:
        return reason
    if not lora.a or lora.rank > LARGEST_RANK or len(lora.segments or ()) > _kernels.MOST_SEGMENTS:
        return f"it takes a total rank from 1 to {LARGEST_RANK}, and at most {_kernels.MOST_SEGMENTS} segments"
    if lora.a[0].dtype not in (x.dtype, torch.float32):
        return f"it takes experts in {x.dtype} or torch.float32, but they are in {lora.a[0].dtype}"
    if isinstance(lora.seed, Tensor):
        return "it takes the seed of dropout as a number, not from the GPU's memory"
    if x.numel() == 0 or weight.n == 0 or weight.n % 8 or weight.k % 8:
        return f"both sides of the weight must be multiples of 8, and x must have rows; the weight is {(weight.n, weight.k)}"
    return _unreadable(call)


def _unreadable(call: Call) -> str | None:
    """Return why the kernels cannot read the weight, or None if they can."""
    x, weight = call.input, call.weight
    if isinstance(call, BackwardCall) and not call.needs.dx:
        return None
    if weight.kind == FLOATING:
        return None if weight.data.dtype == x.dtype else f"the weight is {weight.data.dtype}, but x is {x.dtype}"
    # Forward an int8 weight is (N, K), backward (K, N): its rows are read in pieces of 16 bytes.
    if weight.kind != "int8" or weight.data.dtype != torch.int8:
        return f"of quantized weights it takes int8 that lies on the GPU, but this one is {weight.kind}"
    return f"a row of the int8 weight {(weight.n, weight.k)} is no multiple of 16" if weight.data.shape[1] % 16 else None


def prefers(call: Call) -> bool:
    """Return whether the kernels passed their tests on this GPU and are faster for this shape than what would run otherwise."""
    if not devices.has_passed(devices.properties(call.input.device).capability):
        return False
    rival: Backend = triton if triton.unavailable() is None and triton.supports(call) is None else eager
    return fastest.is_faster(name, (forward, backward), rival, call)


@lru_cache(maxsize=None)
def _chip(device: torch.device) -> Any:
    properties = devices.properties(device)
    major, minor = properties.capability
    return _kernels.DeviceProperties(10 * major + minor, properties.multiprocessors, properties.shared_memory)


@lru_cache(maxsize=None)
def _choices(capability: tuple[int, int]) -> Choices[GemmConfig]:
    major, minor = capability
    return Choices(f"cuda-gemm-sm{major}{minor}-{devices.build_id()[:16]}.json")


@lru_cache(maxsize=1)
def _no_dropout() -> object:
    return _kernels.Dropout(0.0, 0)


@lru_cache(maxsize=1)
def _no_fused_shrink() -> object:
    return _kernels.FusedShrink()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


class _Pass:
    """What the launches of one pass share. It holds the tensors whose addresses the kernels get.

    Shapes: R is the total rank, S and T are (M, R), and T is S with scale and gate.
    """

    def __init__(self, x: Tensor, lora: Lora) -> None:
        device = x.device
        self.bf16, self.chip, self.stream = x.dtype == torch.bfloat16, _chip(device), _kernels.Stream(*devices.stream(device))
        self.rank = lora.rank
        self.rows_of_experts = None if lora.segments is None else tuple(lora.segments)
        self.layout = layout = layout_of(tuple(lora.ranks), self.rows_of_experts, device)
        self.segments = layout.segments
        self.a, self.b = concatenated(lora, layout.gaps, x.dtype)
        self.scale = scale_on(lora.scale, device).to(torch.float32)
        gates = lora.gate_rows()
        self.gate = None if gates is None else gates.to(torch.float32)
        strides = (0, 0) if self.gate is None else self.gate.stride()
        self.factors = _kernels.Factors(
            self.scale.data_ptr(), layout.owner.data_ptr(), _address(self.gate), *strides
        )
        self.has_dropout = lora.dropout_p > 0
        self.dropout = _kernels.Dropout(lora.dropout_p, lora.seed) if self.has_dropout else _no_dropout()

    def shrink(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return S = drop(x) A^T and T."""
        m, a = x.shape[0], self.a
        s, t = x.new_empty(m, self.rank), x.new_empty(m, padded(self.rank))
        _kernels.shrink(
            self.bf16, m, x.shape[1], self.rank, x.data_ptr(), x.stride(0), a.data_ptr(), a.stride(0), s.data_ptr(),
            t.data_ptr(), t.stride(0), self.factors, self.segments, self.dropout, self.stream,
        )  # fmt: skip
        return s, t

    def apply_scale_and_gate(self, s: Tensor) -> Tensor:
        """Return T of S."""
        t = s.new_empty(s.shape[0], padded(self.rank))
        _kernels.apply_scale_and_gate(
            self.bf16, s.shape[0], self.rank, s.data_ptr(), t.data_ptr(), t.stride(0), self.factors,
            self.segments, self.stream,
        )  # fmt: skip
        return t

    def forward(self, x: Tensor, w: Tensor, w_scale: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return y (M, N) and S."""

        def run(config: GemmConfig) -> tuple[Tensor, Tensor]:
            if config.fuses_shrink:
                s, t = x.new_empty(len(x), self.rank), x.new_empty(len(x), padded(self.rank))
                blocks = sum(-(-rows // 128) for rows in self.rows_of_experts or (len(x),))
                ready = x.new_zeros(blocks, dtype=torch.int32)
                fused = _kernels.FusedShrink(self.a.data_ptr(), self.a.stride(0), s.data_ptr(), self.factors, ready.data_ptr())
                return self._gemm(x, w, None, bias, t, self.b, False, False, config.tile, fused), s
            s, t = self.shrink(x)
            return self._gemm(x, w, w_scale, bias, t, self.b, False, False, config.tile, _no_fused_shrink()), s

        # The tiles that can compute S take neither dropout nor an int8 W. In a forward pass dropout concerns S alone.
        may_fuse = not self.has_dropout and w_scale is None
        return run(self._choose("forward", x, len(w), w_scale, has_dropout=False, may_fuse=may_fuse, run=run))

    def dx(self, dy: Tensor, w: Tensor, w_scale: Tensor | None, ds: Tensor, f: Tensor) -> Tensor:
        """Return dy w + ds f. An int8 w is given as its transpose, and f with it."""
        transposed = w_scale is None

        def run(config: GemmConfig) -> Tensor:
            return self._gemm(dy, w, w_scale, None, ds, f, transposed, self.has_dropout, config.tile, _no_fused_shrink())

        n = w.shape[1] if transposed else len(w)
        return run(self._choose("dx", dy, n, w_scale, has_dropout=self.has_dropout, may_fuse=False, run=run))

    def _choose(
        self, name: str, x: Tensor, n: int, w_scale: Tensor | None, has_dropout: bool, may_fuse: bool,
        run: Callable[[GemmConfig], object],
    ) -> GemmConfig:  # fmt: skip
        """Return how to run a GEMM; rows count up to a power of two. `run` computes the whole of it."""
        (rows, k), int8 = x.shape, w_scale is not None
        m = 1 << (rows - 1).bit_length()
        full_tiles = all(own == 0 or own >= 128 for own in self.rows_of_experts or ())
        segmented = self.rows_of_experts is not None
        shape = (name, "bf16" if self.bf16 else "fp16", m, n, k, self.rank, int8, has_dropout, may_fuse, segmented, full_tiles)

        def ways() -> dict[str, GemmConfig]:
            configs = gemm_configs(self.chip, m, n, k, self.rank, int8, has_dropout, full_tiles, may_fuse)
            return {str(config): config for config in configs}

        return _choices(devices.properties(x.device).capability).choose(x.device, shape, ways, run)

    def _gemm(
        self, x: Tensor, w: Tensor, w_scale: Tensor | None, bias: Tensor | None, t: Tensor, f: Tensor, transposed: bool,
        has_dropout: bool, tile: int, fused_shrink: object,
    ) -> Tensor:  # fmt: skip
        """Return x w^T + t f^T + bias, or if `transposed` x w + t f. With `has_dropout` the mask lies on t f."""
        (m, k), n = x.shape, w.shape[1] if transposed else w.shape[0]
        y = x.new_empty(m, n)
        _kernels.gemm(
            self.bf16, m, n, k, self.rank, x.data_ptr(), x.stride(0), w.data_ptr(), w.stride(0), _address(w_scale),
            _address(bias), t.data_ptr(), t.stride(0), f.data_ptr(), f.stride(0), y.data_ptr(), transposed,
            self.dropout if has_dropout else _no_dropout(), self.segments, fused_shrink, tile, self.chip, self.stream,
        )  # fmt: skip
        return y

    def lora_grad_partials(
        self, z: Tensor, t: Tensor | None, b: Tensor | None, has_dropout: bool
    ) -> tuple[list[Tensor] | None, Tensor | None]:
        """Read z (M, C) once; return partial sums of drop(z)^T t, (splits, C, R) for each expert, and of z b, (blocks, M, R)."""
        m, c = z.shape
        # Two blocks of threads for each multiprocessor, as far as the columns and the ranks do not make them already.
        columns = _kernels.lora_grad_partials_blocks(c)
        splits = max(1, 2 * self.chip.multiprocessors // (columns * -(-self.rank // 32)))
        rows = -(-m // (64 * splits)) * 64
        counts = [-(-own // rows) for own in self.rows_of_experts or (m,)]
        g = z.new_empty(sum(counts), c, self.rank, dtype=torch.float32) if t is not None else None
        u = z.new_empty(columns, m, self.rank, dtype=torch.float32) if b is not None else None
        _kernels.lora_grad_partials(
            self.bf16, m, c, self.rank, rows, z.data_ptr(), z.stride(0), _address(t), _stride(t), _address(g),
            _address(b), _stride(b), _address(u), self.segments,
            self.dropout if has_dropout else _no_dropout(), self.stream,
        )  # fmt: skip
        if g is None:
            return None, u
        return list(g.split(counts)) if self.rows_of_experts else [g] * len(self.layout.starts), u

    def finalize_row_grads(self, u: Tensor, s: Tensor | None, dgate: Tensor | None, like: Tensor) -> Tensor:
        """Return dS (M, R), in the dtype of `like`, from the partial sums of U = dy B; fill `dgate` (M, E) if it is given."""
        partials, m, _ = u.shape
        ds = like.new_empty(m, padded(self.rank))
        _kernels.finalize_row_grads(
            self.bf16, m, self.rank, len(self.layout.starts), partials, u.data_ptr(), _address(s), ds.data_ptr(),
            ds.stride(0), _address(dgate), self.factors, self.segments, self.stream,
        )  # fmt: skip
        return ds

    def reduce_partials(self, g: Tensor, out: Tensor, first: int) -> None:
        """Write out (C, r): the sum of the partials g (partials, C, R), in order, of its columns from `first` on."""
        partials, c, _ = g.shape
        _kernels.reduce_partials(
            self.bf16, out.dtype == torch.float32, c, self.rank, partials, first, out.shape[1], g.data_ptr(), out.data_ptr(),
            out.stride(0), out.stride(1), self.stream,
        )  # fmt: skip


def forward(call: ForwardCall) -> tuple[Tensor, Tensor]:
    """Compute y (..., N) and S, the experts' inner products that the backward pass needs; see `Backend.forward`."""
    x, weight, bias, lora = call
    rows = aligned_rows(x)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    y, s = _Pass(x, lora).forward(rows, aligned_rows(weight.data), weight.scale, bias)
    return y.view(*x.shape[:-1], weight.n), s


def backward(call: BackwardCall) -> Gradients:
    """Compute the gradients that a call asks for; see `Backend.backward`."""
    dy, x, weight, lora, s, needs = call
    rows = aligned_rows(dy)
    work = _Pass(dy, lora)
    starts = work.layout.starts
    s = None if s is None else s.contiguous()
    dgate = rows.new_empty(len(rows), lora.gate.shape[-1], dtype=torch.float32) if needs.dgate else None
    da, db = empty_gradients(lora, needs)

    # One pass over dy: dB from T, and U = dy B, from which dS and the gate's gradient come.
    needs_u = needs.dx or needs.dgate or any(needs.da)
    t = work.apply_scale_and_gate(s) if any(needs.db) else None
    partials, u = work.lora_grad_partials(rows, t, work.b if needs_u else None, has_dropout=False)
    ds = work.finalize_row_grads(u, s, dgate, rows) if needs_u else None
    for e, (out, first) in enumerate(zip(db, starts)):
        if out is not None:
            work.reduce_partials(partials[e], out, first)

    if any(needs.da):
        partials, _ = work.lora_grad_partials(aligned_rows(x), ds, None, has_dropout=work.has_dropout)
        for e, (out, first) in enumerate(zip(da, starts)):
            if out is not None:
                work.reduce_partials(partials[e], out.t(), first)

    dx = None
    if needs.dx:
        # An int8 weight is given as its transpose, so its ranks lie along it too.
        f, rank = work.a, len(work.a)
        if weight.scale is not None:
            f = aligned_rows(F.pad(f.t(), (0, padded(rank) - rank)))
        dx = work.dx(rows, aligned_rows(weight.data), weight.scale, ds, f)
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    return dx, None if dgate is None else dgate.view(lora.gate.shape).to(lora.gate.dtype), da, db
