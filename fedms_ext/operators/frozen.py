"""`expert_linear` on a quantized weight, as PyTorch sees it: registration, fakes and autograd (compare `ops.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, reference
from ..backends import eager
from ..backends.base import Frozen, Lora, Needs, Scales
from .expert_linear import _library, _without_autocast, applied, call, check, fake_s, given, settled, split_scale, transforms

if TYPE_CHECKING:
    from ..nn.quantized_weight import QuantizedWeight

# `weight` and `weight_scale` are the data and the scale of a QuantizedWeight (N, K) of the `kind` and the `group`, and
# those of the backward pass what its `for_dx` gives.
_library.define(
    "frozen_linear(Tensor x, Tensor weight, Tensor weight_scale, str kind, int group, Tensor? bias, Tensor[] lora_a, "
    "Tensor[] lora_b, Tensor scale, Tensor? gate, SymInt[]? segments, float dropout_p, SymInt seed) "
    "-> (Tensor y, Tensor s)"
)
_library.define(
    "frozen_linear_backward(Tensor dy, Tensor? x, SymInt k, Tensor? weight, Tensor? weight_scale, str kind, "
    "int group, Tensor[] lora_a, Tensor[] lora_b, Tensor scale, Tensor? gate, SymInt[]? segments, Tensor? s, "
    "float dropout_p, SymInt seed, bool needs_dx, bool needs_dgate, bool[] needs_da, bool[] needs_db) -> Tensor[]"
)


def _backend(x: Tensor) -> ModuleType:
    chosen = backends.choose(x)
    return chosen if hasattr(chosen, "frozen_forward") else eager


@_without_autocast
def _forward(
    x: Tensor, weight: Tensor, weight_scale: Tensor, kind: str, group: int, bias: Tensor | None, *lora: Any
) -> tuple[Tensor, Tensor]:
    frozen = Frozen(weight, weight_scale, kind, group, weight_scale.shape[0], x.shape[-1])
    return _backend(x).frozen_forward(x, frozen, bias, Lora(*lora))


@_without_autocast
def _backward(
    dy: Tensor, x: Tensor | None, k: int, weight: Tensor | None, weight_scale: Tensor | None, kind: str, group: int,
    lora_a: list[Tensor], lora_b: list[Tensor], scale: Tensor, gate: Tensor | None, segments: Sequence[int] | None,
    s: Tensor | None, dropout_p: float, seed: int, *needs: Any,
) -> list[Tensor]:  # fmt: skip
    frozen = Frozen(weight, weight_scale, kind, group, dy.shape[-1], k)
    lora = Lora(lora_a, lora_b, scale, gate, segments, dropout_p, seed)
    return given(_backend(dy).frozen_backward(dy, x, frozen, lora, s, Needs(*needs)))


_library.impl("frozen_linear", _forward, "CompositeExplicitAutograd")
_library.impl("frozen_linear_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fedms_ext::frozen_linear")
def _(x, weight, weight_scale, kind, group, bias, lora_a, lora_b, scale, gate, segments, dropout_p, seed):
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0])), fake_s(x, lora_a, segments)


@torch.library.register_fake("fedms_ext::frozen_linear_backward")
def _(
    dy, x, k, weight, weight_scale, kind, group, lora_a, lora_b, scale, gate, segments, s, dropout_p, seed, needs_dx,
    needs_dgate, needs_da, needs_db,
):  # fmt: skip
    gradients = [dy.new_empty((*dy.shape[:-1], k))] if needs_dx else []
    if needs_dgate:
        gradients.append(gate.new_empty(gate.shape))
    gradients += [a.new_empty(a.shape) for a, needed in zip(lora_a, needs_da) if needed]
    gradients += [b.new_empty(b.shape) for b, needed in zip(lora_b, needs_db) if needed]
    return gradients


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        weight: Tensor,
        weight_scale: Tensor,
        for_dx: tuple[Tensor | None, Tensor | None],
        kind: str,
        group: int,
        bias: Tensor | None,
        scale: Scales | Tensor,
        segments: Sequence[int] | None,
        dropout_p: float,
        seed: int,
        needs: tuple[bool, ...],
        *lora: Tensor,
    ) -> Tensor:
        experts = len(lora) // 2
        y, s = call(
            torch.ops.fedms_ext.frozen_linear, _forward, x, weight, weight_scale, kind, group, bias, lora[:experts],
            lora[experts:], scale, gate, segments, dropout_p, seed,
        )  # fmt: skip
        # `needs` is for x, the gate, every A, every B. Kept is what its gradients use and nothing else.
        keep_x = any(needs[2 : 2 + experts])
        keep_s = needs[1] or any(needs[2 + experts :])
        ctx.numbers, tensor = split_scale(scale)
        ctx.save_for_backward(x if keep_x else None, s if keep_s else None, gate, *for_dx, tensor, *lora)
        ctx.k, ctx.kind, ctx.group, ctx.segments = x.shape[-1], kind, group, segments
        ctx.dropout_p, ctx.seed, ctx.needs = dropout_p, seed, needs
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, s, gate, weight, weight_scale, scale, *lora = ctx.saved_tensors
        scale = ctx.numbers if scale is None else scale
        experts = len(lora) // 2
        needs = ctx.needs
        found = iter(
            call(
                torch.ops.fedms_ext.frozen_linear_backward, _backward, dy, x, ctx.k, weight, weight_scale, ctx.kind,
                ctx.group, lora[:experts], lora[experts:], scale, gate, ctx.segments, s, ctx.dropout_p, ctx.seed, needs[0],
                needs[1], needs[2 : 2 + experts], needs[2 + experts :],
            )
        )  # fmt: skip
        dx, dgate, *dlora = [next(found) if needed else None for needed in needs]
        return dx, dgate, *[None] * 11, *dlora


def frozen_linear(
    x: Tensor,
    frozen: QuantizedWeight,
    bias: Tensor | None,
    lora_a: Sequence[Tensor] = (),
    lora_b: Sequence[Tensor] = (),
    scale: Sequence[float] = (),
    gate: Tensor | None = None,
    active: Sequence[bool] | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    segments: Sequence[int] | None = None,
) -> Tensor:
    """`expert_linear` on a quantized weight (N, K).

    x is (..., K), any floating dtype, and y (..., N) has the same. The other arguments are those of `expert_linear`.
    See `reference.frozen_linear` for what is computed on the CPU from int8.

    Raises TypeError for an x that is not floating, ValueError for a wrong shape or device.
    """
    n, k = frozen.shape
    weight, weight_scale = frozen.operands
    check(x, n, k, bias, lora_a, lora_b, scale, active, segments)
    if weight_scale.device != x.device:
        raise ValueError(f"the weight is on {weight_scale.device}, but x is on {x.device}; move one of them")
    if gate is not None:
        gate = gate.expand(*x.shape[:-1], len(lora_a) if segments is None else 1)
    lora_a, lora_b, chosen, gate, segments = applied(lora_a, lora_b, scale, gate, active, segments)
    if not lora_a:
        gate = None
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    factors = settled(chosen)
    if transforms():
        bias = None if bias is None else bias.to(x.dtype)
        y = F.linear(x, frozen.dequantize().to(x.dtype), bias)
        if not lora_a:
            return y
        return y + reference.lora_branch(x, lora_a, lora_b, factors, gate, dropout_p, seed, segments)

    needs: tuple[bool, ...] = (False,)
    if torch.is_grad_enabled():
        needs = tuple(tensor is not None and tensor.requires_grad for tensor in (x, gate, *lora_a, *lora_b))
    if any(needs):
        for_dx = frozen.for_dx() if needs[0] else (None, None)
        return _FrozenLinear.apply(
            x, gate, weight, weight_scale, for_dx, frozen.kind, frozen.group, bias, factors, segments, dropout_p,
            seed, needs, *lora_a, *lora_b,
        )  # fmt: skip
    return call(
        torch.ops.fedms_ext.frozen_linear, _forward, x, weight, weight_scale, frozen.kind, frozen.group, bias, lora_a, lora_b,
        factors, gate, segments, dropout_p, seed,
    )[0]
