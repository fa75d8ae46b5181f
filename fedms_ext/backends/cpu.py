"""The C++ kernels of `fedms_ext._C`.

With a floating weight the frozen product is left to PyTorch (MKL), and the LoRA branch runs in float32. With a weight of 8 or 4
bits both are one kernel. One of 16 bits is expanded to float32, for few rows in the registers: few CPUs compute in fp16, and
without AMX bf16 is half as fast as fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from ..quantization.formats import EIGHT_BITS, HALVES
from ..reference import LEVELS
from . import eager
from .base import BackwardCall, Call, ForwardCall, Gradients, Lora, Needs, Weight, empty_gradients, s_dtype
from .cpu_thresholds import LARGEST_RANK

name = "cpu"

_C.set_tensor_types(Tensor, torch.nn.Parameter)

# Up to so many rows a weight of 16 bits is expanded in the registers. With more rows it is no slower to write it out as float32
# once (test_few_rows of bench/layers/bench_cpu_linear.py).
_FEW_ROWS = 128


def unavailable() -> str | None:
    """Return why this backend cannot run here, or None; see `Backend.unavailable`."""
    return None


def supports(call: Call) -> str | None:
    """Return why this backend cannot compute a call, or None; see `Backend.supports`."""
    x, lora, kind = call.input, call.lora, call.weight.kind
    if x.device.type != "cpu":
        return f"it computes on the CPU, but its input is on {x.device}"
    is_backward = isinstance(call, BackwardCall)
    if kind in EIGHT_BITS or (kind in LEVELS and not is_backward):
        return None  # these convert their operands to what the kernels take
    if not lora.a:
        return "it has no backward pass without experts on a weight of this format" if is_backward else None
    for tensor in (x, call.x, *lora.a, *lora.b, lora.gate):
        if tensor is not None and tensor.dtype != torch.float32:
            return f"it computes in float32, but x, the gate, an A or a B is {tensor.dtype}"
    return None


def prefers(call: Call) -> bool:
    """Return whether the kernels are faster than PyTorch: on tensors without gaps, and with ranks that are small enough.

    With dropout they are at any rank, since the eager backend computes its mask in many steps.
    """
    x, lora, kind = call.input, call.lora, call.weight.kind
    is_backward = isinstance(call, BackwardCall)
    if kind in EIGHT_BITS or (kind in LEVELS and not is_backward):
        return True
    if not lora.a:
        return x.shape[:-1].numel() <= _FEW_ROWS and _dense(x)
    if not all(map(_dense, (*lora.a, *lora.b))) or not (call.x is None or _dense(call.x)):
        return False
    return prefers_branch(x.shape[:-1].numel(), sum(lora.ranks), len(lora.a), lora.dropout_p, is_backward)


def prefers_branch(rows: int, rank: int, experts: int, dropout_p: float, is_backward: bool) -> bool:
    """Return whether the kernels are faster than PyTorch in the LoRA branch alone. `rank` is the sum of the experts' ranks."""
    return dropout_p > 0 or rank <= _largest_ranks(rows)[is_backward] * experts


def _dense(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous()


# The LoRA kernels of AVX-VNNI are those of AVX2, and of Arm the portable ones.
_RANKS = {"avxvnni": LARGEST_RANK["avx2"], **LARGEST_RANK}.get(_C.build_info()["isa_used"], LARGEST_RANK["portable"])


@lru_cache(maxsize=4096)
def _largest_ranks(rows: int) -> tuple[int, int]:
    """Return the largest mean rank at which the kernels beat PyTorch, in a forward and in a backward pass."""
    _, forward, backward = [rule for rule in _RANKS if rule[0] <= max(rows, 1)][-1]
    return forward, backward


# A, B, scale and the gate of the experts as the kernels take them.
_Experts = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[float], Tensor | None]
_NO_EXPERTS: _Experts = ((), (), (), None)


def forward(call: ForwardCall) -> tuple[Tensor, Tensor]:
    """Compute y (..., N) and S, the experts' inner products that the backward pass needs; see `Backend.forward`."""
    x, weight, bias, lora = call
    if weight.kind in EIGHT_BITS or weight.kind in LEVELS:
        return _packed_forward(call)
    if weight.kind in HALVES and x.shape[:-1].numel() <= _FEW_ROWS and _dense(x):
        y = x.new_empty(*x.shape[:-1], weight.n)
        product = _C.fp16_forward if weight.kind == "fp16" else _C.bf16_forward
        product(x, weight.data, _plain(bias)[0], y)
    else:
        y = F.linear(x, weight.expanded(x.dtype), None if bias is None else bias.to(x.dtype))
    if not lora.a:
        return y, x.new_empty(x.shape[:-1].numel(), 0)
    x, *pairs = _plain(x, *lora.a, *lora.b)
    experts = _plain_experts(lora, pairs)
    if lora.segments is not None:
        return y, _segments_forward(x, lora, experts, y)
    s = x.new_empty(x.shape[:-1].numel(), lora.rank)
    _C.lora_forward(x, *experts, lora.dropout_p, int(lora.seed), s, y)
    return y, s


def backward(call: BackwardCall) -> Gradients:
    """Compute the gradients that a call asks for; see `Backend.backward`."""
    if call.weight.kind in EIGHT_BITS:
        return _int8_backward(call)
    _, _, weight, lora, _, needs = call
    # dy may be expanded from fewer values, as the gradient of a sum is.
    dy, x, s, *pairs = _plain(call.dy, call.x, call.s, *lora.a, *lora.b)
    dx = _input_gradient(dy, weight) if needs.dx else None
    experts = _plain_experts(lora, pairs)
    dgate, da, db = _gradients(lora, experts, needs)
    if lora.segments is None:
        _C.lora_backward(dy, x, *experts, s, lora.dropout_p, int(lora.seed), dx, dgate, da, db)
    else:
        _segments_backward(dy, x, lora, experts, s, dx, dgate, da, db)
    return dx, None if dgate is None else dgate.view(lora.gate.shape), da, db


def _input_gradient(dy: Tensor, weight: Weight) -> Tensor:
    """Return dy W, (..., K)."""
    if weight.kind not in LEVELS or dy.shape[:-1].numel() > _C.nibbles_few_rows():
        return dy @ weight.expanded_for_dx(dy.dtype)
    dx = dy.new_empty(*dy.shape[:-1], weight.k)
    _C.nibbles_input_gradient(dy, weight.data, weight.scale, dx)
    return dx


def _packed_forward(call: ForwardCall) -> tuple[Tensor, Tensor]:
    """Compute `reference.frozen_linear` in float32. A weight of 4 bits is the int8 that `reference.groups_as_int8` makes of it."""
    x, weight, bias, lora = call
    plain, bias, *pairs = _plain(x, bias, *lora.a, *lora.b)
    experts = _plain_experts(lora, pairs)
    y = plain.new_empty(*x.shape[:-1], weight.n)
    fused = experts if lora.segments is None else _NO_EXPERTS
    s = plain.new_empty(x.shape[:-1].numel(), lora.rank if fused[0] else 0)
    scale = weight.scale if weight.kind in EIGHT_BITS else None  # a weight of 4 bits has its scale in the packed form
    _C.int8_forward(plain, weight.data, scale, bias, *fused, lora.dropout_p, int(lora.seed), s, y)
    if lora.segments is not None:
        s = _segments_forward(plain, lora, experts, y)
    return _as(y, x.dtype), _as(s, s_dtype(x, lora.a))


def _int8_backward(call: BackwardCall) -> Gradients:
    dy, x, weight, lora, s, needs = call
    plain, x, s, *pairs = _plain(dy, x, s, *lora.a, *lora.b)
    experts = _plain_experts(lora, pairs)
    dx = plain.new_empty(*dy.shape[:-1], weight.k) if needs.dx else None
    dgate, da, db = _gradients(lora, experts, needs)
    k, data, scale = weight.k, weight.data, weight.scale
    if lora.segments is None:
        _C.int8_backward(plain, x, k, data, scale, *experts, s, lora.dropout_p, int(lora.seed), dx, dgate, da, db)
    else:
        if needs.dx:
            _C.int8_backward(plain, None, k, data, scale, *_NO_EXPERTS, None, 0.0, 0, dx, None, [], [])
        _segments_backward(plain, x, lora, experts, s, dx, dgate, da, db)
    return (
        None if dx is None else dx.to(dy.dtype),
        None if dgate is None else dgate.view(lora.gate.shape).to(lora.gate.dtype),
        [None if grad is None else grad.to(t.dtype) for grad, t in zip(da, lora.a)],
        [None if grad is None else grad.to(t.dtype) for grad, t in zip(db, lora.b)],
    )


def _gradients(
    lora: Lora, experts: _Experts, needs: Needs
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Return where the gradients go, float32: dgate (M, E), or (M, 1) with segments, and every dA and dB."""
    a, b, _, gates = experts
    dgate = gates.new_empty(len(gates), lora.gate.shape[-1]) if needs.dgate else None
    return dgate, *empty_gradients(lora._replace(a=a, b=b), needs)


def _segments_forward(x: Tensor, lora: Lora, experts: _Experts, y: Tensor) -> Tensor:
    """Add the branch of every segment to its rows of y, and return S."""
    a, b, scale, gates = experts
    rows, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    columns = [x.new_empty(count, rank) for count, rank in zip(lora.segments, lora.ranks)]
    for e, own in enumerate(lora.spans()):
        if columns[e].numel():
            gate = None if gates is None else gates[own, e : e + 1]
            _C.lora_forward(rows[own], [a[e]], [b[e]], [scale[e]], gate, lora.dropout_p, int(lora.seed), columns[e], y[own],
                            own.start)  # fmt: skip
    return eager.side_by_side(columns, lora.segments)


def _segments_backward(
    dy: Tensor, x: Tensor | None, lora: Lora, experts: _Experts, s: Tensor | None, dx: Tensor | None,
    dgate: Tensor | None, da: Sequence[Tensor | None], db: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Compute what `_C.lora_backward` does, each segment on its own."""

    def rows(tensor: Tensor | None, own: slice) -> Tensor | None:
        return None if tensor is None else tensor.view(-1, tensor.shape[-1])[own]

    a, b, scale, gates = experts
    columns = [None] * len(a) if s is None else eager.columns_of(s, lora)
    for e, own in enumerate(lora.spans()):
        if lora.ranks[e] == 0:
            if dgate is not None:
                dgate[own] = 0
            continue
        _C.lora_backward(
            rows(dy, own), rows(x, own), [a[e]], [b[e]], [scale[e]], None if gates is None else gates[own, e : e + 1],
            None if columns[e] is None else columns[e].contiguous(), lora.dropout_p, int(lora.seed), rows(dx, own),
            rows(dgate, own), [da[e]], [db[e]], own.start,
        )  # fmt: skip


def _plain(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return tensors as the kernels take them: float32 without gaps. To look first, and at all of them here, saves 8 us a call
    at one row."""
    return [
        tensor if tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous())
        else tensor.to(torch.float32).contiguous()
        for tensor in tensors
    ]  # fmt: skip


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _plain_experts(lora: Lora, pairs: list[Tensor]) -> _Experts:
    gates = lora.gate_rows().to(torch.float32) if lora.gate is not None and lora.a else None
    return pairs[: len(lora.a)], pairs[len(lora.a) :], lora.scale_numbers, gates
