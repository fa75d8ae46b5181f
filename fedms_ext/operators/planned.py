"""The short way of a layer to the CUDA kernels: one call from Python to C++ a pass, by plans that the layer keeps.

The general way checks and converts every operand, goes through the choice of a backend, and takes several hundred Python calls,
for which a small layer on a GPU waits longer than for its kernels. Here all of that is done once for a shape. The kernels decline
a tensor that they cannot read where it is; the call then takes the general way, which computes the same, or names what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import cuda, cuda_plan, device
from ..backends.base import FLOATING, BackwardCall, ForwardCall, Lora, Needs, Scales, Weight, scale_on
from .arguments import Quantized
from .definition import gradients
from .dispatch import is_observed


class Planned:
    """What a layer keeps for calls of one shape.

    Attributes:
        plan: of the passes, or None if another backend computes such calls.
        y_shape: of the output.
        room: values of x's dtype for what the forward pass keeps, S at the end.
        scale: the experts' scales on the GPU, float32 (E,).
        backward: by which gradients are needed: whether any of x's, the gate's, A's and B's are, or None if another backend
            computes the backward pass.
    """

    def __init__(self, found: ForwardCall) -> None:
        x, weight, _, lora = found
        self.plan = cuda_plan.Plan(cuda_plan.shape_of(x, weight, lora)) if backends.choose(found) is cuda else None
        self.y_shape = (*x.shape[:-1], weight.n)
        self.room = 0 if self.plan is None else self.plan.room_size + self.plan.shape.m * self.plan.rank
        self.scale = scale_on(lora.scale, x.device)
        self.backward: dict[tuple[bool, ...], tuple[bool, bool, bool, bool] | None] = {}


class Plans(dict[tuple[object, ...], Planned]):
    """What a layer keeps, by shape. A copy of the layer, or one that is loaded, starts without any."""

    MOST = 64

    def keep(self, key: tuple[object, ...], planned: Planned) -> None:
        """Keep a plan, in the place of the oldest one if there are many."""
        if len(self) >= self.MOST:
            self.pop(next(iter(self)), None)
        self[key] = planned

    def __copy__(self) -> Plans:
        return Plans()

    def __deepcopy__(self, memo: object) -> Plans:
        return Plans()

    def __reduce__(self) -> tuple[type[Plans], tuple[()]]:
        return Plans, ()


def planned_linear(
    plans: Plans, x: Tensor, weight: Tensor | Quantized, bias: Tensor | None, a: Sequence[Tensor], b: Sequence[Tensor],
    scale: Sequence[float], gate: Tensor | None, dropout_p: float, seed: int | Tensor,
) -> Tensor | None:  # fmt: skip
    """Return y = x W^T + bias + the experts' branch, or None where the CUDA kernels do not compute the call in this way.

    Args:
        plans: of the layer.
        x: (..., K).
        weight: (N, K), a tensor or a quantized weight.
        bias: (N,) or None.
        a: (r_e, K) of every applied expert.
        b: (N, r_e) of every applied expert.
        scale: a number for every applied expert.
        gate: a weight for every row and expert, broadcastable to x.shape[:-1] + (E,), or None.
        dropout_p: probability that a value of x is dropped in the branch.
        seed: of the dropout mask; see `expert_linear`.
    """
    if is_observed() or torch.is_autocast_enabled(x.device.type):
        return None
    quantized: Any = None if isinstance(weight, Tensor) else weight
    data, data_scale = (weight, None) if isinstance(weight, Tensor) else quantized.operands
    if gate is not None:
        gate = _gate_of_rows(gate, x)
    ranks = [pair.shape[0] for pair in a]
    key = (x.shape, x.dtype, x.device, data.dtype, a[0].dtype, *scale, *ranks, gate is None, dropout_p > 0.0,
           backends.preference())  # fmt: skip
    planned = plans.get(key)
    if planned is None:
        planned = _plan(plans, key, x, data, data_scale, quantized, a, b, scale, gate, dropout_p, seed)
    plan = planned.plan
    if plan is None:
        return None
    y, room = x.new_empty(planned.y_shape), x.new_empty(planned.room)
    try:
        plan.forward(x, data, data_scale, bias, a, b, planned.scale, gate, dropout_p, seed, y, None, room)
    except cuda_plan.Declined:
        return None
    if torch.is_grad_enabled():
        needs = tuple([tensor is not None and tensor.requires_grad for tensor in (x, gate, *a, *b)])
        if True in needs:
            if quantized is not None:
                data, data_scale = quantized.for_dx() if needs[0] else (None, None)
            kept = (room, data, data_scale, seed if isinstance(seed, Tensor) else None)
            return _Planned.apply((y, planned, kept, quantized, scale, dropout_p, seed, needs), x, gate, *a, *b)
    return y


def _gate_of_rows(gate: Tensor, x: Tensor) -> Tensor:
    """Return the gate as float32 (M, E), without a copy where it is that already."""
    shape = (*x.shape[:-1], gate.shape[-1])
    return (gate if gate.shape == shape else gate.expand(shape)).reshape(-1, shape[-1]).to(torch.float32)


def _plan(
    plans: Plans, key: tuple[object, ...], x: Tensor, data: Tensor, data_scale: Tensor | None, quantized: Any,
    a: Sequence[Tensor], b: Sequence[Tensor], scale: Sequence[float], gate: Tensor | None, dropout_p: float,
    seed: int | Tensor,
) -> Planned:  # fmt: skip
    """Return what is kept for calls of a new shape. What is made while a CUDA graph is captured belongs to the graph."""
    kind, group = (FLOATING, 0) if quantized is None else (quantized.kind, quantized.group)
    n, k = data.shape if quantized is None else quantized.shape
    lora = Lora(a, b, Scales(scale), gate, None, dropout_p, seed)
    planned = Planned(ForwardCall(x, Weight(data, data_scale, kind, group, n, k), None, lora))
    if not device.is_capturing(x.device):
        plans.keep(key, planned)
    return planned


class _Planned(torch.autograd.Function):
    """Joins what a plan has computed to autograd's graph."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], x: Tensor, gate: Tensor | None, *pairs: Tensor) -> Tensor:
        y, ctx.planned, kept, ctx.quantized, ctx.scale, ctx.dropout_p, ctx.seed, ctx.needs = call
        # x is kept for the gradients of A alone.
        ctx.save_for_backward(x if True in ctx.needs[2 : 2 + len(pairs) // 2] else None, gate, *kept, *pairs)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        # Under `create_graph=True` the gradients must raise an error where they are differentiated again.
        return (_gradients_once if torch.is_grad_enabled() else _gradients)(ctx, dy)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the call (None), x, the gate, every A and every B."""
    saved = ctx.saved_tensors  # read only once, as activation checkpointing requires
    x, gate, room, weight, weight_scale, seed, *pairs = saved
    planned, needs = ctx.planned, ctx.needs
    experts = len(pairs) // 2
    if needs not in planned.backward:
        found = _backward_call(ctx, dy, saved)
        planned.backward[needs] = found.needs.kinds if backends.choose(found) is cuda else None
    kinds = planned.backward[needs]
    if kinds is None or is_observed():
        return None, *_general_gradients(ctx, dy, saved)
    dx = dy.new_empty(*dy.shape[:-1], planned.plan.shape.k) if needs[0] else None
    dgate = gate.new_empty(gate.shape) if needs[1] else None
    made = [torch.empty_like(pair, memory_format=torch.contiguous_format) if needed else None
            for pair, needed in zip(pairs, needs[2:])]
    try:
        planned.plan.backward(
            dy, kinds, x, weight, weight_scale, pairs[:experts], pairs[experts:], planned.scale, gate, ctx.dropout_p,
            ctx.seed if seed is None else seed, None, room, True, dx, dgate, made[:experts], made[experts:],
        )  # fmt: skip
    except cuda_plan.Declined:  # a dy whose values share memory, such as the gradient of a sum
        return None, *_general_gradients(ctx, dy, saved)
    return None, dx, dgate, *made


_gradients_once = torch.autograd.function.once_differentiable(_gradients)


def _backward_call(ctx: Any, dy: Tensor, saved: Sequence[Any]) -> BackwardCall:
    """Return what a backend is given for this backward pass; `saved` is what `_Planned.forward` saved."""
    x, gate, room, weight, weight_scale, seed, *pairs = saved
    experts = len(pairs) // 2
    kind, group = (FLOATING, 0) if ctx.quantized is None else (ctx.quantized.kind, ctx.quantized.group)
    needs = Needs(ctx.needs[0], ctx.needs[1], ctx.needs[2 : 2 + experts], ctx.needs[2 + experts :])
    seed = ctx.seed if seed is None else seed
    lora = Lora(pairs[:experts], pairs[experts:], Scales(ctx.scale), gate, None, ctx.dropout_p, seed)
    plan = ctx.planned.plan
    s = room[plan.room_size :].view(plan.shape.m, plan.rank)
    return BackwardCall(dy, x, Weight(weight, weight_scale, kind, group, dy.shape[-1], plan.shape.k), lora, s, needs)


def _general_gradients(ctx: Any, dy: Tensor, saved: Sequence[Any]) -> list[Tensor | None]:
    """Return the gradients by the operator: another backend computes them, or PyTorch's dispatcher is observed."""
    _, x, weight, lora, s, _ = _backward_call(ctx, dy, saved)
    number, seed_tensor = (0, lora.seed) if isinstance(lora.seed, Tensor) else (lora.seed, None)
    return gradients(
        dy, x, weight.k, weight.data, weight.scale, weight.kind, weight.group, [*lora.a, *lora.b], lora.scale, lora.gate, None,
        lora.dropout_p, number, seed_tensor, s, ctx.needs,
    )  # fmt: skip
