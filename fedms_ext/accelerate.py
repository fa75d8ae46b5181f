"""`accelerate`: run the LoRA layers of a PEFT model on the kernels of this package."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import cast

from torch import nn


@dataclass(frozen=True)
class Accelerated:
    """The result of `accelerate`.

    Attributes:
        layers: Dotted names of the layers that now run on `fedms_ext.expert_linear`.
        skipped: Dotted names of the adapter modules that are still computed by PEFT, each with the reason.
    """

    layers: tuple[str, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} LoRA layers accelerated, {len(self.skipped)} left to PEFT"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"  {reason}: {', '.join(names)}" for reason, names in reasons.items()]
        return "\n".join(lines)


# The settings of a LoraConfig that are supported: they select layers and shapes, concern initialization and saving, or can be
# seen in the layers (see `PeftLinear.obstacle`).
_KNOWN = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules "
    "exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights "
    "layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config megatron_core trainable_token_indices "
    "loftq_config eva_config corda_config lora_ga_config use_dora alora_invocation_tokens use_qalora qalora_group_size "
    "layer_replication runtime_config lora_bias target_parameters arrow_config ensure_weight_tying".split()
)


def _unknown_settings(model: nn.Module) -> str | None:
    """Return why all adapters of a model are left to PEFT, or None: an unknown setting differs from its default."""
    configs = [c for m in model.modules() if isinstance(held := getattr(m, "peft_config", None), dict) for c in held.values()]
    for config in configs:
        for field in dataclasses.fields(config) if dataclasses.is_dataclass(config) else ():
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if field.name not in _KNOWN and getattr(config, field.name) != default:
                return f"its configuration sets {field.name}, which this version does not know"
    return None


def accelerate(model: nn.Module, *, group: bool | None = None) -> Accelerated:
    """Run the LoRA linear layers of a PEFT model on `fedms_ext.expert_linear`, in place.

    Only the class of each layer changes, so parameters, the `state_dict`, adapters (including rsLoRA), `set_adapter`,
    merging, `save_pretrained` and the Hugging Face Trainer work as before. Outputs and gradients are equal up to rounding.
    The seed of dropout comes from torch's default generator, but the mask differs from PEFT's.

    Modules that the operator cannot compute are left to PEFT and listed in the result: DoRA and other variants, adapters
    with a bias, several active adapters with dropout, GPT-2's Conv1D, quantized or trained base weights, embeddings,
    convolutions and `modules_to_save`.

    Args:
        model: A `peft.PeftModel`, or any module that contains LoRA layers of PEFT. A second call changes nothing.
        group: Whether to compute the query, key and value of an attention layer together, and the two inputs of a gated MLP, as in
            `fedms_ext.attach`; see `fedms_ext.group`. None or true: on a GPU, where that was measured to be faster. On a CPU only
            layers of int8 weights are, which PEFT computes itself.

    Returns:
        The names of the accelerated and of the skipped modules.

    Raises:
        ModuleNotFoundError: If PEFT is not installed.
        ValueError: If the model holds no LoRA layer.
    """
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    from fedms_ext.nn.peft_linear import PeftLinear
    from fedms_ext.sparse.siblings import group_siblings

    layers, skipped = [], {}
    unknown = _unknown_settings(model)
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            skipped[name] = "a fully trained module (modules_to_save or trainable tokens)"
        elif not isinstance(module, BaseTunerLayer):
            continue
        elif type(module) not in (lora.Linear, PeftLinear):
            skipped[name] = f"a {type(module).__module__}.{type(module).__name__}, not a peft.tuners.lora.Linear"
        else:
            module.__class__ = PeftLinear
            if reason := cast(PeftLinear, module).obstacle() or unknown:
                if module.siblings is not None:
                    module.siblings.part()
                cast(PeftLinear, module).forget_plans()
                module.__class__ = lora.Linear
                skipped[name] = reason
            else:
                layers.append(name)
    if not layers and not skipped:
        raise ValueError(f"{type(model).__name__} holds no LoRA layer; make one with peft.get_peft_model first")
    if group is not False:
        group_siblings(model, on_cpu=False)
    return Accelerated(tuple(layers), skipped)
