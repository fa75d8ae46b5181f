"""The layers that the CPU benchmarks time, PEFT's form of one and ours, and a pass of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from fedms_ext import ExpertLinear, LoRA, QuantizedWeight

peft = pytest.importorskip("peft")

# Rows, K, N.
SHAPES = {
    "MiniLM attention": (2048, 384, 384),
    "MiniLM up": (2048, 384, 1536),
    "MiniLM down": (2048, 1536, 384),
    "ViT-B attention": (1576, 768, 768),
    "ViT-B up": (1576, 768, 3072),
    "ViT-B down": (1576, 3072, 768),
    "64 rows": (64, 768, 768),
    "16 rows": (16, 768, 768),
    "1 row": (1, 768, 768),
}


def peft_linear(linear: nn.Linear, rank: int) -> nn.Module:
    """PEFT's LoRA layer around a Linear layer, its A and B random."""
    config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=["0"], init_lora_weights=False)
    return peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]


def expert_linear(linear: nn.Linear, rank: int, kind: str | None = None) -> ExpertLinear:
    """Our layer around a Linear layer, with one trained expert whose A and B are random; kind: format of its frozen weight."""
    layer = ExpertLinear.from_linear(linear, {"e": LoRA(rank, 16)})
    nn.init.normal_(layer.lora_b["e"])
    layer.set_state("e", "trained")
    if kind is not None:
        layer.freeze(QuantizedWeight(layer.weight, kind))
    return layer


def layer_pass(
    layer: Callable[[Tensor], Tensor], trained: Sequence[Tensor], x: Tensor, dy: Tensor, backward: bool
) -> Callable[[], object]:
    """Return a call of a layer: forward without a gradient, or forward and backward, for x and what is trained."""
    leaf = x.clone().requires_grad_(backward)

    def forward() -> object:
        with torch.no_grad():
            return layer(leaf)

    def both() -> object:
        return torch.autograd.grad(layer(leaf), [leaf, *trained], dy)

    return both if backward else forward
