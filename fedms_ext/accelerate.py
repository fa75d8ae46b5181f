"""`accelerate`: PEFT's LoRA layers on the kernels of this package, in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn


@dataclass(frozen=True)
class Accelerated:
    """What `accelerate` did: dotted names of the layers that run on our operator, and the reason for each adapter
    module that it left to PEFT."""

    layers: tuple[str, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} LoRA layers accelerated, {len(self.skipped)} left to PEFT"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"  {reason}: {', '.join(names)}" for reason, names in reasons.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Accelerated:
    """Lets the LoRA linear layers of a PEFT model compute by `fedms_ext.expert_linear`, in place.

    Parameters, their names and the `state_dict`, adapters (rsLoRA included), `set_adapter`, merging, `save_pretrained`
    and the Hugging Face Trainer work as before, since only the class of each layer changes. Outputs and gradients are
    the same up to rounding; dropout is drawn from torch's default generator but with another mask, and one adapter at a
    time. What the operator does not compute (DoRA and other variants, biases of an adapter, GPT-2's Conv1D, quantised
    or trained base weights, embeddings, convolutions, modules_to_save) stays as it is and is named in the result.

    Args:
        model: a `peft.PeftModel`, or any module that holds PEFT's LoRA layers. Calling again changes nothing.

    Raises:
        ModuleNotFoundError: without PEFT.
        ValueError: if the model holds no LoRA layer.
    """
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    from fedms_ext.nn.peft_linear import PeftLinear

    layers, skipped = [], {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            skipped[name] = "trained as a whole (modules_to_save or trainable tokens)"
        elif not isinstance(module, BaseTunerLayer):
            continue
        elif type(module) not in (lora.Linear, PeftLinear):
            skipped[name] = f"a {type(module).__module__}.{type(module).__name__}, not a peft.tuners.lora.Linear"
        else:
            module.__class__ = PeftLinear
            if reason := cast(PeftLinear, module).obstacle():
                module.__class__ = lora.Linear
                skipped[name] = reason
            else:
                layers.append(name)
    if not layers and not skipped:
        raise ValueError(f"{type(model).__name__} holds no LoRA layer; make one with peft.get_peft_model first")
    return Accelerated(tuple(layers), skipped)
