"""The way from Python to an operator's implementation, past PyTorch's dispatcher where nobody listens there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..backends.base import Scales


def call(operator: Callable[..., Any], implementation: Callable[..., Any], *args: Any) -> Any:
    """Run an operator, skipping PyTorch's dispatcher if nothing observes it.

    Dispatching to an implementation in Python costs about as much as the kernel of a layer at one row. The shortcut is taken only
    in eager mode, for plain tensors, with no tracer, dispatch mode, functorch transform or profiler active. The dispatcher is what
    calls a subclass of Tensor, or writes out a view that is not plain.

    Args:
        operator: of torch.ops; it takes the scales as a tensor.
        implementation: what the dispatcher would call; it takes the scales as numbers, too.
        args: of both.
    """
    if is_observed() or not is_plain(args):
        return operator(*[scale_tensor(arg) if type(arg) is Scales else arg for arg in args])
    if not torch.is_grad_enabled():  # to enter no_grad once more takes 4 us
        return implementation(*args)
    with torch.no_grad():  # as below the dispatcher's autograd
        return implementation(*args)


def is_observed() -> bool:
    """Return whether a compiler, a tracer, a mode, a transform or the profiler listens to PyTorch's dispatcher."""
    # Dynamo alone would read the functions below; whoever else traces or compiles sets a mode, which they find.
    if torch.compiler.is_dynamo_compiling():
        return True
    tracing, modes, transform, profiler = _PROBES  # a loop would take longer, at every layer
    return bool(tracing() or modes() or transform() or profiler())


def untransformed_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return `function.apply` for calls that no transform of `torch.func` observes.

    `Function.apply` first looks for such transforms and for tensors that outlived one. Both are known to be absent where
    `is_observed` is False and a kernel could read the tensors.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def is_plain(args: Sequence[Any]) -> bool:
    """Return whether a kernel may read every tensor of a call from memory.

    It may not read a subclass (DTensor, FakeTensor, ...), which may have no memory, or a view whose values are to be negated when
    they are read.
    """
    inside = [arg for arg in args if type(arg) is tuple or type(arg) is list]
    every = (*args, *chain(*inside))
    return _PLAIN.issuperset(map(type, every)) and not any([t.is_neg() for t in every if isinstance(t, Tensor)])


def is_transformed() -> bool:
    """Return whether a transform of `torch.func` (vmap, grad, jvp) is active. The operators have no rules for it."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def scale_tensor(values: Sequence[float]) -> Tensor:
    """Return scales as the tensor (E,) that goes through the dispatcher, float64."""
    return torch.tensor(tuple(values), dtype=torch.float64)


def _find_probes() -> tuple[Callable[[], object], ...]:
    """Return private functions of PyTorch that say whether somebody listens. If one is missing, somebody always does."""
    try:
        return (
            torch._C._is_tracing,
            torch._C._len_torch_dispatch_stack,
            torch._C._are_functorch_transforms_active,
            partial(getattr, torch.autograd.profiler, "_is_profiler_enabled", True),
        )
    except AttributeError:
        return (lambda: True,) * 4


_PROBES = _find_probes()

# Whether autocast is on for any device. It takes a tenth of the time of torch.is_autocast_enabled(x.device.type).
is_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled

# All that a call may hold besides lists. Of tensors only those whose values lie in memory of their own, as they are.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, Scales, list, tuple, torch.Size, type(None), bool, int, float, str))
