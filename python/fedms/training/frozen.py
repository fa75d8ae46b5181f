"""How the frozen weights of a run's model are stored: quantized, or in the 16 bits that its activations have."""
from __future__ import annotations

import torch
from torch import nn

from fedms.config import RunConfig
from fedms.errors import blamed_on
from fedms.training.device import ACTIVATIONS, format_on
from fedms_ext import cast_frozen, quantize


def held_dtype(config: RunConfig) -> torch.dtype | None:
    """Return the dtype in which a run holds the frozen weights of Linear layers that it does not quantize, or None for the model's own.

    A run with activations of 16 bits holds them in these, as PEFT trains adapters in float32 on a base model in bfloat16: autocast
    would round each weight at every pass, to the same bits, and keep both. Only the rule "exact" adds to the weights, before they are
    rounded.
    """
    return None if config.run.dtype == "fp32" or config.aggregation == "exact" else ACTIVATIONS[config.run.dtype]


def is_quantized(config: RunConfig, frozen: str) -> bool:
    """Return whether a run quantizes the weights that `[model] frozen` is about.

    It does not if they are fp32, nor if they are of the 16 bits to which `hold_in_16_bits` rounds all weights of the run.
    """
    held_so_anyway = held_dtype(config) is not None and frozen == config.run.dtype
    return frozen != "fp32" and not held_so_anyway


def held_format(config: RunConfig, frozen: str) -> str:
    """Return the format in which a run holds the weights that `[model] frozen` is about: `frozen`, or in the place of fp32 the 16 bits
    of `[run] dtype`, see `held_dtype`."""
    if is_quantized(config, frozen):
        return frozen
    return "fp32" if held_dtype(config) is None else config.run.dtype


def quantize_frozen(module: nn.Module, config: RunConfig, device: torch.device, frozen: str) -> None:
    """Quantize the frozen weights of Linear layers as `[model] frozen` says, but for those of `[model] full_precision`. All must be in
    full precision before.

    Raises:
        ConfigError: If no layer has a name of `[model] full_precision`, or a weight cannot be quantized.
    """
    if is_quantized(config, frozen):
        with blamed_on("model.full_precision"):
            quantize(module, format_on(device, frozen), exclude=config.model.full_precision or None)
        _let_go_of_file(module)


def hold_in_16_bits(module: nn.Module, config: RunConfig) -> None:
    """Round the frozen weights of Linear layers that are not quantized to the `held_dtype` of a run, if it has one. From then on the
    model runs under autocast alone.

    Raises:
        ConfigError: If a weight is beyond the range of fp16.
    """
    if (dtype := held_dtype(config)) is not None:
        with blamed_on("run.dtype"):
            cast_frozen(module, dtype)
        _let_go_of_file(module)


def _let_go_of_file(module: nn.Module) -> None:
    """Copy all parameters: one keeps the whole file mapped that the model was loaded from, with all that was rounded."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
