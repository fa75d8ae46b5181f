"""Gives models of the transformers library the attention of this package."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fedms_ext.operators.attention import attention

NAME = "fedms_ext"


def use_attention(model: nn.Module) -> bool:
    """Let a model of the transformers library compute attention by `fedms_ext.attention` where it is faster.

    Only models whose attention is PyTorch's ("sdpa") are changed, and only what that computes: calls with dropout, a causal
    mask that is not written out, grouped heads or a position bias stay with it.

    Args:
        model: any module.

    Returns:
        Whether the model was changed; it is not if it is of no such library or has another attention.
    """
    if getattr(getattr(model, "config", None), "_attn_implementation", None) != "sdpa":
        return False
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError:  # of a version without interfaces for attention
        return False

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)  # type: ignore[operator]  # a method of the library's models
    return bool(model.config._attn_implementation == NAME)  # type: ignore[union-attr]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute attention as the library asks for it: q, k and v (batch, heads, tokens, width); out (batch, tokens, heads, width)."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    other = [name for name in ("position_bias", "softcap") if options.get(name) is not None]
    if dropout > 0.0 or other or key.shape[1] != query.shape[1] or (causal and attention_mask is None and query.shape[2] > 1):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )  # fmt: skip
    out = attention(query, key, value, attention_mask, scaling)
    return out.transpose(1, 2).contiguous(), None
