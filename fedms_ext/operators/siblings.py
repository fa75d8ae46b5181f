"""Linear layers with experts that share their input, computed together: one call for the outputs and one for the gradients.

The query, the key and the value of an attention layer read the same x. On a CPU x is then quantized once instead of three times,
and the gradient of x is one sum of three products instead of three tensors that autograd adds up: the C++ kernels do so, on weights
of 8 bits and many rows. On a GPU see `planned_siblings`. Every other call is declined, and the caller computes its layers one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C, backends
from ..backends import cuda
from ..backends.device import ON_GPU
from ..quantization.formats import EIGHT_BITS
from .arguments import Quantized, dtype_under_autocast, settled_scale
from .definition import gradients
from .dispatch import is_autocast_enabled, is_observed, untransformed_apply
from .planned_siblings import GroupPlans, planned_siblings


# With fewer values in x the checks of a group take as long as what it saves: three layers 384 -> 384 on 512 rows gain nothing, on
# 2048 rows 12 % with the gradient of x and 5 % without it (a Zen 4 that others used too; bench/layers/bench_cpu_siblings.py).
FEWEST_VALUES = 1 << 19


class Sibling(NamedTuple):
    """A layer of several that share x: the arguments of `expert_linear` besides x.

    Attributes:
        weight: (N, K); the N may differ among the siblings.
        bias: (N,) or None.
        lora_a: (r_e, K) for each applied expert; there may be none.
        lora_b: (N, r_e) for each applied expert.
        scale: A number for each applied expert.
        gate: x.shape[:-1] + (experts,), or None.
        dropout_p: Probability that a value of x is dropped in the branch.
        seed: Seed of this layer's own dropout mask.
    """

    weight: Tensor | Quantized
    bias: Tensor | None
    lora_a: Sequence[Tensor]
    lora_b: Sequence[Tensor]
    scale: Sequence[float]
    gate: Tensor | None
    dropout_p: float
    seed: int


def joined_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which layers of x are computed together, or None if they are not, as far as x and the surroundings tell.

    x must be a plain tensor whose changes in place are counted, which those of inference mode are not: on the CPU one with at least
    `FEWEST_VALUES` values and without autocast; on a GPU one that is bf16 or fp16, or that autocast makes so, while gradients are
    recorded, since without them little is gained, and Python takes longer for a group than for its layers. No compiler, transform or
    profiler may be at work.
    """
    if type(x) is not Tensor or x.is_inference() or is_observed():
        return None
    if getattr(x, ON_GPU):
        dtype = dtype_under_autocast(x) if is_autocast_enabled() else x.dtype
        is_taken = dtype in (torch.bfloat16, torch.float16) and torch.is_grad_enabled() and cuda.unavailable() is None
    else:
        dtype, is_taken = x.dtype, x.numel() >= FEWEST_VALUES and not is_autocast_enabled() and backends.cpu_is_chosen()
    return dtype if is_taken else None


def sibling_linears(plans: GroupPlans, x: Tensor, layers: Sequence[Sibling]) -> Sequence[Tensor] | None:
    """Return y (..., N) of every layer, or None if they have to be computed one by one.

    On a CPU each y has the bits that `expert_linear` gives by itself; on a GPU it has those of the same sums with another tile. The
    outputs share one node of autograd's graph, as those of `torch.unbind` do: the gradient of x is the sum over the layers in their
    order, and a backward pass from one of the outputs frees what a later one from another output would need.

    Args:
        plans: What the CUDA kernels keep for the group.
        x: (..., K), for which there is a `joined_dtype`.
        layers: At least one layer.
    """
    if getattr(x, ON_GPU):
        return planned_siblings(plans, x, layers)
    weights: list[Any] = [layer.weight for layer in layers]
    if any([isinstance(weight, Tensor) or weight.kind not in EIGHT_BITS for weight in weights]):
        return None
    found = _C.siblings_forward(x, [(*weight.operands, *layer[1:]) for weight, layer in zip(weights, layers)])
    if found is None:
        return None
    needs_x = False
    needs: list[tuple[bool, ...]] = [()] * len(layers)
    if torch.is_grad_enabled():
        needs_x = x.requires_grad
        needs = [tuple([t is not None and t.requires_grad for t in _inputs(layer)]) for layer in layers]
    if not needs_x and not any(map(any, needs)):
        return [y for y, _ in found]
    for_dx = [weight.for_dx() if needs_x else (None, None) for weight in weights]
    calls = [
        (weight, len(layer.lora_a), tuple(layer.scale), layer.dropout_p, layer.seed, (needs_x, *needed))
        for weight, layer, needed in zip(weights, layers, needs)
    ]
    return _apply((found, for_dx), (x.shape[-1], calls), x, *chain(*map(_inputs, layers)))


def _inputs(layer: Sibling) -> tuple[Tensor | None, ...]:
    """Return what may need a gradient besides x: the gate, every A and every B."""
    return layer.gate, *layer.lora_a, *layer.lora_b


class _Siblings(torch.autograd.Function):
    """Adds the results of `_C.siblings_forward` to autograd's graph."""

    @staticmethod
    def forward(ctx: Any, made: tuple[Any, Any], call: tuple[Any, ...], x: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        found, for_dx = made
        ctx.call, ctx.inputs = call, len(inputs)
        keep_x, kept, rest = False, [], iter(inputs)
        for (_, s), weight, (_, experts, *_, needs) in zip(found, for_dx, call[1]):
            keep_x |= True in needs[2 : 2 + experts]
            keep_s = needs[1] or True in needs[2 + experts :]
            kept += [s if keep_s else None, *weight, *[next(rest) for _ in range(1 + 2 * experts)]]
        ctx.save_for_backward(x if keep_x else None, *kept)
        ctx.set_materialize_grads(False)
        ys = [y for y, _ in found]
        ctx.mark_non_differentiable(*[y for y, (*_, needs) in zip(ys, call[1]) if True not in needs])
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        # Under `create_graph=True` the gradients must raise an error where they are differentiated again.
        return (_gradients_once if torch.is_grad_enabled() else _gradients)(ctx, *dys)


_apply = untransformed_apply(_Siblings)


class _Saved(NamedTuple):
    """What the backward pass of a layer takes besides x: its gradient, what is saved of it, and the numbers of its call."""

    dy: Tensor | None
    s: Tensor | None
    weight: Tensor | None
    weight_scale: Tensor | None
    gate: Tensor | None
    pairs: list[Tensor]
    quantized: Any
    scale: tuple[float, ...]
    dropout_p: float
    seed: int
    needs: tuple[bool, ...]


def _gradients(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of the two tuples (both None), x and the gate, every A and every B of each layer."""
    x, *saved = ctx.saved_tensors
    k, calls = ctx.call
    rest, layers = iter(saved), []
    for dy, (quantized, experts, *numbers) in zip(dys, calls):
        s, weight, weight_scale, gate, *pairs = [next(rest) for _ in range(4 + 2 * experts)]
        layers.append(_Saved(dy, s, weight, weight_scale, gate, pairs, quantized, *numbers))
    live = [layer for layer in layers if layer.dy is not None]
    dx, found = _joined(x, k, live) or _one_by_one(x, k, live)
    made = iter(found)
    own = [next(made)[1:] if layer.dy is not None else [None] * (1 + len(layer.pairs)) for layer in layers]
    return None, None, dx, *chain(*own)


_gradients_once = torch.autograd.function.once_differentiable(_gradients)

_Found = tuple[Tensor | None, Sequence[Sequence[Tensor | None]]]


def _joined(x: Tensor | None, k: int, layers: list[_Saved]) -> _Found | None:
    """Return dx and the gradients of each layer from one call of the C++ kernels, or None if they decline it."""
    if is_observed():
        return None
    arguments = []
    for layer in layers:
        experts = len(layer.pairs) // 2
        dy, a, b = layer.dy.contiguous(), layer.pairs[:experts], layer.pairs[experts:]
        arguments.append((dy, layer.weight, layer.weight_scale, a, b, layer.scale, layer.gate, layer.dropout_p, layer.seed,
                          layer.s, layer.needs))  # fmt: skip
    return _C.siblings_backward(x, k, arguments, layers[0].needs[0])


def _one_by_one(x: Tensor | None, k: int, layers: list[_Saved]) -> _Found:
    """Return dx and the gradients of each layer, each computed by the operator."""
    dx: Tensor | None = None
    found: list[Sequence[Tensor | None]] = []
    for layer in layers:
        own = gradients(
            layer.dy, x, k, layer.weight, layer.weight_scale, layer.quantized.kind, layer.quantized.group, layer.pairs,
            settled_scale(layer.scale), layer.gate, None, layer.dropout_p, layer.seed, None, layer.s, layer.needs,
        )  # fmt: skip
        dx = own[0] if dx is None else dx.add_(own[0])
        found.append(own)
    return dx, found
