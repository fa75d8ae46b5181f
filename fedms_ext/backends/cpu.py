"""The CPU backend. Until the kernels of `fedms_ext._C` are bound here, it is not available."""

from __future__ import annotations

from torch import Tensor


def unavailable() -> str | None:
    return "not built"


def supports(x: Tensor) -> bool:
    return False
