"""Seeds of dropout masks: numbers, or within `seeds_on_device` tensors in the GPU's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from ..backends import device as devices

_ON_DEVICE: ContextVar[bool] = ContextVar("fedms_seeds_on_device", default=False)
_MOST = 2**63 - 1


def draw_seed(x: Tensor) -> int | Tensor:
    """Draw the seed of a mask for x from torch's default generator.

    Returns:
        A number, from the CPU's generator; for an x on a GPU within `seeds_on_device`, and while a CUDA graph is captured, an int64
        tensor (1,) beside it, from the GPU's generator. A number would be a constant of the graph: every replay would drop the same
        values.
    """
    if devices.is_real(x.device) and (_ON_DEVICE.get() or devices.is_capturing(x.device)):
        return torch.randint(_MOST, (1,), device=x.device)
    return int(torch.randint(_MOST, ()))


@contextmanager
def seeds_on_device() -> Iterator[None]:
    """Within the context seeds for layers on a GPU are drawn there."""
    token = _ON_DEVICE.set(True)
    try:
        yield
    finally:
        _ON_DEVICE.reset(token)
