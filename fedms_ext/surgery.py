"""Put experts into any model's Linear layers, take them out, merge them."""
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedms_ext.nn.expert_linear import ExpertLinear, LoRA, check_experts

ALL_LINEAR = "all-linear"


def expert_layers(model: nn.Module) -> dict[str, ExpertLinear]:
    """All `ExpertLinear` layers of a model by dotted name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ExpertLinear)}


def find_blocks(model: nn.Module) -> str:
    """Dotted name of the model's list of transformer blocks (`""`: the model itself): the longest `nn.ModuleList` or
    `nn.Sequential` whose members are of one class, hold Linear layers and are none, and which lies in no other such
    list.

    Raises:
        ValueError: if there is none, or several of the same length (two towers): name one with `blocks=`.
    """
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) == 0:
            continue
        one_class = len({type(m) for m in module}) == 1
        hold_linear = all(any(isinstance(m, nn.Linear) for m in block.modules() if m is not block) for block in module)
        nested = any(name.startswith(_prefix(outer)) for outer in found)
        if one_class and hold_linear and not nested:
            found[name] = len(module)
    longest = [name for name, n in found.items() if n == max(found.values())]
    if len(longest) != 1:
        what = f"several lists of {found[longest[0]]} blocks: {', '.join(longest)}" if longest else "no list of blocks"
        raise ValueError(f"found {what} in {type(model).__name__}; pass blocks=\"dotted.name\" of the nn.ModuleList "
                         "or nn.Sequential that holds the transformer blocks")
    return longest[0]


def _prefix(name: str) -> str:
    """How the dotted names of what lies in a module begin."""
    return f"{name}." if name else ""


def block_list(model: nn.Module, blocks: str) -> nn.ModuleList | nn.Sequential:
    """The list of blocks at a dotted name.

    Raises:
        ValueError: if there is no such module, or it is no list of modules.
    """
    try:
        found = model.get_submodule(blocks)
    except AttributeError:
        raise ValueError(f"the model has no module {blocks!r}, which should be its list of blocks") from None
    if not isinstance(found, (nn.ModuleList, nn.Sequential)):
        raise ValueError(f"{blocks!r} is a {type(found).__name__}; a list of blocks is an nn.ModuleList or nn.Sequential")
    return found


def attach(model: nn.Module, targets: str | Sequence[str], experts: Mapping[str, LoRA],
           blocks: str | None = None) -> list[str]:
    """Freezes the model and joins LoRA experts to its target layers, in place.

    Called again with new expert names, it adds them to the layers that are there. New pairs are frozen with B = 0,
    so the model's function does not change; `activate` decides what is trained.

    Args:
        model: any module. All its parameters get `requires_grad=False`.
        targets: as in PEFT: `"all-linear"` (every Linear inside the blocks), a list of name endings
            (`["query", "value"]`), or a regular expression that must match the whole dotted name.
        experts: LoRA shape by expert name.
        blocks: dotted name of the list of transformer blocks; found by inspection where that is unambiguous.

    Returns:
        Dotted names of the layers that now hold the experts, in the model's order.

    Raises:
        ValueError: if nothing matches, a target matches nothing or lies outside the blocks, an expert's name is
            taken or unusable, its dropout differs from that of the layer's other experts, one layer has several
            names, or the block list cannot be found. The model is then as it was.
    """
    if not experts:
        raise ValueError("no experts given; pass e.g. {\"global\": LoRA(rank=8, alpha=16)}")
    before = getattr(model, "fedms_blocks", None)
    if blocks is None:
        blocks = find_blocks(model) if before is None else before
    elif before not in (None, blocks):
        raise ValueError(f"blocks={blocks!r}, but the model's experts are attached to the blocks {before!r}")
    number = {f"{_prefix(blocks)}{i}.": i + 1 for i in range(len(block_list(model, blocks)))}
    linears = {name: m for name, m in model.named_modules() if type(m) in (nn.Linear, ExpertLinear)}
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)

    # All is checked before anything is changed.
    chosen = {}
    for name in _matching(linears, targets, tuple(number)):
        if len(names[linears[name]]) > 1:
            raise ValueError(f"{', '.join(names[linears[name]])} are one and the same layer; experts need a layer of their own")
        block = next((i for prefix, i in number.items() if f"{name}.".startswith(prefix)), None)
        if block is None:
            raise ValueError(f"target {name!r} lies outside the blocks {blocks!r}; experts are activated block by "
                             "block, so their layers must lie inside one")
        try:
            check_experts(getattr(linears[name], "experts", {}), experts)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
        chosen[name] = block

    model.requires_grad_(False)
    for name, block in chosen.items():
        layer = linears[name]
        if isinstance(layer, ExpertLinear):
            for expert, lora in experts.items():
                layer.add_expert(expert, lora)
        else:
            layer = ExpertLinear.from_linear(layer, experts)
            layer.block = block
            model.set_submodule(name, layer)
    model.fedms_blocks = blocks  # type: ignore[assignment]  # torch's stubs: only tensors and modules
    _leave_fused_paths(model)
    return list(chosen)


def _matching(linears: Mapping[str, nn.Module], targets: str | Sequence[str], blocks: tuple[str, ...]) -> list[str]:
    if targets == ALL_LINEAR:
        matched = [name for name in linears if f"{name}.".startswith(blocks)]
    elif isinstance(targets, str):
        matched = [name for name in linears if re.fullmatch(targets, name)]
    else:
        matched = [name for name in linears if any(name == t or name.endswith("." + t) for t in targets)]
        idle = [t for t in targets if not any(name == t or name.endswith("." + t) for name in linears)]
        if idle:
            raise ValueError(f"targets {idle} match no Linear layer; its layers end in {_endings(linears)}")
    if not matched:
        raise ValueError(f"targets {targets!r} match no Linear layer; its layers end in {_endings(linears)}")
    return matched


def _endings(linears: Mapping[str, nn.Module]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears})) or "(there are none)"


def _leave_fused_paths(model: nn.Module) -> None:
    """Makes PyTorch's own encoders call their Linear layers. Outside of training they run a fused operator on the
    layers' weights instead, which would pass the experts by without a word."""
    switched = model.__dict__.setdefault("fedms_fused", [])
    for module in model.modules():
        attribute = ("activation_relu_or_gelu" if isinstance(module, nn.TransformerEncoderLayer) else
                     "use_nested_tensor" if isinstance(module, nn.TransformerEncoder) else None)
        if attribute and getattr(module, attribute) and expert_layers(module):
            switched.append((module, attribute, getattr(module, attribute)))
            setattr(module, attribute, 0)


def detach(model: nn.Module) -> None:
    """Replaces every `ExpertLinear` by the plain `nn.Linear` on the same parameters; the experts are dropped (merge
    first to keep one). The parameters stay frozen."""
    for name, layer in expert_layers(model).items():
        model.set_submodule(name, layer.to_linear())
    for module, attribute, value in model.__dict__.pop("fedms_fused", []):
        setattr(module, attribute, value)
    model.__dict__.pop("fedms_blocks", None)


def merge(model: nn.Module, expert: str) -> None:
    """Adds an expert into the weights of all its layers (the originals are kept aside for `unmerge`).

    Raises:
        KeyError: if no layer has the expert.
        RuntimeError: if an expert is merged already.
    """
    layers = layers_of(model, expert)
    merged = sorted({layer.merged[0] for layer in layers.values() if layer.merged is not None})
    if merged:
        raise RuntimeError(f"experts {merged} are merged already; call unmerge first")
    for layer in layers.values():
        layer.merge(expert)


def unmerge(model: nn.Module) -> None:
    """Restores the weights from before `merge`, bit for bit.

    Raises:
        RuntimeError: if nothing is merged.
    """
    layers = [layer for layer in expert_layers(model).values() if layer.merged is not None]
    if not layers:
        raise RuntimeError("no expert is merged into this model")
    for layer in layers:
        layer.unmerge()


def layers_of(model: nn.Module, expert: str) -> dict[str, ExpertLinear]:
    """The layers that hold an expert, by dotted name. KeyError if none does."""
    layers = {name: layer for name, layer in expert_layers(model).items() if expert in layer.experts}
    if not layers:
        known = sorted({e for layer in expert_layers(model).values() for e in layer.experts})
        raise KeyError(f"no layer has an expert {expert!r}; attached are {known}")
    return layers


def expert_tensors(model: nn.Module, expert: str) -> Iterator[tuple[str, Tensor]]:
    """(name, parameter) of one expert: `<layer>.lora_a` (r, K) and `<layer>.lora_b` (N, r), in the model's order."""
    for name, layer in layers_of(model, expert).items():
        yield f"{name}.lora_a", layer.lora_a[expert]
        yield f"{name}.lora_b", layer.lora_b[expert]


@torch.no_grad()
def reset_expert(model: nn.Module, expert: str, generator: torch.Generator) -> None:
    """Starts an expert afresh: A Kaiming uniform (as PEFT), drawn from `generator`; B zero."""
    for layer in layers_of(model, expert).values():
        nn.init.kaiming_uniform_(layer.lora_a[expert], a=5**0.5, generator=generator)
        layer.lora_b[expert].zero_()
