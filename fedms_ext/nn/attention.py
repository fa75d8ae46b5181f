"""Let models of the transformers library use the attention of this package."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fedms_ext.nn.frozen_linear import FrozenLinear
from fedms_ext.operators.attention import attention
from fedms_ext.quantization.formats import HALVES

NAME = "fedms_ext"


def use_attention(model: nn.Module) -> bool:
    """Let a model of the transformers library compute attention with `fedms_ext.attention`.

    Where the frozen weights of an attention module's linear layers are stored in 8 or 4 bits (`fedms_ext.quantize`), its products
    may round their operands to bfloat16. Such layers round their own inputs to 8 bits, which changes the result more.

    Only models that use PyTorch's attention ("sdpa") are changed. Calls with dropout, an implicit causal mask, grouped heads, a
    position bias or a soft cap are still computed by the library's "sdpa" function.

    Args:
        model: Any module.

    Returns:
        Whether the model was changed. It is not changed if it is not a model of the library, uses another attention, or comes from
        a version of the library in which attention cannot be registered.
    """
    if getattr(getattr(model, "config", None), "_attn_implementation", None) != "sdpa":
        return False
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError:  # a version of the library in which attention cannot be registered
        return False

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)  # type: ignore[operator]  # a method of the library's models
    return bool(model.config._attn_implementation == NAME)  # type: ignore[union-attr]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute attention with the signature of the library.

    Args:
        query, key, value: (batch, heads, tokens, width); the others are those of the library's "sdpa" function.

    Returns:
        The output (batch, tokens, heads, width), and None instead of the probabilities.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    other = [name for name in ("position_bias", "softcap") if options.get(name) is not None]
    if dropout > 0.0 or other or key.shape[1] != query.shape[1] or (causal and attention_mask is None and query.shape[2] > 1):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )  # fmt: skip
    out = attention(query, key, value, attention_mask, scaling, rounded=_has_rounding_layers(module))
    return out.transpose(1, 2).contiguous(), None


def _has_rounding_layers(module: nn.Module) -> bool:
    """Return whether a linear layer of an attention module holds its weight in a format whose kernels round x to 8 bits."""
    return any(isinstance(layer, FrozenLinear) and layer.frozen is not None and layer.frozen.kind not in HALVES
               for layer in module.children())
