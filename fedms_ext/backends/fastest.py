"""Whether the CUDA kernels or what would run otherwise are faster for a call: measured once for each shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import device as devices
from .autotune import Choices
from .base import Backend, BackwardCall, Call

Passes = tuple[Callable[..., object], Callable[..., object]]  # forward and backward


def is_faster(name: str, passes: Passes, rival: Backend, call: Call) -> bool:
    """Return whether the forward or backward pass of a backend is faster than that of its rival for calls of this shape.

    Rows count up to a power of two. Where nothing can be measured the rival counts as faster.
    """
    x, lora, weight = call.input, call.lora, call.weight
    rows = 1 << max(x.shape[:-1].numel() - 1, 0).bit_length()
    segments = None if lora.segments is None else len(lora.segments)
    shape = (*_asked(call), weight.kind, weight.group, x.dtype, rows, weight.n, weight.k, *lora.ranks, lora.a[0].dtype,
             lora.gate is not None, lora.dropout_p > 0, segments)  # fmt: skip
    ways = {rival.name: (rival.forward, rival.backward), name: passes}
    choices = _choices(devices.properties(x.device).capability)
    chosen = choices.choose(x.device, shape, lambda: ways, lambda way: way[isinstance(call, BackwardCall)](call))
    return chosen == passes


def fastest_of(device: torch.device, shape: tuple[object, ...], ways: Mapping[str, Callable[[], Sequence[Tensor]]]) -> str:
    """Return the name of the fastest of several ways to compute something of a shape; the first one if nothing can be measured.

    Each way returns all that it computes. One whose results are not those of the first is not taken.
    """
    choices = _choices(devices.properties(device).capability)

    def run(name: str) -> Sequence[Tensor]:
        return ways[name]()

    return choices.choose(device, shape, lambda: {name: name for name in ways}, run, run)


@lru_cache(maxsize=None)
def _choices(capability: tuple[int, int]) -> Choices[Any]:
    major, minor = capability
    return Choices(f"backends-sm{major}{minor}-{devices.build_id()[:16]}.json")


def _asked(call: Call) -> tuple[object, ...]:
    if not isinstance(call, BackwardCall):
        return ("forward",)
    return "backward", call.needs.dx, call.needs.dgate, any(call.needs.da), any(call.needs.db)
