"""The expert linear layer in plain PyTorch operators: any device, any floating dtype, the fall-back of all others.

The two functions here are what a backend is. Shapes: x (..., K), weight (N, K), lora_a[e] (r_e, K),
lora_b[e] (N, r_e), scale (E,), gate x.shape[:-1] + (E,) or None; only the experts that are applied are given.
`s` is x A^T of all experts side by side, (M, sum of r_e) with M the number of rows of x, without scale and gate.

With `segments`, E numbers of rows that add up to M, the rows of a segment take its expert alone: the gate is then
x.shape[:-1] + (1,), and s (M, largest r_e) holds for each row what its own expert makes of it. An expert of rank 0 is
one that is not applied, where it has rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import dequantise
from ..reference import dropout


def unavailable() -> str | None:
    return None


def supports(x: Tensor) -> bool:
    return True


def spans(segments: Sequence[int] | None, experts: int) -> list[slice | None]:
    """The rows that take each expert: all of them (None), or one segment after the other."""
    if segments is None:
        return [None] * experts
    return [slice(end - count, end) for count, end in zip(segments, accumulate(segments))]


def _rows(tensor: Tensor, own: slice | None) -> Tensor:
    return tensor if own is None else tensor[own]


def gate_rows(gate: Tensor | None, experts: int, segments: Sequence[int] | None) -> Tensor | None:
    """The gate as (M, E); in segments all columns are the one there is."""
    if gate is None:
        return None
    return gate.reshape(-1, experts) if segments is None else gate.reshape(-1, 1).expand(-1, experts)


def _factor(scale: list[float] | Tensor, gate: Tensor | None, expert: int, own: slice | None) -> float | Tensor:
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


def parts_of(s: Tensor, ranks: Sequence[int], segments: Sequence[int] | None) -> list[Tensor]:
    """What `side_by_side` put together."""
    if segments is None:
        return list(s.split(list(ranks), dim=1))
    return [part[:, :rank] for part, rank in zip(s.split(list(segments)), ranks)]


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
    segments: Sequence[int] | None,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Returns y, of shape x.shape[:-1] + (N,), and s."""
    rows = x.reshape(-1, x.shape[-1])
    gates = gate_rows(gate, len(lora_a), segments)
    scales = _scales(scale)
    y = F.linear(rows, weight, bias)
    dropped = dropout(rows, dropout_p, seed).to(lora_a[0].dtype)
    owns = spans(segments, len(lora_a))
    parts = [_rows(dropped, own) @ a.t() for own, a in zip(owns, lora_a)]
    for e, (own, s, b) in enumerate(zip(owns, parts, lora_b)):
        _add_product(_rows(y, own), _factor(scales, gates, e, own), s, b.t())
    return y.view(*x.shape[:-1], weight.shape[0]), side_by_side(parts, segments)


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
    """Returns dx, dgate, [dA_e], [dB_e], with None for what is not needed.

    `x` may be None if no dA is needed, `s` if neither dgate nor any dB is.
    """
    experts = len(lora_a)
    dtype = lora_a[0].dtype
    low = dy.reshape(-1, weight.shape[0])
    high = low.to(dtype)
    gates = gate_rows(gate, experts, segments)
    scales = _scales(scale)
    parts = None if s is None else parts_of(s, [a.shape[0] for a in lora_a], segments)
    dropped = dropout(x.reshape(-1, x.shape[-1]), dropout_p, seed).to(dtype) if any(needs_da) else None
    dx = low @ weight if needs_dx else None
    # With dropout the LoRA part of dx is masked, so it is summed up apart.
    dx_lora = torch.zeros_like(dx, dtype=dtype) if needs_dx and dropout_p > 0 else dx
    dgate = gate.new_empty(gate.shape).view(-1, gate.shape[-1]) if needs_dgate else None
    da: list[Tensor | None] = [None] * experts
    db: list[Tensor | None] = [None] * experts
    for e, own in enumerate(spans(segments, experts)):
        factor = _factor(scales, gates, e, own)
        if needs_dx or needs_dgate or needs_da[e]:
            u = _rows(high, own) @ lora_b[e]
            if dgate is not None:
                _rows(dgate, own)[:, e if segments is None else 0] = (parts[e] * u).sum(dim=1) * scales[e]
            ds = (u * factor).to(dtype)
            if needs_da[e]:
                da[e] = ds.t() @ _rows(dropped, own)
            if needs_dx:
                _add_product(_rows(dx_lora, own), 1.0, ds, lora_a[e])
        if needs_db[e]:
            db[e] = _rows(high, own).t() @ (parts[e] * factor).to(dtype)
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
    segments: Sequence[int] | None,
    dropout_p: float,
    seed: int,
    run: Callable[..., tuple[Tensor, Tensor]] = forward,
) -> tuple[Tensor, Tensor]:
    """`forward`, or that of another backend, on the data of a QuantisedWeight (N, K), expanded to x's dtype."""
    expanded = dequantise(weight, weight_scale, kind, group, x.shape[-1]).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if not lora_a:
        return F.linear(x, expanded, bias), x.new_empty(x.shape[:-1].numel(), 0)
    return run(x, expanded, bias, lora_a, lora_b, scale, gate, segments, dropout_p, seed)


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
    run: Callable[..., tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]] = backward,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """`backward`, or that of another backend, on what QuantisedWeight.for_dx gave; None where dx is not needed."""
    n = dy.shape[-1]
    expanded = expand_for_dx(weight, weight_scale, kind, group, n, k).to(dy.dtype) if needs_dx else dy.new_empty(n, 0)
    if not lora_a:
        return dy @ expanded, None, [], []
    return run(
        dy, x, expanded, lora_a, lora_b, scale, gate, segments, s, dropout_p, seed, needs_dx, needs_dgate, needs_da,
        needs_db,
    )  # fmt: skip


def expand_for_dx(weight: Tensor, weight_scale: Tensor, kind: str, group: int, n: int, k: int) -> Tensor:
    """The weight (n, k), float32, that dx is computed with."""
    if kind == "int8":
        return dequantise(weight, weight_scale, kind, group, n).t()
    return dequantise(weight, weight_scale, kind, group, k)
