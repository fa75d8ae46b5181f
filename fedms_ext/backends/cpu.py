"""The CPU backend: the kernels of `fedms_ext._C`. With a floating weight the frozen GEMM is left to torch (MKL), and
the LoRA branch runs in fp32; with a quantised one both are one kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
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
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    if not _in_kernels(x, lora_a, lora_b, gate, dropout_p):
        return eager.forward(x, weight, bias, lora_a, lora_b, scale, gate, dropout_p, seed)
    gates = None if gate is None else gate.reshape(-1, len(lora_a))
    y = F.linear(x, weight, bias)
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
            dy, x, weight, lora_a, lora_b, scale, gate, s, dropout_p, seed, needs_dx, needs_dgate, needs_da, needs_db
        )
    gates = None if gate is None else gate.reshape(-1, len(lora_a))
    dx = dy @ weight if needs_dx else None
    dgate = gates.new_empty(gates.shape) if needs_dgate else None
    da = [torch.empty_like(a) if needed else None for a, needed in zip(lora_a, needs_da)]
    db = [torch.empty_like(b) if needed else None for b, needed in zip(lora_b, needs_db)]
    _C.lora_backward(dy, x, lora_a, lora_b, scale.tolist(), gates, s, dropout_p, seed, dx, dgate, da, db)
    return dx, None if dgate is None else dgate.view(gate.shape), da, db


def _plain(tensor: Tensor) -> Tensor:
    """In the form that the kernels take: float32 without gaps. To look first saves 4 us a call at one row."""
    return tensor if _dense(tensor) else tensor.to(torch.float32).contiguous()


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _plain_operands(
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scale: Tensor, gate: Tensor | None
) -> tuple[list[Tensor], list[Tensor], list[float], Tensor | None]:
    gates = gate.to(torch.float32).reshape(-1, len(lora_a)) if gate is not None and lora_a else None
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
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """`reference.frozen_linear` in float32; y has x's dtype, s that of the experts."""
    if kind != "int8":
        return eager.frozen_forward(
            x, weight, weight_scale, kind, group, bias, lora_a, lora_b, scale, gate, dropout_p, seed
        )
    operands = _plain_operands(lora_a, lora_b, scale, gate)
    plain = _plain(x)
    s = plain.new_empty(x.shape[:-1].numel(), sum([a.shape[0] for a in lora_a]))
    y = plain.new_empty(*x.shape[:-1], weight_scale.shape[0])
    _C.int8_forward(
        plain, weight, weight_scale, None if bias is None else _plain(bias), *operands, dropout_p, seed, s, y
    )
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
            dy, x, k, weight, weight_scale, kind, group, lora_a, lora_b, scale, gate, s, dropout_p, seed,
            needs_dx, needs_dgate, needs_da, needs_db,
        )  # fmt: skip
    a, b, scales, gates = _plain_operands(lora_a, lora_b, scale, gate)
    plain = _plain(dy)
    dx = plain.new_empty(*dy.shape[:-1], k) if needs_dx else None
    dgate = plain.new_empty(gates.shape) if needs_dgate else None
    da = [torch.empty_like(t) if needed else None for t, needed in zip(a, needs_da)]
    db = [torch.empty_like(t) if needed else None for t, needed in zip(b, needs_db)]
    _C.int8_backward(
        plain, None if x is None else _plain(x), k, weight, weight_scale, a, b, scales, gates,
        None if s is None else _plain(s), dropout_p, seed, dx, dgate, da, db,
    )  # fmt: skip
    return (
        None if dx is None else dx.to(dy.dtype),
        None if dgate is None else dgate.view(gate.shape).to(gate.dtype),
        [None if grad is None else grad.to(t.dtype) for grad, t in zip(da, lora_a)],
        [None if grad is None else grad.to(t.dtype) for grad, t in zip(db, lora_b)],
    )
