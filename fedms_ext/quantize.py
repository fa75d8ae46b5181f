"""Quantise the frozen weights of a model in place, and put the original ones back."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedms_ext.formats import KINDS
from fedms_ext.nn.expert_linear import ExpertLinear
from fedms_ext.nn.frozen_linear import FrozenLinear
from fedms_ext.nn.quantised_weight import QuantisedWeight, tensor_sha256
from fedms_ext.reference import GROUP


def quantize(model: nn.Module, kind: str = "int8", group: int = GROUP) -> list[str]:
    """Replaces the frozen weights of a model's Linear layers by quantised ones, in place; the originals are dropped.

    Layers with experts keep them; plain Linear layers become `FrozenLinear`. Left alone are layers whose weight still
    asks for a gradient (a head that is trained), layers that share their weight with another module, and subclasses
    of `nn.Linear`. Attach experts first: `attach` takes plain Linear layers.

    Args:
        model: any module.
        kind: the format, `"int8"`, `"fp16"`, `"bf16"`, `"nf4"` or `"int4"`; see `QuantisedWeight`.
        group: values that share a scale in the 4-bit formats, 32 or 64.

    Returns:
        Dotted names of the layers that are quantised now, in the model's order.

    Raises:
        ValueError: for an unknown kind or group, if no layer can be quantised, or if a weight is not finite or beyond fp16.
        RuntimeError: if an expert is merged into a weight.
    """
    if kind not in KINDS:
        raise ValueError(f"cannot quantise to {kind!r}; expected {', '.join(KINDS)}")
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    layers = {
        name: layer for name, layer in model.named_modules()
        if type(layer) in (nn.Linear, ExpertLinear) and layer.weight is not None
        and not layer.weight.requires_grad and owners[id(layer.weight)] == 1
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Linear layer with a frozen weight; freeze it first "
                         "(requires_grad_(False)), or attach experts, which does so")
    merged = [name for name, layer in layers.items() if getattr(layer, "merged", None) is not None]
    if merged:
        raise RuntimeError(f"an expert is merged into {merged[0]!r}; call unmerge before the weights are quantised")
    frozen = {name: QuantisedWeight(layer.weight, kind, group) for name, layer in layers.items()}
    for name, layer in layers.items():
        if isinstance(layer, ExpertLinear):
            layer.freeze(frozen[name])
        else:
            _replace(model, name, FrozenLinear(frozen[name], layer.bias))
    for module in model.modules():
        # Outside of training PyTorch's own encoder layers pass their Linear layers by, and read the weights.
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, FrozenLinear) for m in module.children()):
            module.activation_relu_or_gelu = 0
    return list(layers)


@torch.no_grad()
def dequantize(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Puts the original weights back into a quantised model, in place; then experts can be merged and exported.

    Args:
        model: a model that `quantize` changed.
        weights: the original weight (N, K) of every quantised layer, under `<dotted name>.weight`, such as the
            state dict of the model as it was loaded. Each is checked against its SHA-256.

    Returns:
        Dotted names of the layers that have their weight again, in the model's order.

    Raises:
        KeyError: if a weight is missing.
        ValueError: if nothing is quantised, or a weight is not the one that was quantised.
    """
    layers = {name: m for name, m in model.named_modules() if getattr(m, "frozen", None) is not None}
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no quantised layer")
    for name, layer in layers.items():
        if f"{name}.weight" not in weights:
            raise KeyError(f"the original weight {name + '.weight'!r} is missing")
        found = tensor_sha256(weights[f"{name}.weight"])
        if found != layer.frozen.sha256:
            raise ValueError(f"{name}.weight is not the weight that was quantised: its SHA-256 is {found}, "
                             f"expected {layer.frozen.sha256}; load the model that `quantize` was given")
    for name, layer in layers.items():
        weight = weights[f"{name}.weight"].detach().to(layer.frozen.scale.device, copy=True)
        if isinstance(layer, ExpertLinear):
            layer.thaw(weight)
        else:
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), layer.bias
            _replace(model, name, linear)
    return list(layers)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    if not name:
        raise ValueError("the model is a Linear layer itself, which cannot be replaced in place; wrap it in a module")
    layer.train(model.get_submodule(name).training)
    model.set_submodule(name, layer)
