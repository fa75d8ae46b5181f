"""The CPU backend: the kernels of `fedms_ext._C`. With a floating weight the frozen GEMM is left to torch (MKL), and
the LoRA branch runs in fp32; with one of 8 or 4 bits both are one kernel. One of 16 bits is made float32 for the GEMM:
few CPUs compute in fp16, and without AMX bf16 is half as fast as fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from ..formats import HALVES
from . import eager

_C.set_tensor_type(Tensor)


def unavailable() -> str | None:
    return None


def supports(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _dense(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous()


# The largest mean rank of the experts at which the kernels are used. The time of a layer in the kernels over that in
# the eager backend, on one thread of a Xeon (AVX-512; AVX2 alike), one expert, forward / forward and backward:
#   M x K -> N            r = 8          r = 48         r = 64         r = 128
#   2048 x 384 -> 384     0.97 / 0.87    1.05 / 1.05    1.05 / 1.08    1.12 / 1.11
#   1576 x 768 -> 3072    0.98 / 1.02    0.98 / 1.01    1.01 / 1.04    1.11 / 1.09
#   64 x 768 -> 768       0.91 / 0.88    0.99 / 0.99    1.01 / 0.99    1.02 / 1.09
#   1 x 768 -> 768        0.90 / 0.84    1.00 / 0.94    1.04 / 0.97    1.11 / 1.08
# With dropout the kernels take 0.3 to 0.8 of the time at any rank (AVX2: up to 0.96): the eager backend computes its
# mask in many steps.
_LARGEST_MEAN_RANK = 48


def _in_kernels(
    x: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], gate: Tensor | None, dropout_p: float
) -> bool:
    return (
        (dropout_p > 0 or sum([a.shape[0] for a in lora_a]) <= _LARGEST_MEAN_RANK * len(lora_a))
        and _dense(x)
        and all(map(_dense, lora_a))
        and all(map(_dense, lora_b))
        and (gate is None or gate.dtype == torch.float32)
    )


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
    if not _in_kernels(x, lora_a, lora_b, gate, dropout_p):
        return eager.forward(x, weight, bias, lora_a, lora_b, scale, gate, segments, dropout_p, seed)
    gates = eager.gate_rows(gate, len(lora_a), segments)
    y = F.linear(x, weight, bias)
    if segments is not None:
        return y, _segments_forward(x, lora_a, lora_b, scale.tolist(), gates, segments, dropout_p, seed, y)
    s = x.new_empty(x.shape[:-1].numel(), sum([a.shape[0] for a in lora_a]))
    _C.lora_forward(x, lora_a, lora_b, scale.tolist(), gates, dropout_p, seed, s, y)
    return y, s


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
    # dy may be expanded from fewer values (the gradient of a sum); the kernels want it written out.
    dy = dy.contiguous()
    if not _in_kernels(dy, lora_a, lora_b, gate, dropout_p) or (x is not None and not _dense(x)):
        return eager.backward(
            dy, x, weight, lora_a, lora_b, scale, gate, segments, s, dropout_p, seed, needs_dx, needs_dgate, needs_da,
            needs_db,
        )  # fmt: skip
    dx = dy @ weight if needs_dx else None
    operands = (lora_a, lora_b, scale.tolist(), eager.gate_rows(gate, len(lora_a), segments))
    dgate, da, db = _gradients(gate, lora_a, lora_b, needs_dgate, needs_da, needs_db)
    if segments is None:
        _C.lora_backward(dy, x, *operands, s, dropout_p, seed, dx, dgate, da, db)
    else:
        _segments_backward(dy, x, *operands, segments, s, dropout_p, seed, dx, dgate, da, db)
    return dx, None if dgate is None else dgate.view(gate.shape), da, db


def _gradients(
    gate: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    needs_dgate: bool,
    needs_da: Sequence[bool],
    needs_db: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Where the gradients go, float32: dgate (M, E), or (M, 1) in segments, and every dA and dB."""
    like = lora_a[0] if lora_a else gate
    return (
        like.new_empty(gate.shape[:-1].numel(), gate.shape[-1]) if needs_dgate else None,
        [torch.empty_like(a) if needed else None for a, needed in zip(lora_a, needs_da)],
        [torch.empty_like(b) if needed else None for b, needed in zip(lora_b, needs_db)],
    )


def _segments_forward(
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Sequence[float],
    gates: Tensor | None,
    segments: Sequence[int],
    dropout_p: float,
    seed: int,
    y: Tensor,
) -> Tensor:
    """Adds the branch of every segment to its rows of y, and returns s."""
    rows, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    parts = [x.new_empty(count, a.shape[0]) for count, a in zip(segments, lora_a)]
    for e, own in enumerate(eager.spans(segments, len(lora_a))):
        if parts[e].numel():
            gate = None if gates is None else gates[own, e : e + 1]
            _C.lora_forward(
                rows[own], [lora_a[e]], [lora_b[e]], [scale[e]], gate, dropout_p, seed, parts[e], y[own], own.start
            )
    return eager.side_by_side(parts, segments)


def _segments_backward(
    dy: Tensor,
    x: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Sequence[float],
    gates: Tensor | None,
    segments: Sequence[int],
    s: Tensor | None,
    dropout_p: float,
    seed: int,
    dx: Tensor | None,
    dgate: Tensor | None,
    da: Sequence[Tensor | None],
    db: Sequence[Tensor | None],
) -> None:
    """What `_C.lora_backward` computes, each segment on its own."""

    def rows(tensor: Tensor | None, own: slice) -> Tensor | None:
        return None if tensor is None else tensor.view(-1, tensor.shape[-1])[own]

    parts = [None] * len(lora_a) if s is None else eager.parts_of(s, [a.shape[0] for a in lora_a], segments)
    for e, own in enumerate(eager.spans(segments, len(lora_a))):
        if lora_a[e].shape[0] == 0:
            if dgate is not None:
                dgate[own] = 0
            continue
        _C.lora_backward(
            rows(dy, own), rows(x, own), [lora_a[e]], [lora_b[e]], [scale[e]],
            None if gates is None else gates[own, e : e + 1], None if parts[e] is None else parts[e].contiguous(),
            dropout_p, seed, rows(dx, own), rows(dgate, own), [da[e]], [db[e]], own.start,
        )  # fmt: skip


_NO_EXPERTS = ((), (), (), None)  # as `_plain_operands` returns them


def _plain(tensor: Tensor) -> Tensor:
    """In the form that the kernels take: float32 without gaps. To look first saves 4 us a call at one row."""
    return tensor if _dense(tensor) else tensor.to(torch.float32).contiguous()


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _plain_operands(
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scale: Tensor, gate: Tensor | None, segments: Sequence[int] | None
) -> tuple[list[Tensor], list[Tensor], list[float], Tensor | None]:
    gates = eager.gate_rows(gate.to(torch.float32), len(lora_a), segments) if gate is not None and lora_a else None
    return [_plain(a) for a in lora_a], [_plain(b) for b in lora_b], scale.tolist(), gates


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
    """`reference.frozen_linear` in float32, on a weight of 4 bits as `reference.groups_as_int8` makes it int8; y has x's
    dtype, s that of the experts."""
    if kind in HALVES:
        return eager.frozen_forward(
            x, weight, weight_scale, kind, group, bias, lora_a, lora_b, scale, gate, segments, dropout_p, seed, forward
        )
    operands = _plain_operands(lora_a, lora_b, scale, gate, segments)
    plain, bias = _plain(x), None if bias is None else _plain(bias)
    y = plain.new_empty(*x.shape[:-1], weight_scale.shape[0])
    fused = operands if segments is None else _NO_EXPERTS
    s = plain.new_empty(x.shape[:-1].numel(), sum([a.shape[0] for a in fused[0]]))
    # A weight of 4 bits has its scale in the packed form.
    _C.int8_forward(plain, weight, weight_scale if kind == "int8" else None, bias, *fused, dropout_p, seed, s, y)
    if segments is not None:
        s = _segments_forward(plain, *operands, segments, dropout_p, seed, y)
    return _as(y, x.dtype), _as(s, lora_a[0].dtype) if lora_a else s


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
    if kind != "int8":
        return eager.frozen_backward(
            dy, x, k, weight, weight_scale, kind, group, lora_a, lora_b, scale, gate, segments, s, dropout_p, seed,
            needs_dx, needs_dgate, needs_da, needs_db, backward,
        )  # fmt: skip
    operands = _plain_operands(lora_a, lora_b, scale, gate, segments)
    plain, x, s = _plain(dy), None if x is None else _plain(x), None if s is None else _plain(s)
    dx = plain.new_empty(*dy.shape[:-1], k) if needs_dx else None
    dgate, da, db = _gradients(gate, *operands[:2], needs_dgate, needs_da, needs_db)
    frozen = (k, weight, weight_scale)
    if segments is None:
        _C.int8_backward(plain, x, *frozen, *operands, s, dropout_p, seed, dx, dgate, da, db)
    else:
        if needs_dx:
            _C.int8_backward(plain, None, *frozen, *_NO_EXPERTS, None, 0.0, 0, dx, None, [], [])
        _segments_backward(plain, x, *operands, segments, s, dropout_p, seed, dx, dgate, da, db)
    return (
        None if dx is None else dx.to(dy.dtype),
        None if dgate is None else dgate.view(gate.shape).to(gate.dtype),
        [None if grad is None else grad.to(t.dtype) for grad, t in zip(da, lora_a)],
        [None if grad is None else grad.to(t.dtype) for grad, t in zip(db, lora_b)],
    )
