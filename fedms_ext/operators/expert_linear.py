"""The operators as PyTorch sees them: registration, fakes, autograd, autocast and the checks of the arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, reference
from ..backends.base import Gradients, Lora, Needs, Scales

_library = torch.library.Library("fedms_ext", "DEF")

# Only the applied experts reach these operators. They have no autograd formula of their own: a call that needs
# gradients goes through `_ExpertLinear`. The seed is a SymInt and the scale a tensor so that a new value of either
# never recompiles a compiled model.
_library.define(
    "expert_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] lora_a, Tensor[] lora_b, Tensor scale, "
    "Tensor? gate, SymInt[]? segments, float dropout_p, SymInt seed) -> (Tensor y, Tensor s)"
)
_library.define(
    "expert_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor[] lora_a, Tensor[] lora_b, Tensor scale, "
    "Tensor? gate, SymInt[]? segments, Tensor? s, float dropout_p, SymInt seed, bool needs_dx, bool needs_dgate, "
    "bool[] needs_da, bool[] needs_db) -> Tensor[]"
)


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    # The dtypes are settled before an operator is called; autocast must not change them again in a backend.
    @wraps(function)
    def wrapper(first: Tensor, *args: Any) -> Any:
        device = first.device.type
        if not torch.is_autocast_enabled(device):
            return function(first, *args)
        with torch.autocast(device, enabled=False):
            return function(first, *args)

    return wrapper


@_without_autocast
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, *lora: Any) -> tuple[Tensor, Tensor]:
    return backends.choose(x).forward(x, weight, bias, Lora(*lora))


@_without_autocast
def _backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, lora_a: list[Tensor], lora_b: list[Tensor], scale: Tensor,
    gate: Tensor | None, segments: Sequence[int] | None, s: Tensor | None, dropout_p: float, seed: int, *needs: Any,
) -> list[Tensor]:  # fmt: skip
    lora = Lora(lora_a, lora_b, scale, gate, segments, dropout_p, seed)
    return given(backends.choose(dy).backward(dy, x, weight, lora, s, Needs(*needs)))


def given(gradients: Gradients) -> list[Tensor]:
    """Those that were asked for, in the order of an operator's result."""
    dx, dgate, da, db = gradients
    return [gradient for gradient in (dx, dgate, *da, *db) if gradient is not None]


_library.impl("expert_linear", _forward, "CompositeExplicitAutograd")
_library.impl("expert_linear_backward", _backward, "CompositeExplicitAutograd")


def _listeners() -> tuple[Callable[[], object], ...]:
    """By which one asks whether a tracer, a mode, a transform or the profiler listens to PyTorch's dispatcher: names that
    PyTorch does not promise. Where it lacks one, nobody can tell, so one always does."""
    try:
        return (
            torch._C._is_tracing,
            torch._C._len_torch_dispatch_stack,
            torch._C._functorch.peek_interpreter_stack,
            torch._C._autograd._profiler_enabled,
        )
    except AttributeError:
        return (lambda: True,)


_LISTENERS = _listeners()

# All that a call may hold besides lists: of tensors only those whose values lie in memory of their own, as they are.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, Scales, list, tuple, torch.Size, type(None), bool, int, float, str))


def _is_plain(args: Sequence[Any]) -> bool:
    """Whether a kernel may read every tensor of a call from memory: not a subclass (DTensor, FakeTensor, ...), which may have
    none, and not a view whose values are to be negated when they are read."""
    inside = [arg for arg in args if type(arg) is tuple or type(arg) is list]
    every = (*args, *chain(*inside))
    return _PLAIN.issuperset(map(type, every)) and not any([t.is_neg() for t in every if isinstance(t, Tensor)])


def is_observed() -> bool:
    """Whether a compiler, a tracer, a mode, a transform or the profiler listens to PyTorch's dispatcher."""
    if torch.compiler.is_compiling():
        return True
    for listens in _LISTENERS:
        if listens():
            return True
    return False


def _dispatched(operator: Callable[..., Any], args: Sequence[Any]) -> Any:
    return operator(*[scale_tensor(arg) if type(arg) is Scales else arg for arg in args])


def call(operator: Callable[..., Any], implementation: Callable[..., Any], *args: Any) -> Any:
    """`operator`, past PyTorch's dispatcher if nothing listens there (a compiler, a tracer, a mode, a transform, the profiler)
    and every tensor is plain: from Python to Python it takes as long as the kernel of a layer at one row.

    The dispatcher is what calls a subclass of Tensor, or writes out a view that is not plain.
    """
    if is_observed() or not _is_plain(args):
        return _dispatched(operator, args)
    if not torch.is_grad_enabled():  # to say so again takes 4 us
        return implementation(*args)
    with torch.no_grad():  # as below the dispatcher's autograd
        return implementation(*args)


def fake_s(x: Tensor, lora_a: Sequence[Tensor], segments: Sequence[int] | None) -> Tensor:
    rows = math.prod(x.shape[:-1])  # numel() of a torch.Size would fix the size
    ranks = [a.shape[0] for a in lora_a]
    width = sum(ranks) if segments is None else max(ranks)
    return x.new_empty((rows, width), dtype=lora_a[0].dtype if lora_a else x.dtype)


@torch.library.register_fake("fedms_ext::expert_linear")
def _(x, weight, bias, lora_a, lora_b, scale, gate, segments, dropout_p, seed):
    return x.new_empty((*x.shape[:-1], weight.shape[0])), fake_s(x, lora_a, segments)


@torch.library.register_fake("fedms_ext::expert_linear_backward")
def _(
    dy, x, weight, lora_a, lora_b, scale, gate, segments, s, dropout_p, seed, needs_dx, needs_dgate, needs_da, needs_db
):
    gradients = [dy.new_empty((*dy.shape[:-1], weight.shape[1]))] if needs_dx else []
    if needs_dgate:
        gradients.append(gate.new_empty(gate.shape))
    gradients += [a.new_empty(a.shape) for a, needed in zip(lora_a, needs_da) if needed]
    gradients += [b.new_empty(b.shape) for b, needed in zip(lora_b, needs_db) if needed]
    return gradients


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        weight: Tensor,
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
            torch.ops.fedms_ext.expert_linear, _forward, x, weight, bias, lora[:experts], lora[experts:], scale, gate,
            segments, dropout_p, seed,
        )  # fmt: skip
        # `needs` is for x, the gate, every A, every B. Kept is what its gradients use and nothing else.
        keep_x = any(needs[2 : 2 + experts])
        keep_s = needs[1] or any(needs[2 + experts :])
        numbers, tensor = split_scale(scale)
        ctx.save_for_backward(x if keep_x else None, s if keep_s else None, gate, weight, tensor, *lora)
        ctx.numbers, ctx.segments, ctx.dropout_p, ctx.seed, ctx.needs = numbers, segments, dropout_p, seed, needs
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, s, gate, weight, scale, *lora = ctx.saved_tensors
        scale = ctx.numbers if scale is None else scale
        experts = len(lora) // 2
        needs = ctx.needs
        found = iter(
            call(
                torch.ops.fedms_ext.expert_linear_backward, _backward, dy, x, weight, lora[:experts], lora[experts:],
                scale, gate, ctx.segments, s, ctx.dropout_p, ctx.seed, needs[0], needs[1], needs[2 : 2 + experts],
                needs[2 + experts :],
            )
        )  # fmt: skip
        dx, dgate, *dlora = [next(found) if needed else None for needed in needs]
        return dx, dgate, *[None] * 7, *dlora


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_tensor(name: str, tensor: Any, like: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}, expected a tensor")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but x is on {like.device}; move one of them")


def check(
    x: Tensor,
    n: int,
    k: int,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Sequence[float] | Tensor,
    active: Sequence[bool] | None,
    segments: Sequence[int] | None,
) -> None:
    """What both operators ask of the operands besides the weight, (n, k)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is {type(x).__name__}, expected a tensor")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"x has the layout {x.layout}{', nested' if x.is_nested else ''}, expected a dense tensor; pass "
                        "x.to_dense() or the padded rows")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}, expected a floating dtype")
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x has the shape {_shape(x)}, expected (..., {k}) for a weight of {(n, k)}")
    if bias is not None:
        _check_tensor("bias", bias, x)
        if bias.dim() != 1 or bias.shape[0] != n:
            raise ValueError(f"bias has the shape {_shape(bias)}, expected ({n},)")
    experts = len(lora_a)
    if len(lora_b) != experts:
        raise ValueError(f"lora_a has {experts} tensors and lora_b {len(lora_b)}; there must be one pair an expert")
    if (scale.shape != (experts,)) if isinstance(scale, Tensor) else (len(scale) != experts):
        found = _shape(scale) if isinstance(scale, Tensor) else f"{len(scale)} values"
        raise ValueError(f"scale has {found}, expected one value for each of the {experts} experts")
    if active is not None and len(active) != experts:
        raise ValueError(f"active has {len(active)} values, expected one for each of the {experts} experts")
    if segments is not None:
        rows = math.prod(x.shape[:-1])
        if len(segments) != experts or any(count < 0 for count in segments) or sum(segments) != rows:
            raise ValueError(f"segments is {list(segments)}, expected a number of rows for each of the {experts} experts, "
                             f"at least 0, and {rows} in all")
    for e in range(experts):
        a, b = lora_a[e], lora_b[e]
        _check_tensor(f"lora_a[{e}]", a, x)
        _check_tensor(f"lora_b[{e}]", b, x)
        if a.dim() != 2 or a.shape[1] != k or a.shape[0] < 1:
            raise ValueError(f"lora_a[{e}] has the shape {_shape(a)}, expected (rank >= 1, {k})")
        if b.dim() != 2 or b.shape[0] != n or b.shape[1] != a.shape[0]:
            raise ValueError(f"lora_b[{e}] has the shape {_shape(b)}, expected ({n}, {a.shape[0]})")


def applied(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Sequence[float] | Tensor,
    gate: Tensor | None,
    active: Sequence[bool] | None,
    segments: Sequence[int] | None,
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[float] | Tensor, Tensor | None, Sequence[int] | None]:
    """What an operator is given: the active experts alone. With segments an expert that is not active keeps its rows
    and has the rank 0."""
    if active is None or all(active):
        return lora_a, lora_b, scale, gate, segments
    if segments is None or not any(active):
        chosen = [e for e, is_active in enumerate(active) if is_active]
        scale = scale[chosen] if isinstance(scale, Tensor) else [scale[e] for e in chosen]
        gate = None if gate is None else gate[..., chosen]
        return [lora_a[e] for e in chosen], [lora_b[e] for e in chosen], scale, gate, None
    lora_a = [a if is_active else a.detach()[:0] for a, is_active in zip(lora_a, active)]
    lora_b = [b if is_active else b.detach()[:, :0] for b, is_active in zip(lora_b, active)]
    return lora_a, lora_b, scale, gate, segments


def _check_dtypes(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]
) -> None:
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        other, name = (weight, "weight") if weight.dtype != x.dtype else (bias, "bias")
        raise TypeError(f"{name} is {other.dtype} and x is {x.dtype}; convert one of them, or use torch.autocast")
    dtype = lora_a[0].dtype
    for tensor in (*lora_a, *lora_b):
        if tensor.dtype != dtype or not tensor.is_floating_point():
            raise TypeError(f"lora_a and lora_b must share one floating dtype; found {dtype} and {tensor.dtype}")


def scale_tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(tuple(values), dtype=torch.float64)


def settled(scale: Sequence[float | Tensor] | Tensor) -> Scales | Tensor:
    """The scale of a call: the numbers as they are now, or a tensor (E,). An operator takes a tensor, which takes 3 us to
    make, so numbers become one only where the dispatcher is called."""
    if isinstance(scale, Tensor):
        return scale
    if any([isinstance(value, Tensor) for value in scale]):  # PEFT's, after prepare_model_for_compiled_hotswap
        return torch.stack([torch.as_tensor(value, dtype=torch.float64).detach() for value in scale])
    return scale_tensor(scale) if torch.compiler.is_compiling() else Scales(scale)


def split_scale(scale: Scales | Tensor) -> tuple[Scales | None, Tensor | None]:
    """A scale as what a context of autograd keeps itself, and what it saves as a tensor."""
    return (None, scale) if isinstance(scale, Tensor) else (scale, None)


def transforms() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, jvp) is at work. Our operators have no rules for it, so that a layer
    then is computed by PyTorch's own ones, which have."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _under_autocast(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    # As torch's linear: everything but float64 is converted, and the gradients come back in the dtypes given.
    dtype = torch.get_autocast_dtype(x.device.type)
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in (x, *tensors)
    ]


def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Sequence[float] | Tensor,
    gate: Tensor | None = None,
    active: Sequence[bool] | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    segments: Sequence[int] | None = None,
) -> Tensor:
    """A frozen linear layer with any number of LoRA experts, each weighted by a gate row by row.

        y = x W^T + b + sum over the active experts e of  scale_e * gate_e * (dropout(x) A_e^T) B_e^T

    Args:
        x: (..., K), any floating dtype.
        weight: (N, K) in x's dtype, frozen: it never gets a gradient.
        bias: (N,) or None, frozen too.
        lora_a: E tensors (r_e, K), r_e >= 1; the ranks may differ.
        lora_b: E tensors (N, r_e). All A and B share one dtype, in which the LoRA branch is computed; the result
            has x's dtype.
        scale: E numbers or a tensor (E,), alpha / r in LoRA. It gets no gradient. A tensor on x's device or on
            the CPU may change its values without a recompilation of a compiled model.
        gate: a weight for every row and expert, broadcastable to x.shape[:-1] + (E,), floating; None means 1.
        active: E bools, which experts are applied; None means all. One that is not costs nothing: its A and B
            get no gradient (None) and its column of the gate gets zero. With none active the result is
            F.linear(x, weight, bias), bit for bit, and the gate is not part of it.
        dropout_p: 0 <= p < 1, the dropout on x in the LoRA branch; one mask, shared by the experts.
        seed: 0 <= seed < 2**63, which mask; required if dropout_p > 0. See `fedms_ext.philox_mask`.
        segments: E numbers of rows that add up to the rows of x, in their order: the first segments[0] rows take
            expert 0 alone, the next segments[1] rows expert 1, and so on; one may be 0. The rows of an expert that is
            not active take none. The gate then is one weight a row, that of its own expert: it broadcasts to
            x.shape[:-1] + (1,). No expert is computed for the rows of another.

    Returns y, (..., N), in x's dtype. Gradients flow to x, the gate and every A and B, once: the gradient of a
    gradient is a RuntimeError (`fedms_ext.reference.expert_linear` has them all). Under torch.autocast everything
    but float64 is converted to its dtype first, as by F.linear.

    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, device or value. NaN is not looked for.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x is {type(x).__name__}, expected a tensor")
    _check_tensor("weight", weight, x)
    if weight.dim() != 2:
        raise ValueError(f"weight has the shape {_shape(weight)}, expected (N, K)")
    check(x, *weight.shape, bias, lora_a, lora_b, scale, active, segments)
    experts = len(lora_a)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}, expected 0 <= dropout_p < 1")
    if dropout_p > 0.0 and seed is None:
        raise ValueError(f"dropout_p is {dropout_p}, but seed is None; give a seed, a new one for every mask")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, expected 0 <= seed < 2**63")
    if gate is not None:
        _check_tensor("gate", gate, x)
        shape = (*x.shape[:-1], experts if segments is None else 1)
        try:
            gate = gate if gate.shape == shape else gate.expand(shape)
        except RuntimeError:
            raise ValueError(f"gate has the shape {_shape(gate)}, expected one that broadcasts to {shape}") from None
        if not gate.is_floating_point():
            raise TypeError(f"gate is {gate.dtype}, expected a floating dtype")
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise ValueError("scale requires a gradient, but gets none; pass scale.detach(), or train a gate instead")
    weight = weight.detach() if weight.requires_grad else weight
    bias = bias.detach() if bias is not None and bias.requires_grad else bias

    lora_a, lora_b, scale, gate, segments = applied(lora_a, lora_b, scale, gate, active, segments)
    experts = len(lora_a)
    if experts == 0:
        return F.linear(x, weight, bias)

    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias, *lora = _under_autocast(x, weight, bias, *lora_a, *lora_b)
        lora_a, lora_b = lora[:experts], lora[experts:]
    _check_dtypes(x, weight, bias, lora_a, lora_b)
    scale = settled(scale)
    seed = 0 if seed is None else seed
    if transforms():
        return F.linear(x, weight, bias) + reference.lora_branch(x, lora_a, lora_b, scale, gate, dropout_p, seed, segments)

    needs: tuple[bool, ...] = (False,)
    if torch.is_grad_enabled():
        inputs = (x, gate, *lora_a, *lora_b)
        needs = tuple(tensor is not None and tensor.requires_grad for tensor in inputs)
    if any(needs):
        return _ExpertLinear.apply(x, gate, weight, bias, scale, segments, dropout_p, seed, needs, *lora_a, *lora_b)
    return call(
        torch.ops.fedms_ext.expert_linear, _forward, x, weight, bias, lora_a, lora_b, scale, gate, segments, dropout_p, seed
    )[0]
