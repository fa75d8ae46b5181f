"""A shortcut for plain calls of `expert_linear` on a CPU: one C++ call for each pass.

For one row the kernels take a few microseconds. The general path, which checks and converts every operand and chooses a backend,
takes several times as long. Here a call goes directly to `_C.linear_forward`, which returns None if the call is not plain: a
tensor is not float32, not dense, of a subclass, lazily negated or on another device, or shapes do not fit. The caller then takes
the general path, which computes the same result or reports what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C, backends
from ..backends.base import FLOATING
from ..backends.cpu import prefers_branch
from ..backends.device import ON_GPU
from .arguments import Quantized, settled_scale
from .definition import gradients
from .dispatch import is_autocast_enabled, is_observed, untransformed_apply


def plain_linear(
    x: Tensor,
    weight: Tensor | Quantized,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Sequence[float] | Tensor,
    gate: Tensor | None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    segments: Sequence[int] | None = None,
) -> Tensor | None:
    """Return y = x W^T + bias + the LoRA branch, or None if the call is not plain.

    Args:
        x: (..., K).
        weight: (N, K), a tensor or a quantized weight.
        bias: (N,) or None.
        lora_a: (r_e, K) for each applied expert. Without experts, only calls with a quantized weight are plain.
        lora_b: (N, r_e) for each applied expert.
        scale: A number for each applied expert; a tensor is not plain.
        gate: x.shape[:-1] + (experts,), with any strides, or None; a gate that has to be expanded is not plain.
        dropout_p: Probability that a value of x is dropped in the branch.
        seed: Seed of the dropout mask, or None; a tensor is not plain.
        segments: Number of rows of each applied expert, which alone applies to them, or None. Plain only without a gate, without
            dropout and if no gradient is needed.
    """
    if type(x) is not Tensor or getattr(x, ON_GPU) or is_observed() or is_autocast_enabled() or not backends.cpu_is_chosen():
        return None
    if isinstance(weight, Tensor):
        quantized, data, data_scale = None, weight, None
        if not lora_a:
            return None  # the caller calls F.linear
    else:
        quantized = weight
        data, data_scale = getattr(weight, "operands", (None, None))
    if not (isinstance(lora_a, (list, tuple)) and isinstance(lora_b, (list, tuple)) and isinstance(scale, (list, tuple))):
        return None
    if dropout_p if seed is None else type(seed) is not int or not 0 <= seed < 2**63:
        return None
    inputs: tuple[Tensor | None, ...] = ()
    needs: list[bool] = []
    if torch.is_grad_enabled():
        inputs = (x, gate, *lora_a, *lora_b)
        needs = [isinstance(tensor, Tensor) and tensor.requires_grad for tensor in inputs]
    trains = True in needs
    if trains and segments is not None:
        return None
    seed_number = seed if isinstance(seed, int) else 0
    found = _C.linear_forward(
        x, data, data_scale, bias, lora_a, lora_b, scale, gate, dropout_p, seed_number, segments, trains, _product
    )
    if found is None or not trains:
        return None if found is None else found[0]
    if quantized is not None:
        data, data_scale = quantized.for_dx() if needs[0] else (None, None)
    return _apply((*found, data, data_scale), (x.shape[-1], quantized, tuple(scale), dropout_p, seed_number, needs), *inputs)


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, rank: int, experts: int, dropout_p: float
) -> Tensor | None:
    """Return x W^T + bias, to which the kernels add the branch, or None if PyTorch is faster in the branch, too."""
    if not prefers_branch(rows, rank, experts, dropout_p, is_backward=False):
        return None
    return F.linear(x.detach(), weight.detach(), None if bias is None else bias.detach())


def _product_for_dx(dy: Tensor, weight: Tensor, rows: int, rank: int, experts: int, dropout_p: float) -> Tensor | None:
    """Return dy W, to which the kernels add the branch's part, or None if PyTorch is faster in the branch, too."""
    return dy @ weight if prefers_branch(rows, rank, experts, dropout_p, is_backward=True) else None


class _Plain(torch.autograd.Function):
    """Adds the result of `_C.linear_forward` to autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any, made: tuple[Any, ...], call: tuple[Any, ...], x: Tensor, gate: Tensor | None, *pairs: Tensor
    ) -> Tensor:
        ctx.call, needs = call, call[-1]
        y, s, weight, weight_scale = made  # in a tuple: of y itself autograd would return a view
        experts = len(pairs) // 2
        keep_x = True in needs[2 : 2 + experts]
        keep_s = needs[1] or True in needs[2 + experts :]
        ctx.save_for_backward(x if keep_x else None, s if keep_s else None, gate, weight, weight_scale, *pairs)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        # Under `create_graph=True` the gradients must raise an error where they are differentiated again.
        return (_gradients_once if torch.is_grad_enabled() else _gradients)(ctx, dy)


_apply = untransformed_apply(_Plain)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the two tuples (both None), x, the gate, every A and every B."""
    x, s, gate, weight, weight_scale, *pairs = ctx.saved_tensors
    k, quantized, scale, dropout_p, seed, needs = ctx.call
    experts = len(pairs) // 2
    if not is_observed():
        found = _C.linear_backward(
            dy, x, k, weight, weight_scale, pairs[:experts], pairs[experts:], scale, gate, dropout_p, seed, s, needs,
            _product_for_dx,
        )  # fmt: skip
        if found is not None:
            return None, None, *found
    # The operator accepts every dy, even one whose values share memory, such as the gradient of a sum.
    kind, group = (FLOATING, 0) if quantized is None else (quantized.kind, quantized.group)
    return None, None, *gradients(
        dy, x, k, weight, weight_scale, kind, group, pairs, settled_scale(scale), gate, None, dropout_p, seed, None, s, needs
    )


_gradients_once = torch.autograd.function.once_differentiable(_gradients)
