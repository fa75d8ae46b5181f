"""Quantize the frozen weights of a model in place, and put the original ones back."""
from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedms_ext.nn.expert_linear import ExpertLinear
from fedms_ext.nn.frozen_linear import FrozenLinear
from fedms_ext.nn.linear import is_linear, is_transposed, obstacle, reader, replaced_forward
from fedms_ext.nn.quantized_weight import QuantizedWeight, tensor_sha256
from fedms_ext.quantization.formats import KINDS
from fedms_ext.reference import GROUP
from fedms_ext.sparse.surgery import Targets, matches


def quantize(model: nn.Module, kind: str = "int8", group: int = GROUP, *, exclude: Targets | None = None) -> list[str]:
    """Replaces the frozen weights of a model's linear layers by quantized ones, in place; the originals are dropped.

    Each layer stays the same object, with its experts, hooks and attributes; plain ones become `FrozenLinear`. Layers are
    those of `attach`. Left alone are layers whose weight still asks for a gradient (a head that is trained), layers that
    share their weight with another module, subclasses of `nn.Linear` that compute something else, layers whose weight
    is computed (pruned, parametrized) or lies elsewhere, and those whose weight the code around them reads, as far as one
    sees that: where it reads a quantized one all the same, it gets it expanded.

    Args:
        model: any module.
        kind: the format, `"int8"`, `"fp16"`, `"bf16"`, `"nf4"` or `"int4"`; see `QuantizedWeight`.
        group: values that share a scale in the 4-bit formats, 32 or 64.
        exclude: name endings or a regular expression: the layers to leave alone. By default the output layer that
            `model.get_output_embeddings()` names, since a language model's logits suffer most; `()` leaves out none.

    Returns:
        Dotted names of the layers that are quantized now, in the model's order.

    Raises:
        ValueError: for an unknown kind or group, if no layer can be quantized, or if a weight is not finite or beyond fp16,
            or a layer's forward method was replaced (offloading), so that it would read no weight.
        RuntimeError: if an expert is merged into a weight.
        The model is then as it was.

    Warns:
        UserWarning: if most bytes of the frozen weights stay as they are (a mixture of experts in one tensor, embeddings).
    """
    if kind not in KINDS:
        raise ValueError(f"cannot quantize to {kind!r}; expected {', '.join(KINDS)}")
    layers = _quantizable(model, exclude)
    replaced = [(name, reason) for name, layer in layers.items() if (reason := replaced_forward(layer)) is not None]
    if replaced:
        raise ValueError("layer {!r} cannot be quantized: {}".format(*replaced[0]))
    merged = [name for name, layer in layers.items() if getattr(layer, "merged", None) is not None]
    if merged:
        raise RuntimeError(f"an expert is merged into {merged[0]!r}; call unmerge before the weights are quantized")
    frozen = {name: _quantized(name, layer, kind, group) for name, layer in layers.items()}
    _tell_what_stays(model, layers)
    for name, layer in layers.items():
        (layer if isinstance(layer, FrozenLinear) else FrozenLinear.take(layer)).freeze(frozen[name])
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
    for module in model.modules():
        # Outside of training PyTorch's own encoder layers pass their Linear layers by, and read the weights.
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, FrozenLinear) for m in module.modules()):
            module.activation_relu_or_gelu = 0
    return list(layers)


def _quantizable(model: nn.Module, exclude: Targets | None) -> dict[str, nn.Module]:
    owners: Counter[int] = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    head = getattr(model, "get_output_embeddings", lambda: None)() if exclude is None else None
    layers = {}
    for name, layer in model.named_modules():
        weight = layer._parameters.get("weight")
        if weight is None or not is_linear(layer) or weight.requires_grad or owners[id(weight)] > 1 or layer is head:
            continue
        if exclude and matches(name, exclude):
            continue
        if reader(model, name) is not None:
            continue
        if isinstance(layer, FrozenLinear) or replaced_forward(layer) or obstacle(layer) is None:
            layers[name] = layer
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Linear layer with a frozen weight of its own that can be quantized; "
                         "freeze it first (requires_grad_(False)), or attach experts, which does so")
    return layers


def _quantized(name: str, layer: nn.Module, kind: str, group: int) -> QuantizedWeight:
    weight: Any = layer.weight
    if weight.is_meta:
        raise ValueError(f"layer {name!r} cannot be quantized: its weight is offloaded or was never loaded; load it first")
    try:
        return QuantizedWeight(weight.t() if is_transposed(layer) else weight, kind, group)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from None


def _tell_what_stays(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    quantized = {id(layer.weight) for layer in layers.values()}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    stays = {name: p.nbytes for name, p in frozen.items() if id(p) not in quantized}
    share = sum(stays.values()) / sum(p.nbytes for p in frozen.values())
    if share > 0.5:
        largest = sorted(stays, key=lambda name: -stays[name])[:3]
        warnings.warn(f"{share:.0%} of the bytes of the frozen weights stay as they are, the most of them in "
                      f"{', '.join(largest)}: only linear layers with a matrix of their own are quantized", stacklevel=3)


@torch.no_grad()
def dequantize(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Puts the original weights back into a quantized model, in place; then experts can be merged and exported.

    Args:
        model: a model that `quantize` changed.
        weights: the original weight of every quantized layer, under `<dotted name>.weight`, such as the
            state dict of the model as it was loaded. Each is checked against its SHA-256.

    Returns:
        Dotted names of the layers that have their weight again, in the model's order.

    Raises:
        KeyError: if a weight is missing.
        ValueError: if nothing is quantized, or a weight is not the one that was quantized.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FrozenLinear) and m.frozen is not None}
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no quantized layer")
    for name, layer in layers.items():
        if f"{name}.weight" not in weights:
            raise KeyError(f"the original weight {name + '.weight'!r} is missing")
        weight = weights[f"{name}.weight"]
        found = tensor_sha256(weight.t() if is_transposed(layer) else weight)
        if found != layer.frozen.sha256:
            raise ValueError(f"{name}.weight is not the weight that was quantized: its SHA-256 is {found}, "
                             f"expected {layer.frozen.sha256}; load the model that `quantize` was given")
    for name, layer in layers.items():
        layer.thaw(weights[f"{name}.weight"].detach().to(layer.frozen.scale.device, copy=True))
        if not isinstance(layer, ExpertLinear):
            layer.leave()
    return list(layers)
