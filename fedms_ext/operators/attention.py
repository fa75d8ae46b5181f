"""Attention on short sequences on a CPU, one C++ call for the forward and one for the backward pass; PyTorch computes the rest.

PyTorch's kernel is designed for long sequences. It takes a fifth of a training step with one block on a cached int8 prefix. On a
Zen 4 with AVX-512 the kernel of this package takes 0.79 of its time at 64 tokens and 0.89 at 197, and 0.59 and 0.52 where
operands are rounded to bfloat16. With AVX2 it was slower than PyTorch's, so it is not used there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from .dispatch import is_autocast_enabled, is_observed

# Largest number of keys: all keys and values of a head and a block of rows of the probabilities should fit into the L2 cache.
LONGEST = 512
_HAS_KERNEL = _C.build_info()["isa_used"] == "avx512"


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None, rounded: bool = False
) -> Tensor:
    """Compute softmax(scale * q k^T + mask) v for every head.

    Args:
        q: (batch, heads, queries, width), floating.
        k: (batch, heads, keys, width).
        v: (batch, heads, keys, width).
        mask: (batch or 1, heads or 1, queries or 1, keys), or None. A floating mask is added to the logits; a bool mask is True
            for each key that a query attends to.
        scale: A number; None means 1 / sqrt(width).
        rounded: Whether the operands of the products (q, k, v, the probabilities and the gradients) may be rounded to bfloat16.
            The C++ kernel does so on CPUs with AVX-512 BF16, which multiply such values at twice the rate of float32; sums and
            the softmax stay in float32. Results and gradients then differ by about 0.4 % from those in float32.

    Returns:
        (batch, heads, queries, width), equal to the result of `torch.nn.functional.scaled_dot_product_attention` up to rounding.
        Gradients flow to q, k and v. Differentiating a gradient of the C++ kernel again raises a RuntimeError.

    Raises:
        RuntimeError: If the shapes do not fit; the error is PyTorch's.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not is_observed() and _is_short(q, k, v, mask):
        added = mask if mask is None or mask.dtype != torch.bool else _added(mask)
        out = _Attention.apply(q, k, v, added, scale, rounded)
        if out is not None:
            return out
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _is_short(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Return whether to try the C++ kernel. It still declines shapes, strides and dtypes that it does not support."""
    tensors = (q, k, v) if mask is None else (q, k, v, mask)
    return (
        _HAS_KERNEL
        and all([type(tensor) is Tensor and tensor.is_cpu for tensor in tensors])
        and k.shape[-2] <= LONGEST
        and not (mask is not None and mask.requires_grad)
        and not is_autocast_enabled()
    )


def _added(mask: Tensor) -> Tensor:
    """Return a bool mask as one that is added to the logits, in float32."""
    return torch.zeros(mask.shape).masked_fill_(mask.logical_not(), float("-inf"))


class _Attention(torch.autograd.Function):
    """The C++ kernel with its gradients. The result is None if the kernel declines the call."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, rounded: bool
    ) -> Tensor | None:
        found = _C.attention_forward(q, k, v, mask, scale, rounded)
        if found is None:
            return None
        out, softmax = found
        ctx.save_for_backward(q, k, v, mask, softmax)
        ctx.scale, ctx.rounded = scale, rounded
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, softmax = ctx.saved_tensors
        dout = dout if dout.dtype == torch.float32 and dout.stride(-1) == 1 else dout.float().contiguous()
        gradients = _C.attention_backward(dout, q, k, v, mask, ctx.scale, ctx.rounded, softmax)
        dq, dk, dv = [gradient.transpose(1, 2) for gradient in gradients]
        return dq, dk, dv, None, None, None
