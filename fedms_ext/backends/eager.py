"""The expert linear layer in plain PyTorch operators: any device, any floating dtype, the fall-back of all others.

The functions here are what a backend is. Shapes: x (..., K), weight (N, K), the others as in operands.py. `s` is x A^T
of all experts side by side, (M, sum of r_e) with M the number of rows of x, without scale and gate; in segments (M,
largest r_e), which holds for each row what its own expert makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantization.formats import dequantize
from ..reference import dropout
from .base import Frozen, Gradients, Lora, Needs, Scales, plain_numbers


def unavailable() -> str | None:
    return None


def supports(x: Tensor) -> bool:
    return True


def _rows(tensor: Tensor, own: slice | None) -> Tensor:
    return tensor if own is None else tensor[own]


def _factor(scale: Sequence[float] | Tensor, gate: Tensor | None, expert: int, own: slice | None) -> float | Tensor:
    """scale_e, times column e of the gate if there is one: a number, a 0-d tensor or (rows, 1)."""
    return scale[expert] if gate is None else _rows(gate, own)[:, expert : expert + 1] * scale[expert]


def side_by_side(parts: list[Tensor], segments: Sequence[int] | None) -> Tensor:
    """s, from what every expert makes of its rows."""
    if len(parts) == 1:
        return parts[0]
    if segments is None:
        return torch.cat(parts, dim=1)
    width = max([part.shape[1] for part in parts])
    return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts])


def parts_of(s: Tensor, lora: Lora) -> list[Tensor]:
    """What `side_by_side` put together."""
    if lora.segments is None:
        return list(s.split(lora.ranks, dim=1))
    return [part[:, :rank] for part, rank in zip(s.split(list(lora.segments)), lora.ranks)]


def _scales(scale: Scales | Tensor) -> Sequence[float] | Tensor:
    # Numbers (cheaper operators), unless they lie on another device: reading them would wait for it.
    return plain_numbers(scale) if not isinstance(scale, Tensor) or scale.device.type == "cpu" else scale


def _add_product(y: Tensor, factor: float | Tensor, s: Tensor, b: Tensor) -> None:
    """y += factor * s b, in place; y may have a lower precision than s and b."""
    if isinstance(factor, Tensor):
        s, factor = (s * factor).to(b.dtype), 1.0
    if y.dtype == s.dtype:
        y.addmm_(s, b, alpha=factor)
    else:
        y.add_(s @ b, alpha=factor)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora) -> tuple[Tensor, Tensor]:
    """Returns y, of shape x.shape[:-1] + (N,), and s."""
    rows = x.reshape(-1, x.shape[-1])
    gates, scales, spans = lora.gate_rows(), _scales(lora.scale), lora.spans()
    y = F.linear(rows, weight, bias)
    dropped = dropout(rows, lora.dropout_p, lora.seed).to(lora.a[0].dtype)
    parts = [_rows(dropped, own) @ a.t() for own, a in zip(spans, lora.a)]
    for e, (own, s, b) in enumerate(zip(spans, parts, lora.b)):
        _add_product(_rows(y, own), _factor(scales, gates, e, own), s, b.t())
    return y.view(*x.shape[:-1], weight.shape[0]), side_by_side(parts, lora.segments)


def backward(dy: Tensor, x: Tensor | None, weight: Tensor, lora: Lora, s: Tensor | None, needs: Needs) -> Gradients:
    """`x` may be None if no dA is needed, `s` if neither dgate nor any dB is."""
    experts = len(lora.a)
    dtype = lora.a[0].dtype
    low = dy.reshape(-1, weight.shape[0])
    high = low.to(dtype)
    gates, scales = lora.gate_rows(), _scales(lora.scale)
    parts = None if s is None else parts_of(s, lora)
    dropped = dropout(x.reshape(-1, x.shape[-1]), lora.dropout_p, lora.seed).to(dtype) if any(needs.da) else None
    dx = low @ weight if needs.dx else None
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
                _rows(dgate, own)[:, column] = (parts[e] * u).sum(dim=1) * scales[e]
            ds = (u * factor).to(dtype)
            if needs.da[e]:
                da[e] = ds.t() @ _rows(dropped, own)
            if needs.dx:
                _add_product(_rows(dx_lora, own), 1.0, ds, lora.a[e])
        if needs.db[e]:
            db[e] = _rows(high, own).t() @ (parts[e] * factor).to(dtype)
    if dx_lora is not dx:
        dx += dropout(dx_lora, lora.dropout_p, lora.seed)
    if dx is not None:
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
    return dx, None if dgate is None else dgate.view(lora.gate.shape), da, db


def frozen_forward(
    x: Tensor, frozen: Frozen, bias: Tensor | None, lora: Lora, run: Callable[..., tuple[Tensor, Tensor]] = forward
) -> tuple[Tensor, Tensor]:
    """`forward`, or that of another backend, on a quantized weight, expanded to x's dtype."""
    expanded = dequantize(frozen.data, frozen.scale, frozen.kind, frozen.group, frozen.k).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if not lora.a:
        return F.linear(x, expanded, bias), x.new_empty(x.shape[:-1].numel(), 0)
    return run(x, expanded, bias, lora)


def frozen_backward(
    dy: Tensor, x: Tensor | None, frozen: Frozen, lora: Lora, s: Tensor | None, needs: Needs,
    run: Callable[..., Gradients] = backward,
) -> Gradients:  # fmt: skip
    """`backward`, or that of another backend, on a quantized weight."""
    expanded = expand_for_dx(*frozen).to(dy.dtype) if needs.dx else dy.new_empty(frozen.n, 0)
    if not lora.a:
        return dy @ expanded, None, [], []
    return run(dy, x, expanded, lora, s, needs)


def expand_for_dx(weight: Tensor, weight_scale: Tensor, kind: str, group: int, n: int, k: int) -> Tensor:
    """The weight (n, k), float32, that dx is computed with."""
    if kind == "int8":
        return dequantize(weight, weight_scale, kind, group, n).t()
    return dequantize(weight, weight_scale, kind, group, k)
