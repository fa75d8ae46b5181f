"""An adapter that was trained elsewhere, as the tensors of a global expert."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedms.errors import ConfigError
from fedms.models.peft_format import read_pairs, read_shape
from fedms.tensors import Tensors

if TYPE_CHECKING:
    from fedms.training.expert_model import ExpertModel


def imported_tensors(model: ExpertModel, folder: Path) -> Tensors:
    """Return the pairs of an adapter, and its head if it has one that fits.

    Raises:
        ConfigError: If the adapter has another shape.
    """
    lora, shape = model.config.lora, read_shape(folder)
    if (shape.rank, shape.alpha, shape.rslora) != (lora.rank, lora.alpha, lora.rslora):
        raise ConfigError(f"lora.rank: the adapter in {folder} has rank {shape.rank}, alpha {shape.alpha:g}, rslora "
                          f"{str(shape.rslora).lower()}; `fedms import-peft` sets [lora] to that")
    found, own = read_pairs(folder, model.layers), model.read("global")
    if "head/weight" in found and "head/bias" not in found:
        found["head/bias"] = torch.zeros(len(found["head/weight"]))
    head: Tensors = {name: found.pop(name) for name in ("head/weight", "head/bias") if name in found}
    if all(name in own and own[name].shape == tensor.shape for name, tensor in head.items()):
        found |= head
    for name, tensor in found.items():
        if tensor.shape != own[name].shape:
            raise ConfigError(f"lora.start: {folder}: {name} is {tuple(tensor.shape)}, the model's is "
                              f"{tuple(own[name].shape)}; is it an adapter of this model?")
        if not torch.isfinite(tensor).all():
            raise ConfigError(f"lora.start: {folder}: {name} holds NaN or infinity")
        if name in model.block_of and name.endswith("lora_b") and tensor.any() and model.block_of[name] not in model.order:
            raise ConfigError(f"sal.order: leaves out block {model.block_of[name]}, where the adapter in {folder} has a pair")
    return found
