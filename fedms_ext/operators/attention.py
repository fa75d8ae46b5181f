"""Attention of short sequences on a CPU, forward and backward, in one C++ call a pass; everything else is PyTorch's own.

PyTorch's kernel is made for long sequences: of a training step with one block on a cached int8 prefix it takes a fifth. On a Zen 4
with AVX-512 this one takes 0.7 of its time at 64 tokens and 0.8 at 197; with AVX2 it was slower, so it is not used there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from .dispatch import is_observed

# A block of rows of the probabilities and all keys and values of a head should stay in the L2 cache.
LONGEST = 512


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Compute softmax(scale * q k^T + mask) v for every head.

    Args:
        q: (batch, heads, queries, width), floating.
        k: (batch, heads, keys, width).
        v: (batch, heads, keys, width).
        mask: (batch or 1, heads or 1, queries or 1, keys), floating (added) or bool (True: take part), or None.
        scale: a number; None means 1 / sqrt(width).

    Returns:
        (batch, heads, queries, width), as `torch.nn.functional.scaled_dot_product_attention` gives it, in float32 up to its
        rounding. Gradients flow to q, k and v; a second one is a RuntimeError where the C++ kernel ran.

    Raises:
        RuntimeError: for shapes that do not fit, from PyTorch.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not is_observed() and _is_short(q, k, v, mask):
        added = mask if mask is None or mask.dtype != torch.bool else _added(mask)
        out = _Attention.apply(q, k, v, added, scale)
        if out is not None:
            return out
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _is_short(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Return whether the kernel is made for a call; what it does not take for other reasons it declines itself."""
    tensors = (q, k, v) if mask is None else (q, k, v, mask)
    return (
        all([type(tensor) is Tensor and tensor.is_cpu and not tensor.is_neg() for tensor in tensors])
        and k.shape[-2] <= LONGEST
        and not (mask is not None and mask.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and _C.build_info()["isa_used"] == "avx512"
    )


def _added(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill_(mask.logical_not(), float("-inf"))


class _Attention(torch.autograd.Function):
    """The kernel with its gradients; None where it declines."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor | None:
        found = _C.attention_forward(q, k, v, mask, scale)
        if found is None:
            return None
        out, softmax = found
        ctx.save_for_backward(q, k, v, mask, softmax)
        ctx.scale = scale
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, softmax = ctx.saved_tensors
        dout = dout if dout.dtype == torch.float32 and dout.stride(-1) == 1 else dout.float().contiguous()
        gradients = _C.attention_backward(dout, q, k, v, mask, ctx.scale, softmax)
        dq, dk, dv = [gradient.transpose(1, 2) for gradient in gradients]
        return dq, dk, dv, None, None
