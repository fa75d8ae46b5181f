"""The layers that the CPU benchmarks time, and PEFT's form of one."""

from __future__ import annotations

import pytest
from torch import nn

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
