"""Register the operators with PyTorch: schemas, implementations, fakes. Floating and quantized weights share one operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.base import BackwardCall, ForwardCall, Lora, Needs, Scales, Weight, s_dtype
from .dispatch import call

_library = torch.library.Library("fedms_ext", "DEF")

# Only the applied experts reach these operators. They have no autograd formula: a call that needs gradients goes through an
# autograd function, which runs the backward operator by `gradients`. The seed is a SymInt and the scale a tensor, so that a new
# value of either never recompiles a compiled model; a `seed_tensor` is used instead of the seed. A floating weight has the kind
# "float" and no `weight_scale`. A quantized weight is passed as its data and scale, and to the backward operator as what its
# `for_dx` returns.
_library.define(
    "expert_linear(Tensor x, Tensor weight, Tensor? weight_scale, str kind, int group, Tensor? bias, Tensor[] lora_a, "
    "Tensor[] lora_b, Tensor scale, Tensor? gate, SymInt[]? segments, float dropout_p, SymInt seed, Tensor? seed_tensor) "
    "-> (Tensor y, Tensor s)"
)
_library.define(
    "expert_linear_backward(Tensor dy, Tensor? x, SymInt k, Tensor? weight, Tensor? weight_scale, str kind, int group, "
    "Tensor[] lora_a, Tensor[] lora_b, Tensor scale, Tensor? gate, SymInt[]? segments, float dropout_p, SymInt seed, "
    "Tensor? seed_tensor, Tensor? s, bool needs_dx, bool needs_dgate, bool[] needs_da, bool[] needs_db) -> Tensor[]"
)


def _lora(
    a: Sequence[Tensor], b: Sequence[Tensor], scale: Scales | Tensor, gate: Tensor | None, segments: Sequence[int] | None,
    dropout_p: float, seed: int, seed_tensor: Tensor | None,
) -> Lora:  # fmt: skip
    return Lora(a, b, scale, gate, segments, dropout_p, seed if seed_tensor is None else seed_tensor)


def forward_call(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, kind: str, group: int, bias: Tensor | None, *lora: Any
) -> ForwardCall:
    """Return the call of a backend for the arguments of the forward operator."""
    n = (weight if weight_scale is None else weight_scale).shape[0]
    return ForwardCall(x, Weight(weight, weight_scale, kind, group, n, x.shape[-1]), bias, _lora(*lora))


def backward_call(
    dy: Tensor, x: Tensor | None, k: int, weight: Tensor | None, weight_scale: Tensor | None, kind: str, group: int,
    *rest: Any,
) -> BackwardCall:  # fmt: skip
    """Return the call of a backend for the arguments of the backward operator."""
    weight_of_call = Weight(weight, weight_scale, kind, group, dy.shape[-1], k)
    return BackwardCall(dy, x, weight_of_call, _lora(*rest[:8]), rest[8], Needs(*rest[9:]))


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    # The dtypes are chosen before an operator is called, and autocast must not change them again in a backend.
    @wraps(function)
    def wrapper(first: Tensor, *args: Any) -> Any:
        device = first.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(first, *args)
        with torch.autocast(device, enabled=False):
            return function(first, *args)

    return wrapper


@_without_autocast
def run_forward(*args: Any) -> tuple[Tensor, Tensor]:
    """Compute y and S with the chosen backend."""
    found = forward_call(*args)
    return backends.choose(found).forward(found)


@_without_autocast
def run_backward(*args: Any) -> list[Tensor]:
    """Compute the gradients that are needed with the chosen backend, and return them in order."""
    found = backward_call(*args)
    dx, dgate, da, db = backends.choose(found).backward(found)
    return [gradient for gradient in (dx, dgate, *da, *db) if gradient is not None]


def gradients(
    dy: Tensor, x: Tensor | None, k: int, weight: Tensor | None, weight_scale: Tensor | None, kind: str, group: int,
    pairs: Sequence[Tensor], scale: Scales | Tensor, gate: Tensor | None, segments: Sequence[int] | None, dropout_p: float,
    seed: int, seed_tensor: Tensor | None, s: Tensor | None, needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Run the backward operator, skipping PyTorch's dispatcher if nothing observes it.

    Args:
        pairs: Every A, then every B.
        needs: Whether the gradient of x, of the gate, of each A and of each B is needed.
        The other arguments are those of the operator.

    Returns:
        The gradients in the order of `needs`, None for those that are not needed.
    """
    experts = len(pairs) // 2
    found = iter(call(
        torch.ops.fedms_ext.expert_linear_backward, run_backward, dy, x, k, weight, weight_scale, kind, group, pairs[:experts],
        pairs[experts:], scale, gate, segments, dropout_p, seed, seed_tensor, s, needs[0], needs[1], needs[2 : 2 + experts],
        needs[2 + experts :],
    ))  # fmt: skip
    return [next(found) if needed else None for needed in needs]


_library.impl("expert_linear", run_forward, "CompositeExplicitAutograd")
_library.impl("expert_linear_backward", run_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fedms_ext::expert_linear")
def _(x, weight, weight_scale, kind, group, bias, lora_a, lora_b, scale, gate, segments, dropout_p, seed, seed_tensor):
    rows = math.prod(x.shape[:-1])  # numel() of a torch.Size would fix the size
    ranks = [a.shape[0] for a in lora_a]
    width = sum(ranks) if segments is None else max(ranks)
    n = (weight if weight_scale is None else weight_scale).shape[0]
    return x.new_empty((*x.shape[:-1], n)), x.new_empty((rows, width), dtype=s_dtype(x, lora_a))


@torch.library.register_fake("fedms_ext::expert_linear_backward")
def _(
    dy, x, k, weight, weight_scale, kind, group, lora_a, lora_b, scale, gate, segments, dropout_p, seed, seed_tensor, s,
    needs_dx, needs_dgate, needs_da, needs_db,
):  # fmt: skip
    gradients = [dy.new_empty((*dy.shape[:-1], k))] if needs_dx else []
    if needs_dgate:
        gradients.append(gate.new_empty(gate.shape))
    gradients += [a.new_empty(a.shape) for a, needed in zip(lora_a, needs_da) if needed]
    gradients += [b.new_empty(b.shape) for b, needed in zip(lora_b, needs_db) if needed]
    return gradients
