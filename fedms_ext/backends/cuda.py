"""The CUDA C++ kernels of csrc/cuda. FEDMS_BACKEND=cuda forces them; by itself only `measured` chooses them, on a GPU that
has passed their tests.

For bf16 and fp16 layers whose sides are multiples of 8 (16 along K for an int8 weight), with a total rank of 256 at
most, experts in the base's dtype, and up to eight segments. Everything else goes to the Triton backend where it can run,
and to `eager`.

FEDMS_CUDA_EMULATED=FILE takes the kernels from a module that was compiled for the emulator of tests/kernels/cuda, and
then they take tensors on the CPU.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import time
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from . import autotune, eager, triton
from .base import Frozen, Gradients, Lora, Needs, dense_rows, empty_gradients, made_once, scale_on

LARGEST_RANK = 256  # of all experts together; above it the branch is no longer narrow

_WIDE = 2048        # columns from which on S is made inside of the GEMM

_EMULATED = os.environ.get("FEDMS_CUDA_EMULATED")


def _load_emulated(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_C", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.cuda


_kernels = _load_emulated(_EMULATED) if _EMULATED else getattr(_C, "cuda", None)


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    if _kernels is None:
        return "this build has no CUDA kernels; reinstall with FEDMS_CUDA=1 and the CUDA toolkit (nvcc)"
    if _EMULATED:
        return None
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA; install a CUDA build of it"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU; see torch.cuda.is_available()"
    try:
        _kernels.check_device(torch.cuda.current_device())
    except RuntimeError as error:
        return f"{error}; this build is for {_C.build_info()['cuda']}, see FEDMS_CUDA_ARCHS in setup.py"
    return None


def supports(x: Tensor) -> bool:
    if x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return x.device.type == "cpu" if _EMULATED else x.is_cuda and capability(x.device) >= (8, 0)


@lru_cache(maxsize=None)
def capability(device: torch.device | None) -> tuple[int, int]:
    """The compute capability of a device, or of the current one."""
    return (9, 0) if _EMULATED else torch.cuda.get_device_capability(device)


@lru_cache(maxsize=1)
def build_id() -> str:
    """The hash of the module that holds the kernels: another build may do other things."""
    return hashlib.sha256(Path(_EMULATED or _C.__file__).read_bytes()).hexdigest()


def record(capability: tuple[int, int]) -> Path:
    """The file that says that the kernels of a build have passed their tests on a GPU of that capability."""
    return autotune.folder() / f"cuda-sm{capability[0]}{capability[1]}-passed.json"


@lru_cache(maxsize=None)
def passed(capability: tuple[int, int]) -> bool:
    """Whether this build's kernels have passed their tests on a GPU of that capability, as far as $FEDMS_CACHE knows."""
    kept = autotune.read(record(capability))
    return bool(kept) and kept.get("build") == build_id()


def record_pass() -> Path:
    """Notes in $FEDMS_CACHE that this build's kernels have passed their tests on the current GPU. Only for who ran them."""
    path = record(capability(None))
    autotune.write(path, {"build": build_id(), "passed": time.strftime("%Y-%m-%d %H:%M:%S")})
    passed.cache_clear()
    return path


def other(x: Tensor) -> ModuleType:
    """Who takes a call that the kernels do not."""
    return triton if triton.unavailable() is None and triton.supports(x) else eager


def _in_kernels(x: Tensor, n: int, lora: Lora) -> bool:
    k = x.shape[-1]
    return (
        len(lora.segments or ()) <= _kernels.MOST_SEGMENTS
        and x.numel() > 0
        and n > 0
        and n % 8 == 0
        and k % 8 == 0
        and len(lora.a) > 0
        and lora.a[0].dtype == x.dtype
        and lora.rank <= LARGEST_RANK
    )


@lru_cache(maxsize=None)
def _chip(device: torch.device) -> Any:
    if _EMULATED:
        return _kernels.DeviceProperties(90, 4, 232448)
    properties = torch.cuda.get_device_properties(device)
    return _kernels.DeviceProperties(
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # missing in torch's stubs
    )


@lru_cache(maxsize=1)
def _nothing_dropped() -> object:
    return _kernels.Dropout(0.0, 0)


@lru_cache(maxsize=1)
def _no_fused_shrink() -> object:
    return _kernels.FusedShrink()


def _stream(x: Tensor) -> object:
    if _EMULATED:
        return _kernels.Stream(0, 0)
    return _kernels.Stream(x.device.index, torch.cuda.current_stream(x.device).cuda_stream)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _rows(x: Tensor) -> Tensor:
    return dense_rows(x, 16)


def _padded(rank: int) -> int:
    return -(-rank // 8) * 8


class _Layout(NamedTuple):
    """Where experts of some ranks lie side by side."""

    gaps: list[int]     # ranks of zeros behind each one
    starts: list[int]   # the column of S where each one begins
    owner: Tensor       # (R,) the number of a rank's expert
    segments: object


@made_once(256)
def _layout(ranks: tuple[int, ...], segments: tuple[int, ...] | None, device: torch.device) -> _Layout:
    """In segments each expert begins at a multiple of 16 ranks."""
    gaps = [-rank % (1 if segments is None else 16) for rank in ranks]
    firsts = [sum(ranks[:e]) + sum(gaps[:e]) for e in range(len(ranks))]
    owner = torch.tensor([e for e, r in enumerate(ranks) for _ in range(r)], dtype=torch.int32, device=device)
    if segments is None:
        return _Layout(gaps, firsts, owner, _kernels.Segments([], [], []))
    rows = _kernels.Segments(list(accumulate(segments)), ranks, firsts)
    return _Layout(gaps, [0] * len(ranks), owner, rows)


def _side_by_side(lora: Lora, gaps: list[int]) -> tuple[Tensor, Tensor]:
    """The applied experts as a (R, K) and b (N, R), whose rows start at multiples of 16 bytes."""
    if len(lora.a) == 1 and gaps == [0]:
        a, b = lora.a[0], lora.b[0]
    else:
        a = torch.cat([F.pad(a, (0, 0, 0, gap)) if gap else a for a, gap in zip(lora.a, gaps)])
        b = torch.cat([F.pad(b, (0, gap)) if gap else b for b, gap in zip(lora.b, gaps)], dim=1)
    rank = b.shape[1]
    return _rows(a), _rows(b) if rank % 8 == 0 else F.pad(b, (0, -rank % 8))[:, :rank]


class _GemmConfig(NamedTuple):
    """How a GEMM runs: the number of its tile, and whether the tiles of the first columns make S on the way."""

    tile: int
    inside: bool

    def __str__(self) -> str:
        return _kernels.gemm_tile_name(self.tile) + (", S inside" if self.inside else "")


@lru_cache(maxsize=None)
def _choices(capability: tuple[int, int]) -> autotune.Choices:
    major, minor = capability
    return autotune.Choices(f"cuda-gemm-sm{major}{minor}-{build_id()[:16]}.json")


def _gemm_configs(
    chip: object, m: int, n: int, k: int, rank: int, int8: bool, has_dropout: bool, full_tiles: bool, inside: bool
) -> list[_GemmConfig]:
    """The legal ones, the one that the cost model expects to be the fastest first. `full_tiles`: no segment is shorter than a
    wgmma tile. `inside`: S may be made on the way."""
    tiles = _kernels.gemm_tiles(chip, m, n, k, rank, int8, has_dropout, full_tiles)
    apart = [_GemmConfig(tile, False) for tile in tiles]
    # The tiles that make S take longer: there must be many others.
    within = [_GemmConfig(tile, True) for tile in tiles if inside and _kernels.shrinks_inside(tile, rank)]
    return within + apart if n >= _WIDE else apart + within


_kept: dict[tuple[object, ...], _GemmConfig] = {}


class _Call:
    """What the launches of one call of the operator share. It holds the tensors whose addresses the kernels get."""

    def __init__(self, x: Tensor, lora: Lora) -> None:
        device = x.device
        self.bf16, self.chip, self.stream = x.dtype == torch.bfloat16, _chip(device), _stream(x)
        self.rank = lora.rank
        self.rows_of_experts = None if lora.segments is None else tuple(lora.segments)
        self.layout = layout = _layout(tuple(lora.ranks), self.rows_of_experts, device)
        self.segments = layout.segments
        self.a, self.b = _side_by_side(lora, layout.gaps)
        self.scale = scale_on(lora.scale, device).to(torch.float32)
        gates = lora.gate_rows()
        self.gate = None if gates is None else gates.to(torch.float32)
        strides = (0, 0) if self.gate is None else self.gate.stride()
        self.factors = _kernels.Factors(
            self.scale.data_ptr(), layout.owner.data_ptr(), _address(self.gate), *strides
        )
        self.has_dropout = lora.dropout_p > 0
        self.nothing_dropped = _nothing_dropped()
        self.dropout = _kernels.Dropout(lora.dropout_p, lora.seed) if self.has_dropout else self.nothing_dropped

    def shrink(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """s = drop(x) A^T (M, R), and t, which is s with scale and gate."""
        m, a = x.shape[0], self.a
        s, t = x.new_empty(m, self.rank), x.new_empty(m, _padded(self.rank))
        _kernels.shrink(
            self.bf16, m, x.shape[1], self.rank, x.data_ptr(), x.stride(0), a.data_ptr(), a.stride(0), s.data_ptr(),
            t.data_ptr(), t.stride(0), self.factors, self.segments, self.dropout, self.stream,
        )  # fmt: skip
        return s, t

    def apply_scale_and_gate(self, s: Tensor) -> Tensor:
        t = s.new_empty(s.shape[0], _padded(self.rank))
        _kernels.apply_scale_and_gate(
            self.bf16, s.shape[0], self.rank, s.data_ptr(), t.data_ptr(), t.stride(0), self.factors,
            self.segments, self.stream,
        )  # fmt: skip
        return t

    def forward(self, x: Tensor, w: Tensor, w_scale: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """y and s."""

        def run(config: _GemmConfig) -> tuple[Tensor, Tensor]:
            if config.inside:
                s, t = x.new_empty(len(x), self.rank), x.new_empty(len(x), _padded(self.rank))
                blocks = sum(-(-rows // 128) for rows in self.rows_of_experts or (len(x),))
                ready = x.new_zeros(blocks, dtype=torch.int32)
                inside = _kernels.FusedShrink(self.a.data_ptr(), self.a.stride(0), s.data_ptr(), self.factors, ready.data_ptr())
                return self._gemm(x, w, None, bias, t, self.b, False, False, config.tile, inside), s
            s, t = self.shrink(x)
            return self._gemm(x, w, w_scale, bias, t, self.b, False, False, config.tile, _no_fused_shrink()), s

        # Neither dropout nor an int8 W is for the tiles that can make S; and dropout is S's affair alone.
        inside = not self.has_dropout and w_scale is None
        return run(self._choose("forward", x, len(w), w_scale, has_dropout=False, inside=inside, run=run))

    def dx(self, dy: Tensor, w: Tensor, w_scale: Tensor | None, ds: Tensor, f: Tensor) -> Tensor:
        """dy w + ds f; an int8 w is given as its transpose, and f with it."""
        transposed = w_scale is None

        def run(config: _GemmConfig) -> Tensor:
            return self._gemm(dy, w, w_scale, None, ds, f, transposed, self.has_dropout, config.tile, _no_fused_shrink())

        n = w.shape[1] if transposed else len(w)
        return run(self._choose("dx", dy, n, w_scale, has_dropout=self.has_dropout, inside=False, run=run))

    def _choose(
        self, name: str, x: Tensor, n: int, w_scale: Tensor | None, has_dropout: bool, inside: bool, run: Callable[[_GemmConfig], object]
    ) -> _GemmConfig:
        """How to run a GEMM: measured once for each shape, with rows up to a power of two. `run` runs the whole of it."""
        (rows, k), int8 = x.shape, w_scale is not None
        m = 1 << (rows - 1).bit_length()
        full_tiles = all(own == 0 or own >= 128 for own in self.rows_of_experts or ())
        segmented = self.rows_of_experts is not None
        shape = (name, "bf16" if self.bf16 else "fp16", m, n, k, self.rank, int8, has_dropout, inside, segmented, full_tiles)
        if (x.device, shape) not in _kept:
            configs = {str(config): config for config in _gemm_configs(self.chip, m, n, k, self.rank, int8, has_dropout, full_tiles, inside)}
            names = list(configs)
            if not _EMULATED:  # there is no time to measure
                names = [_choices(capability(x.device)).choose(" ".join(map(str, shape)), names, lambda config: run(configs[config]))]
            _kept[x.device, shape] = configs[names[0]]
        return _kept[x.device, shape]

    def _gemm(
        self, x: Tensor, w: Tensor, w_scale: Tensor | None, bias: Tensor | None, t: Tensor, f: Tensor, transposed: bool,
        has_dropout: bool, tile: int, inside: object,
    ) -> Tensor:  # fmt: skip
        """x w^T + t f^T + bias, or `transposed`: x w + t f. `has_dropout`: dropout masks t f."""
        (m, k), n = x.shape, w.shape[1] if transposed else w.shape[0]
        y = x.new_empty(m, n)
        _kernels.gemm(
            self.bf16, m, n, k, self.rank, x.data_ptr(), x.stride(0), w.data_ptr(), w.stride(0), _address(w_scale),
            _address(bias), t.data_ptr(), t.stride(0), f.data_ptr(), f.stride(0), y.data_ptr(), transposed,
            self.dropout if has_dropout else self.nothing_dropped, self.segments, inside, tile, self.chip, self.stream,
        )  # fmt: skip
        return y

    def lora_grad_partials(
        self, z: Tensor, t: Tensor | None, b: Tensor | None, has_dropout: bool
    ) -> tuple[list[Tensor] | None, Tensor | None]:
        """One pass over z (M, C): the parts of drop(z)^T t (splits, C, R) of each expert, and those of z b (blocks, M, R)."""
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
            self.dropout if has_dropout else self.nothing_dropped, self.stream,
        )  # fmt: skip
        if g is None:
            return None, u
        return list(g.split(counts)) if self.rows_of_experts else [g] * len(self.layout.starts), u

    def finalize_row_grads(self, u: Tensor, s: Tensor | None, dgate: Tensor | None, like: Tensor) -> Tensor:
        """dS (M, R), in the dtype of `like`, from the parts of U; fills `dgate` (M, E) if it is given."""
        parts, m, _ = u.shape
        ds = like.new_empty(m, _padded(self.rank))
        _kernels.finalize_row_grads(
            self.bf16, m, self.rank, len(self.layout.starts), parts, u.data_ptr(), _address(s), ds.data_ptr(),
            ds.stride(0), _address(dgate), self.factors, self.segments, self.stream,
        )  # fmt: skip
        return ds

    def reduce_partials(self, g: Tensor, out: Tensor, first: int) -> None:
        """out (C, r) = the ordered sum over the parts of g (parts, C, R), its columns from `first` on."""
        parts, c, _ = g.shape
        _kernels.reduce_partials(
            self.bf16, c, self.rank, parts, first, out.shape[1], g.data_ptr(), out.data_ptr(), out.stride(0),
            out.stride(1), self.stream,
        )  # fmt: skip


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora) -> tuple[Tensor, Tensor]:
    if not _in_kernels(x, weight.shape[0], lora) or weight.dtype != x.dtype:
        return other(x).forward(x, weight, bias, lora)
    return _forward(x, weight, None, bias, lora)


def frozen_forward(x: Tensor, frozen: Frozen, bias: Tensor | None, lora: Lora) -> tuple[Tensor, Tensor]:
    """`forward` on an int8 weight, made wide where a tile is multiplied; x is not quantized."""
    if not _in_kernels(x, frozen.n, lora) or frozen.data.dtype != torch.int8 or frozen.k % 16:
        return other(x).frozen_forward(x, frozen, bias, lora)
    return _forward(x, frozen.data, frozen.scale, bias, lora)


def _forward(
    x: Tensor, weight: Tensor, w_scale: Tensor | None, bias: Tensor | None, lora: Lora
) -> tuple[Tensor, Tensor]:
    rows, weight = _rows(x), _rows(weight)
    call = _Call(x, lora)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    y, s = call.forward(rows, weight, w_scale, bias)
    return y.view(*x.shape[:-1], weight.shape[0]), s


def backward(dy: Tensor, x: Tensor | None, weight: Tensor, lora: Lora, s: Tensor | None, needs: Needs) -> Gradients:
    if not _in_kernels(dy, weight.shape[1], lora) or weight.dtype != dy.dtype:
        return other(dy).backward(dy, x, weight, lora, s, needs)
    return _backward(dy, x, weight, None, lora, s, needs)


def frozen_backward(
    dy: Tensor, x: Tensor | None, frozen: Frozen, lora: Lora, s: Tensor | None, needs: Needs
) -> Gradients:
    """`backward` on the int8 transpose (K, N) of the weight."""
    int8 = not needs.dx or (frozen.data.dtype == torch.int8 and frozen.n % 16 == 0)
    if not _in_kernels(dy, frozen.k, lora) or not int8:
        return other(dy).frozen_backward(dy, x, frozen, lora, s, needs)
    return _backward(dy, x, frozen.data, frozen.scale, lora, s, needs)


def _backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, w_scale: Tensor | None, lora: Lora, s: Tensor | None,
    needs: Needs,
) -> Gradients:  # fmt: skip
    # `weight` is (N, K), or (K, N) and int8 with one scale a row.
    rows = _rows(dy)
    call = _Call(dy, lora)
    starts = call.layout.starts
    s = None if s is None else s.contiguous()
    dgate = rows.new_empty(len(rows), lora.gate.shape[-1], dtype=torch.float32) if needs.dgate else None
    da, db = empty_gradients(lora, needs)

    # One pass over dy: dB from S with scale and gate, and U = dy B, from which dS and the gate's gradient come.
    needs_u = needs.dx or needs.dgate or any(needs.da)
    t = call.apply_scale_and_gate(s) if any(needs.db) else None
    parts, u = call.lora_grad_partials(rows, t, call.b if needs_u else None, has_dropout=False)
    ds = call.finalize_row_grads(u, s, dgate, rows) if needs_u else None
    for e, (out, first) in enumerate(zip(db, starts)):
        if out is not None:
            call.reduce_partials(parts[e], out, first)

    if any(needs.da):
        parts, _ = call.lora_grad_partials(_rows(x), ds, None, has_dropout=call.has_dropout)
        for e, (out, first) in enumerate(zip(da, starts)):
            if out is not None:
                call.reduce_partials(parts[e], out.t(), first)

    dx = None
    if needs.dx:
        # An int8 weight is its own transpose, quantized apart, so its ranks lie along it too.
        f, rank = call.a, len(call.a)
        if w_scale is not None:
            f = _rows(F.pad(f.t(), (0, _padded(rank) - rank)))
        dx = call.dx(rows, _rows(weight), w_scale, ds, f)
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    return dx, None if dgate is None else dgate.view(lora.gate.shape).to(lora.gate.dtype), da, db
