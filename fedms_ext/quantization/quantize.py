"""Quantize the frozen weights of a model in place, or round them to 16 bits, and restore the original weights."""
from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedms_ext.nn.expert_linear import ExpertLinear
from fedms_ext.nn.frozen_linear import FrozenLinear
from fedms_ext.nn.fused_paths import settle_fused_paths
from fedms_ext.nn.linear import is_linear, is_transposed, obstacle, reader, replaced_forward
from fedms_ext.nn.pairs import Pairs
from fedms_ext.nn.quantized_weight import QuantizedWeight, tensor_sha256
from fedms_ext.quantization.formats import HALVES, KINDS
from fedms_ext.reference import GROUP
from fedms_ext.sparse.surgery import Targets, matches


def quantize(model: nn.Module, kind: str = "int8", group: int = GROUP, *, exclude: Targets | None = None) -> list[str]:
    """Replace the frozen weights of a model's linear layers by quantized weights, in place. The original weights are freed.

    Each layer stays the same object and keeps its experts, hooks and attributes; layers without experts become
    `FrozenLinear`. A `state_dict` of the result loads into models that were quantized to the same format first. The following layers
    are not quantized:

    - layers whose weight requires a gradient, such as a trained head;
    - layers that share their weight with another module;
    - layers that `attach` does not accept: subclasses of `nn.Linear` that compute something else, and layers whose weight
      is computed (pruned or parametrized);
    - layers whose weight is read by the code of a surrounding module, as far as its source code shows. If such code is
      missed, it reads the expanded weight, and the result is still right.

    Args:
        model: Any module.
        kind: The format: `"int8"`, `"int8_rotated"`, `"fp16"`, `"bf16"`, `"nf4"` or `"int4"`; see `QuantizedWeight`.
        group: Number of values that share a scale in the 4-bit formats, 32 or 64.
        exclude: Layers that are not quantized, as name endings or a regular expression. The default is the output layer,
            `model.get_output_embeddings()`, because quantizing it affects the logits of a language model most. Pass `()` to
            quantize it too.

    Returns:
        Dotted names of the quantized layers, in the model's order.

    Raises:
        ValueError: If the kind or the group is unknown, `exclude` holds an ending of no layer's name, no layer can be quantized, a
            weight is not finite or beyond the range of fp16, or the forward method of a layer was replaced (by offloading, for
            example).
        RuntimeError: If an expert is merged into a weight.
        In all cases the model is unchanged.

    Warns:
        UserWarning: If more than half of the bytes of the frozen weights are not quantized, as in a mixture of experts that
            is stored as one tensor.
    """
    if kind not in KINDS:
        raise ValueError(f"cannot quantize to {kind!r}; expected {', '.join(KINDS)}")
    _check_endings(model, exclude)
    layers = _frozen_linears(model, exclude)
    if not layers:
        if any(isinstance(module, QuantizedWeight) for module in model.modules()):
            raise ValueError(f"{type(model).__name__} is quantized already; call fedms_ext.dequantize with the original weights first")
        raise ValueError(f"{type(model).__name__} has no Linear layer with a frozen weight of its own that can be quantized; "
                         "freeze it first (requires_grad_(False)), or attach experts, which does so")
    replaced = [(name, reason) for name, layer in layers.items() if (reason := replaced_forward(layer)) is not None]
    if replaced:
        raise ValueError("layer {!r} cannot be quantized: {}".format(*replaced[0]))
    merged = [name for name, layer in layers.items() if getattr(layer, "merged", None) is not None]
    if merged:
        raise RuntimeError(f"an expert is merged into {merged[0]!r}; call unmerge before the weights are quantized")
    frozen = {name: _quantized(name, layer, kind, group) for name, layer in layers.items()}
    _warn_of_unquantized(model, layers)
    for name, layer in layers.items():
        (layer if isinstance(layer, FrozenLinear) else FrozenLinear.take(layer)).freeze(frozen[name])
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
    settle_fused_paths(model)
    return list(layers)


def _check_endings(model: nn.Module, exclude: Targets | None) -> None:
    names = [name for name, layer in model.named_modules() if is_linear(layer)]
    for ending in () if exclude is None or isinstance(exclude, str) else exclude:
        if not any(matches(name, [ending]) for name in names):
            raise ValueError(f"no Linear layer's name ends in {ending!r}; their names end in "
                             f"{', '.join(sorted({name.rpartition('.')[2] for name in names}))}")


def _frozen_linears(model: nn.Module, exclude: Targets | None) -> dict[str, Any]:
    """Return the linear layers, by dotted name, with a frozen weight that no other module shares or reads, without those in `exclude`."""
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
    return layers


def _quantized(name: str, layer: nn.Module, kind: str, group: int) -> QuantizedWeight:
    weight: Any = layer.weight
    if weight.is_meta:
        raise ValueError(f"layer {name!r} cannot be quantized: its weight is offloaded or was never loaded; load it first")
    try:
        return QuantizedWeight(weight.t() if is_transposed(layer) else weight, kind, group)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from None


def _warn_of_unquantized(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    quantized = {id(layer.weight) for layer in layers.values()}
    experts = {id(p) for module in model.modules() if isinstance(module, Pairs) for p in module.parameters()}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad and id(p) not in experts}
    stays = {name: p.nbytes for name, p in frozen.items() if id(p) not in quantized}
    share = sum(stays.values()) / sum(p.nbytes for p in frozen.values())
    if share > 0.5:
        largest = sorted(stays, key=lambda name: -stays[name])[:3]
        warnings.warn(f"{share:.0%} of the bytes of the frozen weights are not quantized; the largest such weights are "
                      f"{', '.join(largest)}. Only linear layers that own their weight matrix are quantized", stacklevel=3)


@torch.no_grad()
def cast_frozen(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Convert the frozen weights and biases of a model's linear layers to a dtype of 16 bits, in place, and leave all else as it is.

    This is only for models that run under `torch.autocast`. In every pass autocast copies a float32 weight into its own dtype, and
    keeps the copy until the backward pass. A weight that is stored in this dtype takes half of the memory and needs no copy, and the
    model computes the same bits. Experts, norms and embeddings stay in float32, which an optimizer needs for its steps; PEFT does
    the same with adapters on a base model in bfloat16. Outside of autocast such a layer refuses a float32 input.

    Weights of convolutions and of `nn.MultiheadAttention` stay in float32 too, although they gave the same bits in trials: whether
    code around a layer reads its values is checked for linear layers alone.

    Args:
        model: Any module.
        dtype: `torch.bfloat16` or `torch.float16`.

    Returns:
        Dotted names of the layers that are in this dtype now, in the model's order: those that `quantize` takes by default, without
        layers that are quantized already, in float64, offloaded or patched.

    Raises:
        ValueError: If the dtype is another one, or a weight or bias is beyond its range. The model is unchanged then.
    """
    if dtype not in HALVES.values():
        raise ValueError(f"cannot cast frozen weights to {dtype}; expected torch.bfloat16 or torch.float16")
    layers = {name: layer for name, layer in _frozen_linears(model, None).items()
              if layer.weight.is_floating_point() and layer.weight.dtype != torch.float64 and replaced_forward(layer) is None}
    frozen = {f"{name}.{kind}": p for name, layer in layers.items() for kind, p in layer._parameters.items()
              if p is not None and not p.requires_grad}
    for name, p in frozen.items():
        if p.numel() and not p.is_meta and not (largest := p.abs().amax()).to(dtype).isfinite():
            raise ValueError(f"{name} has a value of magnitude {largest:.3g}, beyond the range of {str(dtype).removeprefix('torch.')}; "
                             "use bfloat16 or float32")
    for p in frozen.values():
        p.data = p.to(dtype)
    settle_fused_paths(model)
    return list(layers)


@torch.no_grad()
def dequantize(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Restore the original weights of a quantized model in place, so that experts can be merged and exported.

    Args:
        model: A model that `quantize` changed.
        weights: The original weight of each quantized layer under the key `<dotted name>.weight`, as in the state dict of
            the model before `quantize`. Each weight is compared with the SHA-256 of the weight that was quantized.

    Returns:
        Dotted names of the restored layers, in the model's order.

    Raises:
        KeyError: If a weight is missing.
        ValueError: If no layer is quantized, or a weight differs from the one that was quantized.
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
                             f"expected {layer.frozen.sha256}; pass the weights that the model had before quantize")
    for name, layer in layers.items():
        layer.thaw(weights[f"{name}.weight"].detach().to(layer.frozen.scale.device, copy=True))
        if not isinstance(layer, ExpertLinear):
            layer.leave()
    settle_fused_paths(model)
    return list(layers)
