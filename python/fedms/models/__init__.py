"""Foundation models. A new model is one file here, and a line in `MODELS`."""

from __future__ import annotations

from .base import FoundationModel, ModelError
from .minilm import MiniLM
from .vit_digits import ViTDigits

__all__ = ["FoundationModel", "ModelError", "load"]

MODELS = {
    "minilm": MiniLM,
    "vit-digits": ViTDigits,
}


def load(config) -> FoundationModel:
    """Load the frozen model `config.id` (config: the [model] table). ModelError if unknown or missing."""
    if config.id not in MODELS:
        raise ModelError(f"model.id: unknown model {config.id!r}; known: {', '.join(MODELS)}")
    return MODELS[config.id]()
