"""The CPU backend: the kernels of `fedms_ext._C`. With a floating weight the frozen GEMM is left to torch (MKL), and
the LoRA branch runs in fp32; with one of 8 or 4 bits both are one kernel. One of 16 bits is made float32, for few rows in
the registers: few CPUs compute in fp16, and without AMX bf16 is half as fast as fp32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from ..quantization.formats import HALVES
from ..reference import LEVELS
from . import eager
from .base import Frozen, Gradients, Lora, Needs, empty_gradients
from .cpu_thresholds import LARGEST_RANK

_C.set_tensor_types(Tensor, torch.nn.Parameter)


def unavailable() -> str | None:
    return None


def supports(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _dense(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous()


# Those of the LoRA kernels: AVX-VNNI runs AVX2's, and Arm the portable ones.
_RANKS = {"avxvnni": LARGEST_RANK["avx2"], **LARGEST_RANK}.get(_C.build_info()["isa_used"], LARGEST_RANK["portable"])


@lru_cache(maxsize=4096)
def _largest_ranks(rows: int) -> tuple[int, int]:
    """In a forward and in a backward pass."""
    _, forward, backward = [rule for rule in _RANKS if rule[0] <= max(rows, 1)][-1]
    return forward, backward


def in_kernels(x: Tensor, lora: Lora, backward: bool) -> bool:
    """Whether a call on a floating weight runs in the kernels: where they take the operands, and are faster than the eager
    backend. With dropout they are at any rank: the eager backend computes its mask in many steps."""
    return (
        (lora.dropout_p > 0 or sum(lora.ranks) <= _largest_ranks(x.shape[:-1].numel())[backward] * len(lora.a))
        and _dense(x)
        and all(map(_dense, lora.a))
        and all(map(_dense, lora.b))
        and (lora.gate is None or lora.gate.dtype == torch.float32)
    )


def serves(x: Tensor, lora: Lora, kind: str | None, backward: bool) -> bool:
    """Whether a call on a weight of this kind (None: a floating one) is left neither to the eager backend nor to PyTorch."""
    if kind == "int8" or (kind in LEVELS and not backward):
        return True
    if kind in HALVES and not backward and not lora.a:
        return x.shape[:-1].numel() <= _FEW_ROWS and _dense(x)
    return bool(lora.a) and in_kernels(x.contiguous() if backward else x, lora, backward)


# a, b, scale and the gate of the experts as the kernels take them.
_Experts = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[float], Tensor | None]


def _experts(lora: Lora) -> _Experts:
    return lora.a, lora.b, lora.factors, lora.gate_rows()


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora) -> tuple[Tensor, Tensor]:
    if not in_kernels(x, lora, backward=False):
        return eager.forward(x, weight, bias, lora)
    y = F.linear(x, weight, bias)
    return y, _add_branch(x, lora, y)


def _add_branch(x: Tensor, lora: Lora, y: Tensor) -> Tensor:
    """Adds the LoRA branch to y, and returns s."""
    if lora.segments is not None:
        return _segments_forward(x, lora, _experts(lora), y)
    s = x.new_empty(x.shape[:-1].numel(), lora.rank)
    _C.lora_forward(x, *_experts(lora), lora.dropout_p, lora.seed, s, y)
    return s


def backward(dy: Tensor, x: Tensor | None, weight: Tensor, lora: Lora, s: Tensor | None, needs: Needs) -> Gradients:
    # dy may be expanded from fewer values (the gradient of a sum); the kernels want it written out.
    dy = dy.contiguous()
    if not in_kernels(dy, lora, backward=True) or (x is not None and not _dense(x)):
        return eager.backward(dy, x, weight, lora, s, needs)
    dx = dy @ weight if needs.dx else None
    experts = _experts(lora)
    dgate, da, db = _gradients(lora, experts, needs)
    if lora.segments is None:
        _C.lora_backward(dy, x, *experts, s, lora.dropout_p, lora.seed, dx, dgate, da, db)
    else:
        _segments_backward(dy, x, lora, experts, s, dx, dgate, da, db)
    return dx, None if dgate is None else dgate.view(lora.gate.shape), da, db


def _gradients(
    lora: Lora, experts: _Experts, needs: Needs
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Where the gradients go, float32: dgate (M, E), or (M, 1) in segments, and every dA and dB."""
    a, b, _, gates = experts
    dgate = gates.new_empty(len(gates), lora.gate.shape[-1]) if needs.dgate else None
    return dgate, *empty_gradients(lora._replace(a=a, b=b), needs)


def _segments_forward(x: Tensor, lora: Lora, experts: _Experts, y: Tensor) -> Tensor:
    """Adds the branch of every segment to its rows of y, and returns s."""
    a, b, scale, gates = experts
    rows, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    parts = [x.new_empty(count, rank) for count, rank in zip(lora.segments, lora.ranks)]
    for e, own in enumerate(lora.spans()):
        if parts[e].numel():
            gate = None if gates is None else gates[own, e : e + 1]
            _C.lora_forward(
                rows[own], [a[e]], [b[e]], [scale[e]], gate, lora.dropout_p, lora.seed, parts[e], y[own], own.start
            )
    return eager.side_by_side(parts, lora.segments)


def _segments_backward(
    dy: Tensor, x: Tensor | None, lora: Lora, experts: _Experts, s: Tensor | None, dx: Tensor | None,
    dgate: Tensor | None, da: Sequence[Tensor | None], db: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """What `_C.lora_backward` computes, each segment on its own."""

    def rows(tensor: Tensor | None, own: slice) -> Tensor | None:
        return None if tensor is None else tensor.view(-1, tensor.shape[-1])[own]

    a, b, scale, gates = experts
    parts = [None] * len(a) if s is None else eager.parts_of(s, lora)
    for e, own in enumerate(lora.spans()):
        if lora.ranks[e] == 0:
            if dgate is not None:
                dgate[own] = 0
            continue
        _C.lora_backward(
            rows(dy, own), rows(x, own), [a[e]], [b[e]], [scale[e]], None if gates is None else gates[own, e : e + 1],
            None if parts[e] is None else parts[e].contiguous(), lora.dropout_p, lora.seed, rows(dx, own),
            rows(dgate, own), [da[e]], [db[e]], own.start,
        )  # fmt: skip


_NO_EXPERTS: _Experts = ((), (), (), None)


def _plain(*tensors: Tensor | None) -> list[Tensor | None]:
    """In the form that the kernels take: float32 without gaps. To look first, and at all of them here, saves 8 us a call at
    one row."""
    return [
        tensor if tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous())
        else tensor.to(torch.float32).contiguous()
        for tensor in tensors
    ]  # fmt: skip


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _plain_experts(lora: Lora, pairs: list[Tensor]) -> _Experts:
    gates = lora.gate_rows().to(torch.float32) if lora.gate is not None and lora.a else None
    return pairs[: len(lora.a)], pairs[len(lora.a) :], lora.factors, gates


def frozen_forward(x: Tensor, frozen: Frozen, bias: Tensor | None, lora: Lora) -> tuple[Tensor, Tensor]:
    """`reference.frozen_linear` in float32, on a weight of 4 bits as `reference.groups_as_int8` makes it int8; y has x's
    dtype, s that of the experts."""
    if frozen.kind in HALVES:
        return _half_forward(x, frozen, bias, lora)
    plain, bias, *pairs = _plain(x, bias, *lora.a, *lora.b)
    experts = _plain_experts(lora, pairs)
    y = plain.new_empty(*x.shape[:-1], frozen.n)
    fused = experts if lora.segments is None else _NO_EXPERTS
    s = plain.new_empty(x.shape[:-1].numel(), lora.rank if fused[0] else 0)
    # A weight of 4 bits has its scale in the packed form.
    scale = frozen.scale if frozen.kind == "int8" else None
    _C.int8_forward(plain, frozen.data, scale, bias, *fused, lora.dropout_p, lora.seed, s, y)
    if lora.segments is not None:
        s = _segments_forward(plain, lora, experts, y)
    return _as(y, x.dtype), _as(s, lora.a[0].dtype) if lora.a else s


# With more rows it is no slower to write the weight out as float32 once (test_few_rows of bench/layers/bench_cpu_linear.py).
_FEW_ROWS = 128


def _half_forward(x: Tensor, frozen: Frozen, bias: Tensor | None, lora: Lora) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    if rows > _FEW_ROWS or not _dense(x) or (lora.a and not in_kernels(x, lora, backward=False)):
        return eager.frozen_forward(x, frozen, bias, lora, forward)
    y = x.new_empty(*x.shape[:-1], frozen.n)
    product = _C.fp16_forward if frozen.kind == "fp16" else _C.bf16_forward
    product(x, frozen.data, *_plain(bias), y)
    return y, _add_branch(x, lora, y) if lora.a else x.new_empty(rows, 0)


def frozen_backward(
    dy: Tensor, x: Tensor | None, frozen: Frozen, lora: Lora, s: Tensor | None, needs: Needs
) -> Gradients:
    if frozen.kind != "int8":
        return eager.frozen_backward(dy, x, frozen, lora, s, needs, backward)
    plain, x, s, *pairs = _plain(dy, x, s, *lora.a, *lora.b)
    experts = _plain_experts(lora, pairs)
    dx = plain.new_empty(*dy.shape[:-1], frozen.k) if needs.dx else None
    dgate, da, db = _gradients(lora, experts, needs)
    weight = (frozen.k, frozen.data, frozen.scale)
    if lora.segments is None:
        _C.int8_backward(plain, x, *weight, *experts, s, lora.dropout_p, lora.seed, dx, dgate, da, db)
    else:
        if needs.dx:
            _C.int8_backward(plain, None, *weight, *_NO_EXPERTS, None, 0.0, 0, dx, None, [], [])
        _segments_backward(plain, x, lora, experts, s, dx, dgate, da, db)
    return (
        None if dx is None else dx.to(dy.dtype),
        None if dgate is None else dgate.view(lora.gate.shape).to(lora.gate.dtype),
        [None if grad is None else grad.to(t.dtype) for grad, t in zip(da, lora.a)],
        [None if grad is None else grad.to(t.dtype) for grad, t in zip(db, lora.b)],
    )
