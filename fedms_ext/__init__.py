"""Linear layers with gated LoRA experts as PyTorch operators."""

from __future__ import annotations

import torch  # noqa: F401  first: the kernels of this package run on the OpenMP runtime that torch brings

from . import interface  # noqa: F401  before a call that kernels of other sources would not take

from . import _C, budget
from .accelerate import Accelerated, accelerate
from .backends import Backend, available, explain, register_backend, use_backend
from .freed_memory import keep_freed_memory
from .graphs import graphed
from .nn import ExpertLinear, FrozenLinear, GateAdapter, LoRA, PairState, QuantizedWeight, use_attention, use_rms_norm
from .operators import attention, expert_linear
from .quantization.quantize import cast_frozen, dequantize, quantize
from .reference import philox_mask
from .sparse.activation import (
    ConstantPrefix,
    activate,
    activation_order,
    deactivate,
    gated,
    prefix_depth,
    prefix_hash,
    segmented,
)
from .sparse.bank import ExpertBank
from .sparse.cache import ConstantCache, DiskCache, Ragged
from .sparse.siblings import group
from .sparse.surgery import attach, detach, expert_layers, expert_tensors, find_blocks, merge, reset_expert, unmerge

__all__ = [
    "Accelerated",
    "Backend",
    "ConstantCache",
    "ConstantPrefix",
    "DiskCache",
    "ExpertBank",
    "ExpertLinear",
    "FrozenLinear",
    "GateAdapter",
    "LoRA",
    "PairState",
    "QuantizedWeight",
    "Ragged",
    "accelerate",
    "activate",
    "activation_order",
    "attach",
    "attention",
    "available",
    "budget",
    "build_info",
    "cast_frozen",
    "deactivate",
    "dequantize",
    "detach",
    "expert_layers",
    "expert_linear",
    "expert_tensors",
    "explain",
    "find_blocks",
    "gated",
    "graphed",
    "group",
    "keep_freed_memory",
    "merge",
    "philox_mask",
    "prefix_depth",
    "prefix_hash",
    "quantize",
    "register_backend",
    "reset_expert",
    "segmented",
    "unmerge",
    "use_attention",
    "use_backend",
    "use_rms_norm",
]


def build_info() -> dict[str, object]:
    """Return how the kernels were built and which instructions they use.

    Returns:
        A dictionary with these keys:

        - `version`: version of the package.
        - `cuda`: the GPU architectures that the CUDA kernels were compiled for, or None if they were not built.
        - `isa_detected`, `isa_used`, `isa_available`: instruction sets of the CPU, out of portable, avx2, avxvnni, avx512,
          dotprod and i8mm. The environment variable `FEDMS_CPU_ISA` changes which one is used.
        - `bf16_products`: whether the CPU multiplies bfloat16 values by an instruction of its own and the kernels use it (AVX-512
          BF16, with `avx512`): in the attention of quantized blocks and in the gradient of a quantized head of a language model.
        - `openmp`: release date of the OpenMP standard that the compiler implements, such as 201511.
    """
    return _C.build_info()
