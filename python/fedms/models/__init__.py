"""Foundation models. A new built-in model is one file here, and a line in `MODELS` and in `config.MODELS`; anything in
Hugging Face's format is read by `huggingface`, and any other module by `ModuleModel`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from . import huggingface
from .base import FoundationModel, ModelError
from .huggingface import wrap
from .minilm import MiniLM
from .module import ModuleModel
from .vit import RECIPES, PretrainedViT
from .vit_digits import ViTDigits

__all__ = ["MODELS", "FoundationModel", "ModelError", "ModuleModel", "load", "wrap"]

MODELS: dict[str, Callable[[], FoundationModel]] = {
    "minilm": MiniLM,
    "vit-digits": ViTDigits,
    **{name: partial(PretrainedViT, name) for name in RECIPES},
}


def load(table) -> FoundationModel:
    """Load the frozen model `table.id` (table: the run file's [model]): a built-in one by its name, else what
    `huggingface.load` finds in a folder or on the hub. ModelError if it cannot be had."""
    return MODELS[table.id]() if table.id in MODELS else huggingface.load(table)
