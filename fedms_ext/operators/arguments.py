"""The arguments of `expert_linear`: what is checked, and what becomes of them before the operator is called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backends.base import Scales
from .dispatch import scale_tensor


class Quantized(Protocol):
    """What the operator asks of a quantized weight (N, K); see `fedms_ext.QuantizedWeight`."""

    kind: str
    group: int

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def operands(self) -> tuple[Tensor, Tensor]: ...

    def for_dx(self) -> tuple[Tensor, Tensor]: ...

    def dequantize(self) -> Tensor: ...


def check(
    x: Tensor, weight: Tensor, n: int, k: int, bias: Tensor | None, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scale: Sequence[float | Tensor] | Tensor, active: Sequence[bool] | None, segments: Sequence[int] | None,
) -> None:  # fmt: skip
    """Check types, layouts, devices and shapes.

    Shapes that were correct once are not checked again one by one, which would take longer than the product of one row.

    Args:
        x: The input.
        weight: A floating weight, or the data of a quantized one.
        n, k: Shape of the weight.
        bias, lora_a, lora_b, scale, active, segments: See `expert_linear`.

    Raises:
        TypeError: If an argument is not a tensor, not floating or not dense.
        ValueError: If a shape, number or device is wrong.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x is {type(x).__name__}, expected a tensor")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"x has the layout {x.layout}{', nested' if x.is_nested else ''}, expected a dense tensor; pass "
                        "x.to_dense() or the padded rows")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}, expected a floating dtype")
    _check_tensors(x, weight, bias, lora_a, lora_b)
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise ValueError("scale requires a gradient, but gets none; pass scale.detach(), or train a gate instead")
    if active is not None and len(active) != len(lora_a):
        raise ValueError(f"active has {len(active)} values, expected one for each of the {len(lora_a)} experts")
    shapes = (
        x.shape, n, k, None if bias is None else bias.shape, tuple([a.shape for a in lora_a]), tuple([b.shape for b in lora_b]),
        scale.shape if isinstance(scale, Tensor) else (len(scale),), None if segments is None else tuple(segments),
    )  # fmt: skip
    (_check_shapes if torch.compiler.is_compiling() else _check_shapes_once)(*shapes)


def _check_tensors(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]
) -> None:
    """Check that all are tensors on x's device."""
    every = (weight, *lora_a, *lora_b) if bias is None else (weight, bias, *lora_a, *lora_b)
    device = x.device
    for tensor in every:
        if not isinstance(tensor, Tensor) or tensor.device != device:
            break
    else:
        return
    named = [("weight", weight), *[("bias", bias)] * (bias is not None)]
    named += [(f"lora_a[{e}]", a) for e, a in enumerate(lora_a)] + [(f"lora_b[{e}]", b) for e, b in enumerate(lora_b)]
    for name, value in named:
        check_tensor(name, value, x)


def check_tensor(name: str, value: Any, like: Tensor) -> None:
    """Raise TypeError if a value is no tensor, ValueError if it is not on the device of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, expected a tensor")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, but x is on {like.device}; move one of them")


_Shape = Sequence[int]


def _check_shapes(
    x: _Shape, n: int, k: int, bias: _Shape | None, lora_a: Sequence[_Shape], lora_b: Sequence[_Shape], scale: _Shape,
    segments: Sequence[int] | None,
) -> None:  # fmt: skip
    if len(x) < 1 or x[-1] != k:
        raise ValueError(f"x has the shape {tuple(x)}, expected (..., {k}) for a weight of {(n, k)}")
    if bias is not None and (len(bias) != 1 or bias[0] != n):
        raise ValueError(f"bias has the shape {tuple(bias)}, expected ({n},)")
    experts = len(lora_a)
    if len(lora_b) != experts:
        raise ValueError(f"lora_a has {experts} tensors and lora_b {len(lora_b)}; there must be one pair an expert")
    if len(scale) != 1 or scale[0] != experts:
        raise ValueError(f"scale has the shape {tuple(scale)}, expected one value for each of the {experts} experts")
    if segments is not None:
        rows = math.prod(x[:-1])
        if len(segments) != experts or any(count < 0 for count in segments) or sum(segments) != rows:
            raise ValueError(f"segments is {list(segments)}, expected a number of rows for each of the {experts} experts, "
                             f"at least 0, and {rows} in all")
    for e, (a, b) in enumerate(zip(lora_a, lora_b)):
        if len(a) != 2 or a[1] != k or a[0] < 1:
            raise ValueError(f"lora_a[{e}] has the shape {tuple(a)}, expected (rank >= 1, {k})")
        if len(b) != 2 or b[0] != n or b[1] != a[0]:
            raise ValueError(f"lora_b[{e}] has the shape {tuple(b)}, expected ({n}, {a[0]})")


_check_shapes_once = lru_cache(maxsize=4096)(_check_shapes)


def check_dropout(dropout_p: float, seed: int | Tensor | None, x: Tensor) -> None:
    """Check the probability and the seed.

    Raises:
        TypeError: If the seed is a tensor that is not int64.
        ValueError: If a value is out of range, or the seed is missing or on another device.
    """
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}, expected 0 <= dropout_p < 1")
    if seed is None:
        if dropout_p > 0.0:
            raise ValueError(f"dropout_p is {dropout_p}, but seed is None; give a seed, a new one for every mask")
    elif isinstance(seed, Tensor):
        check_tensor("seed", seed, x)
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"seed is {seed.dtype} of shape {tuple(seed.shape)}, expected torch.int64 with one element")
    elif not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, expected 0 <= seed < 2**63")


def expanded_gate(gate: Tensor, x: Tensor, experts: int, segments: Sequence[int] | None) -> Tensor:
    """Return the gate as x.shape[:-1] + (E,), or with segments as x.shape[:-1] + (1,).

    Raises:
        TypeError: If it is not a floating tensor.
        ValueError: If its shape does not broadcast, or it is on another device than x.
    """
    check_tensor("gate", gate, x)
    if not gate.is_floating_point():
        raise TypeError(f"gate is {gate.dtype}, expected a floating dtype")
    shape = (*x.shape[:-1], experts if segments is None else 1)
    try:
        return gate if gate.shape == shape else gate.expand(shape)
    except RuntimeError:
        raise ValueError(f"gate has the shape {tuple(gate.shape)}, expected one that broadcasts to {shape}") from None


Applied = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[float] | Tensor, Tensor | None, Sequence[int] | None]


def applied(
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scale: Sequence[float] | Tensor, gate: Tensor | None,
    active: Sequence[bool] | None, segments: Sequence[int] | None,
) -> Applied:  # fmt: skip
    """Return A, B, scale, gate and segments of the active experts alone.

    With segments an expert that is not active keeps its rows and has the rank 0.
    """
    if active is None or all(active):
        return lora_a, lora_b, scale, gate if lora_a else None, segments
    if segments is None or not any(active):
        chosen = [e for e, is_active in enumerate(active) if is_active]
        scale = scale[chosen] if isinstance(scale, Tensor) else [scale[e] for e in chosen]
        gate = None if gate is None or not chosen else gate[..., chosen]
        return [lora_a[e] for e in chosen], [lora_b[e] for e in chosen], scale, gate, None
    lora_a = [a if is_active else a.detach()[:0] for a, is_active in zip(lora_a, active)]
    lora_b = [b if is_active else b.detach()[:, :0] for b, is_active in zip(lora_b, active)]
    return lora_a, lora_b, scale, gate, segments


def check_dtypes(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]
) -> None:
    """Raise TypeError for dtypes that do not fit; `weight` is None if it is quantized."""
    if weight is not None and (weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype)):
        other, name = (weight, "weight") if weight.dtype != x.dtype else (bias, "bias")
        raise TypeError(f"{name} is {other.dtype} and x is {x.dtype}; convert one of them, or use torch.autocast")
    if not lora_a:
        return
    dtype = lora_a[0].dtype
    for tensor in (*lora_a, *lora_b):
        if tensor.dtype != dtype or not dtype.is_floating_point:
            raise TypeError(f"lora_a and lora_b must share one floating dtype; found {dtype} and {tensor.dtype}")


def settled_scale(scale: Sequence[float | Tensor] | Tensor) -> Scales | Tensor:
    """Return the scale of a call: the numbers as they are now, or a tensor (E,).

    The operator takes a tensor, which takes 3 us to make, so numbers become one only where the dispatcher is called.
    """
    if isinstance(scale, Tensor):
        return scale
    if any([isinstance(value, Tensor) for value in scale]):  # PEFT's, after prepare_model_for_compiled_hotswap
        return torch.stack([torch.as_tensor(value, dtype=torch.float64).detach() for value in scale])
    return scale_tensor(scale) if torch.compiler.is_compiling() else Scales(scale)  # type: ignore[arg-type]  # numbers alone are left


def under_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return tensors as torch's linear sees them: where autocast is on for the device of the first one, x, all but float64 in its dtype."""
    x: Any = tensors[0]
    if not torch.is_autocast_enabled(x.device.type):
        return [*tensors]
    dtype = torch.get_autocast_dtype(x.device.type)
    return [t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]


def dtype_under_autocast(x: Tensor) -> torch.dtype:
    """Return the dtype of what `under_autocast` makes of x, floating."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)
