"""The CUDA kernels, or Triton's and cuBLAS: whichever is the faster one for a call, measured once for each shape.

Only on a GPU on which this build's CUDA kernels have passed their tests, of which `make gpu` leaves a record: a kernel that
never ran is no default.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import TypeVar

from torch import Tensor

from . import cuda
from .autotune import Choices
from .base import Frozen, Gradients, Lora, Needs

_Result = TypeVar("_Result")


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    if reason := cuda.unavailable():
        return reason
    if not cuda.passed(cuda.capability(None)):
        return "the CUDA kernels of this build have not passed their tests on a GPU of this kind; run make gpu"
    return None


def supports(x: Tensor) -> bool:
    return cuda.supports(x) and cuda.passed(cuda.capability(x.device))


@lru_cache(maxsize=None)
def _choices(capability: tuple[int, int]) -> Choices:
    major, minor = capability
    return Choices(f"backends-sm{major}{minor}-{cuda.build_id()[:16]}.json")


_kept: dict[tuple[object, ...], ModuleType] = {}


def _fastest(x: Tensor, shape: tuple[object, ...], lora: Lora, run: Callable[[ModuleType], _Result]) -> _Result:
    """`run` on the backend that is the fastest one for the shape; rows count up to a power of two."""
    m = 1 << max(x.shape[:-1].numel() - 1, 0).bit_length()
    segments = None if lora.segments is None else len(lora.segments)
    key = (x.device, *shape, x.dtype, m, x.shape[-1], *lora.ranks, lora.gate is not None, lora.dropout_p > 0, segments)
    if key not in _kept:
        other = cuda.other(x)
        ways = {other.__name__: other, cuda.__name__: cuda}
        name = " ".join(map(str, key[1:]))
        way = _choices(cuda.capability(x.device)).choose(name, list(ways), lambda way: run(ways[way]))
        _kept[key] = ways[way]
    return run(_kept[key])


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora) -> tuple[Tensor, Tensor]:
    return _fastest(x, ("forward", len(weight)), lora, lambda backend: backend.forward(x, weight, bias, lora))


def backward(dy: Tensor, x: Tensor | None, weight: Tensor, lora: Lora, s: Tensor | None, needs: Needs) -> Gradients:
    return _fastest(
        dy, ("backward", weight.shape[1], *_asked(needs)), lora,
        lambda backend: backend.backward(dy, x, weight, lora, s, needs),
    )  # fmt: skip


def frozen_forward(x: Tensor, frozen: Frozen, bias: Tensor | None, lora: Lora) -> tuple[Tensor, Tensor]:
    return _fastest(
        x, ("forward", frozen.n, frozen.kind, frozen.group), lora,
        lambda backend: backend.frozen_forward(x, frozen, bias, lora),
    )  # fmt: skip


def frozen_backward(
    dy: Tensor, x: Tensor | None, frozen: Frozen, lora: Lora, s: Tensor | None, needs: Needs
) -> Gradients:
    return _fastest(
        dy, ("backward", frozen.k, frozen.kind, frozen.group, *_asked(needs)), lora,
        lambda backend: backend.frozen_backward(dy, x, frozen, lora, s, needs),
    )  # fmt: skip


def _asked(needs: Needs) -> tuple[bool, ...]:
    return needs.dx, needs.dgate, any(needs.da), any(needs.db)
