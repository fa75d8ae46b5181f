"""Foundation models. A new built-in model is one file here, and a line in `MODELS` and in `config.MODELS`; anything in
Hugging Face's format is read by `huggingface`, and any other module by `ModuleModel`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fedms.errors import ModelError

from . import causal_lm, huggingface
from .base import FoundationModel
from .huggingface import wrap
from .minilm import MiniLM
from .module import ModuleModel
from .smollm2 import SmolLM2
from .vit import RECIPES, PretrainedViT
from .vit_digits import ViTDigits

__all__ = ["MODELS", "FoundationModel", "ModelError", "ModuleModel", "load", "wrap"]

MODELS: dict[str, Callable[[], FoundationModel]] = {
    "minilm": MiniLM,
    "smollm2": SmolLM2,
    "vit-digits": ViTDigits,
    **{name: partial(PretrainedViT, name) for name in RECIPES},
}


def load(table, task: str = "classification") -> FoundationModel:
    """Load the frozen model `table.id` (table: the run file's [model]): a built-in one by its name, else what
    `huggingface.load`, or for the task "causal_lm" `causal_lm.load`, finds in a folder or on the hub. ModelError if it cannot
    be had."""
    if table.id in MODELS:
        return MODELS[table.id]()
    return causal_lm.load(table) if task == "causal_lm" else huggingface.load(table)
