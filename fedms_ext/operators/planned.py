"""A shortcut from a layer to the CUDA kernels: one C++ call for each pass, with plans that the layer keeps.

The general path checks and converts every operand and chooses a backend. That takes several hundred Python calls, and more time
than the kernels of a small layer. Here it is done once for each shape. If the kernels cannot read a tensor in place, they decline
the call, which then takes the general path: it computes the same result or reports what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import backends
from ..backends import cuda, cuda_plan, device
from ..backends.base import FLOATING, BackwardCall, ForwardCall, Lora, Needs, Scales, Weight, scale_on
from .arguments import Quantized, under_autocast
from .definition import gradients
from .dispatch import is_autocast_enabled, is_observed, untransformed_apply


_needs_gradient = attrgetter("requires_grad")


class Planned:
    """What a layer keeps for its calls of one shape.

    Attributes:
        plan: The plan of both passes, or None if another backend computes such calls.
        x_shape: Shape of the input.
        y_shape: Shape of the output.
        scale: Scales of the experts on the GPU, float32 (E,).
        numbers: Scales of the experts, the very tuple of the last call of this shape.
        backward: For each combination of needed gradients whether the plan computes that backward pass, or another backend does.
    """

    def __init__(self, found: ForwardCall, scale: Sequence[float]) -> None:
        x, weight, _, lora = found
        self.plan = cuda_plan.Plan(cuda_plan.shape_of(x, weight, lora)) if backends.choose(found) is cuda else None
        self.x_shape, self.y_shape = tuple(x.shape), (*x.shape[:-1], weight.n)
        self.scale = scale_on(lora.scale, x.device)
        self.backward: dict[tuple[bool, ...], bool] = {}
        self.numbers, self._dtype, self._data_dtype, self._device = scale, x.dtype, weight.data.dtype, x.device
        self._rest = weight.kind, lora.gate is None, lora.dropout_p > 0.0, backends.preference()

    def fits(self, x: Tensor, data: Tensor, scale: Sequence[float], *rest: object) -> bool:
        """Return whether this plan was made for a call like this one. Only what is cheap to read is compared; `Plans.again` finds a
        plan by all that it depends on.

        Args:
            x: (..., K).
            data: The values of the weight.
            scale: The very tuple of the call that this was made for, as which experts are applied is not looked at again.
            rest: Kind of the weight, whether there is no gate, whether there is dropout, and `backends.preference()`.
        """
        return (
            scale is self.numbers and x.shape == self.x_shape and x.dtype is self._dtype and data.dtype is self._data_dtype
            and x.device == self._device and rest == self._rest
        )  # fmt: skip


class Plans(dict[tuple[object, ...], Planned]):
    """The plans of a layer by shape. Copies of the layer and loaded layers start without plans.

    Attributes:
        last: The one of the last call, or None.
    """

    MOST = 64
    last: Planned | None = None

    def keep(self, key: tuple[object, ...], planned: Planned) -> None:
        """Keep a plan; if there are `MOST` plans already, drop the oldest one."""
        if len(self) >= self.MOST:
            self.pop(next(iter(self)), None)
        self[key] = self.last = planned

    def again(self, key: tuple[object, ...], scale: Sequence[float]) -> Planned | None:
        """Return the plan of a shape, if there is one, as that of the last call; `scale` is the very tuple of this call."""
        planned = self.get(key)
        if planned is not None:
            self.last, planned.numbers = planned, scale
        return planned

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
    """Return y = x W^T + bias + the LoRA branch, or None if the call cannot take this shortcut.

    Under autocast x, W and bias are converted to its dtype, as in torch's linear. A and B are not: the kernels round them as they
    read them, and their gradients are float32.

    Args:
        plans: The plans of the layer.
        x: (..., K).
        weight: (N, K), a tensor or a quantized weight.
        bias: (N,) or None.
        a: (r_e, K) for each applied expert.
        b: (N, r_e) for each applied expert.
        scale: A number for each applied expert.
        gate: A weight for each row and expert, broadcastable to x.shape[:-1] + (E,), or None.
        dropout_p: Probability that a value of x is dropped in the branch.
        seed: Seed of the dropout mask; see `expert_linear`.
    """
    if is_observed():
        return None
    # The exact type first, here and below: to ask whether something is an instance of Tensor takes 500 instructions.
    if type(weight) is Parameter or isinstance(weight, Tensor):
        quantized, data, data_scale, kind = None, weight, None, FLOATING
    else:
        quantized, (data, data_scale), kind = weight, weight.operands, weight.kind
    if is_autocast_enabled():
        x, bias, data = under_autocast(x, bias, data) if quantized is None else (*under_autocast(x), bias, data)
    if gate is not None:
        gate = gate_of_rows(gate, x)
    planned = plans.last
    rest = kind, gate is None, dropout_p > 0.0, backends.preference()
    if planned is None or not planned.fits(x, data, scale, *rest):
        key = (x.shape, x.dtype, x.device, data.dtype, *rest, *scale, *map(len, a))
        planned = plans.again(key, scale)
        if planned is None:
            planned = _plan(plans, key, x, data, data_scale, quantized, a, b, scale, gate, dropout_p, seed)
    plan = planned.plan
    if plan is None:
        return None
    needs: tuple[bool, ...] = (False,)
    if torch.is_grad_enabled():
        needs = (x.requires_grad, gate is not None and gate.requires_grad, *map(_needs_gradient, a), *map(_needs_gradient, b))
    trains = True in needs
    # Numbers, since PyTorch takes 3,000 instructions longer to read a tuple, and 8,000 for a torch.Size.
    y, room = x.new_empty(*planned.y_shape), x.new_empty(plan.room_size) if trains else None
    try:
        plan.forward(x, data, data_scale, bias, a, b, planned.scale, gate, dropout_p, seed, y, None, room)
    except cuda_plan.Declined:
        return None
    if not trains:
        return y
    if quantized is not None:
        data, data_scale = quantized.for_dx() if needs[0] else (None, None)
    call = planned, quantized, scale, dropout_p, seed, needs
    return _apply((call, y, room, data, data_scale, None if type(seed) is int else seed), x, gate, *a, *b)


def gate_of_rows(gate: Tensor, x: Tensor) -> Tensor:
    """Return the gate as float32 (M, E), without a copy if possible."""
    shape = (*x.shape[:-1], gate.shape[-1])
    return (gate if gate.shape == shape else gate.expand(shape)).reshape(-1, shape[-1]).to(torch.float32)


def _plan(
    plans: Plans, key: tuple[object, ...], x: Tensor, data: Tensor, data_scale: Tensor | None, quantized: Any,
    a: Sequence[Tensor], b: Sequence[Tensor], scale: Sequence[float], gate: Tensor | None, dropout_p: float,
    seed: int | Tensor,
) -> Planned:  # fmt: skip
    """Plan calls of a new shape. A plan that is made while a CUDA graph is captured is not kept: its memory is the graph's."""
    kind, group = (FLOATING, 0) if quantized is None else (quantized.kind, quantized.group)
    n, k = data.shape if quantized is None else quantized.shape
    lora = Lora(a, b, Scales(scale), gate, None, dropout_p, seed)
    planned = Planned(ForwardCall(x, Weight(data, data_scale, kind, group, n, k), None, lora), scale)
    if not device.is_capturing(x.device):
        plans.keep(key, planned)
    return planned


class _Planned(torch.autograd.Function):
    """Adds the result of a plan to autograd's graph."""

    @staticmethod
    def forward(ctx: Any, made: tuple[Any, ...], x: Tensor, gate: Tensor | None, *pairs: Tensor) -> Tensor:
        call, y, *kept = made  # in a tuple: of y itself autograd would return a view
        ctx.call = call
        # x is needed only for the gradients of A.
        ctx.save_for_backward(x if True in call[-1][2 : 2 + len(pairs) // 2] else None, gate, *kept, *pairs)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        # Under `create_graph=True` the gradients must raise an error where they are differentiated again.
        return (_gradients_once if torch.is_grad_enabled() else _gradients)(ctx, dy)


_apply = untransformed_apply(_Planned)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the tuple (None), x, the gate, every A and every B."""
    saved = ctx.saved_tensors  # read only once, as activation checkpointing requires
    x, gate, room, weight, weight_scale, seed, *pairs = saved
    planned, _, _, dropout_p, number, needs = ctx.call
    experts = len(pairs) // 2
    computes = planned.backward.get(needs)
    if computes is None:
        computes = planned.backward[needs] = backends.choose(_backward_call(ctx.call, dy, saved)) is cuda
    if is_observed() or not computes:
        return None, *_general_gradients(ctx.call, dy, saved)
    dx = dy.new_empty(*planned.x_shape) if needs[0] else None
    dgate = gate.new_empty(gate.shape) if needs[1] else None
    # Like a pair that is not dense they would not be dense, which the kernels decline.
    made = [*map(torch.empty_like, pairs)] if False not in needs[2:] else [
        torch.empty_like(pair) if needed else None for pair, needed in zip(pairs, needs[2:])]
    try:
        planned.plan.backward(
            dy, x, weight, weight_scale, pairs[:experts], pairs[experts:], planned.scale, gate, dropout_p,
            number if seed is None else seed, None, room, dx, dgate, made[:experts], made[experts:],
        )  # fmt: skip
    except cuda_plan.Declined:  # such as a dy whose values share memory, the gradient of a sum
        return None, *_general_gradients(ctx.call, dy, saved)
    return None, dx, dgate, *made


_gradients_once = torch.autograd.function.once_differentiable(_gradients)


def _backward_call(call: tuple[Any, ...], dy: Tensor, saved: Sequence[Any]) -> BackwardCall:
    """Return what a backend is given for this backward pass; `saved` is what `_Planned.forward` saved."""
    x, gate, room, weight, weight_scale, seed, *pairs = saved
    planned, quantized, scale, dropout_p, number, needs = call
    experts = len(pairs) // 2
    kind, group = (FLOATING, 0) if quantized is None else (quantized.kind, quantized.group)
    lora = Lora(pairs[:experts], pairs[experts:], Scales(scale), gate, None, dropout_p, number if seed is None else seed)
    plan = planned.plan
    s = room[plan.s_at :].view(plan.shape.m, plan.rank)
    needed = Needs(needs[0], needs[1], needs[2 : 2 + experts], needs[2 + experts :])
    return BackwardCall(dy, x, Weight(weight, weight_scale, kind, group, dy.shape[-1], plan.shape.k), lora, s, needed)


def _general_gradients(call: tuple[Any, ...], dy: Tensor, saved: Sequence[Any]) -> list[Tensor | None]:
    """Return the gradients by the operator: another backend computes them, or PyTorch's dispatcher is observed."""
    _, x, weight, lora, s, _ = _backward_call(call, dy, saved)
    number, seed_tensor = (0, lora.seed) if isinstance(lora.seed, Tensor) else (lora.seed, None)
    return gradients(
        dy, x, weight.k, weight.data, weight.scale, weight.kind, weight.group, [*lora.a, *lora.b], lora.scale, lora.gate, None,
        lora.dropout_p, number, seed_tensor, s, call[-1],
    )  # fmt: skip
