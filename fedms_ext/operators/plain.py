"""The plain case of `expert_linear` on a CPU: one C++ call a pass.

At one row the kernels take a few microseconds, and the general way to them, which checks and converts every operand and goes
through the choice of a backend, takes several times as long. Here a call goes straight to `_C.linear_forward`, which declines
(None) whatever is not plain: a tensor that is not float32, not dense, of a subclass or elsewhere, and shapes that do not fit.
Views whose values are to be negated when they are read are declined here. The caller then takes the general way, which computes
the same, or names what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C, backends
from ..backends.base import FLOATING
from .arguments import Quantized, settled_scale
from .dispatch import call, is_observed
from .expert_linear import expert_linear, run_backward


def plain_linear(
    x: Tensor,
    weight: Tensor | Quantized,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Sequence[float],
    gate: Tensor | None,
    segments: Sequence[int] | None = None,
) -> Tensor | None:
    """Return y = x W^T + bias + the experts' branch, or None where the call is not plain.

    Args:
        x: (..., K).
        weight: (N, K), a tensor or a quantized weight.
        bias: (N,) or None.
        lora_a: (r_e, K) of every applied expert.
        lora_b: (N, r_e) of every applied expert.
        scale: a number for every applied expert.
        gate: (rows, experts), or None; only with an x of two dimensions.
        segments: numbers of rows, one for every applied expert, which takes these rows alone, or None; only without a gate, and
            where nothing needs a gradient.
    """
    if type(x) is not Tensor or is_observed() or not backends.cpu_is_chosen() or torch.is_autocast_enabled("cpu"):
        return None
    inputs = (x, gate, *lora_a, *lora_b)
    needs = [tensor is not None and tensor.requires_grad for tensor in inputs] if torch.is_grad_enabled() else [False]
    if True in needs and (segments is not None or not lora_a):
        return None
    quantized: Any = None if isinstance(weight, Tensor) else weight
    data, data_scale = (weight, None) if isinstance(weight, Tensor) else quantized.operands
    for tensor in (x, bias, gate, *lora_a, *lora_b, data):
        if tensor is not None and tensor.is_neg():
            return None
    found = _C.linear_forward(x, data, data_scale, bias, lora_a, lora_b, scale, gate, segments)
    if found is None:
        return None
    if True in needs:
        if quantized is not None:
            data, data_scale = quantized.for_dx() if needs[0] else (None, None)
        return _Plain.apply((*found, data, data_scale, quantized, scale, needs), *inputs)
    return found[0]


def frozen_linear(x: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor:
    """Return y = x W^T + bias, (..., N), for a quantized weight (N, K), whether the call is plain or not.

    Raises:
        TypeError, ValueError: what `expert_linear` raises.
    """
    fits = x.shape[-1:] == weight.shape[1:]
    y = plain_linear(x, weight, bias, (), (), (), None) if fits else None
    return expert_linear(x, weight, bias) if y is None else y


class _Plain(torch.autograd.Function):
    """Joins what `_C.linear_forward` has computed to autograd's graph."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], x: Tensor, gate: Tensor | None, *pairs: Tensor) -> Tensor:
        y, s, weight, weight_scale, ctx.quantized, ctx.scale, needs = call
        experts = len(pairs) // 2
        keep_x = True in needs[2 : 2 + experts]
        keep_s = needs[1] or True in needs[2 + experts :]
        ctx.save_for_backward(x if keep_x else None, s if keep_s else None, gate, weight, weight_scale, *pairs)
        ctx.needs = needs
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        # Under `create_graph=True` the gradients must raise an error where they are differentiated again.
        return (_gradients_once if torch.is_grad_enabled() else _gradients)(ctx, dy)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the call (None), x, the gate, every A and every B."""
    x, s, gate, weight, weight_scale, *pairs = ctx.saved_tensors
    experts = len(pairs) // 2
    a, b = pairs[:experts], pairs[experts:]
    if not is_observed() and not dy.is_neg():
        found = _C.linear_backward(dy, x, weight, weight_scale, a, b, ctx.scale, gate, s, ctx.needs)
        if found is not None:
            return None, *found
    return None, *_general_gradients(ctx, dy, x, s, gate, weight, weight_scale, a, b)


_gradients_once = torch.autograd.function.once_differentiable(_gradients)


def _general_gradients(
    ctx: Any, dy: Tensor, x: Tensor | None, s: Tensor | None, gate: Tensor | None, weight: Tensor | None,
    weight_scale: Tensor | None, a: list[Tensor], b: list[Tensor],
) -> list[Tensor | None]:  # fmt: skip
    """Return the gradients by the operator, which takes everything: a dy that is expanded from fewer values, say."""
    needs, quantized, k = ctx.needs, ctx.quantized, a[0].shape[1]
    kind, group = (FLOATING, 0) if quantized is None else (quantized.kind, quantized.group)
    found = call(
        torch.ops.fedms_ext.expert_linear_backward, run_backward, dy, x, k, weight, weight_scale, kind, group, a, b,
        settled_scale(ctx.scale), gate, None, 0.0, 0, None, s, needs[0], needs[1], needs[2 : 2 + len(a)], needs[2 + len(a) :],
    )  # fmt: skip
    gradients = iter(found)
    return [next(gradients) if needed else None for needed in needs]
