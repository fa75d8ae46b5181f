"""A small Vision Transformer (arXiv 2010.11929) for 8 x 8 images, with RANDOM weights from a fixed seed.

It needs no download and runs in seconds: for smoke tests. Its accuracies say nothing about pretrained models.
"""

from __future__ import annotations

import torch

from fedms.config import ModelTable

from .base import import_transformers, quiet_transformers
from .vision_model import VisionModel

SEED = 2010_11929


class ViTDigits(VisionModel):
    """A small vision transformer with random weights for 8 x 8 digits, for trying things out."""

    def __init__(self) -> None:
        transformers = import_transformers()
        config = transformers.ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            module = transformers.ViTModel(config, add_pooling_layer=False)
        with quiet_transformers():
            processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8}, do_normalize=False)
        super().__init__("vit-digits", module, processor, pooling="mean")


def load(table: ModelTable) -> ViTDigits:
    """Load the model."""
    return ViTDigits()
