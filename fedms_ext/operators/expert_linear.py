"""The function `expert_linear`. Plain calls take one C++ call for each pass; all others use the operator and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..backends.base import FLOATING, Scales
from .arguments import (
    Quantized,
    applied,
    check,
    check_dropout,
    check_dtypes,
    expanded_gate,
    settled_scale,
    under_autocast,
)
from .definition import gradients, run_forward
from .dispatch import call, is_transformed
from .plain import plain_linear


class _ExpertLinear(torch.autograd.Function):
    """The operator with gradients for x, the gate, every A and every B: those that `needs` has True for, in this order."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        weight: tuple[Tensor, Tensor | None, str, int],
        for_dx: tuple[Tensor | None, Tensor | None],
        bias: Tensor | None,
        scale: Scales | Tensor,
        rest: tuple[Sequence[int] | None, float, int, Tensor | None],
        needs: tuple[bool, ...],
        *lora: Tensor,
    ) -> Tensor:
        experts = len(lora) // 2
        y, s = call(
            torch.ops.fedms_ext.expert_linear, run_forward, x, *weight, bias, lora[:experts], lora[experts:], scale, gate, *rest
        )
        # What the gradients use is kept, and nothing else.
        keep_x = any(needs[2 : 2 + experts])
        keep_s = needs[1] or any(needs[2 + experts :])
        segments, dropout_p, seed, seed_tensor = rest
        ctx.numbers, scale_tensor = (None, scale) if isinstance(scale, Tensor) else (scale, None)
        ctx.save_for_backward(
            x if keep_x else None, s if keep_s else None, gate, *for_dx, scale_tensor, seed_tensor, *lora
        )
        ctx.k, ctx.kind, ctx.group, ctx.segments = x.shape[-1], weight[2], weight[3], segments
        ctx.dropout, ctx.needs = (dropout_p, seed), needs
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, s, gate, weight, weight_scale, scale, seed_tensor, *lora = ctx.saved_tensors
        scale = ctx.numbers if scale is None else scale
        dropout_p, seed = ctx.dropout
        dx, dgate, *dlora = gradients(
            dy, x, ctx.k, weight, weight_scale, ctx.kind, ctx.group, lora, scale, gate, ctx.segments, dropout_p, seed, seed_tensor,
            s, ctx.needs,
        )  # fmt: skip
        return dx, dgate, *[None] * 6, *dlora


def expert_linear(
    x: Tensor,
    weight: Tensor | Quantized,
    bias: Tensor | None,
    lora_a: Sequence[Tensor] = (),
    lora_b: Sequence[Tensor] = (),
    scale: Sequence[float] | Tensor = (),
    gate: Tensor | None = None,
    active: Sequence[bool] | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    segments: Sequence[int] | None = None,
) -> Tensor:
    """Compute a frozen linear layer with any number of LoRA experts, each weighted by a gate row by row.

        y = x W^T + b + sum over the active experts e of scale_e * gate_e * (dropout(x) A_e^T) B_e^T

    Differentiating a gradient again raises a RuntimeError; `fedms_ext.reference.expert_linear` supports it. Under torch.autocast
    all tensors except float64 ones are first converted to its dtype, as in F.linear; with a quantized weight only x is converted.
    Inputs are not checked for NaN.

    Args:
        x: (..., K), any floating dtype.
        weight: (N, K) in the dtype of x, or a `QuantizedWeight` that stands for (N, K). It is frozen and never gets a gradient.
            With int8 on a CPU x is quantized too for this product; see `reference.frozen_linear`.
        bias: (N,) or None, also frozen; with a floating weight it has the dtype of x.
        lora_a: E tensors (r_e, K), r_e >= 1; the ranks may differ.
        lora_b: E tensors (N, r_e). All A and B have the same dtype, which may be wider than that of x, and their gradients have it,
            too. The LoRA branch is computed in that dtype. Only the GPU kernels, which run for x in bf16 or fp16, round A and B to
            the dtype of x for the products and add up in float32. S = dropout(x) A^T is kept for the backward pass in the dtype of
            x if that has 16 bits, otherwise in that of A.
        scale: E numbers or a tensor (E,); alpha / r in LoRA. It gets no gradient. The values of a tensor on the device of x or on
            the CPU may change without a recompilation of a compiled model.
        gate: A weight for each row and expert, broadcastable to x.shape[:-1] + (E,), floating; None means 1.
        active: E bools, which experts are applied; None means all. An expert that is not applied costs nothing: its A and B get no
            gradient (None), and its column of the gate gets zeros. If no expert is active on a floating weight, the result is
            F.linear(x, weight, bias), bit for bit, and does not depend on the gate.
        dropout_p: 0 <= p < 1, the dropout on x in the LoRA branch, rounded to a multiple of 2**-16. The experts share one mask.
        seed: Seed of the mask, required if dropout_p > 0. A number, 0 <= seed < 2**63, or an int64 tensor with one element on the
            device of x, which is read when the kernels run, so that each replay of a CUDA graph can have another mask. Which values
            a seed drops is told by `fedms_ext.philox_mask`, and fixed by the version of the masks, `fedms_ext.reference.MASK_VERSION`:
            it is 2, with 16 random bits a value and 7 rounds of Philox.
        segments: E numbers of rows whose sum is the number of rows of x: only expert 0 applies to the first segments[0] rows, only
            expert 1 to the next segments[1] rows, and so on; a number may be 0. No expert applies to the rows of an expert that is
            not active. The gate is then one weight for each row, that of its own expert, and broadcasts to x.shape[:-1] + (1,). No
            expert is computed for the rows of another.

    Returns:
        y, (..., N), in the dtype of x. Gradients flow to x, the gate and every A and B.

    Raises:
        TypeError: If a type or dtype is wrong.
        ValueError: If a shape, device or value is wrong.
    """
    if active is None:
        y = plain_linear(x, weight, bias, lora_a, lora_b, scale, gate, dropout_p, seed, segments)
        if y is not None:
            return y
    own, n, k = _operands(weight)
    check(x, own[0], n, k, bias, lora_a, lora_b, scale, active, segments)
    if dropout_p or seed is not None:
        check_dropout(dropout_p, seed, x)
    if gate is not None:
        gate = expanded_gate(gate, x, len(lora_a), segments)
    bias = bias.detach() if bias is not None and bias.requires_grad else bias
    lora_a, lora_b, scale, gate, segments = applied(lora_a, lora_b, scale, gate, active, segments)
    experts, is_floating = len(lora_a), own[1] is None
    if is_floating and experts == 0:
        return F.linear(x, own[0], bias)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):      # torch knows no autocast of meta tensors
        if is_floating:
            x, data, bias, *lora = under_autocast(x, own[0], bias, *lora_a, *lora_b)
            own, lora_a, lora_b = (data, *own[1:]), lora[:experts], lora[experts:]
        else:
            (x,) = under_autocast(x)
    check_dtypes(x, own[0] if is_floating else None, bias, lora_a, lora_b)
    if is_transformed():
        return _by_pytorch(x, weight, bias, lora_a, lora_b, scale, gate, dropout_p, seed, segments)
    number, seed_tensor = (0, seed) if isinstance(seed, Tensor) else (seed or 0, None)
    scale, rest = settled_scale(scale), (segments, dropout_p, number, seed_tensor)
    needs: tuple[bool, ...] = (False,)
    if torch.is_grad_enabled():
        needs = tuple([t is not None and t.requires_grad for t in (x, gate, *lora_a, *lora_b)])
    if True in needs:
        for_dx = (None, None) if not needs[0] else own[:2] if isinstance(weight, Tensor) else weight.for_dx()
        return _ExpertLinear.apply(x, gate, own, for_dx, bias, scale, rest, needs, *lora_a, *lora_b)
    return call(torch.ops.fedms_ext.expert_linear, run_forward, x, *own, bias, lora_a, lora_b, scale, gate, *rest)[0]


_Own = tuple[Tensor, Tensor | None, str, int]


def _operands(weight: Any) -> tuple[_Own, int, int]:
    """Return data, scale, kind and group of a weight for the operator, and N and K.

    Raises:
        TypeError: If it is neither a tensor nor a quantized weight.
        ValueError: If it is a tensor without two dimensions.
    """
    if isinstance(weight, Tensor):
        if weight.dim() != 2:
            raise ValueError(f"weight has the shape {tuple(weight.shape)}, expected (N, K)")
        return (weight.detach() if weight.requires_grad else weight, None, FLOATING, 0), *weight.shape
    try:
        return (*weight.operands, weight.kind, weight.group), *weight.shape
    except AttributeError:
        raise TypeError(f"weight is {type(weight).__name__}, expected a tensor or a fedms_ext.QuantizedWeight") from None


def _by_pytorch(
    x: Tensor, weight: Any, bias: Tensor | None, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scale: Sequence[float] | Tensor, gate: Tensor | None, dropout_p: float, seed: int | Tensor | None,
    segments: Sequence[int] | None,
) -> Tensor:  # fmt: skip
    """Compute the layer by operators of PyTorch's own, which have rules for the transforms of `torch.func`."""
    dense = weight.detach() if isinstance(weight, Tensor) else weight.dequantize().to(x.dtype)
    y = F.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y + reference.lora_branch(x, lora_a, lora_b, scale, gate, dropout_p, seed, segments) if lora_a else y
