"""Operations as `FlopCounterMode` counts them, against those of the same layer in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fedms_ext.profiling  # noqa: F401  registers the formulas
from fedms_ext import ExpertLinear, LoRA, QuantizedWeight, reference


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("needs_dx", [False, True])
def test_a_layer_counts_as_in_plain_pytorch(frozen, needs_dx):
    layer = ExpertLinear.from_linear(nn.Linear(24, 40), {"a": LoRA(4, 8), "b": LoRA(6, 8)})
    for name in "ab":
        layer.set_state(name, "trained")
    x = torch.randn(3, 5, 24, requires_grad=needs_dx)
    weight = layer.weight.detach()
    with FlopCounterMode(display=False) as want:
        reference.expert_linear(x, weight, layer.bias, list(layer.lora_a.values()), list(layer.lora_b.values()),
                                [2.0, 2.0]).sum().backward()  # fmt: skip
    if frozen:
        layer.freeze(QuantizedWeight(weight))
    with FlopCounterMode(display=False) as got:
        layer(x).sum().backward()
    assert got.get_total_flops() == want.get_total_flops() > 0
