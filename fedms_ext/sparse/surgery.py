"""Put experts into any model's Linear layers, take them out, merge them."""
from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedms_ext.nn.expert_linear import ExpertLinear
from fedms_ext.nn.frozen_linear import FrozenLinear
from fedms_ext.nn.fused_paths import settle_fused_paths
from fedms_ext.nn.linear import class_name, is_linear, obstacle, reader, replaced_forward
from fedms_ext.nn.lora import LoRA, check_experts
from fedms_ext.sparse.siblings import group_siblings
from fedms_ext.sparse.skipping import restore_forward

ALL_LINEAR = "all-linear"


def expert_layers(model: nn.Module) -> dict[str, ExpertLinear]:
    """Return all `ExpertLinear` layers of a model by dotted name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ExpertLinear)}


def find_blocks(model: nn.Module) -> str:
    """Return the dotted name of the model's list of transformer blocks (`""` for the model itself).

    It is the longest outermost `nn.ModuleList` or `nn.Sequential` whose members are of one class, contain Linear layers, and
    are not Linear layers themselves.

    Raises:
        ValueError: If there is no such list, or several of the same length (two towers); pass `blocks=` to `attach` then.
    """
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) == 0:
            continue
        one_class = len({type(m) for m in module}) == 1
        hold_linear = all(any(is_linear(m) for m in block.modules() if m is not block) for block in module)
        nested = any(name.startswith(_prefix(outer)) for outer in found)
        if one_class and hold_linear and not nested:
            found[name] = len(module)
    longest = [name for name, n in found.items() if n == max(found.values())]
    if len(longest) != 1:
        what = f"several lists of {found[longest[0]]} blocks: {', '.join(longest)}" if longest else "no list of blocks"
        raise ValueError(f"found {what} in {type(model).__name__}; pass blocks=\"dotted.name\" of the nn.ModuleList "
                         "or nn.Sequential that holds the transformer blocks; if the model has several towers, attach to each "
                         "tower separately")
    return longest[0]


def _prefix(name: str) -> str:
    """Return the prefix of the dotted names of a module's submodules."""
    return f"{name}." if name else ""


def block_list(model: nn.Module, blocks: str) -> nn.ModuleList | nn.Sequential:
    """Return the list of blocks at a dotted name.

    Raises:
        ValueError: If there is no such module, or it is not a list of modules.
    """
    try:
        found = model.get_submodule(blocks)
    except AttributeError:
        raise ValueError(f"the model has no module {blocks!r}, which should be its list of blocks") from None
    if not isinstance(found, (nn.ModuleList, nn.Sequential)):
        raise ValueError(f"{blocks!r} is a {type(found).__name__}; a list of blocks is an nn.ModuleList or nn.Sequential")
    return found


Targets = str | Sequence[str]


def attach(model: nn.Module, targets: Targets, experts: Mapping[str, LoRA], blocks: str | None = None, *,
           exclude: Targets = (), overrides: Mapping[str, Mapping[str, LoRA]] | None = None, group: bool | None = None) -> list[str]:
    """Freeze the model and add LoRA experts to its target layers, in place.

    Each layer stays the same object, so its hooks, its attributes and all references to it remain valid. A second call with
    new expert names adds them to the same layers and does not change the experts that are there. New pairs are frozen and
    have B = 0, so the output of the model does not change; call `activate` to train them.

    Layers can be `nn.Linear`, subclasses of it that compute the same function, and GPT-2's Conv1D.

    Args:
        model: Any module. The first call sets `requires_grad=False` on all its parameters.
        targets: As in PEFT: `"all-linear"` (all linear layers inside the blocks), a list of name endings
            (`["query", "value"]`), or a regular expression that must match the whole dotted name.
        experts: Shape of each expert, by name.
        blocks: Dotted name of the list of transformer blocks. By default `find_blocks` finds it.
        exclude: Targets that get no experts, as name endings or a regular expression.
        overrides: Other shapes for some targets, by name ending, such as `{"fc1": {"global": LoRA(rank=4, alpha=8)}}`. If
            several endings match, the longest one is used.
        group: Whether to compute the query, key and value of an attention layer together, and the two inputs of a gated MLP,
            where the names of the layers tell that they are such; see `fedms_ext.group`. None: on a GPU, where that was measured
            to be faster, and not on a CPU, because there a whole training step of MiniLM on int8 gains nothing that can be measured
            (0.99 and 1.02 times as fast), although layers of 2048 rows by themselves gain up to 12 %
            (`bench/layers/bench_cpu_siblings.py`).

    Returns:
        Dotted names of the layers that now hold the experts, in the model's order.

    Raises:
        TypeError: If `targets` or `experts` are of another type.
        ValueError: If `targets` or one of its entries matches no layer, or it is no regular expression; if a target lies outside of
            the blocks, is known under several names, or cannot hold experts (its class computes something else, its weight is
            computed or offloaded, its forward method was replaced, or a surrounding module reads its weight instead of calling
            it); if the name of an expert is taken or unusable, or its dropout differs from that of the layer's other experts; or if
            the list of blocks cannot be found. The model is unchanged then.

    Warns:
        UserWarning: If `"all-linear"` omits layers because a surrounding module reads their weight.
    """
    _check_arguments(targets, exclude, experts, *(overrides or {}).values())
    before = getattr(model, "fedms_blocks", None)
    if blocks is None:
        blocks = find_blocks(model) if before is None else before
    elif before not in (None, blocks):
        raise ValueError(f"blocks={blocks!r}, but the model's experts are attached to the blocks {before!r}")
    number = {f"{_prefix(blocks)}{i}.": i + 1 for i in range(len(block_list(model, blocks)))}
    # Everything is checked before anything is changed.
    chosen = _chosen(model, targets, exclude, tuple(number))
    shapes = {name: _shapes_of(name, experts, overrides or {}) for name in chosen}
    numbers = {name: _check_layer(model, name, layer, shapes[name], number) for name, layer in chosen.items()}

    if before is None:
        model.requires_grad_(False)
    for name, layer in chosen.items():
        if isinstance(layer, ExpertLinear):
            for expert, lora in shapes[name].items():
                layer.add_expert(expert, lora)
        else:
            ExpertLinear.join(layer, shapes[name]).block = numbers[name]
    model.fedms_blocks = blocks  # type: ignore[assignment]  # torch's stubs: only tensors and modules
    settle_fused_paths(model)
    if group is not False:
        group_siblings(model, on_cpu=group is True)
    return list(chosen)


def _check_arguments(targets: Targets, exclude: Targets, *shapes: Mapping[str, LoRA]) -> None:
    """Check the types of what `attach` is given; the first of the `shapes` are the experts'."""
    example = 'pass e.g. {"global": LoRA(rank=8, alpha=16)}'
    for named in shapes:
        if not isinstance(named, Mapping):
            raise TypeError(f"experts are given as a dictionary of LoRA by name, got {type(named).__name__}; {example}")
        for name, lora in named.items():
            if not isinstance(lora, LoRA):
                raise TypeError(f"expert {name!r} is {lora!r}, expected a LoRA; {example}")
    if not shapes[0]:
        raise ValueError(f"no experts given; {example}")
    for what, names in (("targets", targets), ("exclude", exclude)):
        if isinstance(names, str):
            try:
                re.compile(names)
            except re.error as error:
                raise ValueError(f"{what}={names!r} is no regular expression: {error}; pass a list of name endings, or repair it") from None
        elif not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"{what}={names!r}, expected {ALL_LINEAR!r}, a regular expression, or a list of name endings")


def _chosen(model: nn.Module, targets: Targets, exclude: Targets, blocks: tuple[str, ...]) -> dict[str, nn.Module]:
    """Return the layers that get experts, by name. Raise a ValueError for layers that are never called."""
    linears = {name: m for name, m in model.named_modules() if is_linear(m)}
    matched = [name for name in _matching(model, linears, targets, blocks) if not (exclude and matches(name, exclude))]
    if not matched:
        raise ValueError(f"exclude={exclude!r} leaves none of the targets {targets!r}")
    readers = {name: found for name in matched if (found := reader(model, name)) is not None}
    told = ", ".join(f"{name!r} (read by {found})" for name, found in readers.items())
    if readers and (targets != ALL_LINEAR or len(readers) == len(matched)):
        raise ValueError(f"the code around these layers computes with their weight instead of calling them, so experts "
                         f"would change nothing: {told}; choose other targets")
    if readers:
        warnings.warn(f"no experts join these layers, since the code around them computes with their weight instead of "
                      f"calling them: {told}", stacklevel=3)
    return {name: linears[name] for name in matched if name not in readers}


def _check_layer(model: nn.Module, name: str, layer: nn.Module, experts: Mapping[str, LoRA],
                 blocks: Mapping[str, int]) -> int:
    """Return the number of the block that contains a layer. Raise a ValueError if the layer cannot hold the experts."""
    names = [other for other, module in model.named_modules(remove_duplicate=False) if module is layer]
    if len(names) > 1:
        raise ValueError(f"{', '.join(names)} are one and the same layer; experts need a layer of their own")
    block = next((i for prefix, i in blocks.items() if f"{name}.".startswith(prefix)), None)
    if block is None:
        where = next(iter(blocks)).rstrip(".").rpartition(".")[0]
        raise ValueError(f"target {name!r} lies outside the blocks {where!r}; experts are activated block by block, so their "
                         "layers must lie inside one")
    if reason := _refusal(layer):
        raise ValueError(f"layer {name!r} ({class_name(layer)}) cannot hold experts: {reason}")
    try:
        check_experts(getattr(layer, "experts", {}), experts)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from None
    return block


def _shapes_of(name: str, experts: Mapping[str, LoRA], overrides: Mapping[str, Mapping[str, LoRA]]) -> dict[str, LoRA]:
    endings = [ending for ending in overrides if matches(name, [ending])]
    other = overrides[max(endings, key=len)] if endings else {}
    if unknown := sorted(set(other) - set(experts)):
        raise ValueError(f"overrides name the experts {unknown}, expected some of {sorted(experts)}")
    return {expert: other.get(expert, lora) for expert, lora in experts.items()}


def matches(name: str, targets: Targets) -> bool:
    """Return whether a dotted name matches one of several name endings, or as a whole a regular expression."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == t or name.endswith("." + t) for t in targets)


def _matching(model: nn.Module, linears: Mapping[str, nn.Module], targets: Targets, blocks: tuple[str, ...]) -> list[str]:
    if targets == ALL_LINEAR:
        matched = [name for name in linears if f"{name}.".startswith(blocks)]
    else:
        matched = [name for name in linears if matches(name, targets)]
    idle = [] if isinstance(targets, str) else [t for t in targets if not any(matches(name, [t]) for name in linears)]
    if idle or not matched:
        what = idle or repr(targets)
        others = {class_name(m) for name, m in model.named_modules()
                  if targets != ALL_LINEAR and name and not is_linear(m) and matches(name, idle or targets)}
        told = f" (they name {', '.join(sorted(others))}, which experts cannot join)" if others else ""
        raise ValueError(f"targets {what} match no Linear layer{told}; its layers end in {_endings(linears)}")
    return matched


def _endings(linears: Mapping[str, nn.Module]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears})) or "(there are none)"


def _refusal(layer: nn.Module) -> str | None:
    return replaced_forward(layer) if isinstance(layer, FrozenLinear) else obstacle(layer)


def detach(model: nn.Module) -> None:
    """Turn every `ExpertLinear` into its original class, in place. The experts are deleted; `merge` one first to keep it.
    The parameters stay frozen."""
    for layer in expert_layers(model).values():
        layer.leave()
    restore_forward(model)
    settle_fused_paths(model)
    model.__dict__.pop("fedms_blocks", None)


def merge(model: nn.Module, expert: str) -> None:
    """Add an expert to the weights of all layers in which it is applied. The output of the model does not change.

    The original weights are kept for `unmerge`. Layers in which the expert is off are not changed.

    Raises:
        KeyError: If no layer has the expert.
        RuntimeError: If the expert is off in all layers, an expert is merged already, a gate is set, or a weight is
            quantized.
        ValueError: If a merged weight would hold an infinity or a NaN, or a weight is offloaded.
        In all cases the model is unchanged.
    """
    layers = layers_of(model, expert)
    merged = sorted({layer.merged[0] for layer in expert_layers(model).values() if layer.merged is not None})
    if merged:
        raise RuntimeError(f"experts {merged} are merged already; call unmerge first")
    applied = {name: layer for name, layer in layers.items() if expert in layer.applied}
    if not applied:
        raise RuntimeError(f"expert {expert!r} is off in every layer, so there is nothing to merge; activate it first")
    done: list[ExpertLinear] = []
    try:
        for name, layer in applied.items():
            try:
                layer.merge(expert)
            except (RuntimeError, ValueError) as error:
                raise type(error)(f"layer {name!r}: {error}") from None
            done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise


def unmerge(model: nn.Module) -> None:
    """Restore the weights from before `merge`, bit for bit.

    Raises:
        RuntimeError: If no expert is merged.
    """
    layers = [layer for layer in expert_layers(model).values() if layer.merged is not None]
    if not layers:
        raise RuntimeError("no expert is merged into this model")
    for layer in layers:
        layer.unmerge()


def layers_of(model: nn.Module, expert: str) -> dict[str, ExpertLinear]:
    """Return the layers that hold an expert, by dotted name. Raise a KeyError if there are none."""
    layers = {name: layer for name, layer in expert_layers(model).items() if expert in layer.experts}
    if not layers:
        known = sorted({e for layer in expert_layers(model).values() for e in layer.experts})
        raise KeyError(f"no layer has an expert {expert!r}; attached are {known}")
    return layers


def expert_tensors(model: nn.Module, expert: str) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, parameter) of one expert: `<layer>.lora_a` (r, K) and `<layer>.lora_b` (N, r), in the model's order."""
    for name, layer in layers_of(model, expert).items():
        yield f"{name}.lora_a", layer.lora_a[expert]
        yield f"{name}.lora_b", layer.lora_b[expert]


@torch.no_grad()
def reset_expert(model: nn.Module, expert: str, generator: torch.Generator) -> None:
    """Initialize an expert again: A from a Kaiming uniform distribution as in PEFT, B to zero.

    The numbers are drawn on the device of `generator`, so they do not depend on the device of the model.
    """
    for layer in layers_of(model, expert).values():
        a = layer.lora_a[expert]
        drawn = torch.empty(a.shape, dtype=a.dtype, device=generator.device)
        a.copy_(nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator))
        layer.lora_b[expert].zero_()
