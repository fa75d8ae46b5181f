"""PEFT's format: a LoRA expert as a folder of adapter_config.json and adapter_model.safetensors, and back.

Beside them lies head.safetensors, our own: `weight` (C, D) and `bias` (C,) that turn pooled features into logits. PEFT
itself is not needed here; the format is its own (peft 0.10 and later).
"""
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedms.errors import ConfigError
from fedms.foreign import parse_json, printable, read_regular, read_tensors

CONFIG, WEIGHTS, HEAD = "adapter_config.json", "adapter_model.safetensors", "head.safetensors"
PREFIX = "base_model.model."
# What an adapter may hold beyond plain LoRA, and what the plain value is.
PLAIN = {"use_dora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "layer_replication": None,
         "lora_bias": False, "use_qalora": False, "trainable_token_indices": None,
         "target_parameters": None}
# Settings that say how an adapter was made or which layers it has, which its tensors show.
HARMLESS = frozenset(
    "alora_invocation_tokens arrow_config auto_mapping base_model_name_or_path ensure_weight_tying eva_config exclude_modules "
    "fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config corda_config lora_alpha "
    "lora_dropout lora_ga_config megatron_config megatron_core modules_to_save peft_type peft_version qalora_group_size r revision "
    "runtime_config target_modules task_type use_rslora".split())
# Of init_lora_weights: those that leave the base weights as they are. Others (pissa, olora, corda, loftq, lora_ga) subtract from
# the base what A and B start with, so that the adapter fits that changed base alone.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Shape:
    """The shape of an adapter.

    Attributes:
        rank, alpha, rslora: As in the [lora] table of the run file.
        base: The model that the adapter names as its base, or None.
    """

    rank: int
    alpha: float
    rslora: bool
    base: str | None


def config_json(shape: Shape, layers: Iterable[str], module: str, library: str, task: str | None = None,
                transposed: bool = False) -> str:
    """Return the text of adapter_config.json for LoRA.

    Args:
        shape: Shape of the adapter.
        layers: Names of the layers with LoRA.
        module: Name of the class of the module that holds them.
        library: Name of the library that defines the class.
        task: PEFT's name of the task, or None.
        transposed: Whether the module stores the weights of its Linear layers transposed, as GPT-2's Conv1D does.
    """
    return json.dumps({
        "peft_type": "LORA", "task_type": task, "base_model_name_or_path": shape.base, "inference_mode": True,
        "auto_mapping": {"base_model_class": module, "parent_library": library},
        "r": shape.rank, "lora_alpha": shape.alpha, "lora_dropout": 0.0, "use_rslora": shape.rslora, "bias": "none",
        "target_modules": list(layers), "modules_to_save": None, "fan_in_fan_out": transposed, "init_lora_weights": True,
    }, indent=2) + "\n"


def peft_names(expert: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return an expert's pairs, named `expert/<layer>.lora_a` by us, under PEFT's names.

    Args:
        expert: Tensors of the expert by our names.
        prefix: Prefix of the layers' names in the whole model.
    """
    names = {".lora_a": ".lora_A.weight", ".lora_b": ".lora_B.weight"}
    return {PREFIX + prefix + name.removeprefix("expert/").removesuffix(name[-7:]) + names[name[-7:]]: tensor
            for name, tensor in expert.items() if name.startswith("expert/")}


def read_shape(folder: Path) -> Shape:
    """Read the shape of an adapter from its adapter_config.json. This does not import torch.

    Raises:
        ConfigError: If the file is missing, damaged, or describes more than plain LoRA.
    """
    path = folder / CONFIG
    try:
        found = parse_json(read_regular(path))
        kind = found["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"lora.start: {path}: not an adapter in PEFT's format ({type(error).__name__}: {error})") from None
    if kind != "LORA":
        raise ConfigError(f"lora.start: {path}: peft_type is {printable(repr(kind), 60)}; accepted: \"LORA\"")
    for key, plain in PLAIN.items():
        if found.get(key) not in (plain, None):
            raise ConfigError(f"lora.start: {path}: {key} is {printable(repr(found[key]), 60)}, which experts here do not have; accepted: "
                              f"{plain!r}")
    if found.get("init_lora_weights") not in PLAIN_STARTS:
        raise ConfigError(f"lora.start: {path}: init_lora_weights is {printable(repr(found['init_lora_weights']), 60)}, which changes "
                          "the base weights, so the adapter does not fit the original model; save it with PEFT's "
                          "save_pretrained(..., path_initial_model_for_weight_conversion=...)")
    unknown = [key for key, value in found.items() if key not in HARMLESS | PLAIN.keys() and value not in (None, False, {}, [])]
    if unknown:
        raise ConfigError(f"lora.start: {path}: {printable(repr(unknown[0]), 60)} is not known here, so what it does to the layers is "
                          "not known either; accepted: plain LoRA")
    rank, alpha = found.get("r"), found.get("lora_alpha")
    if type(rank) is not int or type(alpha) not in (int, float) or not 1 <= rank <= 2**31 or not 0 < alpha < 1e30:
        raise ConfigError(f"lora.start: {path}: r is {printable(repr(rank), 60)} and lora_alpha {printable(repr(alpha), 60)}; "
                          "expected numbers above 0")
    base = found.get("base_model_name_or_path")
    return Shape(rank, float(alpha), bool(found.get("use_rslora")), base if isinstance(base, str) else None)


def read_pairs(folder: Path, layers: Iterable[str]) -> dict[str, Any]:
    """Read an adapter's tensors, by our names; with `head/weight` and `head/bias` if it has a head.

    An adapter of a model with a head, or of a model that contains ours, has a longer prefix before the names of the layers. Only
    the end of a name is compared.

    Args:
        folder: The folder of the adapter.
        layers: Names of the layers that have experts.

    Raises:
        ConfigError: If the weights are missing, damaged or not in safetensors, or a layer is not among `layers`.
    """
    if not (folder / WEIGHTS).is_file():
        advice = "; adapter_model.bin is a pickle and is not read: load it with peft and save it again" if (
            folder / "adapter_model.bin").is_file() else ""
        raise ConfigError(f"lora.start: {folder} holds no {WEIGHTS}{advice}")
    try:
        tensors, _ = read_tensors(read_regular(folder / WEIGHTS))
        head = read_tensors(read_regular(folder / HEAD))[0] if (folder / HEAD).is_file() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"lora.start: {folder}: the weights cannot be read: {error}") from None
    layers, found = list(layers), {f"head/{name}": tensor.float() for name, tensor in head.items()}
    for name, tensor in tensors.items():
        layer, part = _split(name)
        if part is None:
            if name.rsplit(".", 2)[-2:] in (["classifier", "weight"], ["classifier", "bias"], ["score", "weight"]):
                found.setdefault(f"head/{name.rsplit('.', 1)[1]}", tensor.float())
                continue
            raise ConfigError(f"lora.start: {folder / WEIGHTS}: {name} is no LoRA pair of a Linear layer")
        matching = [own for own in layers if layer == own or layer.endswith("." + own)]
        if not matching:
            raise ConfigError(f"model.targets: the adapter in {folder} has a pair for {layer}, where the model has no "
                              f"expert; its layers are {', '.join(layers[:3])}, ...")
        found[f"expert/{max(matching, key=len)}.lora_{part}"] = tensor.float()
    return found


def _split(name: str) -> tuple[str, str | None]:
    for ending, part in ((".lora_A.weight", "a"), (".lora_B.weight", "b"), (".lora_A.default.weight", "a"),
                         (".lora_B.default.weight", "b")):
        if name.endswith(ending):
            return name.removeprefix(PREFIX).removesuffix(ending), part
    return name, None
