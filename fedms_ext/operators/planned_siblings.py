"""Layers that share their input on the CUDA kernels: one call for the outputs and one for the gradients of all of them.

Together x is read once for S of all layers, one launch computes all outputs, and the gradient of x is one product in the place of
a product for each layer and the sums of them. Calls that the kernels do not take, or take no faster, are declined, and each layer
computes its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import backends
from ..backends import cuda, cuda_plan, device, fastest
from ..backends.base import FLOATING, ForwardCall, Lora, Scales, Weight, dense_rows, scale_on
from ..backends.cuda_group import GroupPlan, GroupShape, obstacle
from .arguments import settled_scale, under_autocast
from .definition import gradients
from .dispatch import is_autocast_enabled, is_observed, untransformed_apply
from .planned import gate_of_rows

if TYPE_CHECKING:
    from .siblings import Sibling

# The plans of a group by what a plan depends on, None where the layers are computed one by one.
GroupPlans = dict[tuple[object, ...], "PlannedGroup | None"]
MOST_PLANS = 64


class PlannedGroup:
    """What a group keeps for its calls of one shape.

    Attributes:
        plan: The plan of both passes.
        scale: Scales of the experts of all layers on the GPU, float32 (E,).
        y_shapes: Shape of each output.
        experts: For each layer the slice of all experts that is its own.
    """

    def __init__(self, plan: GroupPlan, x: Tensor, layers: Sequence[Sibling]) -> None:
        self.plan = plan
        self.scale = scale_on(Scales(chain(*[layer.scale for layer in layers])), x.device)
        self.y_shapes = [(*x.shape[:-1], n) for n in plan.shape.ns]
        self.experts = [slice(*ends) for ends in pairwise(accumulate(map(len, plan.shape.ranks), initial=0))]


def planned_siblings(plans: GroupPlans, x: Tensor, layers: Sequence[Sibling]) -> Sequence[Tensor] | None:
    """Return y (..., N) of every layer, or None if they have to be computed one by one.

    Under autocast x is converted to its dtype once for all layers, and so are the weights and biases; see `planned_linear`.

    Args:
        plans: The plans of the group.
        x: (..., K), for which the module `siblings` has a `joined_dtype`.
        layers: At least two layers.
    """
    gates, weights = [layer.gate is None for layer in layers], _weights(layers)
    if any([not isinstance(weight, Tensor) for weight in weights]) or len(set(gates)) > 1:
        return None
    if any([layer.dropout_p > 0 or not layer.lora_a for layer in layers]):
        return None
    if is_autocast_enabled():
        x, *cast = under_autocast(x, *weights, *[layer.bias for layer in layers])
        weights, biases = cast[: len(layers)], cast[len(layers) :]
        layers = [layer._replace(weight=weight, bias=bias) for layer, weight, bias in zip(layers, weights, biases)]
    kinds = [(weight.shape, weight.dtype) for weight in weights]
    ranks = [tuple(map(len, layer.lora_a)) for layer in layers]
    scales = chain(*[layer.scale for layer in layers])
    key = (x.shape, x.dtype, x.device, x.requires_grad, gates[0], backends.preference(), *kinds, *ranks, *scales)
    if key not in plans:
        planned = _plan(x, layers)
        if device.is_capturing(x.device):  # a plan that is made then has memory of the graph
            return None
        if len(plans) >= MOST_PLANS:
            plans.pop(next(iter(plans)))
        plans[key] = planned
    found = plans[key]
    return None if found is None else _forward(found, x, layers)


def _plan(x: Tensor, layers: Sequence[Sibling]) -> PlannedGroup | None:
    """Return what a group keeps for calls like this one, or None if its layers are to be computed one by one."""
    calls = [
        ForwardCall(x, Weight(weight, None, FLOATING, 0, *weight.shape), layer.bias,
                    Lora(layer.lora_a, layer.lora_b, Scales(layer.scale), layer.gate, None, 0.0, 0))
        for weight, layer in zip(_weights(layers), layers)
    ]  # fmt: skip
    if any([backends.choose(call) is not cuda for call in calls]):
        return None
    fp32 = {lora.dtype == torch.float32 for layer in layers for lora in (*layer.lora_a, *layer.lora_b)}
    ranks = tuple([tuple(map(len, layer.lora_a)) for layer in layers])
    shape = GroupShape(x.device, x.dtype, True in fp32, x.shape[:-1].numel(), x.shape[-1], tuple([call.weight.n for call in calls]), ranks)
    if len(fp32) > 1 or obstacle(shape) is not None:
        return None
    planned = PlannedGroup(GroupPlan(shape), x, layers)
    try:
        return planned if _is_faster(planned, x, layers, calls) else None
    except cuda_plan.Declined:
        return None


def _is_faster(planned: PlannedGroup, x: Tensor, layers: Sequence[Sibling], calls: Sequence[ForwardCall]) -> bool:
    """Return whether both passes are faster together than one by one: measured once for each shape, with every gradient but that of x,
    which is made if x needs it.

    Where nothing can be measured the layers are computed one by one.
    """
    shape, gated, needs_x = planned.plan.shape, layers[0].gate is not None, x.requires_grad
    needs = [needs_x, gated, *[True] * 2 * sum(map(len, shape.ranks))]

    def together() -> list[Tensor]:
        gate = _joined_gate(x, layers)
        ys, room = _outputs(planned, x, layers, gate)
        found = _joined(planned, [x, gate, room, *_weights(layers), *_pairs(layers)], needs, ys)
        return [*ys, *[gradient for gradient in found if gradient is not None]]

    def one_by_one() -> list[Tensor]:
        ys: list[Tensor] = []
        dgates: list[Tensor] = []
        das: list[Tensor] = []
        dbs: list[Tensor] = []
        dx: Tensor | None = None
        for call, own in zip(calls, planned.experts):
            plan = cuda_plan.shared_plan(cuda_plan.shape_of(x, call.weight, call.lora))
            gate = None if call.lora.gate is None else gate_of_rows(call.lora.gate, x)
            branch = call.lora.a, call.lora.b, planned.scale[own], gate, 0.0, 0
            y, room = x.new_empty(*x.shape[:-1], call.weight.n), x.new_empty(plan.room_size)
            plan.forward(x, call.weight.data, None, call.bias, *branch, y, None, room)
            of_x, of_gate = torch.empty_like(x) if needs_x else None, None if gate is None else torch.empty_like(gate)
            da, db = ([*map(torch.empty_like, some)] for some in (call.lora.a, call.lora.b))
            plan.backward(y, x, call.weight.data, None, *branch, None, room, of_x, of_gate, da, db)
            ys.append(y)
            dgates += [] if of_gate is None else [of_gate]
            das += da
            dbs += db
            dx = of_x if dx is None else dx.add_(of_x)
        return [*ys, *([] if dx is None else [dx]), *([torch.cat(dgates, dim=1)] if dgates else []), *das, *dbs]

    key = ("siblings", x.dtype, 1 << (shape.m - 1).bit_length(), shape.k, *shape.ns, *shape.ranks, shape.fp32_experts, gated, needs_x)
    ways = {"one by one": one_by_one, "together": together}
    with torch.no_grad():
        return fastest.fastest_of(x.device, key, ways) == "together"


def _weights(layers: Sequence[Sibling]) -> list[Any]:
    """Return the weight of each layer, which is a tensor where there are plans."""
    return [layer.weight for layer in layers]


def _pairs(layers: Sequence[Sibling]) -> list[Tensor]:
    """Return every A of all layers, then every B."""
    return [*chain(*[layer.lora_a for layer in layers]), *chain(*[layer.lora_b for layer in layers])]


def _joined_gate(x: Tensor, layers: Sequence[Sibling]) -> Tensor | None:
    """Return the gates of all layers side by side, float32 (M, E), or None if there are none."""
    if layers[0].gate is None:
        return None
    return torch.cat([gate_of_rows(layer.gate, x) for layer in layers], dim=1)


def _outputs(planned: PlannedGroup, x: Tensor, layers: Sequence[Sibling], gate: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Return every y and the filled room. Raises `Declined` if the kernels cannot read a tensor in place."""
    ys, room = [x.new_empty(*shape) for shape in planned.y_shapes], x.new_empty(planned.plan.room_size)
    a, b = [*chain(*[layer.lora_a for layer in layers])], [*chain(*[layer.lora_b for layer in layers])]
    planned.plan.forward(x, _weights(layers), [layer.bias for layer in layers], a, b, planned.scale, gate, ys, room)
    return ys, room


def _forward(planned: PlannedGroup, x: Tensor, layers: Sequence[Sibling]) -> Sequence[Tensor] | None:
    gate = _joined_gate(x, layers)
    try:
        ys, room = _outputs(planned, x, layers, gate)
    except cuda_plan.Declined:
        return None
    if not torch.is_grad_enabled():
        return ys
    pairs = _pairs(layers)
    needs = [x.requires_grad, gate is not None and gate.requires_grad, *[pair.requires_grad for pair in pairs]]
    if True not in needs:
        return ys
    weights = _weights(layers) if needs[0] else [None] * len(layers)
    scales = [tuple(layer.scale) for layer in layers]
    return _apply((planned, scales, needs, ys, room, weights), x, gate, *pairs)


class _PlannedSiblings(torch.autograd.Function):
    """Adds the outputs of a group's plan to autograd's graph."""

    @staticmethod
    def forward(ctx: Any, made: tuple[Any, ...], x: Tensor, gate: Tensor | None, *pairs: Tensor) -> tuple[Tensor, ...]:
        planned, scales, needs, ys, room, weights = made
        ctx.call = planned, scales, needs
        experts = len(pairs) // 2
        ctx.save_for_backward(x if True in needs[2 : 2 + experts] else None, gate, room, *weights, *pairs)
        ctx.set_materialize_grads(False)
        if not (needs[0] or needs[1]):
            of_a, of_b = needs[2 : 2 + experts], needs[2 + experts :]
            ctx.mark_non_differentiable(*[y for y, own in zip(ys, planned.experts) if True not in (*of_a[own], *of_b[own])])
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        # Under `create_graph=True` the gradients must raise an error where they are differentiated again.
        return (_gradients_once if torch.is_grad_enabled() else _gradients)(ctx, *dys)


_apply = untransformed_apply(_PlannedSiblings)


def _gradients(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of the tuple (None), x, the gates side by side, every A and every B."""
    planned, scales, needs = ctx.call
    saved = ctx.saved_tensors  # read only once, as activation checkpointing requires
    if is_observed() or any([dy is None for dy in dys]):
        return None, *_one_by_one(planned, saved, needs, dys, scales)
    return None, *_joined(planned, saved, needs, dys)


_gradients_once = torch.autograd.function.once_differentiable(_gradients)


def _joined(planned: PlannedGroup, saved: Sequence[Any], needs: Sequence[bool], dys: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradients from one call of the kernels. `saved` is what `_PlannedSiblings.forward` saved."""
    x, gate, room, *rest = saved
    weights, pairs = rest[: len(dys)], rest[len(dys) :]
    plan, experts = planned.plan, len(pairs) // 2
    dx = room.new_empty(*dys[0].shape[:-1], plan.shape.k) if needs[0] else None
    dgate = torch.empty_like(gate) if needs[1] else None
    made = [torch.empty_like(pair, memory_format=torch.contiguous_format) if needed else None for pair, needed in zip(pairs, needs[2:])]
    rows = [dense_rows(dy, 16) for dy in dys]
    plan.backward(rows, x, weights, planned.scale, gate, room, dx, dgate, made[:experts], made[experts:])
    return [dx, dgate, *made]


def _one_by_one(
    planned: PlannedGroup, saved: Sequence[Any], needs: Sequence[bool], dys: Sequence[Tensor | None], scales: Sequence[Sequence[float]]
) -> list[Tensor | None]:
    """Return the gradients by the operator: an output has none, or PyTorch's dispatcher is observed."""
    x, gate, room, *rest = saved
    weights, pairs = rest[: len(dys)], rest[len(dys) :]
    experts = len(pairs) // 2
    dx, dgate = None, torch.zeros_like(gate) if needs[1] else None
    made: list[Tensor | None] = [None] * len(pairs)
    for dy, weight, s, scale, own in zip(dys, weights, planned.plan.s_of(room), scales, planned.experts):
        if dy is None:
            continue
        numbers = [*range(own.start, own.stop), *range(experts + own.start, experts + own.stop)]
        columns = None if gate is None else gate[:, own].reshape(*dy.shape[:-1], -1)
        of_x, of_gate, *of_pairs = gradients(
            dy, x, planned.plan.shape.k, weight, None, FLOATING, 0, [pairs[i] for i in numbers], settled_scale(scale), columns, None,
            0.0, 0, None, s, [*needs[:2], *[needs[2 + i] for i in numbers]],
        )  # fmt: skip
        dx = of_x if dx is None else dx.add_(of_x)
        if dgate is not None:
            dgate[:, own] = of_gate.view(len(dgate), -1)
        for i, gradient in zip(numbers, of_pairs):
            made[i] = gradient
    return [dx, dgate, *made]
