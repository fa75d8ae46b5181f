"""PyTorch's fused operators for encoders, which read the weights of Linear layers instead of calling the layers."""
from __future__ import annotations

from torch import nn

from fedms_ext.nn.frozen_linear import FrozenLinear

# What the forward method of a class looks at before it takes its fused operator. An encoder makes nested tensors for those of its
# layers, and looks at the first layer alone.
_SWITCHES: dict[type[nn.Module], str] = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
_BEFORE = "fedms_fused_path"    # the attribute of an encoder with the switch's value from before


def settle_fused_paths(model: nn.Module) -> None:
    """Switch the fused operators off in encoders with layers that must be called, and on again where there are none any more.

    In evaluation mode a fused operator would ignore experts, expand a quantized weight, and refuse weights of another dtype than
    that of the norms beside them. `attach`, `detach`, `quantize`, `dequantize` and `cast_frozen` call this.
    """
    for module in model.modules():
        switch = next((name for kind, name in _SWITCHES.items() if isinstance(module, kind)), None)
        if switch is None:
            continue
        if _must_be_called(module):
            module.__dict__.setdefault(_BEFORE, getattr(module, switch))
            setattr(module, switch, 0)
        elif _BEFORE in module.__dict__:
            setattr(module, switch, module.__dict__.pop(_BEFORE))


def _must_be_called(encoder: nn.Module) -> bool:
    dtypes = {p.dtype for p in encoder.parameters()}
    return len(dtypes) > 1 or any(isinstance(module, FrozenLinear) for module in encoder.modules())
