"""Foundation models, a family a file; what is known of each before it is imported is a row of `fedms.config.catalogue`.
Anything in Hugging Face's format is read by `huggingface` or `causal_lm`, and any other module by `ModuleModel`."""

from __future__ import annotations

from fedms.config import ModelTable, registry

from fedms.errors import ModelError

from . import causal_lm, huggingface
from .base import FoundationModel
from .huggingface import wrap
from .module import ModuleModel

__all__ = ["FoundationModel", "ModelError", "ModuleModel", "load", "wrap"]


def load(table: ModelTable, task: str = "classification") -> FoundationModel:
    """Load the frozen model `table.id`.

    A registered model is loaded by its name. Any other is loaded from a folder or from the hub, by `causal_lm.load` for the task
    "causal_lm" and by `huggingface.load` for the others.

    Raises:
        ModelError: If the model cannot be loaded.
    """
    row = registry.models().get(table.id)
    if row is not None:
        return row.load()(table)
    return causal_lm.load(table) if task == "causal_lm" else huggingface.load(table)
