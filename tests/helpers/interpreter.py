"""Makes Triton's interpreter compute with bfloat16: it keeps such values as 16-bit integers, multiplies those in
`tl.dot`, truncates where a GPU rounds to nearest, and turns integers into the wrong bits.

Import this before any kernel, in a process of its own: TRITON_INTERPRET is read when a kernel is defined.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402


def _widened(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    bits = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).bfloat16().view(torch.int16)
    return bits.numpy().view(np.uint16)


_dot, _cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl


def _create_dot(self, a, b, *rest):
    return _dot(self, _widened(a), _widened(b), *rest)


def _cast_impl(self, source, target):
    if target.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
        return TensorHandle(_rounded(source.data), tl.bfloat16)
    return _cast(self, source, target)


InterpreterBuilder.create_dot = _create_dot
InterpreterBuilder.cast_impl = _cast_impl
