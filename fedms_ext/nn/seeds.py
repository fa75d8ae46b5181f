"""Seeds of dropout masks: numbers, or tensors in the GPU's memory inside `seeds_on_device`."""

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
        A number from the CPU's generator. Below torch.compile, and if x is on a GPU, and the call is inside `seeds_on_device` or a CUDA
        graph is being captured, an int64 tensor (1,) from the generator of x's device: a number would be a constant of the graph, and
        every run of it would drop the same values.
    """
    on_device = torch.compiler.is_compiling() or (devices.is_real(x.device) and (_ON_DEVICE.get() or devices.is_capturing(x.device)))
    if on_device:
        return torch.randint(_MOST, (1,), device=x.device)
    return int(torch.randint(_MOST, ()))


@contextmanager
def seeds_on_device() -> Iterator[None]:
    """Draw the seeds of layers on a GPU from the GPU's generator, within the context."""
    token = _ON_DEVICE.set(True)
    try:
        yield
    finally:
        _ON_DEVICE.reset(token)
