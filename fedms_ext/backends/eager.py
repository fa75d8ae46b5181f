"""The operator in plain PyTorch: any device, any floating dtype. It computes whatever no other backend does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import dropout
from .base import BackwardCall, Call, ForwardCall, Gradients, Lora, Scales, numbers_of, s_dtype

name = "eager"


def unavailable() -> str | None:
    """Return why this backend cannot run here, or None; see `Backend.unavailable`."""
    return None


def supports(call: Call) -> str | None:
    """Return why this backend cannot compute a call, or None; see `Backend.supports`."""
    return None


def prefers(call: Call) -> bool:
    """Tell whether this backend is expected to be the fastest for a call; see `Backend.prefers`."""
    return True


def forward(call: ForwardCall) -> tuple[Tensor, Tensor]:
    """Compute y (..., N) and S, the experts' inner products that the backward pass needs; see `Backend.forward`."""
    x, weight, bias, lora = call
    dense = weight.expanded(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if not lora.a:
        return F.linear(x, dense, bias), x.new_empty(x.shape[:-1].numel(), 0)
    rows = x.reshape(-1, x.shape[-1])
    gates, scales, spans = lora.gate_rows(), _scales(lora.scale), lora.spans()
    y = F.linear(rows, dense, bias)
    dropped = dropout(rows, lora.dropout_p, lora.seed).to(lora.a[0].dtype)
    columns = [_rows(dropped, own) @ a.t() for own, a in zip(spans, lora.a)]
    for e, (own, s, b) in enumerate(zip(spans, columns, lora.b)):
        _add_product(_rows(y, own), _factor(scales, gates, e, own), s, b.t())
    s = side_by_side(columns, lora.segments)
    return y.view(*x.shape[:-1], weight.n), s.to(s_dtype(x, lora.a))


def backward(call: BackwardCall) -> Gradients:
    """Compute the gradients that a call asks for; see `Backend.backward`."""
    dy, x, weight, lora, s, needs = call
    experts = len(lora.a)
    low = dy.reshape(-1, weight.n)
    dx = low @ weight.expanded_for_dx(dy.dtype) if needs.dx else None
    if not lora.a:
        return None if dx is None else dx.view(*dy.shape[:-1], weight.k), None, [], []
    dtype = lora.a[0].dtype
    high = low.to(dtype)
    gates, scales = lora.gate_rows(), _scales(lora.scale)
    columns = None if s is None else columns_of(s.to(dtype), lora)
    dropped = dropout(x.reshape(-1, x.shape[-1]), lora.dropout_p, lora.seed).to(dtype) if any(needs.da) else None
    # With dropout the LoRA part of dx is masked, so it is summed up apart.
    dx_lora = torch.zeros_like(dx, dtype=dtype) if needs.dx and lora.dropout_p > 0 else dx
    dgate = lora.gate.new_empty(lora.gate.shape).view(-1, lora.gate.shape[-1]) if needs.dgate else None
    da: list[Tensor | None] = [None] * experts
    db: list[Tensor | None] = [None] * experts
    for e, own in enumerate(lora.spans()):
        factor = _factor(scales, gates, e, own)
        if needs.dx or needs.dgate or needs.da[e]:
            u = _rows(high, own) @ lora.b[e]
            if dgate is not None:
                column = e if lora.segments is None else 0
                _rows(dgate, own)[:, column] = (columns[e] * u).sum(dim=1) * scales[e]
            ds = (u * factor).to(dtype)
            if needs.da[e]:
                da[e] = ds.t() @ _rows(dropped, own)
            if needs.dx:
                _add_product(_rows(dx_lora, own), 1.0, ds, lora.a[e])
        if needs.db[e]:
            db[e] = _rows(high, own).t() @ (columns[e] * factor).to(dtype)
    if dx_lora is not dx:
        dx += dropout(dx_lora, lora.dropout_p, lora.seed)
    if dx is not None:
        dx = dx.view(*dy.shape[:-1], weight.k)
    return dx, None if dgate is None else dgate.view(lora.gate.shape), da, db


def side_by_side(columns: list[Tensor], segments: Sequence[int] | None) -> Tensor:
    """Return S from what every expert makes of its rows, (rows, r_e) each."""
    if len(columns) == 1:
        return columns[0]
    if segments is None:
        return torch.cat(columns, dim=1)
    width = max([own.shape[1] for own in columns])
    return torch.cat([F.pad(own, (0, width - own.shape[1])) for own in columns])


def columns_of(s: Tensor, lora: Lora) -> list[Tensor]:
    """Return what `side_by_side` put together."""
    if lora.segments is None:
        return list(s.split(lora.ranks, dim=1))
    return [own[:, :rank] for own, rank in zip(s.split(list(lora.segments)), lora.ranks)]


def _rows(tensor: Tensor, own: slice | None) -> Tensor:
    return tensor if own is None else tensor[own]


def _scales(scale: Scales | Tensor) -> Sequence[float] | Tensor:
    # As numbers, for cheaper operators, unless they lie on another device: reading them would wait for it.
    return numbers_of(scale) if not isinstance(scale, Tensor) or scale.device.type == "cpu" else scale


def _factor(scale: Sequence[float] | Tensor, gate: Tensor | None, expert: int, own: slice | None) -> float | Tensor:
    """Return scale_e, times column e of the gate if there is one: a number, a 0-d tensor or (rows, 1)."""
    return scale[expert] if gate is None else _rows(gate, own)[:, expert : expert + 1] * scale[expert]


def _add_product(y: Tensor, factor: float | Tensor, s: Tensor, b: Tensor) -> None:
    """Add factor * s b to y in place; y may have a lower precision than s and b."""
    if isinstance(factor, Tensor):
        s, factor = (s * factor).to(b.dtype), 1.0
    if y.dtype == s.dtype:
        y.addmm_(s, b, alpha=factor)
    else:
        y.add_(s @ b, alpha=factor)
