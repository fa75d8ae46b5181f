"""The expert linear layer in plain PyTorch operators: any device, any floating dtype, the fall-back of all others.

The two functions here are what a backend is. Shapes: x (..., K), weight (N, K), lora_a[e] (r_e, K),
lora_b[e] (N, r_e), scale (E,), gate x.shape[:-1] + (E,) or None; only the experts that are applied are given.
`s` is x A^T of all experts side by side, (M, sum of r_e) with M the number of rows of x, without scale and gate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import dequantise
from ..reference import dropout


def unavailable() -> str | None:
    return None


def supports(x: Tensor) -> bool:
    return True


def _factor(scale: list[float] | Tensor, gate: Tensor | None, expert: int) -> float | Tensor:
    """scale_e, times column e of the gate if there is one: a number, a 0-d tensor or (M, 1)."""
    return scale[expert] if gate is None else gate[:, expert : expert + 1] * scale[expert]


def _scales(scale: Tensor) -> list[float] | Tensor:
    # Numbers on the CPU (cheaper operators); on another device they stay there: reading them would wait for it.
    return scale.tolist() if scale.device.type == "cpu" else scale


def _add_product(y: Tensor, factor: float | Tensor, s: Tensor, b: Tensor) -> None:
    """y += factor * s b, in place; y may have a lower precision than s and b."""
    if isinstance(factor, Tensor):
        s, factor = (s * factor).to(b.dtype), 1.0
    if y.dtype == s.dtype:
        y.addmm_(s, b, alpha=factor)
    else:
        y.add_(s @ b, alpha=factor)


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
    """Returns y, of shape x.shape[:-1] + (N,), and s."""
    rows = x.reshape(-1, x.shape[-1])
    gates = None if gate is None else gate.reshape(-1, len(lora_a))
    scales = _scales(scale)
    y = F.linear(rows, weight, bias)
    dropped = dropout(rows, dropout_p, seed).to(lora_a[0].dtype)
    parts = [dropped @ a.t() for a in lora_a]
    for e, (s, b) in enumerate(zip(parts, lora_b)):
        _add_product(y, _factor(scales, gates, e), s, b.t())
    return y.view(*x.shape[:-1], weight.shape[0]), parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


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
    """Returns dx, dgate, [dA_e], [dB_e], with None for what is not needed.

    `x` may be None if no dA is needed, `s` if neither dgate nor any dB is.
    """
    experts = len(lora_a)
    dtype = lora_a[0].dtype
    low = dy.reshape(-1, weight.shape[0])
    high = low.to(dtype)
    gates = None if gate is None else gate.reshape(-1, experts)
    scales = _scales(scale)
    parts = None if s is None else s.split([a.shape[0] for a in lora_a], dim=1)
    dropped = dropout(x.reshape(-1, x.shape[-1]), dropout_p, seed).to(dtype) if any(needs_da) else None
    dx = low @ weight if needs_dx else None
    # With dropout the LoRA part of dx is masked, so it is summed up apart.
    dx_lora = torch.zeros_like(dx, dtype=dtype) if needs_dx and dropout_p > 0 else dx
    dgate = torch.empty_like(gates) if needs_dgate else None
    da: list[Tensor | None] = [None] * experts
    db: list[Tensor | None] = [None] * experts
    for e in range(experts):
        factor = _factor(scales, gates, e)
        if needs_dx or needs_dgate or needs_da[e]:
            u = high @ lora_b[e]
            if dgate is not None:
                dgate[:, e] = (parts[e] * u).sum(dim=1) * scales[e]
            ds = (u * factor).to(dtype)
            if needs_da[e]:
                da[e] = ds.t() @ dropped
            if needs_dx:
                _add_product(dx_lora, 1.0, ds, lora_a[e])
        if needs_db[e]:
            db[e] = high.t() @ (parts[e] * factor).to(dtype)
    if dx_lora is not dx:
        dx += dropout(dx_lora, dropout_p, seed)
    if dx is not None:
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
    return dx, None if dgate is None else dgate.view(gate.shape), da, db


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
    """`forward` on the data of a QuantisedWeight (N, K), expanded to x's dtype."""
    expanded = dequantise(weight, weight_scale, kind, group, x.shape[-1]).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if not lora_a:
        return F.linear(x, expanded, bias), x.new_empty(x.shape[:-1].numel(), 0)
    return forward(x, expanded, bias, lora_a, lora_b, scale, gate, dropout_p, seed)


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
    """`backward` on what QuantisedWeight.for_dx gave; None where dx is not needed."""
    n = dy.shape[-1]
    expanded = expand_for_dx(weight, weight_scale, kind, group, n, k).to(dy.dtype) if needs_dx else dy.new_empty(n, 0)
    if not lora_a:
        return dy @ expanded, None, [], []
    return backward(
        dy, x, expanded, lora_a, lora_b, scale, gate, s, dropout_p, seed, needs_dx, needs_dgate, needs_da, needs_db
    )


def expand_for_dx(weight: Tensor, weight_scale: Tensor, kind: str, group: int, n: int, k: int) -> Tensor:
    """The weight (n, k), float32, that dx is computed with."""
    if kind == "int8":
        return dequantise(weight, weight_scale, kind, group, n).t()
    return dequantise(weight, weight_scale, kind, group, k)
