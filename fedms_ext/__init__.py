"""Linear layers with gated LoRA experts as PyTorch operators."""

from __future__ import annotations

import torch  # noqa: F401  first: the kernels of this package run on the OpenMP runtime that torch brings

from . import _C
from .backends import available, explain, use_backend
from .ops import expert_linear
from .reference import philox_mask

__all__ = ["available", "build_info", "expert_linear", "explain", "philox_mask", "use_backend"]


def build_info() -> dict[str, object]:
    """How the kernels were built and run: version, cuda (compiled or not), isa_detected, isa_used (the instruction
    sets portable | avx2 | avx512, see FEDMS_CPU_ISA) and openmp (the date of the standard, e.g. 201511)."""
    return _C.build_info()
